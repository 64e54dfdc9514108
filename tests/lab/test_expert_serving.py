"""The bench of a real expert group: load, order of measurement and report, on a stand-in."""

import asyncio
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput
from moe_lab.experts import serving, waves
from moe_lab.experts.serve_report import (
    build_document,
    compare_windows,
    describe,
    describe_active,
    describe_pairs,
    engine_gains_s,
    render_decisions,
    render_pairs,
    warn,
)
from moe_lab.experts.serving import (
    DecisionLog,
    ExpertServingResult,
    Origin,
    Start,
    TargetPlacement,
    TimedDecision,
    WindowPair,
    crowd,
    measure,
    move,
)
from moe_lab.experts.waves import WaveSettings, Window, decode_step_ms, output_tokens_per_s, step_ms, tpot_ms
from moe_operator.local.failure import Failure
from moe_tools.comparison import build_salt
from moe_tools.replay import ReplayResult
from rich.console import Console

from tests.lab.expert_stand_ins import IDLE, SETTINGS, A, B, C, FakeGroup, answered, effort_of, failed, window_of
from tests.operator.experts_documents import DECISION, experts


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(serving, "WARM_UP_S", 0.0)
    monkeypatch.setattr(serving, "LOOK_EVERY_S", 0.0)


@pytest.fixture
def serve(monkeypatch):
    """Measures a stand-in; what was said comes with it."""

    def run(group: FakeGroup, **changes):
        said = []
        monkeypatch.setattr(serving, "run_wave", group.serve)
        return asyncio.run(measure(group, None, SETTINGS, effort_of(**changes), said.append)), said

    return run


# The load.


def test_a_wave_has_all_users_at_once():
    requests = WaveSettings(users=3, prompt_tokens=7, output_tokens=9).requests
    assert {(row.arrival_s, row.prompt_tokens, row.output_tokens) for row in requests} == {(0.0, 7, 9)}
    assert len(requests) == 3


def test_a_window_is_measured_by_steps_by_requests_and_by_tokens():
    window = window_of(0.01)
    assert step_ms(window) == pytest.approx(10.0)
    assert tpot_ms(window) == pytest.approx(10.0)
    assert output_tokens_per_s(window) == pytest.approx(44 / 0.24)


def test_a_decode_step_counts_from_the_last_first_token_of_a_wave():
    early, late = answered(0.1, 1.6), answered(0.5, 1.5)
    window = Window(waves=(ReplayResult(outcomes=(early, late, failed()), wall_s=2.0),), steps=1, balance=1.0)
    assert decode_step_ms(window) == pytest.approx(100.0)


def test_a_window_without_answers_has_no_figures():
    window = Window(waves=(ReplayResult(outcomes=(failed(),), wall_s=1.0),), steps=0, balance=1.0)
    assert [read(window) for read in (step_ms, decode_step_ms, tpot_ms, output_tokens_per_s)] == [None] * 4
    assert len(window.failed) == 1


def serve_model(monkeypatch, most: int | None):
    async def call(endpoint, method, path, body=None):
        if path == "/v1/models":
            return {"data": [{"id": "tiny", "max_model_len": most}]}
        return {"tokens": [len(body["prompt"])]}

    monkeypatch.setattr(waves, "call_json", call)
    monkeypatch.setattr("moe_tools.server.call_json", call)


def test_prompts_are_of_the_topic_in_the_servers_own_tokens(monkeypatch):
    serve_model(monkeypatch, 4096)
    monkeypatch.setattr(waves, "topic_texts", lambda: {"sources": "x" * 20_000, "prose": ""})
    load = asyncio.run(waves.prepare_waves("http://127.0.0.1:1", "sources", SETTINGS, 3))
    assert sum(load.prompts.pool) == 20_000
    assert (load.model, load.prompts.salt) == ("tiny", 3)


def test_a_request_that_the_model_does_not_take_is_reported_before_it_is_sent(monkeypatch):
    serve_model(monkeypatch, 14)
    with pytest.raises(InvalidInput, match="15 tokens, tiny takes 14"):
        asyncio.run(waves.prepare_waves("http://127.0.0.1:1", "prose", SETTINGS, 0))


# The order of measurement.


def test_where_active_moved_and_stayed_its_placement_is_b(serve):
    measured, said = serve(FakeGroup(plans=[("stayed", A), ("moved", B)]), active_s=0.2)
    assert (measured.start, measured.target) == (A, TargetPlacement(slots=B, origin=Origin.KEPT))
    assert [row.decision.outcome for row in measured.decisions] == ["stayed", "moved"]
    assert any("decision 2: moved" in line for line in said)


def test_where_active_rolled_its_move_back_b_is_what_it_had_moved_to(serve):
    measured, _ = serve(FakeGroup(plans=[("moved", B), ("rolledBack", A)]), active_s=0.2)
    assert measured.target == TargetPlacement(slots=B, origin=Origin.ROLLED_BACK)


