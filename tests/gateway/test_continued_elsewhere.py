"""At which engine a stream goes on, and when it leaves its own: never for one that computes something else."""

import asyncio
import json
import logging
from types import SimpleNamespace

import aiohttp
import pytest
from moe_contract.gateway_config import EngineAddress
from moe_gateway import gateway as gateway_module
from moe_gateway.continuation.ways import shows_parser
from moe_gateway.engines import target_states
from moe_gateway.engines.fleet import EngineFleet
from moe_gateway.engines.same_model import ModelIdentity, SameModel, find_length, identify_model
from moe_gateway.http.routes import Route
from moe_gateway.request import continued_exchange, exchange

from tests.gateway.compiled import interpreted
from tests.gateway.computing_engine import Computing
from tests.gateway.messages import SSE_END, SSE_HEAD, chunk, json_answer, post
from tests.gateway.test_continuation import (
    ON,
    PATHS,
    TEXT,
    TURNS,
    ask_for,
    body_of,
    events,
    expected,
    start,
    whole,
)
from tests.gateway.waiting import until

# Checks of the gateway after which a stream that could leave would have left.
CHECKS = 5


@pytest.fixture
def soon_stalled(monkeypatch):
    for module in (target_states, exchange, continued_exchange):
        monkeypatch.setattr(module, "STALL_S", 0.5)


async def begun(served):
    await until(lambda: served.gateway.stats.ttft.total > 0)


async def checked(served, times=CHECKS):
    """Waits until the gateway has checked its connections so often."""
    wanted = {"count": times}
    tick = served.gateway.dispatcher.tick

    def count(now_s):
        wanted["count"] -= 1
        tick(now_s)

    served.gateway.dispatcher.tick = count
    await until(lambda: wanted["count"] <= 0)
    served.gateway.dispatcher.tick = tick


def identify(agent, identity):
    agent.say(engine=agent.state["engine"] | {"identity": identity})


async def two_models(make_engine, serve, script, other, *, agent=True):
    """A gateway whose engine `stable` alone takes requests, beside one of the same name that computes another model."""
    engines = [
        await make_engine(script, name="stable", agent=agent),
        await make_engine(Computing(other), name="canary", agent=agent),
    ]
    served = await serve(*engines, dispatch=TURNS, **ON)
    return served, engines


@interpreted
@pytest.mark.parametrize("model", [{}, {"model": None}], ids=["named", "unnamed"])
@pytest.mark.parametrize("identity", ["other", ""])
async def test_a_stream_stays_where_the_other_engine_serves_another_model(make_engine, serve, identity, model):
    script = Computing(TEXT, cuts=[9], fail="pauses")
    served, (stable, canary) = await two_models(make_engine, serve, script, "0123456789" * 9)
    identify(canary.agent, identity)
    canary.agent.say(accepting=False)
    await until(lambda: served.accepting == {"stable"})
    assert served.gateway.dispatcher.engines["canary"].identity == identity
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS, **model))
    await begun(served)
    canary.agent.say(accepting=True)
    await until(lambda: "canary" in served.accepting)
    stable.agent.say(accepting=False, phase="draining")
    await until(lambda: served.gateway.dispatcher.engines["stable"].is_draining)
    await checked(served)
    assert (served.gateway.stats.continuations, canary.requests) == ({}, [])
    script.paused.set()
    answer = await client.answer()
    # It fails at last, and no engine has its model.
    assert TEXT.startswith(whole(events(answer.body)[:-1])["text"]["text"])
    assert "error" in events(answer.body)[-1]
    assert canary.requests == []


async def test_a_stream_does_not_go_on_where_its_engine_does_not_say_what_it_serves(make_engine, serve):
    script = Computing(TEXT, cuts=[9])
    engines = [await make_engine(script), await make_engine(script)]
    for engine in engines:
        identify(engine.agent, "")
    served = await serve(*engines, dispatch=TURNS, **ON)
    await until(lambda: all(not engine.identity for engine in served.gateway.dispatcher.engines.values()))
    answer = await served.ask(ask_for(Route.COMPLETIONS))
    assert b"x-moeserving-continuation" not in answer.headers
    assert events(answer.body)[-1]["error"]["code"] == "engine_failed"


