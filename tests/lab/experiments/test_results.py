"""Conclusions from the runs, and the report: on made-up records, whose conclusions are known."""

import json
import math

import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.experiments.report import build_summary, write_report
from moe_lab.experiments.results import Case, Results, crossing
from moe_lab.experiments.runner import digest_of, is_current, read_records, source_digests
from moe_lab.experiments.variants import PRODUCT, REFERENCE
from moe_lab.experiments.workloads import KEPT_APART
from moe_tools.calibration.preset_errors import PRESET_ERRORS
from moe_tools.calibration.step_errors import StepKind

PRESET = "b300-qwen3.6-35b-a3b-tp2-ep4-dp2"
FLEET = {"preset": PRESET, "servers": 1, "ranks": 2, "max_num_seqs": 256}
SEEDS = (KEPT_APART, KEPT_APART + 1, KEPT_APART + 2)
NAME = f"{PRESET}, one server of 2 ranks in lockstep"


def record(variant, *, load=1.0, seed=KEPT_APART, workload="twoEnd", ttft=1.0, tpot=0.03, digest="d"):
    figures = {
        "ttft_mean": ttft, "ttft_p99": 2 * ttft, "ttft_p99_longest": 2 * ttft, "ttft_floor": 0.05, "tpot_mean": tpot,
        "tpot_p99": tpot, "output_tokens_per_s": 100.0, "jain": 0.5,
    }  # fmt: skip
    return {
        "id": f"{workload}/{load}/{seed}/{variant}", "experiment": "rivals", "workload": workload, "variant": variant,
        "load": load, "seed": seed, "count": 10, "fleet": FLEET, "rate": 5.0, "figures": figures, "digest": digest,
        "versions": {"python": "3.11"}, "cost": "measured somewhere",
    }  # fmt: skip


def case(load=1.0, workload="twoEnd"):
    return Case(fleet=NAME, workload=workload, load=load)


def test_the_best_rival_is_found_for_each_column_by_itself():
    results = Results([
        record(REFERENCE, ttft=2.0, tpot=0.02), record("vllm512", ttft=1.0, tpot=0.03), record(PRODUCT, ttft=0.5)
    ])  # fmt: skip
    assert results.best_rival(case(), "ttft_mean") == "vllm512"
    assert results.best_rival(case(), "tpot_mean") == REFERENCE
    assert results.ratio(case(), "vllm512", PRODUCT, "ttft_mean").value == pytest.approx(0.5)


def test_a_rival_may_be_chosen_by_another_column():
    results = Results([
        record(REFERENCE, ttft=2.0, tpot=0.02), record("vllm512", ttft=1.0, tpot=0.04), record(PRODUCT, tpot=0.03)
    ])  # fmt: skip
    assert results.against_best([case()], "tpot_mean").value == pytest.approx(1.5)
    assert results.against_best([case()], "tpot_mean", "ttft_mean").value == pytest.approx(0.75)


def test_pairs_are_of_the_same_seed():
    results = Results([
        record(REFERENCE, seed=1, ttft=1.0), record(REFERENCE, seed=2, ttft=10.0), record(REFERENCE, seed=3, ttft=7.0),
        record(PRODUCT, seed=1, ttft=0.5), record(PRODUCT, seed=2, ttft=5.0),
    ])  # fmt: skip
    ratio = results.ratio(case(), REFERENCE, PRODUCT, "ttft_mean")
    assert (ratio.value, ratio.count) == (pytest.approx(0.5), 2)
    assert ratio.high == pytest.approx(0.5)


def test_the_last_record_of_a_run_counts():
    results = Results([record(PRODUCT, ttft=1.0), record(PRODUCT, ttft=3.0)])
    assert results.mean(case(), PRODUCT, "ttft_mean") == 3.0
    assert results.runs == 1


def test_saturations_are_no_results():
    assert Results([record(REFERENCE, load=0)]).runs == 0


def test_the_knee_lies_between_two_loads():
    results = Results([
        record(REFERENCE, load=0.85, ttft=0.125), record("vllm512", load=0.85, ttft=0.2),
        record(REFERENCE, load=1.0, ttft=0.5), record("vllm512", load=1.0, ttft=0.7),
    ])  # fmt: skip
    # The floor is 0.05: five times that is crossed half way, on a line of logarithms.
    assert results.knee(NAME, "twoEnd") == pytest.approx(0.925)
    assert Results([record(REFERENCE, load=1.0, ttft=0.1)]).knee(NAME, "twoEnd") is None


