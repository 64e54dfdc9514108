"""The parts of the live page that compute: rates, quantiles, findings, sizes, and the experts of an agent's answer."""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_state import EngineProcess, EngineState, StartProgress
from moe_contract.experts_state import read_experts
from moe_contract.gateway_config import EngineAddress, GatewaySettings, Group
from moe_contract.live_page import (
    EngineRow,
    HeldGroup,
    LiveSnapshot,
    PageFinding,
    RequestRow,
    TimePoint,
    write_event,
)
from moe_contract.request_record import RequestRecord
from moe_contract.typescript import main as generate
from moe_gateway.engines.fleet import Engine
from moe_gateway.live_page.changes import list_changed_settings, list_changes
from moe_gateway.live_page.experts import describe_experts
from moe_gateway.live_page.findings import find_problems
from moe_gateway.live_page.rates import Counters, find_quantile, measure_point, measure_ranks
from moe_gateway.live_page.snapshot import describe_start, find_status
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from tests.gateway.large_fleet import EXPERTS, LAYERS, make_experts, make_fleet, snapshot_of

A = Target("a")
BOUNDS = (0.1, 1.0, 10.0)
READY = EngineRow(name="a", status="ready", signal_source="agent", kv_usage=0.1)
WELL = LiveSnapshot(
    at_s=10.0, accepting=True, hold_limit=100, hold_timeout_s=60.0, point=TimePoint(at_s=10.0), engines=(READY,)
)


def counters(at_s: float, **signal: int) -> Counters:
    return Counters(at_s=at_s, signals={A: EngineSignal(**signal)}, ttft_counts=(0, 0, 0, 0))


@pytest.mark.parametrize(
    ("before", "after", "step_s", "tokens_per_s"),
    [
        (counters(0, step=10, running=1), counters(1, step=60, running=2, computed_tokens=500), 0.02, 500.0),
        (counters(0, step=10, running=0), counters(1, step=60, running=2, computed_tokens=500), None, 500.0),
        (counters(0, step=10, running=1), counters(1, step=10, running=1), None, None),
    ],
)
def test_a_rank_is_measured_while_it_has_requests(before, after, step_s, tokens_per_s):
    rate = measure_ranks(before, after)[A]
    assert (rate.step_s, rate.tokens_per_s) == (step_s, tokens_per_s)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (counters(0, step=10), counters(0, step=20)),
        (counters(0, step=10), counters(60, step=20)),
        (counters(0, step=10), counters(1, step=2)),
        (counters(0, step=10, computed_tokens=9), counters(1, step=20, computed_tokens=2)),
        (Counters(at_s=0, signals={}), counters(1, step=2)),
    ],
)
def test_no_rate_comes_from_a_restart_a_pause_or_an_unknown_rank(before, after):
    assert measure_ranks(before, after) == {}


def test_a_second_has_the_first_tokens_that_came_in_it():
    before = Counters(at_s=5.0, arrivals=3, ttft_counts=(1, 1, 0, 0), ttft_total_s=0.5, signals={})
    after = Counters(at_s=7.0, arrivals=7, ttft_counts=(1, 1, 4, 0), ttft_total_s=8.5, signals={})
    point = measure_point(before, after, {}, BOUNDS, at_s=1.0, held=2, in_flight=3)
    assert (point.ttft_s, point.ttft_p95_s, point.requests_per_s) == (2.0, pytest.approx(9.55), 2.0)
    assert (point.held, point.in_flight, point.step_s, point.tokens_per_s) == (2, 3, None, None)
    one = replace(before, at_s=6.0, ttft_counts=(1, 1, 1, 0), ttft_total_s=2.0)
    point = measure_point(before, one, {}, BOUNDS, at_s=1.0, held=0, in_flight=0)
    assert (point.ttft_s, point.ttft_p95_s) == (1.5, 1.5), "one alone is no bucket"
    assert measure_point(before, replace(before, at_s=99.0), {}, BOUNDS, at_s=1, held=0, in_flight=0).ttft_s is None


