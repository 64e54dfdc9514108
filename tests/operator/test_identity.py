"""Who is asked, who is accepted, and who gets the control token."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.pod_identity import UID_VARIABLE, PodIdentity, identity_variables, read_identity
from moe_operator.autoscale.source import _engines, _read_fleet
from moe_operator.kubernetes.identity import Identity, judge_identity
from moe_operator.kubernetes.peers import Peer, accept_states, fetch_state, find_peers, put_settings
from moe_operator.kubernetes.victims import is_stable_engine
from moe_operator.plan.pod_status import is_live, is_over, is_ready
from pods import agent, gateway, pod, states

Document = dict[str, Any]
OVER = ["Failed", "Succeeded"]


@pytest.mark.parametrize("phase", OVER)
@pytest.mark.parametrize("reason", ["Evicted", "NodeLost", "Shutdown", "UnexpectedAdmissionError", "OutOfcpu", ""])
def test_a_pod_that_is_over_is_nobody_wherever_pods_are_counted(phase: str, reason: str) -> None:
    engine, front = pod(phase=phase), pod("tiny-gateway-a", "gateway", phase=phase)
    engine["status"]["reason"] = front["status"]["reason"] = reason
    assert find_peers([engine, front]) == []
    assert not is_stable_engine(engine)
    assert _engines([engine]) == (set(), set())
    by_pod = states({"tiny-engine-a": agent(), "tiny-gateway-a": gateway()})
    assert _read_fleet([engine, front], by_pod, 0.0).ready == 0
    assert not is_ready(engine)


@given(st.sampled_from(["Pending", "Running", "Unknown", *OVER]), st.booleans(), st.booleans())
def test_a_pod_is_asked_exactly_while_it_is_live(phase: str, ending: bool, ready: bool) -> None:
    found = pod(phase=phase, ending=ending, ready=ready)
    assert is_live(found) == (phase not in OVER and not ending)
    assert bool(find_peers([found])) == is_live(found)
    assert is_ready(found) == (ready and is_live(found))
    assert is_over(found) == (phase in OVER)


@pytest.mark.parametrize(
    ("answer", "asked", "proved"),
    [
        ("mine", True, Identity.PROVED),
        ("mine", False, Identity.PROVED),
        ("other", True, Identity.OTHER),
        ("other", False, Identity.OTHER),
        ("", True, Identity.OTHER),
        ("", False, Identity.UNKNOWN),
    ],
)
def test_an_answer_proves_whose_it_is_by_its_uid(answer: str, asked: bool, proved: Identity) -> None:
    assert judge_identity("mine", asked, agent(pod={"name": "x", "uid": answer})) is proved
    assert judge_identity("mine", asked, gateway(pod={"name": "x", "uid": answer})) is proved


def test_an_agent_of_another_version_that_says_no_pod_is_read() -> None:
    assert agent().pod == PodIdentity() == gateway().pod
    assert read_identity({}) == PodIdentity()
    assert read_identity({UID_VARIABLE: "u", "MOESERVING_POD_NAME": "n"}) == PodIdentity(name="n", uid="u")


class Answering:
    """A program at an address: says its uid, notes each request and the token that came with it."""

    def __init__(self) -> None:
        self.uids = itertools.repeat("mine")
        self.tokens: list[str] = []
        self.known: set[str] | None = None

    async def state(self, request: web.Request) -> web.Response:
        return web.json_response({"phase": "ready", "held": 3, "pod": {"name": "p", "uid": next(self.uids)}})

    async def config(self, request: web.Request) -> web.Response:
        self.tokens.append(request.headers["Authorization"])
        is_known = self.known is None or self.tokens[-1] in self.known
        return web.json_response({}, status=200 if is_known else 401)


Serve = Callable[[Answering], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    runners = []

    async def begin(answering: Answering) -> str:
        app = web.Application()
        app.router.add_get("/v1/state", answering.state)
        app.router.add_put("/v1/config", answering.config)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield begin
    await asyncio.gather(*(runner.cleanup() for runner in runners))


def peer(url: str, component: str, *, asked: bool = True) -> Peer:
    return Peer(pod="p", url=url, component=component, revision="stable", uid="mine", says_uid=asked)


@pytest.mark.parametrize("component", ["engine", "gateway"])
@pytest.mark.parametrize(
    ("uid", "asked", "accepted", "tokens"),
    [("mine", True, True, 1), ("other", True, False, 0), ("", True, False, 0), ("", False, True, 0)],
    ids=["itself", "another's", "no agent of this build", "a pod of an earlier build"],
)
async def test_what_another_pod_answers_is_not_accepted_and_it_gets_no_token(
    serve: Serve, component: str, uid: str, asked: bool, accepted: bool, tokens: int
) -> None:
    answering = Answering()
    answering.uids = itertools.repeat(uid)
    one = peer(await serve(answering), component, asked=asked)
    async with aiohttp.ClientSession() as session:
        found = accept_states([(one, await fetch_state(session, one))])
        assert ("p" in found) is accepted
        assert ("p" in found.strangers) is (not accepted)
        problem = await put_settings(one, {"request": {}}, ("secret",))
    assert answering.tokens == ["Bearer secret"] * tokens
    assert bool(problem) is (tokens == 0)


async def test_an_address_that_changes_hands_between_the_look_and_the_settings_gets_no_token(serve: Serve) -> None:
    answering = Answering()
    answering.uids = iter(["mine", "other"])
    one = peer(await serve(answering), "engine")
    async with aiohttp.ClientSession() as session:
        assert "p" in accept_states([(one, await fetch_state(session, one))])
        assert await put_settings(one, {}, ("secret",)) == "another pod answers at its address"
    assert answering.tokens == []


@pytest.mark.parametrize("says_close", [True, False])
async def test_an_address_that_changes_hands_between_the_proof_and_the_token_gets_none(says_close: bool) -> None:
    """The right pod says its uid and goes; a program of another tenant is there for the next connection."""
    stranger, sites = Answering(), []
    app = web.Application()
    app.router.add_get("/v1/state", stranger.state)
    app.router.add_put("/v1/config", stranger.config)
    runner = web.AppRunner(app)
    await runner.setup()

    async def answer_and_go(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        first.close()
        sites.append(web.TCPSite(runner, "127.0.0.1", port))
        await sites[0].start()
        body = json.dumps({"phase": "ready", "held": 0, "pod": {"name": "p", "uid": "mine"}}).encode()
        close = b"Connection: close\r\n" if says_close else b""
        writer.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (close, len(body), body))
        await writer.drain()
        writer.close()

    first = await asyncio.start_server(answer_and_go, "127.0.0.1", 0)
    port = first.sockets[0].getsockname()[1]
    try:
        problem = await put_settings(peer(f"http://127.0.0.1:{port}", "engine"), {}, ("secret", "older"))
        assert problem == "has closed the connection on which it said who it is"
        assert len(sites) == 1
        assert stranger.tokens == []
    finally:
        await runner.cleanup()


async def test_a_peer_that_knows_only_the_old_token_yet_takes_it(serve: Serve) -> None:
    answering = Answering()
    answering.known = {"Bearer old"}
    one = peer(await serve(answering), "engine")
    assert await put_settings(one, {}, ("new", "old")) == ""
    assert answering.tokens == ["Bearer new", "Bearer old"]
    assert await put_settings(one, {}, ("new", "newer")) == "refused: status 401"
    assert await put_settings(one, {}, ()) == "cannot be changed: no control token"


def test_the_pods_of_a_plan_are_asked_for_their_uid() -> None:
    found = pod()
    found["metadata"]["uid"] = "mine"
    (bare,) = find_peers([found])
    assert (bare.uid, bare.says_uid) == ("mine", False)
    found["spec"]["containers"][0]["env"] = identity_variables()
    (asked,) = find_peers([found])
    assert asked.says_uid