async def test_a_stream_that_waits_goes_on_at_an_engine_that_comes_later(make_engine, serve):
    """It is the engine that serves the same model by then, as one that has taken the place of its own."""
    script = Computing(TEXT, cuts=[9], fail="pauses")
    served, (stable, canary) = await two_models(make_engine, serve, script, TEXT)
    identify(canary.agent, "other")
    canary.agent.say(accepting=False)
    await until(lambda: served.accepting == {"stable"})
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS))
    await begun(served)
    stable.agent.say(accepting=False, phase="backoff")
    await until(lambda: not served.accepting)
    script.paused.set()
    await served.held(1)
    identify(canary.agent, "tiny-1")
    canary.agent.say(accepting=True)
    answer = await client.answer()
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}


def engine_of(rows, *, identity="", agent=True):
    fleet = EngineFleet()
    fleet.replace([EngineAddress(name="e", url="http://h:1", agent_url="http://h:2" if agent else None)])
    fleet.set_process("e", 1, identity)
    fleet.set_models("e", rows)
    return fleet.engines["e"]


BASE = {"id": "tiny", "root": "Qwen/tiny", "max_model_len": 4096}
ADAPTER = {"id": "lora", "root": "/loras/a", "parent": "tiny"}
ROWS = {"tiny": BASE, "lora": ADAPTER}


@pytest.mark.parametrize(
    ("engine", "model", "identity"),
    [
        (engine_of(ROWS, identity="i"), "tiny", ModelIdentity("i", None)),
        (engine_of(ROWS, identity="i"), None, ModelIdentity("i", None)),
        (engine_of({"tiny": {"id": "tiny"}}, identity="i"), "tiny", ModelIdentity("i", None)),
        (engine_of(ROWS, identity="i"), "lora", ModelIdentity("i", "/loras/a")),
        (engine_of(ROWS, identity="i"), "unknown", None),
        (engine_of(ROWS), "tiny", None),
        (engine_of(ROWS, agent=False), "tiny", ModelIdentity("", "Qwen/tiny", 4096)),
        (engine_of(ROWS, agent=False), None, ModelIdentity("", "Qwen/tiny", 4096)),
        (engine_of(ROWS, agent=False), "lora", ModelIdentity("", "/loras/a", 4096)),
        (engine_of({"tiny": {"id": "tiny", "max_model_len": 4096}}, agent=False), "tiny", None),
        (engine_of({"tiny": {"id": "tiny", "root": "x"}}, agent=False), "tiny", None),
        (engine_of({}, agent=False), None, None),
        (None, "tiny", None),
    ],
)
def test_the_identity_of_a_model(engine, model, identity):
    assert identify_model(engine, model) == identity


def test_an_adapter_has_the_length_of_its_engine():
    assert find_length(engine_of({"lora": ADAPTER, "tiny": BASE})) == 4096
    assert find_length(engine_of({"lora": ADAPTER})) is None


def test_the_engines_with_the_same_model_are_those_of_the_moment():
    fleet = EngineFleet()
    addresses = [EngineAddress(name=name, url="http://h:1", agent_url="http://h:2") for name in "abc"]
    fleet.replace(addresses)
    same = SameModel(lambda: fleet.engines, ModelIdentity("i", None), "tiny")
    assert (set(same), same.max_model_len) == (set(), None)
    for name, length in (("a", 8), ("b", 4), ("c", 2)):
        fleet.set_models(name, {"tiny": {"id": "tiny", "max_model_len": length}})
        fleet.set_process(name, 1, "other" if name == "c" else "i")
    assert (set(same), len(same), same.max_model_len) == ({"a", "b"}, 2, 4)
    assert frozenset("bcd") & same == frozenset("b")
    fleet.replace(addresses[:1])
    assert (set(same), 3 in same) == ({"a"}, False)