@given(st.lists(st.integers(0, 50), min_size=4, max_size=4), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_a_quantile_lies_within_the_bounds_and_rises_with_its_part(counts, one, other):
    low, high = (find_quantile(part, BOUNDS, counts) for part in sorted((one, other)))
    if not sum(counts):
        assert (low, high) == (None, None)
    else:
        assert 0.0 <= low <= high + 1e-9
        assert high <= BOUNDS[-1] + 1e-9


def held(count: int, oldest_s: float = 1.0) -> dict[str, object]:
    group = HeldGroup(priority=0, tenant="", requests=count, prompt_tokens=9, oldest_s=oldest_s)
    return {"point": TimePoint(at_s=10.0, held=count), "held": (group,)}


def engine(**changes: object) -> dict[str, object]:
    return {"engines": (replace(READY, **changes),)}


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, []),
        ({"engines": (), "accepting": False}, ["no_engine"]),
        (engine(status="unreachable") | {"accepting": False}, ["none_accepts", "engine_unreachable"]),
        (engine(status="stalled"), ["engine_stalled"]),
        (engine(status="ejected"), ["engine_ejected"]),
        (engine(status="notReady"), ["engine_notReady"]),
        (engine(status="starting"), ["engine_starting"]),
        (engine(status="failed"), ["engine_failed"]),
        (engine(status="stopped"), ["engine_stopped"]),
        (engine(status="draining"), ["engine_draining"]),
        ({"draining": True}, ["draining"]),
        (engine(signal_source="in_flight"), ["stale_signals"]),
        (engine(kv_usage=0.99), ["kv_full"]),
        (engine(ttft_factor=3.0), ["slow_engine"]),
        (engine(expert_balance=2.0), ["uneven_experts"]),
        (held(80), ["hold_queue_full"]),
        (held(3, oldest_s=50.0), ["held_long"]),
        (held(3), ["saturated"]),
        ({"point": TimePoint(at_s=1, ttft_s=2.0), "ttft_target_s": 1.0}, ["ttft_over_bound"]),
        ({"point": TimePoint(at_s=1, step_s=0.2), "step_target_s": 0.1}, ["step_over_bound"]),
        ({"point": TimePoint(at_s=1, ttft_s=2.0)}, []),
    ],
)
def test_each_problem_is_found_and_nothing_else(changes, kinds):
    found = find_problems(replace(WELL, **changes))
    assert [row.kind for row in found] == kinds
    assert not [row.advice for row in found if "below" in row.advice], "`moeserving top` has nothing below"


def test_an_engine_that_starts_or_failed_says_how_far_and_why():
    starting = engine(status="starting", words="loading weights 3 of 8 files, for 42 s")
    assert find_problems(replace(WELL, **starting))[0].message == "a starts: loading weights 3 of 8 files, for 42 s."
    failed = engine(status="failed", words="ended with: exit status 1")
    assert find_problems(replace(WELL, **failed))[0].message == (
        "a has failed and is started again: ended with: exit status 1."
    )


@pytest.mark.parametrize(
    ("phase", "start", "restarts", "last_exit", "words"),
    [
        ("starting", StartProgress(phase="loading weights", progress="3 of 8 files", age_s=42.4), 0, "",
         "loading weights 3 of 8 files, for 42 s"),
        ("starting", StartProgress(phase="compiling", age_s=90), 1, "killed by SIGKILL",
         "compiling, for 1 min 30 s; ended with: killed by SIGKILL"),
        ("backoff", None, 3, "exit status 1", "ended 3 times, the last time with: exit status 1"),
        ("backoff", None, 1, "x" * 1000, "ended with: " + "x" * 299 + "…"),
        ("ready", None, 3, "exit status 1", ""),
        ("draining", None, 0, "", ""),
    ],
)  # fmt: skip
def test_what_an_engine_does_stands_in_the_words_of_its_agent(phase, start, restarts, last_exit, words):
    process = EngineProcess(restarts=restarts, last_exit=last_exit)
    assert describe_start(EngineState(phase=phase, engine=process, start=start)) == words
    assert describe_start(None) == ""


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"is_offered": False}, "starting"),
        ({}, "unreachable"),
        ({"is_offered": False, "reported": EngineState(phase="ready")}, "unreachable"),
        ({"is_offered": False, "is_reachable": True}, "notReady"),
    ],
    ids=["a new pod", "of a fixed list", "answered before", "answers"],
)
def test_a_pod_whose_agent_has_not_answered_yet_starts(changes, status):
    address = EngineAddress(name="a", url="http://127.0.0.1:1", agent_url="http://127.0.0.1:2")
    engine = Engine(address=address, host=b"a", targets=(Target("a"),), **changes)
    assert find_status(engine, Target("a"), (), 0.0) == status


