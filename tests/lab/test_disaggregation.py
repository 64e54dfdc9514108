"""The comparison of prefill and decode together and apart: arrangements, workloads, runs and tables."""

import json

import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.disaggregation import matrix
from moe_lab.disaggregation.__main__ import app
from moe_lab.disaggregation.arrangements import CLOCK, REFERENCE, arrangements
from moe_lab.disaggregation.matrix import Run, rate_run, source_digest
from moe_lab.disaggregation.report import render
from moe_lab.disaggregation.workloads import AGENTS, CHANGE, Folders, build_workload
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.fleet.role_latency import RoleObservation, ServerLoad, predict_costs_s
from moe_scheduling.fleet.roles import RoleSettings
from moe_scheduling.signals import StepTime
from moe_tools.advisor.clocks import ServerParallelism, choose_clock
from moe_tools.advisor.settled import settled_prefill
from typer.testing import CliRunner

runner = CliRunner()


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_every_arrangement_uses_all_gpus(gpus):
    found = arrangements(gpus)
    assert next(iter(found)) == REFERENCE
    assert {shape.gpus for shape in found.values()} == {gpus}
    assert all(
        choose_clock(CLOCK, gpus).covers(ServerParallelism(size)) for shape in found.values() for size in shape.servers
    )
    assert {name for name in found if name.startswith("auto")} == {
        f"auto, {count} of {gpus // count}" for count in (2, 4, 8) if count <= gpus
    }


def test_splits_by_hand_that_no_measured_group_has_are_there_with_rooflines_alone():
    assert "5+3" in arrangements(8, "a100-qwen3-30b-a3b")
    assert "5+3" not in arrangements(8)
    assert {"2+2, 4 of 1", "vLLM, 2+2, 4 of 1"} <= set(arrangements(4, "b300-qwen3.6-35b-a3b"))
    assert not [name for name in arrangements(4, "b300-qwen3.6-35b-a3b") if "2 of 2" in name]


def test_gpus_of_which_no_group_was_measured_are_refused():
    with pytest.raises(InvalidInput, match=r"--gpus: b300-qwen3\.6-35b-a3b has no step times of 8 GPUs as one group"):
        arrangements(8, "b300-qwen3.6-35b-a3b")


def test_every_arrangement_has_the_limits_of_the_experiments():
    for shape in arrangements(8).values():
        assert (shape.limits["max_num_seqs"], shape.limits["max_num_batched_tokens"]) == (1024, 8192)
    assert arrangements(8)["vLLM, interval 2"].limits["prefill_schedule_interval"] == 2


def test_whole_requests_of_stock_engines_depend_on_nothing_of_the_product():
    shapes = arrangements(4)
    digests = {name: source_digest(shapes[name]) for name in (REFERENCE, "unified", "auto, 2 of 2")}
    assert len(set(digests.values())) == 3
    assert digests[REFERENCE] == source_digest(shapes["vLLM, interval 2"])


def test_a_load_that_changes_has_long_prompts_and_then_long_answers():
    rows = build_workload(CHANGE, 200, 10.0, 1, Folders())
    first, then = rows[:100], rows[100:]
    assert sum(row.prompt_tokens for row in first) > 3 * sum(row.prompt_tokens for row in then)
    assert 3 * sum(row.output_tokens for row in first) < sum(row.output_tokens for row in then)
    assert [row.arrival_s for row in rows] == sorted(row.arrival_s for row in rows)
    assert rows == build_workload(CHANGE, 200, 10.0, 1, Folders())
    assert rows != build_workload(CHANGE, 200, 10.0, 2, Folders())


@pytest.mark.parametrize(("name", "said"), [(AGENTS, "--sessions"), ("azure", "traces"), ("x", "--workload: unknown")])
def test_a_workload_without_its_data_is_named(name, said):
    with pytest.raises(InvalidInput, match=said):
        build_workload(name, 20, 1.0, 1, Folders())


def test_a_run_is_named_by_all_that_it_depends_on():
    run = Run(gpus=8, workload="twoEnd", load=0.5, count=600, seed=1, arrangement="auto, 2 of 4")
    changed = Run(**{**run_fields(run), "targets": LatencyTargets(answer_weight=2.0)})
    assert run.id == "h200-qwen3-30b-a3b/8/twoEnd/0.5/600/1/auto, 2 of 4/ttft_growth=0.5"
    assert changed.id == "h200-qwen3-30b-a3b/8/twoEnd/0.5/600/1/auto, 2 of 4/answer_weight=2.0/ttft_growth=0.5"
    whole = Run(**{**run_fields(run), "arrangement": "unified"})
    assert whole.id == "h200-qwen3-30b-a3b/8/twoEnd/0.5/600/1/unified"
    assert rate_run(run) == rate_run(changed)
    assert rate_run(run).load == 0.0


