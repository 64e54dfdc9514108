"""The bench of a real expert group, with a group and a server that are stand-ins."""

import asyncio
import io
import json
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput
from moe_lab.experts import group as group_module
from moe_lab.experts import serve_command as command
from moe_lab.experts import serving, waves
from moe_lab.experts.__main__ import app
from moe_lab.experts.group import NO_PREFIX_CACHE, SAMPLE, LocalGroup, edit_sample, plan_group, read_sample, standing
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
    Effort,
    Measured,
    Origin,
    Pair,
    Seen,
    Start,
    Target,
    crowd,
    measure,
    measure_pairs,
    move,
)
from moe_lab.experts.waves import WaveSettings, Window, decode_step_ms, output_tokens_per_s, step_ms, tpot_ms
from moe_operator.api import load_resource
from moe_operator.local.failure import Failure
from moe_scheduling.expert.decision import ExpertSettings
from moe_tools.comparison import build_salt
from moe_tools.deployment import find_checkout
from moe_tools.replay import Answered, Failed, Run
from rich.console import Console
from typer.testing import CliRunner

from tests.operator.experts_documents import DECISION, PLACED, experts

A = tuple(tuple(row) for row in PLACED)
B = ((0, 2, 3, 1, 2, 3), (0, 2, 3, 1, 2, 3))
C = ((0, 3, 2, 1, 3, 2), (0, 3, 2, 1, 3, 2))
SETTINGS = WaveSettings(users=2, prompt_tokens=4, output_tokens=11)
IDLE = {"load_average": 0.0, "cores": 2}


@pytest.fixture(autouse=True)
def short(monkeypatch) -> None:
    monkeypatch.setattr(serving, "WARM_UP_S", 0.0)
    monkeypatch.setattr(serving, "LOOK_EVERY_S", 0.0)


def answered(ttft_s: float, last_s: float, tokens: int = 11) -> Answered:
    return Answered(
        index=0, due_s=0.0, lateness_s=0.0, prompt_tokens=4, output_tokens=tokens, ttft_s=ttft_s, last_token_s=last_s,
        end_s=last_s,
    )  # fmt: skip


def failed() -> Failed:
    return Failed(index=0, due_s=0.0, lateness_s=0.0, prompt_tokens=4, kind="HTTP 503", detail="nobody there")


def wave_of(step_s: float) -> Run:
    return Run(outcomes=(answered(step_s, 11 * step_s), answered(2 * step_s, 12 * step_s)), wall_s=12 * step_s)


def window_of(step_s: float, gain_s: float | None = None, balance: float = 1.2) -> Window:
    return Window(waves=(wave_of(step_s),) * 2, steps=24, balance=balance, by_rank=(1.2, 0.8), engine_gain_s=gain_s)


def effort_of(**changes) -> Effort:
    return Effort(**({"pairs": 3, "window_s": 0.2, "active_s": 0.0, "start": Start.INITIAL, "seed": 5} | changes))


class FakeGroup:
    """Moves with the next wave, and in the mode active when `plans` say so; its steps last 10 ms, 8 ms under B."""

    def __init__(self, plans=(), promises=(), obeys: bool = True, **document) -> None:
        self.slots, self.wanted, self.mode = A, None, "observe"
        self.steps, self.number, self.rows, self.told = 0, 0, [], []
        self.plans, self.promises, self.obeys, self.changes = list(plans), list(promises), obeys, document

    async def look(self):
        placement = {"version": 1, "directive": 0, "physical_to_logical": [list(row) for row in self.slots]}
        document = {"mode": self.mode, "placement": placement, "decisions": self.rows[:20]} | self.changes
        return ExpertsState.model_validate(experts(**document))

    async def read_steps(self) -> int:
        return self.steps

    async def apply(self, slots) -> None:
        self.wanted = slots
        self.told.append(("apply", slots))

    async def set(self, settings) -> None:
        self.told.append(("set", *settings))
        self.mode = settings[0].partition("=")[2]

    async def read_settings(self) -> ExpertSettings:
        return ExpertSettings(interval_steps=3000)

    def decide(self, outcome: str, slots, **changes) -> None:
        self.number += 1
        for row in self.rows:
            row.pop("physical_to_logical", None)
        placed = {"physical_to_logical": [list(row) for row in slots]}
        self.rows.insert(0, {**DECISION, "number": self.number, "outcome": outcome, **placed, **changes})

    async def serve(self, load, settings, salt) -> Run:
        await asyncio.sleep(0)
        self.told.append(("wave", salt))
        if self.mode == "active" and self.plans:
            outcome, self.slots = self.plans.pop(0)
            promise = self.promises.pop(0) if outcome == "moved" and self.promises else None
            self.decide(outcome, self.slots, predicted_gain_s=promise)
        if self.wanted and self.obeys:
            self.slots, self.wanted = self.wanted, None
            self.decide("applied", self.slots, measured_gain_s=0.002 if self.slots == B else -0.002)
        self.steps += 12
        return wave_of(0.008 if self.slots == B else 0.01)


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
    window = Window(waves=(Run(outcomes=(early, late, failed()), wall_s=2.0),), steps=1, balance=1.0)
    assert decode_step_ms(window) == pytest.approx(100.0)