@pytest.mark.parametrize(
    ("status", "one", "two"),
    [
        ("unreachable", "a cannot be reached.", "a, b cannot be reached."),
        ("stalled", "a has requests and makes no steps.", "a, b have requests and make no steps."),
        ("ejected", "a failed and gets no new requests for now.", "a, b failed and get no new requests for now."),
        ("failed", "a has failed and is started again.", "a, b have failed and are started again."),
        ("notReady", "a is not ready.", "a, b are not ready."),
        ("stopped", "a was drained and has ended.", "a, b were drained and have ended."),
        ("starting", "a starts.", "a, b start."),
        ("draining", "a drains: it ends its streams and takes nothing new.",
         "a, b drain: they end their streams and take nothing new."),
    ],
)  # fmt: skip
def test_one_engine_and_several_are_said_in_their_own_grammar(status, one, two):
    rows = tuple(replace(READY, name=name, status=status) for name in ("a", "b"))
    ranks = tuple(replace(READY, name="a", rank=rank, status=status) for rank in range(2))
    found = [find_problems(replace(WELL, engines=engines))[0].message for engines in (rows[:1], ranks, rows)]
    assert found == [one, one, two]


def test_engines_that_start_are_each_as_far_as_they_say():
    rows = tuple(replace(READY, name=name, status="starting", words=words) for name, words in (("a", "x"), ("b", "y")))
    assert find_problems(replace(WELL, engines=rows))[0].message == "a, b start: x; y."
    assert find_problems(replace(WELL, engines=rows[:1] * 2))[0].message == "a starts: x."
    many = tuple(replace(rows[0], name=f"e-{number}", words=f"w{number}") for number in range(9))
    assert find_problems(replace(WELL, engines=many))[0].message == "e-0, e-1, e-2 and 6 more start: w0; w1; w2."


def seconds(*values: float | None, last_s: float = 9.0) -> list[TimePoint]:
    """Seconds with these times to first token, and between tokens a tenth of them, the last one at `last_s`."""
    return [
        TimePoint(at_s=last_s - age, ttft_s=value, step_s=None if value is None else value / 10)
        for age, value in zip(range(len(values) - 1, -1, -1), values, strict=True)
    ]


@pytest.mark.parametrize(
    ("points", "kinds"),
    [
        (seconds(*[0.2] * 60, *[0.9] * 10), ["ttft_unusual", "step_unusual"]),
        (seconds(*[0.2] * 60, *[0.25] * 10), []),
        (seconds(*[0.2] * 50, *[0.9] * 20), []),
        (seconds(*[0.2] * 20, *[0.9] * 10), []),
        (seconds(*[0.2] * 60, 0.9, *[None] * 9), []),
        (seconds(*[0.2, None] * 40, *[0.9] * 10), ["ttft_unusual", "step_unusual"]),
        (seconds(*[0.002] * 60, *[0.02] * 10), []),
        ([], []),
    ],
    ids=["slow", "a little", "slow for long", "short past", "one request", "gaps", "too small to matter", "nothing"],
)
def test_times_without_a_bound_are_compared_with_the_minutes_before(points, kinds):
    found = find_problems(WELL, points)
    assert [row.kind for row in found] == kinds
    assert [row.severity for row in found] == ["info"] * len(kinds)
    bounded = replace(WELL, ttft_target_s=5.0, step_target_s=5.0)
    assert find_problems(bounded, points) == (), "a bound decides where there is one"


def test_an_unusual_time_is_said_with_what_is_usual():
    (found, _) = find_problems(WELL, seconds(*[0.1] * 20, *[0.2] * 100, *[0.9] * 10))
    assert found.message == (
        "First tokens take longer than usual here: 900 ms of late, and in nine of ten seconds of the last 2 min "
        "at most 200 ms."
    )


@given(st.lists(st.none() | st.floats(0.0, 1e6), max_size=200), st.floats(0.0, 1e6))
def test_a_time_that_is_no_longer_than_before_is_never_unusual(values, least_s):
    before = [value if value is None else max(value, least_s) for value in values]
    assert find_problems(WELL, seconds(*before, *[least_s] * 10)) == ()


def in_force(**dispatch: object) -> GatewaySettings:
    groups = (Group(service="tiny-engine"), Group(service="tiny-canary", weight=0))
    return GatewaySettings(dispatch=EngineSettings(**dispatch), request=RequestSettings(), groups=groups)


def test_a_change_of_settings_is_an_event_with_both_values():
    before = in_force()
    assert list_changed_settings(before, before, 5.0, was_seen=True) == []
    assert list_changed_settings(before, in_force(), 5.0, was_seen=True) == []
    after = replace(
        in_force(targets=LatencyTargets(ttft_s=0.5)),
        request=RequestSettings(policy=RequestPolicy.FCFS),
        groups=(Group(service="tiny-engine"), Group(service="tiny-canary", weight=10)),
    )
    assert [row.message for row in list_changed_settings(before, after, 5.0, was_seen=True)] == [
        "Setting dispatch.targets.ttft_s: none → 0.5.",
        "Setting groups.tiny-canary.weight: 0 → 10.",
        "Setting request.policy: sjf → fcfs.",
    ]
    (gone, *_) = list_changed_settings(after, replace(after, groups=()), 5.0, was_seen=False)
    assert gone.message == "Setting groups.tiny-canary.weight: 10 → none, while no page was open."