def test_where_active_does_not_move_b_is_the_plan_of_the_product(serve):
    measured, _ = serve(FakeGroup(plans=[("stayed", A)]), active_s=0.1)
    assert measured.target.origin is Origin.PLANNED
    assert measured.target.gate.partition(":")[0] in ("move", "stay")
    assert measured.target.slots != A
    assert len(measured.pairs) == 3


def test_where_the_plan_is_the_placement_itself_nothing_is_compared(serve, monkeypatch):
    same = SimpleNamespace(candidate=SimpleNamespace(physical_to_logical=np.array(A)))
    monkeypatch.setattr(serving, "plan_document", lambda *_: same)
    measured, _ = serve(FakeGroup())
    assert (measured.target, measured.pairs) == (None, ())
    assert "nothing better" in describe(measured, IDLE)[-1]
    assert build_document(measured, SETTINGS, "prose", effort_of(), IDLE)["placements"]["b"] is None


def test_of_several_moves_that_were_rolled_back_b_is_the_most_promising(serve):
    group = FakeGroup(plans=[("moved", B), ("rolledBack", A), ("moved", C), ("rolledBack", A)], predicted=[3e-3, 1e-3])
    measured, _ = serve(group, active_s=0.2)
    assert measured.target == TargetPlacement(slots=B, origin=Origin.ROLLED_BACK)


def test_the_mode_is_active_for_its_time_and_observing_for_the_pairs(serve):
    group = FakeGroup(plans=[("moved", B)])
    serve(group, active_s=0.1)
    modes = [row[1] for row in group.calls if row[0] == "set"]
    assert modes == ["scheduling.expert.mode=active", "scheduling.expert.mode=observe"]
    last = max(at for at, row in enumerate(group.calls) if row[0] == "set")
    assert [row[1] for row in group.calls[last:] if row[0] == "apply"] == [A, B, A, B]


def test_the_order_turns_with_each_pair_and_both_windows_have_the_same_prompts(serve, monkeypatch):
    group = FakeGroup(plans=[("moved", B)])
    windows = []
    measure_window = serving.measure_window

    async def noted(group, wave, first, waves, *, moved):
        windows.append((group.slots, first, waves))
        return await measure_window(group, wave, first, waves, moved=moved)

    monkeypatch.setattr(serving, "measure_window", noted)
    measured, _ = serve(group, active_s=0.1)
    assert [row[0] for row in windows] == [A, B, B, A, A, B]
    firsts = [row[1] for row in windows]
    assert firsts[0::2] == firsts[1::2]
    assert len(set(firsts)) == 3
    assert {len(pair.first.waves) for pair in measured.pairs} == {windows[0][2]} == {2}
    assert all(step_ms(pair.first) > step_ms(pair.second) for pair in measured.pairs)


def test_a_wave_that_counts_nowhere_comes_between_a_move_and_its_window(serve):
    group = FakeGroup(plans=[("moved", B)])
    serve(group, active_s=0.1)
    counted = {build_salt(5, number * 256 + wave, 0) for number in range(3) for wave in range(2)}
    for at, row in enumerate(group.calls):
        if row[0] == "apply":
            assert group.calls[at + 1][0] == "wave"
            assert group.calls[at + 1][1] not in counted


def test_the_gain_that_the_engine_measured_is_kept_where_something_moved(serve):
    measured, _ = serve(FakeGroup(plans=[("moved", B)]), active_s=0.1)
    assert [pair.first.engine_gain_s for pair in measured.pairs] == [-0.002, -0.002, None]
    assert [pair.second.engine_gain_s for pair in measured.pairs] == [0.002, None, 0.002]
    assert engine_gains_s(measured.pairs) == [0.002] * 4


def test_crowded_puts_the_hottest_experts_on_the_first_rank(serve):
    document = ExpertsState.model_validate(experts())
    first = crowd(document)[0]
    assert set(first[:3]) == {0, 1}
    assert set(first[3:]) == {2, 3}
    measured, _ = serve(FakeGroup(), start=Start.CROWDED)
    assert measured.start == crowd(document)


def test_crowded_needs_a_load():
    with pytest.raises(Failure, match="no load was recorded"):
        crowd(ExpertsState.model_validate(experts(load={"steps": 0, "tokens": None})))


def test_a_group_that_does_not_move_is_reported_with_its_last_decision(monkeypatch):
    monkeypatch.setattr(serving, "MOVE_TIMEOUT_S", 0.0)
    group = FakeGroup(obeys=False)
    group.decide("failed", A, reason="a rank cannot")

    async def wave(number):
        return await group.serve(None, None, number)

    with pytest.raises(Failure, match="failed a rank cannot"):
        asyncio.run(move(group, B, wave))


