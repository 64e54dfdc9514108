"""An engine that is guarded answers its own gateways alone."""

import json

import pytest
from moe_agent.supervisor.engine_command import build_command
from moe_agent.supervisor.node import Node
from moe_agent.vllm.peer_guard import PeersOnly
from moe_contract.agent_config import AgentConfig, EngineConfig
from moe_contract.engine_process import engine_environment
from moe_contract.peer_tokens import TOKENS_VARIABLE, PeerTokens, derive_peer_token
from moe_contract.sections import Listen

PEER = derive_peer_token(b"secret")


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """Sends a request through the middleware; returns whether it passed, and the messages otherwise."""
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setenv(TOKENS_VARIABLE, str(tmp_path / "token"))

    async def send(path="/v1/completions", *headers, kind="http", method="POST"):
        passed, sent = [], []

        async def app(scope, _receive, _send):
            passed.append(scope)

        async def collect(message):
            sent.append(message)

        scope = {"type": kind, "method": method, "path": path, "headers": [*headers]}
        await PeersOnly(app)(scope, None, collect)
        return bool(passed), sent

    return send


@pytest.mark.parametrize("path", ["/v1/completions", "/metrics", "/tokenize", "/v1/models/x", "/v1/models"])
async def test_without_the_header_of_a_gateway_there_is_no_answer(guarded, path):
    for headers in ([], [(b"x-moeserving-peer", b"secret")], [(b"authorization", b"Bearer secret")]):
        passed, sent = await guarded(path, *headers)
        assert not passed
        assert sent[0]["status"] == 401
        assert json.loads(sent[1]["body"])["error"]["code"] == "invalid_api_key"


async def test_with_it_requests_pass(guarded):
    assert await guarded("/v1/completions", (b"host", b"h"), (b"x-moeserving-peer", PEER)) == (True, [])
    # A client may send one of its own through the gateway.
    headers = [(b"x-moeserving-peer", b"mine"), (b"x-moeserving-peer", PEER)]
    assert await guarded("/v1/completions", *headers) == (True, [])


async def test_a_picked_request_passes_and_its_header_opens_nothing_else(guarded, tmp_path):
    signed = PeerTokens(tmp_path / "token").sign(b"POST", b"/v1/completions")
    header = (b"x-moeserving-peer", signed)
    assert await guarded("/v1/completions", header) == (True, [])
    for path, method in (("/v1/embeddings", "POST"), ("/v1/completions", "GET"), ("/metrics", "GET")):
        assert not (await guarded(path, header, method=method))[0]
    assert not (await guarded("/v1/completions", header, kind="websocket"))[0]


async def test_what_the_agent_asks_for_is_open_to_reading_alone(guarded):
    for path in ("/health", "/v1/models", "/is_sleeping", "/is_paused"):
        assert await guarded(path, method="GET") == (True, [])
        assert not (await guarded(path, method="POST"))[0]


async def test_a_lifespan_passes_and_a_websocket_is_closed(guarded):
    assert await guarded(kind="lifespan") == (True, [])
    assert await guarded(kind="websocket") == (False, [{"type": "websocket.close", "code": 1008}])


async def test_what_a_gateway_sends_passes(guarded, tmp_path):
    name, value = PeerTokens(tmp_path / "token").head_end.removesuffix(b"\r\n\r\n").split(b": ")
    assert (await guarded("/v1/completions", (name, value)))[0]


@pytest.mark.parametrize("guarded_engine", [False, True])
def test_the_agent_names_the_middleware_and_the_file_where_the_engine_is_guarded(tmp_path, guarded_engine):
    engine = EngineConfig(port=1, model="m", served_name="m", guarded=guarded_engine)
    config = AgentConfig(run_dir=tmp_path, listen=Listen(port=2), token_file=tmp_path / "token", engine=engine)
    node = Node(index=0, leader="", ranks=range(1))
    command = build_command(engine, node, cpu_build=True)
    assert (command.count("moe_agent.vllm.peer_guard.PeersOnly") == 1) == guarded_engine
    # The closed list of routes stays in front of it.
    assert command[-1 - command[::-1].index("--middleware") + 1] == "moe_agent.vllm.middleware.ServingRoutesOnly"
    environment = engine_environment(config, {}, cpu_build=True, cpus=1)
    assert environment.get(TOKENS_VARIABLE) == (str(tmp_path / "token") if guarded_engine else None)