def test_failed_requests_are_counted_and_the_worst_comes_first():
    rows = tuple(
        RequestRow(arrived_at_s=1.0, record=RequestRecord(request_id="r", status=status, problem="engine_error"))
        for status in (200, 502, None)
    )
    found = find_problems(replace(WELL, newest=rows, **engine(status="stalled", name="<b>")))
    assert [row.severity for row in found] == ["error", "warning"]
    assert found[1].message == "1 of the newest 2 requests failed, the last with engine_error."
    assert "below" not in found[1].advice


@pytest.mark.parametrize(
    ("requests", "refused", "status", "words"),
    [
        (72, 72, 404, ("72 of 72 requests since", "were refused", "most with 404", "path", "model", "a, b")),
        (10, 6, 401, ("6 of 10", "401", "key")),
        (10, 6, 429, ("6 of 10", "429", "quota")),
        (10, 6, 400, ("6 of 10", "400", "text of the answer says")),
        (1, 1, 404, ("1 of 1 request since", "was refused")),
    ],
)
def test_requests_that_are_mostly_refused_are_a_finding_with_the_likely_cause(requests, refused, status, words):
    shown = replace(WELL, requests=requests, refused=refused, refused_status=status, models=("a", "b"))
    (found,) = find_problems(shown)
    assert found.kind == "refused_requests"
    assert found.severity == "warning"
    assert all(word in f"{found.message} {found.advice}" for word in words), found


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_some_refused_requests_among_many_are_none(requests, refused):
    refused = min(refused, requests)
    kinds = [row.kind for row in find_problems(replace(WELL, requests=requests, refused=refused, refused_status=404))]
    assert kinds == (["refused_requests"] if 2 * refused > requests else [])


def test_changes_are_the_findings_that_begin_and_end_and_the_engines_that_come_and_go():
    other = replace(WELL, at_s=11.0, engines=(replace(READY, name="b"),))
    other = replace(other, findings=(PageFinding(kind="x", severity="error", message="It broke."),))
    assert list_changes(None, other) == []
    assert [row.message for row in list_changes(WELL, other)] == ["It broke.", "New engine: b.", "Engine gone: a."]
    assert next(row.message for row in list_changes(other, WELL)) == "Over: It broke."


@pytest.mark.parametrize(("engines", "ranks", "most_bytes"), [(64, 1, 70_000), (64, 8, 260_000)])
def test_the_snapshot_of_a_large_fleet_is_small(engines, ranks, most_bytes):
    text = write_event(snapshot_of(make_fleet(engines, ranks)))
    assert len(text) < most_bytes
    assert len(json.loads(text.split(b"data: ")[1])["engines"]) == engines * ranks


def test_the_experts_of_a_large_model_are_small():
    """58 layers of 256 experts on 64 ranks, sent only when they have changed."""
    experts = make_experts()
    assert len(write_event(experts)) < 30_000
    assert len(base64.b64decode(experts.by_expert)) == LAYERS * EXPERTS


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "No load of the experts is recorded yet: that takes scheduling.expert.window steps with requests."),
        ({"mode": "off"}, "scheduling.expert.mode is off."),
        ({"load": {"steps": 5}, "balance": {"mean": 1.5, "worst": 2.0}}, "version without this picture"),
        ({"load": {"steps": 5}, "heat": {"unit": 0.1, "by_expert": "AA==", "by_rank": "AA=="}}, ""),
    ],
)
def test_an_agents_answer_without_a_picture_says_why(changes, problem):
    shape = {"ranks": 1, "layers": 1, "experts": 1, "slots_per_rank": 1, "placement": {"version": 1}}
    state = read_experts(json.dumps({"mode": "observe", **shape, **changes}).encode())
    assert problem in describe_experts("a", state, 5.0).problem
    assert bool(problem) == bool(describe_experts("a", state, 5.0).problem)
    assert "does not spread" in describe_experts("a", None, 5.0).problem


def test_the_types_of_the_page_are_those_of_the_contract(tmp_path):
    assert generate(["--check"]) == 0
    assert generate(["--check", "--root", str(tmp_path)]) == 1
