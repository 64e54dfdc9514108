"""Tokens of an OpenID Connect issuer, whose public keys come from a server on loopback."""

import base64
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from moe_contract.access_config import Auth, Jwt
from moe_contract.input_errors import InvalidInput
from moe_contract.tenancy import hash_tenant, tenant_of
from moe_gateway.access.gate import Gate
from moe_gateway.access.issuer import AWAITED, Issuer, read_jwks
from moe_gateway.access.quotas import Lease
from moe_gateway.request.context import ClientRequest

from tests.gateway.messages import post, prompt
from tests.gateway.waiting import free_port, until

ISSUER, AUDIENCE = "https://login.test", "models"
RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC, ED = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **fields: Any) -> dict[str, Any]:
    kinds = {rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm, ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm}
    algorithm = next((found for kind, found in kinds.items() if isinstance(key, kind)), jwt.algorithms.OKPAlgorithm)
    row = json.loads(algorithm.to_jwk(key.public_key()))
    return {**row, **({} if kid is None else {"kid": kid}), **fields}


def token(key: Any = RSA, kid: str | None = "one", algorithm: str = "RS256", **claims: Any) -> str:
    now = int(time.time())
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "team-a", "iat": now, "exp": now + 60} | claims
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers=None if kid is None else {"kid": kid})


class JwksServer:
    """Serves `keys`, or what `answer` says."""

    def __init__(self) -> None:
        self.keys = [jwk(RSA, "one")]
        self.answer: web.Response | None = None
        self.asked = 0
        self.url = f"http://127.0.0.1:{free_port()}/keys"
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_get("/keys", self._get)
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", int(self.url.rsplit(":", 1)[1].partition("/")[0])).start()

    async def _get(self, _request: web.Request) -> web.Response:
        self.asked += 1
        if self.answer is not None:
            return web.Response(body=self.answer.body, status=self.answer.status)
        return web.json_response({"keys": self.keys})

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


@pytest.fixture
async def jwks():
    server = JwksServer()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def trusting(jwks, make_engine, serve):
    async def start(*, known=True, **settings):
        engine = await make_engine()
        section = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": jwks.url, **settings}
        served = await serve(engine, auth={"jwt": section})
        issuer = served.gateway._context.gate.issuer
        if known:
            await until(lambda: issuer._keys, "the keys")
        return engine, served, issuer

    return start


def ask(served, text: str):
    return served.ask(post(prompt(), extra=b"Authorization: Bearer %b\r\n" % text.encode()))


@pytest.mark.parametrize(
    ("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256"), (ED, "EdDSA")], ids=["RS256", "ES256", "EdDSA"]
)
async def test_a_token_of_the_issuer_passes_and_names_the_tenant(trusting, jwks, key, algorithm):
    jwks.keys = [jwk(OTHER_RSA, "zero"), jwk(key, "one", use="sig")]
    engine, served, _ = await trusting()
    text = token(key, algorithm=algorithm)
    assert [(await ask(served, text)).status for _ in range(2)] == [200, 200]
    head = engine.requests[0].head
    assert tenant_of(engine.requests[0].headers[b"x-request-id"].decode()) == hash_tenant(b"team-a")
    assert text.encode() not in head


async def test_another_claim_may_name_the_tenant(trusting):
    engine, served, _ = await trusting(tenant_claim="team")
    assert (await ask(served, token(team="b"))).status == 200
    assert (await ask(served, token())).status == 401
    assert tenant_of(engine.requests[0].headers[b"x-request-id"].decode()) == hash_tenant(b"b")


def encode_part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def encode_claims(algorithm: str) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "a", "exp": int(time.time()) + 60}
    rows = ({"alg": algorithm, "kid": "one"}, claims)
    return ".".join(encode_part(json.dumps(row).encode()) for row in rows)


def unsigned() -> str:
    return f"{encode_claims('none')}."


def signed_by_the_public_key() -> str:
    """The classic attack: the public key taken for a shared secret."""
    public = serialization.PublicFormat.SubjectPublicKeyInfo
    secret = RSA.public_key().public_bytes(serialization.Encoding.PEM, public)
    text = encode_claims("HS256")
    return f"{text}.{encode_part(hmac.digest(secret, text.encode(), 'sha256'))}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: token(OTHER_RSA),
        lambda: token(iss="https://other.test"),
        lambda: token(aud="others"),
        lambda: token(exp=int(time.time()) - 60),
        lambda: token(nbf=int(time.time()) + 600),
        lambda: token(exp=None),
        lambda: token(aud=None),
        lambda: token(sub=None),
        lambda: token(sub=""),
        lambda: token(algorithm="RS512"),
        unsigned,
        signed_by_the_public_key,
        lambda: token()[:-4] + "AAAA",
        lambda: "a.b.c",
        lambda: "..",
        lambda: "é.b.c".encode().decode("latin-1"),
    ],
)
async def test_any_other_token_is_refused(trusting, make):
    engine, served, _ = await trusting()
    answer = await served.ask(post(prompt(), extra=b"Authorization: Bearer %b\r\n" % make().encode("latin-1")))
    assert answer.status == 401
    assert answer.headers[b"www-authenticate"] == b'Bearer realm="moeserving", error="invalid_token"'
    assert engine.requests == []


async def test_keys_and_tokens_pass_side_by_side(jwks, make_engine, serve, tmp_path):
    (folder := tmp_path / "keys").mkdir()
    (folder / "team-b").write_text("sk-0123456789abcdef")
    section = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_url": jwks.url}
    served = await serve(await make_engine(), auth={"jwt": section, "key_dirs": [str(folder)]})
    await until(lambda: served.gateway._context.gate.issuer._keys, "the keys")
    assert (await ask(served, "sk-0123456789abcdef")).status == 200
    assert (await ask(served, token())).status == 200