def test_figures_at_the_knee_lie_between_the_loads_beside_it():
    rows = [
        record(variant, load=load, seed=seed, ttft=ttft * seed)
        for seed in (1, 2)
        for variant, load, ttft in (
            (REFERENCE, 0.85, 0.0625), (REFERENCE, 1.0, 1.0), (PRODUCT, 0.85, 0.04), (PRODUCT, 1.0, 0.16)
        )
    ]  # fmt: skip
    results = Results(rows)
    (knee,) = results.knee_cases(NAME, ["twoEnd", "azure"])
    share = math.log(0.25 / 0.09375) / math.log(16)
    assert knee.load == pytest.approx(0.85 + 0.15 * share)
    assert results.values(knee, PRODUCT, "ttft_mean")[1] == pytest.approx(0.04 * 4**share)
    assert results.against_best([knee], "ttft_mean").value == pytest.approx(0.64 * 4**-share)
    assert build_summary(results)["at_knee"][NAME]["workloads"] == ["twoEnd"]


def test_nothing_is_said_of_loads_beyond_those_measured():
    results = Results([record(REFERENCE), record(PRODUCT)])
    assert results.values(case(1.1), PRODUCT, "ttft_mean") == {}
    assert results.against_best([case(1.1)], "ttft_mean") is None


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], None),
        ([(0.5, 1.0)], None),
        ([(0.5, 9.0)], 0.5),
        ([(0.5, 1.0), (1.0, 4.0)], 0.75),
        ([(0.5, 2.0), (1.0, 9.0)], 0.5),
    ],
)
def test_where_a_level_is_crossed(points, expected):
    assert crossing(points, 2.0) == (expected if expected is None else pytest.approx(expected))


def test_a_sustained_load_meets_both_targets():
    rows = [record(PRODUCT, load=0.5, ttft=0.1), record(PRODUCT, load=1.0, ttft=0.2, tpot=0.2)]
    # The TPOT target of 0.05 is crossed on the way from 0.03 to 0.2.
    share = math.log(0.05 / 0.03) / math.log(0.2 / 0.03)
    assert Results(rows).sustained(NAME, "twoEnd", PRODUCT) == pytest.approx(0.5 + 0.5 * share)
    assert Results([record(PRODUCT, ttft=5.0)]).sustained(NAME, "twoEnd", PRODUCT) is None


def test_a_line_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record(PRODUCT)) + "\n" + '{"id": "twoE')
    assert [row["variant"] for row in read_records(path)] == [PRODUCT]
    assert read_records(tmp_path / "folder" / "absent.jsonl") == []


def test_a_record_of_other_sources_counts_as_not_there():
    digests = source_digests()
    assert digests[True] != digests[False]
    assert is_current(record(PRODUCT, digest=digest_of(PRODUCT, digests)), digests)
    assert not is_current(record(PRODUCT, digest=digest_of(REFERENCE, digests)), digests)
    assert not is_current(record("removed", digest="d"), digests)


def write(tmp_path, records):
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return path


def test_the_report_says_where_we_win_and_where_we_lose(tmp_path):
    rows = [
        record(name, load=load, seed=seed, ttft=ttft * (seed - 95) / 5, tpot=tpot)
        for load in (0.5, 1.0)
        for seed in SEEDS
        for name, ttft, tpot in ((REFERENCE, 1.0, 0.03), ("vllm512", 2.0, 0.02), (PRODUCT, 0.4, 0.025))
    ]
    folder = tmp_path / "results"
    write_report(write(tmp_path, rows), folder)
    page = (folder / "README.md").read_text()
    assert "**modelled**" in page
    assert f"| {NAME} | twoEnd | 50% | TPOT mean | vLLM, 512 tokens a step | 1.25 [1.25, 1.25] |" in page
    assert "18 runs of 10 requests, seeds 101 to 103" in page
    assert "come from other sources" in page
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["by_load"][f"{NAME}: 1"]["against_best"]["ttft_mean"]["value"] == pytest.approx(0.4)
    plots = list(folder.glob("*.svg"))
    assert len(plots) == 1
    assert f"({plots[0].name})" in page


