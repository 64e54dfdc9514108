"""Any order of failures of engines that exchange blocks: each token once, none wrong, nothing left behind."""

import asyncio
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moe_contract.control_tokens import ControlTokens
from moe_contract.documents import parse_model
from moe_contract.gateway_config import GatewayConfig
from moe_gateway.gateway import Gateway

from tests.gateway.clients import Served
from tests.gateway.messages import post
from tests.gateway.peers import FakeAgent, MockEngine
from tests.gateway.split_engines import PATHS, WRONG, Cluster, SplitEngine, body_of, read_stream, text_of
from tests.gateway.waiting import free_port, until

KINDS = [None, None, None, "reset", "dies", "dead", "event", "dead event", 500, 503, 400, "midway"]


def _odd_parameters(_params):
    return {"do_remote_prefill": True}


def _failures(*more):
    return st.lists(st.sampled_from([*KINDS, *more]), max_size=5)


PLANS = st.fixed_dictionaries({"prefill": _failures(_odd_parameters), "decode": _failures(), "whole": _failures()})
ROLES = st.lists(st.sampled_from(["prefill", "decode", "unified"]), min_size=2, max_size=3)
# Route, whether a stream, and whether the client leaves at once.
REQUESTS = st.lists(st.tuples(st.sampled_from(sorted(PATHS)), st.booleans(), st.booleans()), min_size=1, max_size=6)


@pytest.mark.parametrize("continuation", [None, {}], ids=["plain", "continued"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(roles=ROLES, plans=st.lists(PLANS, min_size=3, max_size=3), requests=REQUESTS)
def test_any_order_of_failures(tmp_path, continuation, roles, plans, requests):
    reports = []
    loop = uvloop.new_event_loop()
    loop.set_exception_handler(lambda _loop, context: reports.append(context))
    try:
        loop.run_until_complete(_example(tmp_path, continuation, roles, plans, requests))
    finally:
        loop.close()
    assert reports == []


async def _example(folder: Path, continuation, roles, plans, requests):
    cluster = Cluster()
    scripts = [SplitEngine(cluster, {phase: list(rows) for phase, rows in plan.items()}) for plan in plans]
    engines = [
        MockEngine(f"{role}-{number}", script)
        for number, (role, script) in enumerate(zip(roles, scripts, strict=False))
    ]
    for role, engine in zip(roles, engines, strict=True):
        await engine.start()
        engine.agent = FakeAgent(engine.url)
        engine.agent.say(kv_transfer={"role": role, "peers": "same", "token_bytes": 1000.0})
        await engine.agent.start()
    served = await _serve(folder, engines, continuation)
    try:
        await until(lambda: len(served.gateway.dispatcher.placements.roles) == len(served.accepting) == len(engines))
        await _ask_all(served, requests)
        await until(lambda: served.gateway.dispatcher.in_flight == 0, "no request in flight")
        _check(served, scripts)
    finally:
        await served.close()
        for engine in engines:
            await engine.stop()


async def _serve(folder, engines, continuation):
    (folder / "token").write_text("a-token")
    document = {
        "listen": {"port": free_port()},
        "admin": {"port": free_port()},
        "token_file": str(folder / "token"),
        "engines": [engine.address for engine in engines],
        "disaggregation": {},
        "continuation": continuation,
        # Where all engines are ejected.
        "limits": {"hold_timeout_s": 0.3},
    }
    config = parse_model(GatewayConfig, document)
    served = Served(Gateway(config, ControlTokens(folder / "token")), config)
    await served.gateway.start()
    return served


async def _ask_all(served, requests):
    answers = await asyncio.gather(*(_ask(served, number, *request) for number, request in enumerate(requests)))
    for text, expected in answers:
        assert text is None or text.startswith("error") or text == expected
        assert text is None or WRONG not in text


async def _ask(served, number, route, stream, leaves):
    """The text of an answer, and what it ought to be; None for one that did not come whole."""
    body = body_of(route, prompt=f"Which of these {number} words comes first? " * 60, temperature=0)
    client = await served.connect()
    client.send(post(body | {"stream": True} if stream else body, PATHS[route]))
    if leaves:
        await asyncio.sleep(0)
        client.reset()
        return None, ""
    try:
        answer = await client.answer()
    except asyncio.IncompleteReadError:
        return None, ""
    if answer.status != 200:
        return None, ""
    return read_stream(answer.body) if stream else answer.json["choices"][0]["text"], text_of(body)


def _check(served, scripts):
    dispatcher = served.gateway.dispatcher
    assert dispatcher.held == 0
    for state in dispatcher.target_states.values():
        assert (state.in_flight, state.unanswered_prefill_tokens) == (0, 0)
    bodies = [(phase, body.get("kv_transfer_params")) for script in scripts for phase, body in script.bodies]
    # Parameters are sent once, so nobody reads blocks that another one has freed.
    sent = [params["remote_request_id"] for phase, params in bodies if phase == "decode"]
    assert len(sent) == len(set(sent))
