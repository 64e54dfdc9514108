"""Keys of clients: who passes, what an engine and a log see of them, and how they are replaced."""

import json
import logging
import os
from pathlib import Path

import anthropic
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.access_config import Auth, Quota
from moe_contract.api_keys import ApiKey, read_keys
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.tenancy import hash_tenant, tenant_of
from moe_gateway.access import gate as gate_module
from moe_gateway.access.credentials import split_credentials
from moe_gateway.access.folders import sign_folders
from moe_gateway.access.gate import Gate
from moe_gateway.access.key_table import KeyTable, build_caller

from tests.gateway.messages import post, prompt
from tests.gateway.waiting import until

KEY, OTHER = "sk-0123456789abcdef0123", "sk-another-key-456789"
BEARER = b"Authorization: Bearer " + KEY.encode() + b"\r\n"
GET_MODELS = b"GET /v1/models HTTP/1.1\r\nhost: g\r\n%b\r\n"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "team-keys"
    folder.mkdir()
    (folder / "team-a").write_text(KEY + "\n")
    return folder


def mount(folder: Path, version: str, **entries: str) -> None:
    """Puts the content of a Secret there as the kubelet does: a folder for each version and a link that is replaced."""
    (folder / version).mkdir(parents=True)
    for name, text in entries.items():
        (folder / version / name).write_text(text)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"..data/{name}")
    (folder / "..new").symlink_to(version)
    os.replace(folder / "..new", folder / "..data")


@pytest.fixture
def protect(make_engine, serve, keys):
    async def start(*folders: Path, **auth):
        engine = await make_engine()
        served = await serve(engine, auth={"key_dirs": [str(folder) for folder in folders or (keys,)], **auth})
        return engine, served

    return start


@pytest.mark.parametrize(
    "credential",
    [
        BEARER,
        b"authorization:bearer   " + KEY.encode() + b" \r\n",
        b"X-API-Key: " + KEY.encode() + b"\r\n",
        # Several clients send both, one of them with a placeholder.
        b"x-api-key: placeholder\r\n" + BEARER,
        b"Authorization: Basic YTpi\r\nx-api-key: " + KEY.encode() + b"\r\n",
    ],
)
async def test_a_key_passes_and_is_not_passed_on(protect, credential):
    engine, served = await protect()
    assert (await served.ask(post(prompt(), extra=credential + b"X-Mine: 1\r\n"))).status == 200
    head = engine.requests[0].head
    assert KEY.encode() not in head
    assert not {b"authorization", b"x-api-key"} & engine.requests[0].headers.keys()
    assert engine.requests[0].headers[b"x-mine"] == b"1"


