"""The soak: its rules, its answers and faults, and a short one with a fixed seed through real processes.

The short one grows by requests and kinds of faults, not by time, and asserts guarantees alone.
"""

import asyncio
import json
import subprocess
import sys
from itertools import islice
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_lab.soak import answers
from moe_lab.soak.answers import ReadAnswer, SoakRoute, mark_prompt, owed_text, read_mark, read_piece, read_stream
from moe_lab.soak.deliveries import Deliveries, EngineRecords, Received, SoakOutcome, judge
from moe_lab.soak.faults import EngineFault, GatewayFault, plan_faults
from moe_lab.soak.injection import FaultInjector
from moe_lab.soak.observation import DESCRIPTOR_TOLERANCE, MEMORY_TOLERANCE_BYTES, GatewayReport, find_exceptions
from moe_lab.soak.page import EngineMode, EnginePage
from moe_lab.soak.traffic import Leaving, SoakRequest, plan_request

REQUESTS = 4000
STREAM = SoakRequest(number=7, api=SoakRoute.CHAT, stream=True, tokens=3, text_bytes=200)
PIECE = SoakRequest(number=7, api=SoakRoute.CHAT, stream=False, tokens=3, text_bytes=200)
WHOLE = ReadAnswer(text=owed_text(7, 3), ends=1)


def got(text: str = owed_text(7, 3), ends: int = 1, **more) -> ReadAnswer:
    return ReadAnswer(text=text, ends=ends, **more)


JUDGED = {
    "whole": (STREAM, Received(status=200, answer=WHOLE, is_complete=True), SoakOutcome.WHOLE),
    "of a real engine": (
        STREAM,
        Received(status=200, answer=got("some text"), is_complete=True, is_mock=False),
        SoakOutcome.WHOLE,
    ),
    "left": (STREAM, Received(status=200, answer=got(ends=0), has_left=True), SoakOutcome.LEFT),
    "foreign tokens": (STREAM, Received(status=200, answer=got(" 8.0"), is_complete=True), SoakOutcome.WRONG),
    "a token twice": (STREAM, Received(status=200, answer=got(" 7.0 7.0"), is_complete=True), SoakOutcome.WRONG),
    "an end without all tokens": (
        STREAM,
        Received(status=200, answer=got(" 7.0"), is_complete=True),
        SoakOutcome.WRONG,
    ),
    "two ends": (STREAM, Received(status=200, answer=got(ends=2), is_complete=True), SoakOutcome.WRONG),
    "more after the end": (
        STREAM,
        Received(status=200, answer=WHOLE, is_complete=True, surplus=True),
        SoakOutcome.TWICE,
    ),
    "a stream that had begun": (
        STREAM,
        Received(status=200, answer=got(" 7.0", ends=0, error="x", has_begun=True), is_complete=True),
        SoakOutcome.STREAM_BROKEN,
    ),
    "a stream that had begun by a token without text": (
        STREAM,
        Received(status=200, answer=got("", ends=0, error="x", has_begun=True), is_complete=True),
        SoakOutcome.STREAM_BROKEN,
    ),
    "a stream that had begun, an error and an end": (
        STREAM,
        Received(status=200, answer=got(" 7.0", error="x", has_begun=True), is_complete=True),
        SoakOutcome.STREAM_BROKEN,
    ),
    "an error and an end before the first token": (
        STREAM,
        Received(status=200, answer=got("", error="x"), is_complete=True),
        SoakOutcome.ERROR,
    ),
    "a stream that was cut": (
        STREAM,
        Received(status=200, answer=got(" 7.0", ends=0, has_begun=True)),
        SoakOutcome.STREAM_BROKEN,
    ),
    "an error before its first token": (
        STREAM,
        Received(status=200, answer=got("", ends=0, error="x"), is_complete=True),
        SoakOutcome.ERROR,
    ),
    "a stream without anything": (STREAM, Received(status=200, answer=got("", ends=0)), SoakOutcome.LOST),
    "an answer in one piece that was cut": (PIECE, Received(status=200), SoakOutcome.LOST),
    "nothing": (PIECE, Received(), SoakOutcome.LOST),
    "nothing, of a gateway that was killed": (PIECE, Received(is_gateway_killed=True), SoakOutcome.GATEWAY_KILLED),
    "no answer in time": (PIECE, Received(timed_out=True), SoakOutcome.LOST),
    "an error": (PIECE, Received(status=503, is_complete=True), SoakOutcome.ERROR),
}


