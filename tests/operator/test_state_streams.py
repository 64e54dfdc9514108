"""The states of agents and gateways as they are pushed: how long they are valid, and which streams are open when."""

import asyncio
import itertools
from typing import Any, cast

import orjson
import pytest
from moe_contract.agent_state import AgentState, read_agent_state
from moe_contract.clients import Refused
from moe_contract.state_stream import NotStreamed, Silent
from moe_operator.api import parse_resource
from moe_operator.kubernetes.peers import Peer
from moe_operator.kubernetes.state_streams import (
    ASKED_FOR_S,
    LEAST_RETRY_S,
    LONGEST_RETRY_S,
    NUMBERS_EVERY_S,
    numbers_interval_s,
)
from moe_operator.kubernetes.store import Key
from state_wires import ENDED, GATEWAY, KEY, LOST, Followed, engine, settle, state
from virtual_time import run_in_virtual_time


def test_the_first_pass_waits_for_the_first_states_and_later_ones_have_the_newest() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state("starting"))
        followed.wires.say("http://g-0", orjson.dumps({"held": 3}))
        states = await followed.streams.fetch(KEY, [engine(), GATEWAY])
        assert states.engines["e-0"].phase == "starting"
        assert states.gateways["g-0"].held == 3
        assert followed.changes == [], "the pass that waits sees the first state"
        followed.wires.say("http://e-0", state("ready"))
        await settle()
        assert followed.changes == [(KEY, False)]
        states = await followed.streams.fetch(KEY, [engine(), GATEWAY])
        assert states.engines["e-0"].phase == "ready"
        assert len(followed.wires.opened) == 2, "a stream each, however many passes"
        assert followed.streams.is_pushed(KEY)
        await followed.streams.close()

    run_in_virtual_time(story())


def test_numbers_are_reported_as_such_and_what_is_the_same_is_not() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state())
        await followed.streams.fetch(KEY, [engine()])
        followed.wires.say("http://e-0", state(running=5))
        await settle()
        followed.wires.say("http://e-0", state(running=5))
        await settle()
        assert followed.changes == [(KEY, True)]
        await followed.streams.close()

    run_in_virtual_time(story())


@pytest.mark.parametrize(("accepting", "numbers_only"), [(True, True), (False, False)])
def test_a_held_request_is_more_than_a_number_only_where_no_engine_takes_any(
    accepting: bool, numbers_only: bool
) -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://g-0", orjson.dumps({"accepting": accepting, "held": 0}))
        await followed.streams.fetch(KEY, [GATEWAY])
        followed.wires.say("http://g-0", orjson.dumps({"accepting": accepting, "held": 3}))
        await settle()
        assert followed.changes == [(KEY, numbers_only)]
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_peer_that_cannot_be_reached_has_no_state_and_is_tried_with_longer_and_longer_pauses() -> None:
    async def story() -> None:
        followed = Followed()
        assert "e-0" not in await followed.streams.fetch(KEY, [engine()])
        await asyncio.sleep(300.0)
        times = [at for _, at in followed.wires.opened]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert max(pauses) <= LONGEST_RETRY_S
        assert 300.0 / LONGEST_RETRY_S <= len(times) <= 60
        followed.wires.say("http://e-0", state())
        await asyncio.sleep(LONGEST_RETRY_S)
        assert followed.changes == [(KEY, False)]
        assert "e-0" in await followed.streams.fetch(KEY, [engine()])
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_pass_brings_a_try_forward_but_not_more_often_than_allowed() -> None:
    async def story() -> None:
        followed = Followed()
        await followed.streams.fetch(KEY, [engine()])
        await asyncio.sleep(100.0)
        before = len(followed.wires.opened)
        await followed.streams.fetch(KEY, [engine()])
        await settle()
        times = [at for _, at in followed.wires.opened]
        for _ in range(50):
            await followed.streams.fetch(KEY, [engine()])
            await asyncio.sleep(0.1)
        after = [at for _, at in followed.wires.opened]
        assert before <= len(times) <= before + 1
        assert min(b - a for a, b in itertools.pairwise(after[before:])) >= LEAST_RETRY_S
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_stream_that_ended_is_opened_anew_and_its_state_stays_meanwhile() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state())
        await followed.streams.fetch(KEY, [engine()])
        followed.wires.say("http://e-0", ENDED, state())
        await settle()
        assert "e-0" in await followed.streams.fetch(KEY, [engine()])
        await asyncio.sleep(5.0)
        assert len(followed.wires.opened) == 2
        assert followed.changes == []
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_peer_that_ends_each_stream_at_once_is_not_asked_in_a_tight_loop() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", *[state(), ENDED] * 1000)
        await followed.streams.fetch(KEY, [engine()])
        await asyncio.sleep(300.0)
        assert len(followed.wires.opened) < 120
        assert followed.changes == []
        await followed.streams.close()

    run_in_virtual_time(story())