# When a stream leaves its engine.


@interpreted
async def test_a_chat_without_a_limit_stays_at_an_engine_that_drains(make_engine, serve):
    """How far it may go is not known where engines do not list their longest sequence: it would be computed anew."""
    script = Computing(TEXT, cuts=[9], fail="pauses")
    engines = [await make_engine(script), await make_engine(script)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    client = await served.connect()
    client.send(post(body_of(Route.CHAT, max_tokens=None), PATHS[Route.CHAT]))
    await until(lambda: script.bodies)
    first = next(engine for engine in engines if engine.requests)
    await begun(served)
    first.agent.say(accepting=False, phase="draining")
    await until(lambda: served.gateway.dispatcher.engines[first.name].is_draining)
    await checked(served)
    assert (len(script.bodies), served.in_flight) == (1, 1)
    for engine in engines:
        served.gateway.dispatcher.set_models(engine.name, {"tiny": BASE})
    answer = await client.answer()
    assert whole(events(answer.body)) == expected(Route.CHAT, {}) | {"done": True}
    assert served.gateway.stats.continuations == {"prefix": 1}


async def test_a_drain_moves_a_bounded_number_of_streams_at_each_check(make_engine, serve, monkeypatch):
    monkeypatch.setattr(gateway_module, "MOVES_PER_CHECK", 2)
    script = Computing(TEXT, cuts=[9] * 5, fail="pauses")
    engines = [await make_engine(script), await make_engine(script)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    engines[1].agent.say(accepting=False)
    await until(lambda: served.accepting == {engines[0].name})
    clients = [await served.connect() for _ in range(5)]
    for client in clients:
        client.send(ask_for(Route.COMPLETIONS))
    await until(lambda: sum(served.gateway.stats.ttft.counts) == 5)
    engines[1].agent.say(accepting=True)
    moves = []
    check = served.gateway._check_once

    def count(now_s):
        before = served.gateway.stats.continuations.total()
        check(now_s)
        moves.append(served.gateway.stats.continuations.total() - before)

    monkeypatch.setattr(served.gateway, "_check_once", count)
    engines[0].agent.say(accepting=False, phase="draining")
    for client in clients:
        assert whole(events((await client.answer()).body))["done"]
    assert sum(moves) == 5
    assert max(moves) <= 2


class Pausing:
    """Engines of which the one that got the stream pauses after nine events, until `go` is set."""

    def __init__(self, failing=0, **fields):
        self.computing = Computing(TEXT, **fields)
        self.failing, self.go, self.streams = failing, asyncio.Event(), 0

    async def __call__(self, received, writer):
        path, body = received.line.split(b" ")[1].decode(), json.loads(received.body)
        if not body.get("stream"):
            await self.go.wait()
            writer.write(json_answer({"choices": []}))
            return
        self.streams += 1
        if self.streams <= self.failing:
            writer.transport.abort()
            return
        self.computing.bodies.append((path, body))
        rows = [chunk(row) for row in self.computing.events(path, body)]
        writer.write(SSE_HEAD + b"".join(rows[:9]))
        await writer.drain()
        await self.go.wait()
        writer.write(b"".join(rows[9:]) + SSE_END)


@interpreted
@pytest.mark.parametrize(
    ("failing", "fields"), [(1, {}), (0, {"seed": 3, "temperature": 1.0})], ids=["no attempt left", "replay"]
)
async def test_a_pause_of_an_engine_breaks_no_stream(make_engine, serve, soon_stalled, failing, fields):
    """One that could not be continued soundly waits, as it does without continuation."""
    script = Pausing(failing, drift=3 if not failing else None)
    served = await start(make_engine, serve, script, engines=3)
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS, **fields))
    await begun(served)
    for _ in range(6):
        (await served.connect()).send(post({"model": "tiny", "prompt": "x", "max_tokens": 3}))
    (mine,) = {target for target, state in served.gateway.dispatcher.target_states.items() if state.in_flight} & {
        connection._exchange.target
        for connection in served.gateway._connections
        if connection._exchange is not None and connection._exchange.attempts.is_answering
    }
    await until(lambda: mine in served.gateway.dispatcher.stalled)
    await checked(served)
    script.go.set()
    answer = await client.answer()
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert served.gateway.stats.continuations == {}


