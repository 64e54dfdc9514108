"""What the experiments consist of."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_lab.experiments.plan import (
    EXPERIMENTS,
    LOADS,
    STOCK_ALWAYS,
    STRONGEST,
    Selection,
    build_run,
    code_digest,
    plan_runs,
    saturation_runs,
)
from moe_lab.experiments.runner import PRODUCT_SOURCES, ROOT, SIMULATOR_SOURCES
from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS
from moe_lab.experiments.workloads import (
    ADVERSARIAL,
    ALL,
    BURST_LENGTH,
    KEPT_APART,
    PUBLISHED_SEEDS,
    WORKLOADS,
    find_start,
)
from moe_tools.simulator.rank import STOCK
from moe_tools.simulator.rivals import RIVALS
from moe_tools.simulator.saturation import find_saturation
from moe_tools.traces import mean_rate

WITHOUT_TRACE = sorted(name for name, workload in ALL.items() if not workload.trace)


def test_the_whole_plan_has_more_runs_than_the_papers():
    runs = plan_runs(Selection())
    assert len(runs) >= 240
    assert len({run.id for run in runs}) == len(runs)


def test_every_workload_meets_every_rival_at_saturation():
    runs = {(run.workload, run.variant, run.load, run.seed) for run in plan_runs(Selection(only=("rivals",)))}
    rivals = [name for name, variant in VARIANTS.items() if variant.is_rival]
    assert runs == {
        (workload, variant, load, seed)
        for workload in WORKLOADS
        for variant in (*rivals, PRODUCT)
        for load in (1.0,)
        for seed in (1, 2, 3)
    }


def test_the_strongest_rivals_are_met_from_half_the_load_to_beyond_saturation():
    runs = plan_runs(Selection(only=("rivals", "loads"), seeds=1))
    for name in (*STRONGEST, PRODUCT):
        of_name = {(run.workload, run.load) for run in runs if run.variant == name}
        assert of_name == {(workload, load) for workload in WORKLOADS for load in (*LOADS, 1.0)}
    assert (min(LOADS), max(LOADS)) == (0.5, 1.25)
    assert all(VARIANTS[name].is_rival for name in STRONGEST)


def test_every_published_rival_is_among_the_variants():
    used = {variant.changes["dispatch"] for variant in VARIANTS.values() if variant.is_rival}
    assert used == set(RIVALS)


def test_no_rival_uses_the_product():
    assert not [name for name, variant in VARIANTS.items() if variant.is_rival and variant.uses_product]


def test_an_experiment_names_what_there_is():
    for experiment in EXPERIMENTS.values():
        assert set(experiment.workloads) <= set(ALL)
        assert set(experiment.variants) <= set(VARIANTS)


def test_stock_vllm_is_a_rival_in_every_experiment_with_its_own_lever_too():
    assert [VARIANTS[name].limits.get("prefill_schedule_interval", 1) for name in STOCK_ALWAYS] == [1, 2]
    for experiment in EXPERIMENTS.values():
        assert set(STOCK_ALWAYS) <= set(experiment.variants)


def test_a_fleet_is_what_its_step_times_were_fitted_on():
    for experiment in EXPERIMENTS.values():
        run = next(run for run in plan_runs(Selection()) if run.fleet == experiment.fleet and run.workload != "azure")
        fleet, built = run.fleet, build_run(replace(run, count=20, workload="random"), None, 5.0)
        assert (built.servers, built.ranks, built.limits.max_num_batched_tokens) == (fleet.servers, fleet.ranks, 8192)
        assert built.cost.source.startswith(("measured: vLLM 0.20.1", "modelled from kernels: vLLM 0.24"))
        assert built.cost.model.ranks == fleet.ranks


def test_every_engine_is_one_that_vllm_starts():
    # `SchedulerConfig` refuses fewer tokens a step than requests.
    for run in {(run.fleet, run.variant): run for run in plan_runs(Selection()) if run.workload == "random"}.values():
        limits = build_run(replace(run, count=20), None, 5.0).limits
        assert limits.max_num_batched_tokens >= limits.max_num_seqs, run.id


def test_a_fleet_of_other_ranks_than_were_measured_is_refused():
    run = next(run for run in plan_runs(Selection()) if run.workload == "random")
    with pytest.raises(ValueError, match="was fitted on 2 ranks in lockstep, not on 3"):
        build_run(replace(run, fleet=replace(run.fleet, ranks=3)), None, 5.0)


@given(
    st.sets(st.sampled_from(sorted(EXPERIMENTS))),
    st.sets(st.sampled_from(sorted(ALL))),
    st.sets(st.sampled_from(LOADS)),
)
def test_filters_only_take_away(only, workloads, loads):
    everything = {run.id for run in plan_runs(Selection())}
    chosen = plan_runs(Selection(only=tuple(only), workloads=tuple(workloads), loads=tuple(loads)))
    assert {run.id for run in chosen} <= everything
    assert all(not workloads or run.workload in workloads for run in chosen)
    assert all(not loads or run.load in loads for run in chosen)


@given(st.integers(400, 1200), st.integers(KEPT_APART, 10**6))
def test_a_piece_kept_apart_has_no_request_of_those_in_use(count, seed):
    length = 12 * count
    start = find_start(length, count, seed)
    assert 0 <= start <= length - count
    for used in PUBLISHED_SEEDS:
        other = find_start(length, count, used)
        assert not set(range(start, start + count)) & set(range(other, other + count))


def test_a_trace_that_is_too_short_for_a_piece_of_its_own_is_reported():
    with pytest.raises(InvalidInput, match="--count: 400 requests do not fit into a trace of 500"):
        find_start(500, 400, KEPT_APART)


def test_seeds_may_begin_elsewhere():
    usual = plan_runs(Selection(workloads=("twoEnd",), seeds=2))
    apart = plan_runs(Selection(workloads=("twoEnd",), seeds=2, first_seed=KEPT_APART))
    assert {run.seed for run in apart} == {KEPT_APART, KEPT_APART + 1}
    assert len(apart) == len(usual)
    assert not {run.id for run in apart} & {run.id for run in usual}


def test_saturation_is_measured_once_for_each_workload_seed_and_fleet():
    runs = plan_runs(Selection(workloads=("twoEnd",), seeds=2))
    measuring = saturation_runs(runs)
    fleets = {run.fleet for run in runs}
    assert len(measuring) == 2 * len(fleets)
    assert {run.variant for run in measuring} == {REFERENCE}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(only=("rival",)), "only: unknown 'rival'; known: ablation, adversarial"),
        (Selection(workloads=("round",)), "workload: unknown 'round'"),
        (Selection(variants=("nobody",)), "variant: unknown 'nobody'"),
    ],
)
def test_unknown_names_are_reported(selection, message):
    with pytest.raises(InvalidInput) as caught:
        selection.check()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", WITHOUT_TRACE)
def test_a_workload_is_the_same_for_its_seed_and_other_for_another(name):
    build = ALL[name].build
    assert build(50, 1, None) == build(50, 1, None) != build(50, 2, None)
    assert len(build(50, 1, None)) == 50


def test_a_trace_needs_its_folder():
    with pytest.raises(InvalidInput, match="traces: a folder with azure_llm_2023_conv"):
        WORKLOADS["azure"].build(10, 1, None)


def test_a_run_comes_at_its_part_of_the_saturation():
    run = next(run for run in plan_runs(Selection(workloads=("twoEnd",))) if run.load == 0.85)
    assert mean_rate(build_run(run, None, 17.0).trace) == pytest.approx(17.0)


def test_a_burst_comes_at_once_and_has_no_saturation():
    runs = plan_runs(Selection(workloads=("burst", "sawtooth"), seeds=1))
    assert {run.workload for run in saturation_runs(runs)} == {"sawtooth"}
    run = next(run for run in runs if run.workload == "burst")
    trace = build_run(replace(run, count=20), None, 1.0).trace
    assert {row.arrival_s for row in trace} == {0.0}
    assert len(trace) == round(20 * BURST_LENGTH)


def test_a_workload_may_last_longer_than_others():
    run = next(run for run in plan_runs(Selection(workloads=("twoEnd",), count=50)))
    assert len(build_run(run, None, 5.0).trace) == 50
    assert WORKLOADS["azure"].length > 1


@given(st.floats(0.01, 1000.0), st.floats(0.1, 100.0))
def test_the_saturation_is_where_the_slowdown_passes_five(knee, guess):
    # Slow-downs grow without bound towards the knee of a queue.
    assert find_saturation(lambda rate: 5.0 * (rate / knee) ** 2, guess) == pytest.approx(knee, rel=0.02)


@pytest.mark.parametrize("level", [1.0, 9.0])
def test_without_a_saturation_it_is_reported(level):
    with pytest.raises(ValueError, match="does not pass 5"):
        find_saturation(lambda rate: level, 1.0)


def test_variants_differ_in_what_they_say_alone():
    run = next(run for run in plan_runs(Selection(variants=(REFERENCE,))))
    base = build_run(run, None, 10.0)
    assert (base.scheduler, base.dispatch, base.limits.max_num_batched_tokens) == (STOCK, "vllmInternal", 8192)
    tuned = VARIANTS["vllm512"].apply(base)
    assert tuned.limits.max_num_batched_tokens == 512
    assert tuned.trace is base.trace


def test_the_adversarial_loads_are_apart():
    assert not set(ADVERSARIAL) & set(WORKLOADS)


def test_a_digest_changes_with_the_sources(tmp_path):
    (tmp_path / "a").mkdir()
    source = tmp_path / "a" / "one.py"
    source.write_text("x = 1\n")
    before = code_digest(tmp_path, ["a"])
    assert before == code_digest(tmp_path, ["a"]) != code_digest(tmp_path, [])
    source.write_text("x = 2\n")
    assert code_digest(tmp_path, ["a"]) != before
    assert code_digest(tmp_path, ["a/one.py"]) == code_digest(Path(tmp_path), ["a"])


def test_a_refit_makes_the_runs_of_before_stale():
    assert any((ROOT / place).suffix == ".csv" for place in SIMULATOR_SOURCES)


def test_the_sources_of_a_run_are_there():
    places = [ROOT / place for place in (*SIMULATOR_SOURCES, *PRODUCT_SOURCES)]
    assert [place for place in places if not (place.is_file() or any(place.glob("*.py")))] == []