def run_fields(run):
    return {name: getattr(run, name) for name in run.__slots__}


def record(arrangement, seed, ttft_s, *, load=1.0, extra=""):
    figures = {"ttft_mean": ttft_s, "ttft_p99": 2 * ttft_s, "tpot_mean": 0.02, "tpot_p99": 0.04, "end_mean": 1.0}
    return {
        "id": f"{CLOCK}/2/twoEnd/{load}/20/{seed}/{arrangement}{extra}",
        "clock": CLOCK, "gpus": 2, "workload": "twoEnd", "load": load, "count": 20, "seed": seed,
        "arrangement": arrangement, "figures": {**figures, "good_per_s": 3.0}, "pairs": 0.5,
    }  # fmt: skip


def test_ratios_are_geometric_means_over_pairs_with_an_interval():
    rows = [record(REFERENCE, 1, 0.1), record(REFERENCE, 2, 0.1)]
    rows += [record("unified", 1, 0.02), record("unified", 2, 0.08), record(REFERENCE, 9, 1.0, load=0.0)]
    text = render(rows)
    assert "### h200-qwen3-30b-a3b, 2 GPUs, load 1, twoEnd" in text
    assert "| unified | 0.40, 0.00-" in text
    assert "(50 ms)" in text
    assert text.count("###") == 1


def test_the_last_record_of_a_run_counts_and_other_objectives_have_rows_of_their_own():
    rows = [record(REFERENCE, 1, 0.1), record("auto, 2 of 1", 1, 9.0), record("auto, 2 of 1", 1, 0.2)]
    rows.append(record("auto, 2 of 1", 1, 0.3, extra="/ttft_growth=1.0"))
    text = render(rows)
    assert "| auto, 2 of 1 | 2.00 (200 ms)" in text
    assert "| auto, 2 of 1/ttft_growth=1.0 | 3.00 (300 ms)" in text


def test_unknown_names_are_refused_with_the_known_ones(tmp_path):
    raw = ["--raw", str(tmp_path / "r.jsonl")]
    done = runner.invoke(app, ["run", "--workload", "x", *raw])
    assert (done.exit_code, "--workload: unknown 'x'; known: agents" in done.output) == (2, True)
    done = runner.invoke(app, ["run", "--clock", "x", *raw])
    assert (done.exit_code, "--clock: unknown 'x'; known: a100-" in done.output) == (2, True)
    done = runner.invoke(app, ["run", "--only", "9+9", *raw])
    assert (done.exit_code, "--only: unknown '9+9'; known:" in done.output) == (2, True)


@pytest.mark.timeout(900)
def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    # The workers are forks of this process.
    monkeypatch.setattr(matrix, "RATE_COUNT", 20)
    raw = tmp_path / "r.jsonl"
    options = ["--gpus", "2", "--seeds", "1", "--count", "20", "--raw", str(raw)]
    ready = Run(gpus=2, workload="twoEnd", load=1.0, count=20, seed=1, arrangement=REFERENCE)
    found = {"rate": 4.0, "digest": source_digest(arrangements(2)[REFERENCE])}
    raw.write_text(json.dumps({**record(REFERENCE, 9001, 0.1, load=0.0), "id": rate_run(ready).id, **found}) + "\n{cut")
    names = ["--only", "auto, 2 of 1", "--only", "1+1, 2 of 1"]
    done = runner.invoke(app, ["run", *options, *names])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in raw.read_text().splitlines()[2:]]
    assert [row["arrangement"] for row in rows] == ["auto, 2 of 1", "1+1, 2 of 1"]
    assert rows[1]["pairs"] > 0.5
    assert rows[1]["transfers"]["held"] == 0
    assert {row["rate"] for row in rows} == {4.0}
    done = runner.invoke(app, ["run", *options, *names])
    assert "2 runs, 2 of them made before" in done.output


@pytest.mark.parametrize("growth", [0.0, 10.0])
def test_roles_settle_where_none_changes_any_more(growth):
    observed = RoleObservation(
        observed_s=0.0,
        servers=[ServerLoad(name=f"e{number}") for number in range(4)],
        step_time=StepTime(base_s=0.008, prefill_s=0.00003, decode_s=0.00005),
        requests_per_s=20.0,
        prompt_tokens=3000.0,
        answer_tokens=100.0,
        transfer_s=0.02,
        measured_s=3.0,
    )
    settings = RoleSettings(ttft_growth=growth)
    settled = settled_prefill(observed, settings)
    costs_s = predict_costs_s(observed, growth)
    assert (settled > 0) is (growth > 0)
    assert costs_s[settled] * (1.0 - settings.least_gain) <= min(costs_s)