@pytest.mark.parametrize(("request_", "received", "outcome"), JUDGED.values(), ids=JUDGED)
def test_each_end_of_a_request_has_its_outcome(request_, received, outcome):
    assert judge(request_, received, lambda: 1) is outcome


def test_an_error_after_both_attempts_is_counted_apart_and_breaks_a_guarantee_too():
    assert judge(PIECE, Received(status=502, is_complete=True), lambda: 2) is SoakOutcome.ATTEMPTS_FAILED
    deliveries = Deliveries()
    deliveries.add(PIECE, SoakOutcome.ATTEMPTS_FAILED, "")
    deliveries.add(PIECE, SoakOutcome.GATEWAY_KILLED, "")
    assert (deliveries.finished, deliveries.broken, len(deliveries.examples)) == (2, 1, 1)


def test_records_say_what_was_given_to_more_engines_than_there_are_attempts():
    records = EngineRecords()
    records.read(b"r 1\nr 2\nf 2\n")
    records.read(b"r 1\nr 3\nf 1\nf 2\n")
    records.read(b"r 3\nr 3\n")
    assert (records.given(1), records.repeated, records.computed_twice, records.overwritten) == (2, 2, 1, [3])


def test_a_token_that_completes_no_character_begins_a_chat():
    event = b'data: {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": null}]}\n\n'
    assert read_stream(SoakRoute.CHAT, event) == ReadAnswer(text="", ends=0, has_begun=True)


@pytest.mark.parametrize("api", SoakRoute)
@given(number=st.integers(0, 10**9), tokens=st.integers(1, 12), cut=st.integers(0, 10_000))
def test_what_an_engine_writes_is_what_a_client_reads(api, number, tokens, cut):
    assert read_piece(api, answers.build_piece(api, number, tokens)) == ReadAnswer(
        text=owed_text(number, tokens), ends=1
    )
    stream = answers.build_first_events(api, number)
    stream += b"".join(answers.build_token_event(api, number, index) for index in range(tokens))
    stream += answers.build_last_events(api, number, tokens)
    assert read_stream(api, stream) == ReadAnswer(text=owed_text(number, tokens), ends=1, has_begun=True)
    assert not read_stream(api, answers.build_first_events(api, number)).has_begun
    part = read_stream(api, stream[: cut % len(stream)])
    assert owed_text(number, tokens).startswith(part.text)
    assert read_stream(api, answers.build_error_event(api)).error
    assert read_mark(mark_prompt(number, tokens).encode()) == (number, tokens)