def test_a_window_without_answers_has_no_figures():
    window = Window(waves=(Run(outcomes=(failed(),), wall_s=1.0),), steps=0, balance=1.0)
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


def test_a_request_that_the_model_does_not_take_is_told_before_it_is_sent(monkeypatch):
    serve_model(monkeypatch, 14)
    with pytest.raises(InvalidInput, match="15 tokens, tiny takes 14"):
        asyncio.run(waves.prepare_waves("http://127.0.0.1:1", "prose", SETTINGS, 0))


# What is measured, in which order.


def test_where_active_moved_and_stayed_its_placement_is_b(serve):
    measured, said = serve(FakeGroup(plans=[("stayed", A), ("moved", B)]), active_s=0.2)
    assert (measured.start, measured.target) == (A, Target(slots=B, origin=Origin.KEPT))
    assert [row.decision.outcome for row in measured.decisions] == ["stayed", "moved"]
    assert any("decision 2: moved" in line for line in said)


def test_where_active_took_its_move_back_b_is_what_it_had_moved_to(serve):
    measured, _ = serve(FakeGroup(plans=[("moved", B), ("rolledBack", A)]), active_s=0.2)
    assert measured.target == Target(slots=B, origin=Origin.TAKEN_BACK)


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


def test_of_several_moves_that_were_taken_back_b_is_the_most_promising(serve):
    group = FakeGroup(plans=[("moved", B), ("rolledBack", A), ("moved", C), ("rolledBack", A)], promises=[3e-3, 1e-3])
    measured, _ = serve(group, active_s=0.2)
    assert measured.target == Target(slots=B, origin=Origin.TAKEN_BACK)


def test_the_mode_is_active_for_its_time_and_observing_for_the_pairs(serve):
    group = FakeGroup(plans=[("moved", B)])
    serve(group, active_s=0.1)
    modes = [row[1] for row in group.told if row[0] == "set"]
    assert modes == ["scheduling.expert.mode=active", "scheduling.expert.mode=observe"]
    last = max(at for at, row in enumerate(group.told) if row[0] == "set")
    assert [row[1] for row in group.told[last:] if row[0] == "apply"] == [A, B, A, B]


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
    for at, row in enumerate(group.told):
        if row[0] == "apply":
            assert group.told[at + 1][0] == "wave"
            assert group.told[at + 1][1] not in counted


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


def test_a_group_that_does_not_move_is_told_with_its_last_decision(monkeypatch):
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
    assert [row[0] for row in group.told] == ["wave"]


def test_a_load_that_is_not_answered_ends_the_measurement(monkeypatch):
    async def refuse(load, settings, salt):
        return Run(outcomes=(failed(),), wall_s=0.1)

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


# What is said.


def measured_of(pairs, outcomes=()) -> Measured:
    document = ExpertsState.model_validate(experts())
    rows = [
        ExpertsState.model_validate(experts(decisions=[{**DECISION, "outcome": outcome}])).decisions[0]
        for outcome in outcomes
    ]
    decisions = tuple(Seen(at_s=float(at), decision=row) for at, row in enumerate(rows))
    target = Target(slots=B, origin=Origin.KEPT)
    return Measured(start=A, target=target, decisions=decisions, pairs=tuple(pairs), document=document)


def pairs_of(*steps: tuple[float, float]) -> list[Pair]:
    return [Pair(first=window_of(a), second=window_of(b, balance=1.05)) for a, b in steps]


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
    empty = Window(waves=(Run(outcomes=(failed(),), wall_s=1.0),), steps=0, balance=1.0)
    rows = {row.metric: row for row in compare_windows([Pair(first=empty, second=empty)])}
    assert rows["step, mean"].ratio is None
    assert rows["balance"].ratio is not None
    assert describe_pairs(measured_of([Pair(first=empty, second=empty)])) == ["the steps were not counted"]


def test_what_active_did_is_counted():
    told = describe_active(measured_of([], outcomes=("stayed", "moved", "rolledBack")))
    assert told == ["in the mode active 3 decisions: 1 moved, 1 taken back by itself"]
    assert describe_active(measured_of([])) == ["in the mode active nothing was decided"]


def test_a_busy_machine_is_told():
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