async def test_a_stream_that_moved_to_an_engine_that_hangs_moves_on(make_engine, serve, soon_stalled):
    script, asked = Computing(TEXT, cuts=[9], fail="pauses"), []

    async def hangs_second(received, writer):
        asked.append(received)
        if len(asked) == 2:
            await asyncio.Event().wait()
        await script(received, writer)

    engines = [await make_engine(hangs_second) for _ in range(3)]
    served = await serve(*engines, dispatch=TURNS, **ON)
    client = await served.connect()
    client.send(ask_for(Route.COMPLETIONS))
    await begun(served)
    first = next(engine for engine in engines if engine.requests)
    first.agent.say(accepting=False, phase="draining")
    answer = await client.answer()
    assert whole(events(answer.body)) == expected(Route.COMPLETIONS, {}) | {"done": True}
    assert len(asked) == 3


# Chats whose engine takes reasoning out of them, whatever the settings say.


async def test_a_chat_with_reasoning_is_computed_anew(make_engine, serve):
    script = Computing(TEXT, cuts=[25], reasoning="Let me think. ")
    served = await start(make_engine, serve, script)
    answer = await served.ask(ask_for(Route.CHAT))
    assert whole(events(answer.body)) == expected(Route.CHAT, {}, reasoning="Let me think. ") | {"done": True}
    assert served.gateway.stats.continuations == {"replay": 1}


@pytest.mark.parametrize(
    ("delta", "shows"),
    [
        ({"content": "x"}, False),
        ({"content": "x", "reasoning": None, "tool_calls": []}, False),
        ({"content": 'a "reasoning": "b"'}, False),
        ({"reasoning": ""}, False),
        ({"reasoning": "x"}, True),
        ({"reasoning_content": "x"}, True),
        ({"tool_calls": [{"index": 0}]}, True),
        ({"function_call": {"name": "f"}}, True),
    ],
)
def test_what_a_parser_has_taken_out_shows(delta, shows):
    for separators in ((",", ":"), (", ", ": ")):
        assert shows_parser(json.dumps({"choices": [{"delta": delta}]}, separators=separators).encode()) is shows


# The gateway's own loop.


async def test_a_connection_whose_check_fails_ends_alone(make_engine, serve, caplog):
    script = Computing(TEXT, cuts=[9, 9], fail="pauses")
    served = await start(make_engine, serve, script)
    clients = [await served.connect() for _ in range(2)]
    for client in clients:
        client.send(ask_for(Route.COMPLETIONS))
    await until(lambda: sum(served.gateway.stats.ttft.counts) == 2)
    broken, other = list(served.gateway._connections)
    checks = []

    def fail(_now_s, _limits):
        raise KeyError("one that nobody expects")

    kept = other._exchange
    for connection, check in ((broken, fail), (other, lambda *_: checks.append(1))):
        connection._exchange = SimpleNamespace(check=check, abandon=connection._exchange.abandon)
    with caplog.at_level(logging.ERROR, "moeserving.gateway"):
        await until(lambda: served.in_flight == 1 and checks)
    assert "the check of a connection failed" in caplog.text
    assert served.gateway._connections == {other}
    other._exchange = kept


async def test_the_gateway_may_watch_any_number_of_agents(make_engine, serve):
    """Each watch keeps a connection; aiohttp's own bound is 100."""
    served = await serve(await make_engine())
    connector = served.gateway._session.connector
    assert isinstance(connector, aiohttp.TCPConnector)
    assert connector.limit == 0
