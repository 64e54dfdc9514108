"""An engine whose core hangs while its server lives gets no new requests, and what waits there goes elsewhere."""

import pytest
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.sections import Listen
from moe_gateway.engines import target_states
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.target_states import STALL_S
from moe_gateway.request import exchange
from moe_scheduling.engine.choice import Job, Send
from moe_scheduling.signals import EngineSignal, Target

from tests.gateway.clients import get
from tests.gateway.messages import OK, post, prompt
from tests.gateway.peers import answer_ok, never, rank_row
from tests.gateway.waiting import until

A, B, NOW_S = Target("a"), Target("b"), 100.0


@pytest.fixture
def dispatcher(tmp_path) -> Dispatcher:
    listen, engines = Listen(port=1), tuple(EngineAddress(name=name, url=f"http://{name}") for name in "ab")
    dispatcher = Dispatcher(GatewayConfig(listen=listen, admin=Listen(port=2), token_file=tmp_path, engines=engines))
    for name in "ab":
        dispatcher.set_ready(name, True, NOW_S)
    return dispatcher


def send(dispatcher, target=A):
    decision = dispatcher.choose(Job(10), NOW_S, {B if target == A else A})
    assert isinstance(decision, Send)
    return dispatcher.send(Job(10), (), None, decision, NOW_S)


def test_an_engine_with_work_and_without_steps_is_ejected_until_it_steps(dispatcher):
    dispatcher.set_reachable("a", True)
    dispatcher.observe(A, EngineSignal(step=1), NOW_S, NOW_S)
    sent = send(dispatcher)
    dispatcher.tick(NOW_S + STALL_S - 0.1)
    assert (dispatcher.stalled, dispatcher.is_accepting(A)) == (frozenset(), True)
    later_s = NOW_S + STALL_S + 0.1
    dispatcher.tick(later_s)
    assert (dispatcher.stalled, dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == ({A}, False, True)
    dispatcher.tick(later_s + 60.0)
    assert not dispatcher.is_accepting(A)
    dispatcher.answer(sent, later_s + 61.0)
    dispatcher.complete(sent, later_s + 62.0)
    dispatcher.settle(sent, later_s + 62.0)
    dispatcher.tick(later_s + 62.1)
    assert dispatcher.stalled == frozenset()
    dispatcher.tick(later_s + 100.0)
    assert dispatcher.is_accepting(A)


@pytest.mark.parametrize(
    ("change", "is_progress"),
    [
        ({"step": 2}, True),
        ({"computed_tokens": 9}, True),
        ({"waiting": 5}, False),
        ({"waiting_prefill_tokens": 9}, False),
    ],
)
def test_steps_are_progress_and_arrivals_are_none(dispatcher, change, is_progress):
    dispatcher.observe(A, EngineSignal(step=1), NOW_S, NOW_S)
    send(dispatcher)
    half_s = NOW_S + STALL_S / 2
    dispatcher.observe(A, EngineSignal(**({"step": 1} | change)), half_s, half_s)
    dispatcher.tick(NOW_S + STALL_S + 1.0)
    assert (dispatcher.stalled == frozenset()) is is_progress


def test_a_lost_source_of_signals_is_not_a_lost_engine(dispatcher):
    dispatcher.set_reachable("a", True)
    dispatcher.observe(A, EngineSignal(step=1), NOW_S, NOW_S)
    send(dispatcher)
    dispatcher.set_reachable("a", False)
    dispatcher.tick(NOW_S + STALL_S + 0.1)
    assert (dispatcher.is_accepting(A), dispatcher.is_abandoned(A, stream=False)) == (True, False)


def test_progress_never_goes_backwards(dispatcher):
    dispatcher.set_reachable("a", True)
    send(dispatcher)
    dispatcher.observe(A, EngineSignal(step=1), NOW_S, NOW_S)
    dispatcher.observe(A, EngineSignal(step=2), NOW_S + STALL_S, NOW_S + STALL_S)
    dispatcher.note_progress(A, NOW_S)
    dispatcher.tick(NOW_S + STALL_S + 1.0)
    assert dispatcher.stalled == frozenset()


def test_an_idle_engine_and_one_that_streams_do_not_hang(dispatcher):
    dispatcher.tick(NOW_S + 1000.0)
    assert dispatcher.stalled == frozenset()
    send(dispatcher)
    dispatcher.note_progress(A, NOW_S + STALL_S)
    dispatcher.tick(NOW_S + STALL_S + 10.0)
    assert dispatcher.stalled == frozenset()


def test_the_last_engine_is_used_though_it_hangs(dispatcher):
    dispatcher.set_ready("b", False, NOW_S)
    send(dispatcher)
    dispatcher.tick(NOW_S + STALL_S + 1.0)
    assert (dispatcher.stalled, dispatcher.is_accepting(A)) == ({A}, True)


def test_an_engine_with_a_stuck_rank_is_used_while_there_is_no_other(dispatcher):
    dispatcher.set_ready("a", True, NOW_S, stuck=True)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (False, True)
    dispatcher.tick(NOW_S + 60.0)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (False, True)
    dispatcher.set_ready("b", True, NOW_S, stuck=True)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (True, True)
    dispatcher.set_ready("b", True, NOW_S)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (False, True)
    dispatcher.set_ready("b", False, NOW_S)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (True, False)
    dispatcher.set_ready("a", True, NOW_S)
    dispatcher.set_ready("b", True, NOW_S)
    assert (dispatcher.is_accepting(A), dispatcher.is_accepting(B)) == (True, True)


@pytest.mark.parametrize("trouble", ["silent", "behind", "of_a_newer_agent"])
async def test_an_engine_whose_agent_names_a_rank_gets_nothing_new_while_another_takes_it(make_engine, serve, trouble):
    stuck, other = await make_engine(), await make_engine()
    served = await serve(stuck, other, dispatch={"policy": "roundRobin"})
    stuck.agent.say(ranks=[rank_row(running=1, trouble=trouble)])
    await until(lambda: not served.target_state(stuck.name).accepting)
    for _ in range(4):
        assert (await served.ask(post(prompt()))).json == OK
    assert (len(stuck.requests), len(other.requests)) == (0, 4)
    other.agent.say(accepting=False)
    await until(lambda: served.target_state(stuck.name).accepting)
    assert (await served.ask(post(prompt()))).json == OK
    stuck.agent.say(ranks=[rank_row()])
    other.agent.say(accepting=True)
    await until(lambda: served.target_state(other.name).accepting)
    assert served.target_state(stuck.name).accepting


async def test_what_waits_at_an_engine_that_hangs_is_answered_by_another(make_engine, serve, monkeypatch):
    for module in (target_states, exchange):
        monkeypatch.setattr(module, "STALL_S", 0.3)
    hung, good = await make_engine(never), await make_engine()
    served = await serve(hung, good, dispatch={"policy": "roundRobin"})
    clients = [await served.connect() for _ in range(8)]
    for client in clients:
        client.send(post(prompt(stream=True)))
    await until(lambda: served.gateway.dispatcher.stalled, "a stalled engine")
    rows = (await get(served, "/v1/state"))[1]["engines"]
    assert {row["name"]: row["stalled"] for row in rows} == {hung.name: True, good.name: False}
    assert [(await client.answer()).json for client in clients] == [OK] * 8
    assert (len(hung.requests), len(good.requests)) == (4, 8)
    assert not served.target_state(hung.name).accepting
    hung.script = answer_ok
    for client in clients[:2]:
        client.send(post(prompt()))
        assert (await client.answer()).json == OK