@pytest.mark.parametrize("api", SoakRoute)
@given(st.recursive(st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_is_no_answer_is_said_so(api, document):
    with pytest.raises(ValueError, match="no answer of"):
        read_piece(api, json.dumps(document).encode())


def test_requests_follow_from_seed_and_number_and_are_of_all_kinds():
    planned = [plan_request(3, number) for number in range(3000)]
    assert planned == [plan_request(3, number) for number in range(3000)]
    assert planned[:20] != [plan_request(4, number) for number in range(20)]
    assert {(request.api, request.stream) for request in planned} == {
        (api, kind) for api in SoakRoute for kind in (True, False)
    }
    assert {request.leaving for request in planned} == set(Leaving)
    assert len({request.text_bytes for request in planned}) >= 3
    for request in planned[:200]:
        assert read_mark(request.encode()) == (request.number, request.tokens)


@pytest.mark.parametrize("kinds", [tuple(EngineFault), tuple(GatewayFault)])
def test_each_kind_of_fault_comes_once_before_one_comes_again(kinds):
    faults = list(islice(plan_faults(5, kinds, purpose="x"), 40))
    assert {fault.kind for fault in faults[: len(kinds)]} == set(kinds)
    assert faults == list(islice(plan_faults(5, kinds, purpose="x"), 40))
    assert all(0.0 < fault.duration_s < 60.0 for fault in faults)


class Striking(FaultInjector):
    """Strikes without processes: a fault lasts until it is let go."""

    def __init__(self, turn, now, gate):
        testbed = SimpleNamespace(mocks=[SimpleNamespace(name="engine-0")], gateways=[SimpleNamespace(is_steady=False)])
        super().__init__(testbed, frozenset, lambda _line: None, turn, now)
        self.gate = gate

    async def _wait_for_others(self, victim):
        pass

    async def _strike_engine(self, victim, kind, duration_s):
        await self.gate.wait()

    _strike_gateway = _strike_engine


async def test_a_gateway_fails_during_a_fault_of_an_engine_and_engines_one_at_a_time():
    of_engines, of_gateways, now, gate = asyncio.Lock(), asyncio.Lock(), [], asyncio.Event()
    rows = [(of_engines, EngineFault), (of_engines, EngineFault), (of_gateways, GatewayFault)]
    injectors = [Striking(turn, now, gate) for turn, _ in rows]
    plans = [plan_faults(0, tuple(kinds), purpose="x") for _, kinds in rows]
    tasks = [
        asyncio.create_task(each.run(faults, lambda: True, lambda each=each: each.injected.total() > 0))
        for each, faults in zip(injectors, plans, strict=True)
    ]
    async with asyncio.timeout(60):
        while len(now) < 2:
            await asyncio.sleep(0)
        assert sorted(type(kind).__name__ for kind in now) == ["EngineFault", "GatewayFault"]
        gate.set()
        await asyncio.gather(*tasks)
    assert sum(each.overlaps for each in injectors) >= 1
    assert [each.injected.total() for each in injectors] == [1, 1, 1]
    assert now == []


def test_a_page_carries_the_mode_to_the_engine_and_its_steps_back(tmp_path):
    ours, theirs = EnginePage(tmp_path / "page"), EnginePage(tmp_path / "page")
    assert theirs.mode is EngineMode.NORMAL
    for fault in EngineFault:
        if fault.mode is not None:
            ours.mode = fault.mode
            assert theirs.mode is fault.mode
    theirs.report(5, 2)
    assert ours.read_steps() == (5, 2)
    ours.close()
    theirs.close()


def report(**changes) -> GatewayReport:
    quiet = {
        "name": "gateway-0",
        "is_steady": True,
        "in_flight": 0,
        "held": 0,
        "unanswered_tokens": 0,
        "finished": 9,
        "memory_start_bytes": 100,
        "memory_end_bytes": 100 + MEMORY_TOLERANCE_BYTES,
        "descriptors_start": 20,
        "descriptors_end": 20 + DESCRIPTOR_TOLERANCE,
        "exceptions": (),
    }
    return GatewayReport(**quiet | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"in_flight": 1},
        {"held": 1},
        {"unanswered_tokens": 1},
        {"memory_end_bytes": 101 + MEMORY_TOLERANCE_BYTES},
        {"descriptors_end": 21 + DESCRIPTOR_TOLERANCE},
        {"exceptions": ("Traceback",)},
    ],
)
def test_what_a_gateway_has_left_over_is_a_problem(changes):
    assert report().problems == []
    assert len(report(**changes).problems) == 1


def test_exceptions_are_found_in_a_log():
    assert find_exceptions('{"message":"request"}\nTraceback (most recent call last):\n') == [
        "Traceback (most recent call last):"
    ]


@pytest.mark.timeout(900)
def test_a_short_soak_keeps_every_guarantee_and_leaves_no_process(tmp_path):
    document_path = tmp_path / "soak.json"
    options = ["--requests", str(REQUESTS), "--seed", "1", "--connections", "24", "--fault-every", "50"]
    options += ["--no-long-faults", "--json", str(document_path), "--logs", str(tmp_path / "logs")]
    command = [sys.executable, "-m", "moe_lab.soak", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=840)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(document_path.read_text())
    assert document["problems"] == []
    assert document["requests"] >= REQUESTS
    assert document["official_clients"] > 0
    short = {kind.value for kind in (*EngineFault, *GatewayFault) if not kind.is_long}
    assert short <= document["faults"].keys()
    assert {"/v1/messages, stream", "/v1/responses, one piece"} <= document["traffic"].keys()
    left = [each for each in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(each.info["cmdline"] or ())]
    assert left == []
