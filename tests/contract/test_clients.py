"""The HTTP clients: what they send, and what becomes of every kind of answer."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from moe_contract.clients import AgentClient, GatewayClient, PeerError, Refused, Unreachable, Unreadable
from moe_contract.routes import CONFIG, EXPERTS, METRICS, READYZ, STATE

STATE_TEXT = '{"phase": "ready", "ranks": [{"rank": 0, "running": 2}]}'


class Answers:
    """A peer that answers what the test says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.text, self.asked = 200, "{}", []
        self.known_token = "new"

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.method, request.path_qs, await request.text()))
        given = request.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.known_token}":
            return web.json_response({"errors": [{"path": "Authorization", "message": "no"}]}, status=401)
        return web.Response(status=self.status, text=self.text)


@pytest.fixture
async def answers() -> AsyncIterator[tuple[Answers, str]]:
    peer = Answers()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", peer.answer)
    async with TestServer(app) as server:
        yield peer, str(server.make_url("")).rstrip("/")


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as made:
        yield made


async def test_states_and_metrics_are_read(answers: Any, session: aiohttp.ClientSession) -> None:
    peer, url = answers
    peer.text = STATE_TEXT
    assert (await AgentClient(session, url).state()).ranks[0].running == 2
    assert not (await GatewayClient(session, url).state()).accepting
    peer.text = "a 1\n"
    assert await GatewayClient(session, url).metrics() == "a 1\n"
    assert await GatewayClient(session, url).is_ready()
    peer.status = 503
    assert not await GatewayClient(session, url).is_ready()
    assert [path for _, path, _ in peer.asked] == [STATE, STATE, METRICS, READYZ, READYZ]


async def test_an_engine_without_a_group_has_no_experts(answers: Any, session: aiohttp.ClientSession) -> None:
    peer, url = answers
    peer.status = 404
    assert await AgentClient(session, url).experts(brief=True) is None
    assert peer.asked[-1][1] == f"{EXPERTS}?brief=1"
    peer.status = 503
    with pytest.raises(Refused, match="refused: status 503") as caught:
        await AgentClient(session, url).experts()
    assert caught.value.status == 503
    assert peer.asked[-1][1] == EXPERTS


@pytest.mark.parametrize("tokens", [("new",), ("old", "new"), ("new", "old")])
async def test_settings_are_sent_with_the_first_token_that_is_known(
    answers: Any, session: aiohttp.ClientSession, tokens: tuple[str, ...]
) -> None:
    peer, url = answers
    await AgentClient(session, url).put_settings({"request": {"policy": "fcfs"}}, tokens)
    method, path, body = peer.asked[-1]
    assert (method, path, json.loads(body)) == ("PUT", CONFIG, {"request": {"policy": "fcfs"}})
    assert len(peer.asked) == tokens.index("new") + 1


async def test_a_refusal_says_why_and_no_further_token_is_tried(answers: Any, session: aiohttp.ClientSession) -> None:
    peer, url = answers
    with pytest.raises(Refused, match="refused: Authorization: no"):
        await AgentClient(session, url).put_settings({}, ("old", "older"))
    assert len(peer.asked) == 2
    peer.status, peer.text = 422, '{"errors": [{"path": "request.policy", "message": "unknown"}]}'
    with pytest.raises(Refused, match=r"refused: request\.policy: unknown"):
        await AgentClient(session, url).put_settings({}, ("new", "older"))
    assert len(peer.asked) == 3
    with pytest.raises(PeerError, match="no control token"):
        await AgentClient(session, url).put_settings({}, ())


async def test_a_directive_gives_its_number(answers: Any, session: aiohttp.ClientSession) -> None:
    peer, url = answers
    peer.status, peer.text = 202, '{"version": 12}'
    assert await AgentClient(session, url).send_directive({"action": "plan"}, ("old", "new")) == 12
    assert peer.asked[-1][:2] == ("POST", EXPERTS)
    peer.text = "{}"
    with pytest.raises(Unreadable, match="directive"):
        await AgentClient(session, url).send_directive({}, ("new",))


async def test_unreadable_and_unreachable_are_different_errors(answers: Any, session: aiohttp.ClientSession) -> None:
    peer, url = answers
    peer.text = "[]"
    for call in (AgentClient(session, url).state, AgentClient(session, url).experts, GatewayClient(session, url).state):
        with pytest.raises(Unreadable, match="does not understand"):
            await call()
    with pytest.raises(Unreachable, match="cannot be reached"):
        await AgentClient(session, "http://127.0.0.1:1").state()
    assert not await GatewayClient(session, "http://127.0.0.1:1").is_ready()


async def test_a_peer_that_is_silent_is_given_up(session: aiohttp.ClientSession) -> None:
    async def never(request: web.Request) -> web.Response:
        import asyncio

        await asyncio.sleep(5)
        return web.Response()

    app = web.Application()
    app.router.add_get(STATE, never)
    async with TestServer(app) as server:
        with pytest.raises(Unreachable, match=r"gave no answer within 0\.1 s"):
            await AgentClient(session, str(server.make_url("")).rstrip("/"), timeout_s=0.1).state()


async def test_a_peer_that_takes_no_connection_cannot_be_reached() -> None:
    class Session:
        """Stands for a session whose connections are never answered."""

        def request(self, *_: Any, **__: Any) -> Any:
            raise aiohttp.ConnectionTimeoutError("connection timeout")

    session: Any = Session()
    with pytest.raises(Unreachable, match=r"^cannot be reached$"):
        await AgentClient(session, "http://127.0.0.1:1").state()