@pytest.mark.parametrize(
    ("credential", "message", "challenge"),
    [
        (b"", "an API key is needed", b'Bearer realm="moeserving"'),
        (b"Authorization: Basic YTpi\r\n", "an API key is needed", b'Bearer realm="moeserving"'),
        (b"Authorization: Bearer \r\n", "an API key is needed", b'Bearer realm="moeserving"'),
        (b"Authorization: Bearer nope\r\n", "not valid", b'Bearer realm="moeserving", error="invalid_token"'),
        (b"x-api-key: nope\r\n", "not valid", b'Bearer realm="moeserving", error="invalid_token"'),
        (b"Authorization: " + KEY.encode() + b"\r\n", "an API key is needed", b'Bearer realm="moeserving"'),
        (b"X-Other: Bearer " + KEY.encode() + b"\r\n", "an API key is needed", b'Bearer realm="moeserving"'),
    ],
)
async def test_without_a_key_nothing_reaches_an_engine(protect, credential, message, challenge):
    engine, served = await protect()
    for request in (post(prompt(), extra=credential), GET_MODELS % credential):
        answer = await served.ask(request)
        assert answer.status == 401
        assert answer.headers[b"www-authenticate"] == challenge
        error = answer.json["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert message in error["message"]
    assert engine.requests == []


async def test_the_health_is_open_and_the_models_need_a_key(protect):
    _, served = await protect()
    assert (await served.ask(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")).status == 200
    assert (await served.ask(GET_MODELS % BEARER)).status == 200


async def test_the_official_clients_pass_and_understand_a_refusal(protect):
    _, served = await protect()
    async with openai.AsyncOpenAI(api_key=KEY, base_url=served.url + "/v1", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        await client.completions.create(model="tiny", prompt="hello")
    async with openai.AsyncOpenAI(api_key="wrong", base_url=served.url + "/v1", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not valid"):
            await client.completions.create(model="tiny", prompt="hello")


async def test_a_refusal_has_the_shape_of_anthropics_api_on_its_path():
    from moe_gateway.access.denials import build_denial, deny_caller
    from moe_gateway.request.context import ClientRequest

    request = ClientRequest(b"POST", b"/v1/messages", b"", b"", b"id", None, True, False, 0.0)
    answer = build_denial(request, deny_caller("no key", b"Bearer"), close=False)
    head, body = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 401 Unauthorized")
    assert b"www-authenticate: Bearer" in head
    assert json.loads(body) == {"type": "error", "error": {"type": "authentication_error", "message": "no key"}}


async def test_a_key_names_the_tenant_and_the_clients_own_header_does_not(protect):
    engine, served = await protect()
    extra = BEARER + b"X-Gateway-Inference-Fairness-Id: team-b\r\nX-Request-Id: mine\r\n"
    await served.ask(post(prompt(), extra=extra))
    assert tenant_of(engine.requests[0].headers[b"x-request-id"].decode()) == hash_tenant(b"team-a")


async def test_keys_are_taken_up_when_the_kubelet_replaces_a_secret(protect, tmp_path):
    folder = tmp_path / "mounted"
    mount(folder, "..1", **{"team-a": KEY})
    _, served = await protect(folder)
    gate = served.gateway._context.gate
    mount(folder, "..2", **{"team-a": OTHER})
    await until(lambda: gate._keys.find(OTHER.encode()), "the new key")
    assert (await served.ask(post(prompt(), extra=BEARER))).status == 401
    assert (await served.ask(post(prompt(), extra=b"x-api-key: %b\r\n" % OTHER.encode()))).status == 200


def make_gate(folder: Path, **auth) -> tuple[Gate, list[float]]:
    now = [0.0]
    return Gate(Auth(key_dirs=(folder,), **auth), lambda: now[0]), now


def test_keys_are_taken_up_when_a_file_is_written_added_or_removed(keys):
    gate, _ = make_gate(keys)
    (keys / "team-b").write_text(OTHER)
    gate.tick(10.0)
    assert gate._keys.find(OTHER.encode()).name == "team-b"
    (keys / "team-a").unlink()
    gate.tick(20.0)
    assert gate._keys.find(KEY.encode()) is None


def test_the_folder_is_looked_at_once_a_second(keys):
    gate, _ = make_gate(keys)
    (keys / "team-b").write_text(OTHER)
    gate.tick(0.5)
    assert gate._keys.find(OTHER.encode()) is None
    gate.tick(1.0)
    assert gate._keys.find(OTHER.encode()) is not None


def test_keys_that_are_not_valid_change_nothing_and_are_named_without_the_key(keys, caplog):
    gate, _ = make_gate(keys)
    (keys / "team-a").write_text(json.dumps({"keys": [OTHER], "quotas": {}}))
    with caplog.at_level(logging.INFO):
        gate.tick(10.0)
    assert gate._keys.find(KEY.encode()) is not None
    record = caplog.records[-1]
    assert "team-keys/team-a: quotas: unknown field" in record.reason
    assert OTHER not in caplog.text + record.reason


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "team-keys/e: holds no key"),
        ("{}", "team-keys/e: keys: a list of texts is needed"),
        ('{"keys": []}', "team-keys/e: holds no key"),
        ('{"keys": [12345678901234567890]}', r"team-keys/e: keys\[0\]: a list of texts is needed"),
        ('{"keys": "sk-0123456789abcdef0123"}', "team-keys/e: keys: a list of texts is needed"),
        ("{keys", "team-keys/e: not JSON"),
        ("short", "team-keys/e: key 1: has 5 characters; 16 to 1024 are needed"),
        ("sk-0123456789abcdef 0123", "team-keys/e: key 1: has a character that no header can carry"),
        ("sk-0123456789abcdefgh\nsk-ü0123456789abcdefg", "team-keys/e: key 2: has a character"),
        (KEY, "team-a: has the same key as e"),
        (json.dumps({"keys": [OTHER], "quota": {"requestsPerMinute": 0}}), "team-keys/e: quota.requestsPerMinute"),
        (
            json.dumps({"keys": [OTHER], "quota": {"requests": 1}}),
            "team-keys/e: quota.requests: unknown field; nearest",
        ),
        (json.dumps({"keys": [OTHER], "priority": "high"}), "team-keys/e: priority"),
    ],
)
def test_an_entry_that_is_no_list_of_keys_is_refused_by_its_name(keys, text, said):
    (keys / "e").write_text(text)
    with pytest.raises(InvalidInput, match=said) as raised:
        read_keys([keys])
    assert "0123456789abcdef" not in str(raised.value)


def test_two_quotas_of_one_tenant_are_refused_and_one_counts_for_all_its_keys(keys):
    first = {"keys": [OTHER], "tenant": "team-a", "quota": {"concurrency": 1}}
    (keys / "extra").write_text(json.dumps(first))
    table = KeyTable(read_keys([keys]))
    assert table.find(KEY.encode()).quota == table.find(OTHER.encode()).quota != None  # noqa: E711
    (keys / "third").write_text(json.dumps(first | {"keys": ["sk-third-key-789012"], "quota": {"concurrency": 2}}))
    with pytest.raises(InvalidInput, match="team-a: has two entries with different quotas"):
        read_keys([keys])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"auth.key_dirs: cannot read .*nowhere: No such file"):
        read_keys([tmp_path / "nowhere"])
    assert sign_folders([tmp_path / "nowhere"]) != sign_folders([tmp_path])


def test_no_key_is_shown_or_kept(keys):
    (key,) = read_keys([keys])
    assert KEY not in repr(key)
    table = KeyTable([key])
    assert KEY.encode() not in repr(table._rows).encode()


async def test_logs_hold_no_key(protect, caplog):
    with caplog.at_level(logging.DEBUG):
        _, served = await protect()
        served.gateway._access_log = True
        await served.ask(post(prompt(), extra=BEARER))
        await served.ask(post(prompt(), extra=b"x-api-key: %b\r\n" % OTHER.encode()))
    text = " ".join(str(record.__dict__) for record in caplog.records)
    assert "completions" in text
    assert KEY not in text
    assert OTHER not in text


tokens = st.binary(min_size=16, max_size=40).map(lambda data: data.hex().encode())
names = st.from_regex(rb"[0-9a-zA-Z-]{1,20}", fullmatch=True).filter(
    lambda name: name.lower() not in (b"authorization", b"x-api-key")
)
values = st.binary(max_size=40).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))