# The group and the command.


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """With the samples and a folder that looks like a model."""
    (tmp_path / "manifests").mkdir()
    for name in ("local-cpu.yaml", SAMPLE.name):
        (tmp_path / "manifests" / name).write_text((find_checkout() / "manifests" / name).read_text())
    model = tmp_path / ".cache" / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps({"num_experts": 16}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_resource_is_the_sample_that_only_observes_and_caches_no_prefix(checkout):
    scene = plan_group(None, interval_steps=200, window_steps=100)
    resource = load_resource(scene.manifest)
    assert scene.manifest.is_relative_to(checkout / ".cache")
    assert resource.spec.model.uri == f"file://{checkout / '.cache' / 'models' / 'tiny'}"
    expert = resource.spec.scheduling.expert
    assert resource.spec.scheduling.engine.policy == "roundRobin"
    assert (expert.mode, expert.interval, expert.window, expert.redundant_experts) == ("observe", 200, 100, 2)
    assert resource.spec.engine.args[-1] == NO_PREFIX_CACHE
    assert scene.deployment.name == "tiny-experts"


def test_the_sample_stays_as_it_is():
    sample = read_sample(find_checkout())
    before = yaml.safe_dump(sample)
    edit_sample(sample, Path("/m"), 1, 1)
    assert yaml.safe_dump(sample) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing"], "no such folder"),
        (["manifests"], "holds no model"),
        (["--topic", "pros"], "unknown 'pros'"),
        (["--users", "500"], "128"),
        (["--start", "crowd"], "crowded"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_starts(checkout, monkeypatch, words, told):
    monkeypatch.setattr(group_module, "served", None)
    answer = CliRunner().invoke(app, ["serve", *words])
    assert answer.exit_code == 2
    assert told in answer.output
    assert "Traceback" not in answer.output


def stand(monkeypatch, group: FakeGroup) -> list[str]:
    """The command, on a stand-in; what was started and stopped."""
    told = []

    @contextmanager
    def fake_standing(scene, say):
        told.append("up")
        try:
            yield group
        finally:
            told.append("down")

    async def prepare(*_):
        return None

    monkeypatch.setattr(command, "standing", fake_standing)
    monkeypatch.setattr(command, "prepare_waves", prepare)
    monkeypatch.setattr(serving, "run_wave", group.serve)
    return told


def test_the_command_measures_prints_and_writes(checkout, monkeypatch):
    told = stand(monkeypatch, FakeGroup(plans=[("moved", B)]))
    answer = CliRunner().invoke(app, ["serve", "--pairs", "2", "--window-s", "1", "--active-s", "0.1", "--json", "o"])
    assert answer.exit_code == 0, answer.output
    assert told == ["up", "down"]
    assert "B's steps are shorter" in answer.output
    assert json.loads((checkout / "o").read_text())["environment"]["python"]


def test_a_failure_is_told_in_a_line_and_all_is_stopped(checkout, monkeypatch):
    group = FakeGroup()
    told = stand(monkeypatch, group)

    async def gone():
        raise Failure("tiny-experts-engine-0: its agent cannot be reached")

    group.look = gone
    answer = CliRunner().invoke(app, ["serve"])
    assert answer.exit_code == 1
    assert "cannot be reached" in answer.output
    assert told == ["up", "down"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_all(checkout, monkeypatch, number):
    group = FakeGroup()
    told = stand(monkeypatch, group)

    async def interrupted(*_):
        signal.raise_signal(number)
        await asyncio.sleep(60)

    monkeypatch.setattr(serving, "run_wave", interrupted)
    answer = CliRunner().invoke(app, ["serve"])
    assert answer.exit_code != 0
    assert told == ["up", "down"]


def test_the_group_is_told_through_its_agent(monkeypatch):
    document, asked = ExpertsState.model_validate(experts()), []
    agent = group_module.Agent(engine="tiny-engine-0", url="http://127.0.0.1:7")
    reached = group_module.Reached(name="tiny", agents=(agent,), tokens=("t",))

    async def fetch(_):
        return {"tiny-engine-0": document}

    async def send(*words):
        asked.append(words)

    async def call(endpoint, method, path, body=None):
        return {"ranks": [{"step": 3}, {"step": 7}]}

    monkeypatch.setattr(group_module, "fetch_experts", fetch)
    monkeypatch.setattr(group_module, "send_directive", send)
    monkeypatch.setattr(group_module, "call_json", call)
    local = LocalGroup(deployment=None, reached=reached)
    assert asyncio.run(local.look()) is document
    assert asyncio.run(local.read_steps()) == 7
    asyncio.run(local.apply(B))
    assert asked == [(agent, ("t",), {"action": "apply", "physical_to_logical": [list(row) for row in B]})]


def test_a_group_that_does_not_start_is_taken_down(checkout, monkeypatch):
    calls = []

    class Done:
        returncode = 1

    def run(words, check):
        calls.append(words[1])
        return Done()

    monkeypatch.setattr("subprocess.run", run)
    scene = plan_group(None, interval_steps=1, window_steps=1)
    with pytest.raises(InvalidInput, match="up failed"), standing(scene, lambda _: None):
        raise AssertionError("does not get here")
    assert calls == ["up", "down"]


def test_pairs_none_give_none():
    assert asyncio.run(measure_pairs(FakeGroup(), None, (A, B), 0, 1, print)) == ()