async def test_until_the_keys_are_known_a_client_is_asked_to_come_again(trusting, jwks):
    jwks.answer = web.Response(status=500)
    _, served, _ = await trusting(known=False)
    answer = await ask(served, token())
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"1")
    assert answer.json["error"]["code"] == "issuer_unknown"


async def test_a_key_that_is_new_is_fetched_when_a_token_names_it(trusting, jwks):
    _, served, issuer = await trusting()
    jwks.keys = [jwk(OTHER_RSA, "two")]
    # While the keys are fresh a token that names an invented one does not lead to another fetch.
    assert (await ask(served, token(OTHER_RSA, "two"))).status == 401
    asked = jwks.asked
    issuer._fetched_s -= 60.0
    assert (await ask(served, token(OTHER_RSA, "two"))).status == 503
    await until(lambda: jwks.asked > asked and "two" in issuer._keys, "the new key")
    assert (await ask(served, token(OTHER_RSA, "two"))).status == 200


async def test_what_a_withdrawn_key_signed_counts_no_more(trusting, jwks):
    _, served, issuer = await trusting()
    assert (await ask(served, token())).status == 200
    jwks.keys = [jwk(OTHER_RSA, "two")]
    issuer._wanted.set()
    await until(lambda: "two" in issuer._keys, "the new key")
    assert (await ask(served, token())).status == 401


@pytest.mark.parametrize(
    "answer", [web.Response(status=500), web.Response(text="no"), web.Response(text='{"keys": []}')]
)
async def test_keys_stay_while_their_server_fails(trusting, jwks, answer, caplog):
    _, served, issuer = await trusting()
    jwks.answer = answer
    issuer._wanted.set()
    await until(lambda: "were not fetched" in caplog.text, "a line in the log")
    assert (await ask(served, token())).status == 200


def test_a_token_is_remembered_until_it_ends():
    now = [0.0]
    issuer = Issuer(Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_url="http://h/k"), lambda: now[0])
    text = token(exp=int(time.time()) + 5).encode()
    assert issuer.find(text) is AWAITED
    issuer._keys = read_jwks({"keys": [jwk(RSA, "one")]})
    assert issuer.find(text).name == "team-a"
    issuer._keys = read_jwks({"keys": [jwk(OTHER_RSA, "one")]})
    assert issuer.find(text).name == "team-a"
    now[0] = 36.0
    assert issuer.find(text) is None


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"keys": {}}, {"keys": [1, {}, {"kty": "oct", "k": "AAAA"}]}, {"keys": [jwk(RSA, "a", use="enc")]}],
)
def test_what_holds_no_key_for_signatures_is_refused(document):
    with pytest.raises(ValueError, match="JWKS"):
        read_jwks(document)


def test_keys_of_other_kinds_are_left_out():
    rows = [{"kty": "oct", "k": "AAAA", "kid": "s"}, {"kty": "new"}, jwk(EC, "e"), jwk(RSA, None)]
    assert set(read_jwks({"keys": rows})) == {"e", None}


def test_a_gate_with_tokens_alone_needs_no_folder():
    gate = Gate(Auth(jwt=Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_url="https://h/k")), lambda: 0.0)
    gate.tick(10.0)
    for url in ("ftp://h", "h/k", "https://", "https://u@h/k", "https://h/ k"):
        with pytest.raises((InvalidInput, ValueError)):
            Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_url=url)


KEY = "sk-0123456789abcdef0123"


def gate_of(folder, **entry) -> Gate:
    folder.mkdir()
    (folder / "team-a").write_text(json.dumps({"keys": [KEY], **entry}))
    settings = Jwt(issuer=ISSUER, audience=AUDIENCE, jwks_url="http://h/k")
    return Gate(Auth(key_dirs=(folder,), jwt=settings), lambda: 100.0)


def identify(gate, *lines: bytes):
    request = ClientRequest(b"POST", b"/v1/completions", b"".join(lines), b"", b"id", None, True, False, 0.0)
    return gate.identify(request), request.caller


def test_a_key_beside_a_token_of_an_unknown_signer_passes(tmp_path):
    gate = gate_of(tmp_path / "keys")
    bearer, key = b"Authorization: Bearer %b\r\n" % token().encode(), b"x-api-key: %b\r\n" % KEY.encode()
    denial, caller = identify(gate, bearer, key)
    assert denial is None
    assert caller.name == "team-a"
    denial, _ = identify(gate, bearer, b"x-api-key: placeholder\r\n")
    assert (denial.outcome.status, denial.retry_after_s) == (503, 1)


def test_a_token_and_a_key_of_one_tenant_share_its_quota_and_its_class(tmp_path):
    gate = gate_of(tmp_path / "keys", priority=7, quota={"requestsPerMinute": 1})
    gate.issuer._keys = read_jwks({"keys": [jwk(RSA, "one")]})
    _, by_token = identify(gate, b"Authorization: Bearer %b\r\n" % token().encode())
    _, by_key = identify(gate, b"x-api-key: %b\r\n" % KEY.encode())
    assert by_token == by_key
    assert by_token.priority == 7
    admitted = [gate._quotas.admit(caller, 0, 0.0) for _ in range(5) for caller in (by_key, by_token)]
    assert sum(isinstance(row, Lease) for row in admitted) == 1