@pytest.mark.parametrize("word", [LOST, RuntimeError("whatever a peer sends")])
def test_a_state_is_not_valid_once_its_stream_cannot_be_opened_anew(word: str | Exception) -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state())
        await followed.streams.fetch(KEY, [engine()])
        followed.wires.say("http://e-0", word)
        await settle()
        followed.wires.queues.pop("http://e-0", None)
        await asyncio.sleep(5.0)
        assert followed.changes == [(KEY, False)]
        assert "e-0" not in await followed.streams.fetch(KEY, [engine()])
        await followed.streams.close()

    run_in_virtual_time(story())


def test_what_cannot_be_read_is_no_state_and_ends_no_stream() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", b"{")
        assert "e-0" not in await followed.streams.fetch(KEY, [engine()])
        followed.wires.say("http://e-0", state())
        await settle()
        assert "e-0" in await followed.streams.fetch(KEY, [engine()])
        assert followed.changes == [(KEY, False)]
        await followed.streams.close()

    run_in_virtual_time(story())


def test_only_streams_of_present_peers_are_open() -> None:
    async def story() -> None:
        followed = Followed()
        for url in ("http://e-0", "http://e-1", "http://elsewhere"):
            followed.wires.say(url, state())
        await followed.streams.fetch(KEY, [engine(), engine("e-1", "http://e-1")])
        assert followed.wires.open == 2
        await followed.streams.fetch(KEY, [engine("e-0", "http://elsewhere")])
        await settle()
        assert followed.wires.open == 1, "a pod that is gone, and one that has another address"
        followed.streams.forget(KEY)
        await settle()
        assert followed.wires.open == 0
        assert followed.streams.count == 0
        followed.wires.say("http://elsewhere", state("stopped"))
        await asyncio.sleep(60.0)
        assert followed.changes == []

    run_in_virtual_time(story())


def test_close_ends_every_stream_and_every_try() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", state())
        await followed.streams.fetch(KEY, [engine(), GATEWAY])
        await followed.streams.close()
        assert followed.wires.open == 0
        tries = len(followed.wires.opened)
        await asyncio.sleep(60.0)
        assert len(followed.wires.opened) == tries

    run_in_virtual_time(story())


def test_a_peer_that_does_not_stream_is_not_pushed() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", NotStreamed(state()))
        await followed.streams._follow(KEY, [engine()], 1.0)[0].answered.wait()
        assert not followed.streams.is_pushed(KEY)
        await followed.streams.close()

    run_in_virtual_time(story())


@pytest.mark.parametrize("word", [Silent("sent nothing"), Refused(404, b"")])
def test_a_peer_that_gives_no_stream_but_answers_is_asked_and_tried_again_later(word: Exception) -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", word)
        followed.wires.answers["http://e-0"] = state("starting")
        assert (await followed.streams.fetch(KEY, [engine()])).engines["e-0"].phase == "starting"
        assert not followed.streams.is_pushed(KEY)
        followed.wires.answers["http://e-0"] = state("ready")
        assert (await followed.streams.fetch(KEY, [engine()])).engines["e-0"].phase == "ready"
        await asyncio.sleep(0.9 * ASKED_FOR_S)
        assert len(followed.wires.opened) == 1
        followed.wires.say("http://e-0", state("draining"))
        await asyncio.sleep(0.2 * ASKED_FOR_S)
        assert followed.streams.is_pushed(KEY)
        assert (await followed.streams.fetch(KEY, [engine()])).engines["e-0"].phase == "draining"
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_first_state_that_comes_after_its_pass_is_reported() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0")
        assert "e-0" not in await followed.streams.fetch(KEY, [engine()])
        followed.wires.say("http://e-0", state())
        await settle()
        assert followed.changes == [(KEY, False)]
        assert "e-0" in await followed.streams.fetch(KEY, [engine()])
        await followed.streams.close()

    run_in_virtual_time(story())


def test_states_carry_the_time_at_which_they_were_taken_and_the_last_sign_of_life() -> None:
    async def story() -> None:
        followed = Followed()
        began_s = asyncio.get_running_loop().time()

        async def ages(*said: bytes) -> tuple[float, float]:
            followed.wires.say("http://e-0", *said)
            await settle()
            fresh = (await followed.streams.fetch(KEY, [engine()], interval_s=15.0)).freshness["e-0"]
            return round(fresh.as_of_s - began_s), round(fresh.alive_s - began_s)

        assert await ages(state()) == (0, 0)
        await asyncio.sleep(10.0)
        assert await ages() == (0, 0), "a pass changes nothing"
        assert await ages(b"") == (0, 10), "numbers may wait for the end of the interval"
        await asyncio.sleep(10.0)
        assert await ages(b"") == (20, 20), "changed numbers would have come"
        await asyncio.sleep(10.0)
        assert await ages(b"") == (30, 30)
        assert followed.changes == [], "a heartbeat is no change"
        await asyncio.sleep(1.0)
        assert await ages(state(running=5)) == (31, 31)
        await asyncio.sleep(10.0)
        assert await ages(b"") == (31, 41)
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_peer_that_is_asked_has_a_state_of_now() -> None:
    async def story() -> None:
        followed = Followed(most=0)
        followed.wires.answers["http://e-0"] = state()
        for _ in range(2):
            await asyncio.sleep(100.0)
            fresh = (await followed.streams.fetch(KEY, [engine()])).freshness["e-0"]
            now_s = asyncio.get_running_loop().time()
            assert (fresh.as_of_s, fresh.alive_s) == (pytest.approx(now_s), pytest.approx(now_s))
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_state_and_its_time_belong_together_though_a_newer_one_comes_while_another_peer_is_asked() -> None:
    async def story() -> None:
        followed = Followed(most=1)
        followed.wires.say("http://e-0", state(running=1))
        slow = engine("e-1", "http://e-1")

        async def ask(_: object, peer: Peer) -> AgentState:
            await asyncio.sleep(0.5)
            followed.wires.say("http://e-0", state(running=2))
            await asyncio.sleep(0.5)
            return read_agent_state(state())

        followed.streams._ask = cast(Any, ask)
        began_s = asyncio.get_running_loop().time()
        states = await followed.streams.fetch(KEY, [engine(), slow])
        assert states.engines["e-0"].ranks[0].running == 1
        assert states.freshness["e-0"].as_of_s == pytest.approx(began_s, abs=0.1)
        assert states.freshness["e-1"].as_of_s == pytest.approx(began_s + 1.0, abs=0.1)
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_peer_without_a_state_has_no_freshness() -> None:
    async def story() -> None:
        followed = Followed()
        assert (await followed.streams.fetch(KEY, [engine()])).freshness == {}
        await followed.streams.close()

    run_in_virtual_time(story())


def test_a_heartbeat_without_a_state_opens_no_stream() -> None:
    async def story() -> None:
        followed = Followed()
        followed.wires.say("http://e-0", b"", Silent("sent nothing"))
        followed.wires.answers["http://e-0"] = state()
        assert "e-0" in await followed.streams.fetch(KEY, [engine()])
        assert not followed.streams.is_pushed(KEY)
        await followed.streams.close()

    run_in_virtual_time(story())


def test_beyond_the_most_streams_a_peer_is_asked() -> None:
    async def story() -> None:
        followed = Followed(most=1)
        followed.wires.say("http://e-0", state())
        await followed.streams.fetch(KEY, [engine()])
        other = Key("ns", "other")
        followed.streams._follow(other, [engine("e-1", "http://e-1")], 1.0)
        assert followed.streams.is_pushed(KEY)
        assert not followed.streams.is_pushed(other)
        await followed.streams.close()

    run_in_virtual_time(story())


@pytest.mark.parametrize(
    ("autoscaling", "seconds"),
    [
        (None, NUMBERS_EVERY_S),
        ({"maxReplicas": 3, "targets": {"queueWait": "1s"}}, 1.0),
        ({"maxReplicas": 3, "targets": {"queueWait": "1s"}, "interval": "500ms"}, 0.5),
        ({"maxReplicas": 3, "targets": {"queueWait": "1s"}, "interval": "10m"}, NUMBERS_EVERY_S),
        ({"maxReplicas": 3, "mode": "external"}, NUMBERS_EVERY_S),
    ],
)
def test_an_autoscaler_gets_several_states_for_each_decision(
    autoscaling: dict[str, Any] | None, seconds: float
) -> None:
    spec: dict[str, Any] = {"model": {"uri": "hf://org/model"}}
    if autoscaling is not None:
        spec["autoscaling"] = autoscaling
    document = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}, "spec": spec}
    assert numbers_interval_s(parse_resource(document)) == seconds