def test_the_report_says_whose_step_times_they_are_and_their_error(tmp_path):
    rows = [record(REFERENCE), record(PRODUCT), record("dynamo")]
    rows[2]["fleet"] = {**FLEET, "preset": "h200-qwen3-30b-a3b-kernels-dp2"}
    write_report(write(tmp_path, rows), tmp_path / "results")
    _, _, rest = (tmp_path / "results" / "README.md").read_text().partition("## Step times\n")
    table, _, _ = rest.partition("\n## ")
    measured, composed = [line for line in table.splitlines() if "in lockstep" in line]
    error = next(row for row in PRESET_ERRORS[PRESET] if row.kind is StepKind.DECODE)
    assert f"{NAME} | measured somewhere | held-out shapes | {error.median:.1%}, {error.p90:.1%}" in measured
    assert "composed steps" in composed


def test_the_report_names_the_workloads_with_longer_runs(tmp_path):
    rows = [
        record(name, workload=workload) for name in (REFERENCE, PRODUCT) for workload in ("twoEnd", "azure", "agents")
    ]
    write_report(write(tmp_path, rows), tmp_path / "results")
    page = (tmp_path / "results" / "README.md").read_text()
    assert "6 runs of 10 requests (`agents` 4, `azure` 3 times as many), seeds 101 to 101" in page


def test_plots_of_before_go(tmp_path):
    (tmp_path / "results").mkdir()
    former = tmp_path / "results" / "roofline.svg"
    former.write_text("<svg/>")
    write_report(write(tmp_path, [record(REFERENCE), record(PRODUCT)]), tmp_path / "results")
    assert not former.exists()


def test_the_report_shows_tenants_where_there_are_several(tmp_path):
    rows = [record(name, workload=workload) for name in (REFERENCE, PRODUCT) for workload in ("flood", "twoEnd")]
    for row in rows:
        row["figures"] |= {"ttft_light": 0.1, "ttft_heavy": 0.3, "jain_tenants": 0.8}
    write_report(write(tmp_path, rows), tmp_path / "results")
    _, _, rest = (tmp_path / "results" / "README.md").read_text().partition("## Between tenants\n")
    table, _, _ = rest.partition("\n## ")
    assert "| flood | 100% | ours | 100 | 300 | 0.8 |" in table
    assert "twoEnd" not in table


def test_seeds_for_tuning_are_in_no_table(tmp_path):
    rows = [record(REFERENCE, seed=1, ttft=1.0), record(PRODUCT, seed=1, ttft=0.5)]
    rows += [record(REFERENCE, ttft=1.0), record(PRODUCT, ttft=0.8)]
    folder = tmp_path / "results"
    write_report(write(tmp_path, rows), folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["runs"], summary["seeds"]) == (2, 1)
    assert summary["by_load"][f"{NAME}: 1"]["against_vllm"]["ttft_mean"]["value"] == 0.8
    assert "0.50" not in (folder / "README.md").read_text()
    with pytest.raises(InvalidInput, match="has no results"):
        write_report(write(tmp_path, rows[:2]), folder)


def test_a_run_that_was_made_anew_is_not_stale(tmp_path):
    present = digest_of(REFERENCE, source_digests())
    write_report(write(tmp_path, [record(REFERENCE), record(REFERENCE, digest=present)]), tmp_path / "results")
    assert "other sources than the present ones" not in (tmp_path / "results" / "README.md").read_text()


def test_the_same_results_give_the_same_report(tmp_path):
    rows = [
        record(name, load=load, seed=seed) for name in (REFERENCE, PRODUCT) for load in (0.5, 1.0) for seed in SEEDS[:2]
    ]
    path = write(tmp_path, rows)
    for name in ("one", "other"):
        write_report(path, tmp_path / name)
    pages = [
        {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())} for name in ("one", "other")
    ]
    assert pages[0] == pages[1]


def test_one_seed_has_no_interval(tmp_path):
    summary = build_summary(Results([record(REFERENCE, ttft=1.0), record(PRODUCT, ttft=0.5)]))
    estimate = summary["by_load"][f"{NAME}: 1"]["against_best"]["ttft_mean"]
    assert (estimate["value"], estimate["low"], estimate["high"]) == (0.5, 0.0, None)


def test_no_results_are_reported(tmp_path):
    with pytest.raises(InvalidInput, match="has no results"):
        write_report(tmp_path / "runs.jsonl", tmp_path / "results")