def test_a_placement_that_is_there_is_not_asked_for_again():
    group = FakeGroup()

    async def wave(number):
        return await group.serve(None, None, number)

    assert asyncio.run(move(group, A, wave)) is False
    assert [row[0] for row in group.calls] == ["wave"]


def test_a_load_that_is_not_answered_ends_the_measurement(monkeypatch):
    async def refuse(load, settings, salt):
        return ReplayResult(outcomes=(failed(),), wall_s=0.1)

    monkeypatch.setattr(serving, "run_wave", refuse)
    with pytest.raises(Failure, match="HTTP 503 nobody there"):
        asyncio.run(measure(FakeGroup(), None, SETTINGS, effort_of(active_s=0.1), print))


def test_the_log_keeps_a_placement_that_a_later_look_no_longer_has():
    log = DecisionLog(after=12)
    group = FakeGroup()
    group.number = 12
    group.decide("moved", B)
    assert [row.number for row in log.note(1.0, asyncio.run(group.look()))] == [13]
    group.rows[0]["measured_gain_s"] = 0.5
    group.decide("stayed", C)
    assert [row.number for row in log.note(2.0, asyncio.run(group.look()))] == [14]
    first = log.rows[0]
    assert (first.at_s, first.decision.measured_gain_s, first.decision.physical_to_logical) == (1.0, 0.5, B)


def test_the_log_leaves_out_what_was_decided_before():
    group = FakeGroup()
    group.decide("applied", B)
    log = DecisionLog(after=1)
    assert log.note(1.0, asyncio.run(group.look())) == []
    assert log.rows == ()


def test_one_pair_is_enough_and_its_interval_is_open(serve):
    measured, _ = serve(FakeGroup(plans=[("moved", B)]), active_s=0.1, pairs=1)
    assert "no difference is shown" in describe_pairs(measured)[0]


# The report.


def measured_of(pairs, outcomes=()) -> ExpertServingResult:
    document = ExpertsState.model_validate(experts())
    rows = [
        ExpertsState.model_validate(experts(decisions=[{**DECISION, "outcome": outcome}])).decisions[0]
        for outcome in outcomes
    ]
    decisions = tuple(TimedDecision(at_s=float(at), decision=row) for at, row in enumerate(rows))
    target = TargetPlacement(slots=B, origin=Origin.KEPT)
    return ExpertServingResult(start=A, target=target, decisions=decisions, pairs=tuple(pairs), document=document)


def pairs_of(*steps: tuple[float, float]) -> list[WindowPair]:
    return [WindowPair(first=window_of(a), second=window_of(b, balance=1.05)) for a, b in steps]


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([(0.010, 0.008), (0.020, 0.0161), (0.010, 0.0081)], "shorter"),
        ([(0.008, 0.010), (0.0161, 0.020), (0.0081, 0.010)], "longer"),
        ([(0.010, 0.011), (0.011, 0.010), (0.010, 0.010)], "no difference is shown"),
    ],
)
def test_the_sentence_follows_the_interval(steps, says):
    assert says in describe_pairs(measured_of(pairs_of(*steps)))[0]


def test_a_metric_that_was_not_measured_is_no_number():
    empty = Window(waves=(ReplayResult(outcomes=(failed(),), wall_s=1.0),), steps=0, balance=1.0)
    rows = {row.metric: row for row in compare_windows([WindowPair(first=empty, second=empty)])}
    assert rows["step, mean"].ratio is None
    assert rows["balance"].ratio is not None
    assert describe_pairs(measured_of([WindowPair(first=empty, second=empty)])) == ["the steps were not counted"]


def test_what_active_did_is_counted():
    lines = describe_active(measured_of([], outcomes=("stayed", "moved", "rolledBack")))
    assert lines == ["in the mode active 3 decisions: 1 moved, 1 rolled back by itself"]
    assert describe_active(measured_of([])) == ["in the mode active nothing was decided"]


def test_a_busy_machine_is_reported():
    assert "measure again when idle" in warn({"load_average": 1.5, "cores": 2})[0]
    assert warn(IDLE) == []


def test_tables_and_document_have_everything():
    measured = measured_of(pairs_of((0.010, 0.008), (0.010, 0.008)), outcomes=("moved",))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_pairs(measured), render_decisions(measured))
    text = console.export_text()
    assert "active moved there and stayed there" in text
    assert "1.200" in text
    assert "0.800 [0.800, 0.800]" in text
    document = json.loads(json.dumps(build_document(measured, SETTINGS, "prose", effort_of(), IDLE)))
    assert document["placements"]["b"] == [list(row) for row in B]
    assert document["settings"]["start"] == "initial"
    assert document["active"][0]["outcome"] == "moved"
    assert document["pairs"][0]["b"]["step, mean"] == pytest.approx(8.0)
    assert next(row["verdict"] for row in document["comparisons"]) == "better"