@given(st.lists(st.tuples(names, values), max_size=5), tokens, st.integers(0, 5), st.booleans())
def test_a_credential_is_found_anywhere_and_nothing_else_is_taken_out(rows, token, place, is_bearer):
    lines = [b"%b: %b\r\n" % row for row in rows]
    line = b"AUTHORIZATION: Bearer %b\r\n" % token if is_bearer else b"X-Api-Key: %b\r\n" % token
    place = min(place, len(lines))
    found, rest = split_credentials(b"".join([*lines[:place], line, *lines[place:]]))
    assert found == [token]
    assert rest == b"".join(lines)


@given(st.sets(tokens, min_size=1, max_size=6), tokens)
def test_a_key_finds_its_own_tenant_and_no_other(known, other):
    table = KeyTable([ApiKey(secret=key, tenant=key.decode()) for key in known])
    for key in known:
        assert table.find(key).name == key.decode()
        assert table.find(key + b"0") is None
    assert (table.find(other) is not None) == (other in known)


def test_anthropics_client_sends_its_key_in_a_header_that_is_read():
    client = anthropic.Anthropic(api_key=KEY)
    head = b"".join(b"%b: %b\r\n" % (name.encode(), value.encode()) for name, value in client.auth_headers.items())
    assert split_credentials(head) == ([KEY.encode()], b"")


def test_keys_that_could_not_be_read_for_a_moment_are_read_again_and_named_once(keys, caplog, monkeypatch):
    gate, _ = make_gate(keys)
    (keys / "team-b").write_text(OTHER)

    def fail(_folders):
        raise InvalidInput([InputError("team-keys/team-b", "cannot be read: Too many open files")])

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(gate_module, "read_keys", fail)
        for now_s in (10.0, 20.0, 30.0):
            gate.tick(now_s)
    assert len(caplog.records) == 1
    gate.tick(40.0)
    assert gate._keys.find(OTHER.encode()) is not None


def test_a_file_that_cannot_be_looked_at_does_not_hide_a_change_of_another(keys):
    (keys / "gone").symlink_to(keys / "nowhere")
    before = sign_folders([keys])
    (keys / "team-b").write_text(OTHER)
    assert sign_folders([keys]) != before


def test_a_tenant_has_one_quota_and_one_class_whatever_its_credential(keys):
    quota = Quota(requests_per_minute=1)
    rows = [("k1", 5), ("k2", None), ("k3", 20), ("k4", -3)]
    table = KeyTable(
        ApiKey(secret=name.encode(), tenant="team-a", priority=level, quota=quota if level == 5 else None)
        for name, level in rows
    )
    found = table.add_terms(build_caller("team-a"))
    assert (found.name, found.quota, found.priority) == ("team-a", quota, 20)
    assert table.add_terms(build_caller("team-b")) == build_caller("team-b")
