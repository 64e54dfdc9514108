"""Fitted step times: staircase, least times, and the invariants that any coefficients keep."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_tools.simulator.costs import IDLE, Work
from moe_tools.simulator.fitted_presets import FITTED_PRESETS, parse_presets, render_presets
from moe_tools.simulator.rank import work_of
from moe_tools.simulator.scenario import build_simulation, cost_of, limits_of, parse_scenario
from moe_tools.simulator.step_time import VLLM_GRAPH_SIZES, Coefficients, FittedCost, StepModel

COUNT = st.integers(0, 700)
WORK = st.builds(Work, COUNT, COUNT, st.integers(0, 10**6), st.integers(0, 10**7), st.integers(0, 2))
SECONDS = st.floats(0.0, 0.01)
COEFFICIENTS = st.builds(Coefficients, *[SECONDS] * len(Coefficients._fields))
MODEL = st.builds(
    StepModel,
    experts=st.sampled_from([1, 8, 256]),
    top_k=st.sampled_from([1, 6, 8]),
    expert_ranks=st.sampled_from([1, 4]),
    ranks=st.sampled_from([1, 2, 4]),
    graph_sizes=st.sampled_from([(), (1, 2, 4), VLLM_GRAPH_SIZES]),
)
GROUP = st.tuples(MODEL, COEFFICIENTS).flatmap(
    lambda drawn: st.tuples(
        st.just(FittedCost(model=drawn[0], coefficients=drawn[1], source="")),
        st.lists(WORK, min_size=drawn[0].ranks, max_size=drawn[0].ranks),
    )
)


@given(GROUP, WORK)
def test_more_work_never_takes_less_time(group, extra):
    cost, works = group
    more = [Work(*(one + other for one, other in zip(works[0], extra, strict=True))), *works[1:]]
    assert 0.0 <= cost.group_step_s(works) <= cost.group_step_s(more) * (1 + 1e-9) < math.inf


@given(GROUP)
def test_the_order_of_the_ranks_does_not_matter(group):
    cost, works = group
    assert cost.group_step_s(works) == pytest.approx(cost.group_step_s(works[::-1]))


@pytest.mark.parametrize("name", sorted(FITTED_PRESETS))
def test_a_preset_has_a_source_and_takes_time_even_for_a_dummy_step(name):
    preset = FITTED_PRESETS[name]
    cost = preset.cost(preset.ranks)
    assert cost.source.startswith(("measured", "modelled"))
    assert min(preset.coefficients) >= 0.0
    assert cost.group_step_s([IDLE] * preset.ranks) > 0.001
    assert preset.measurements > 50
    assert preset.kv_blocks * 16 > 32_768
    assert cost.expert_pressures([IDLE] * preset.ranks) == (1.0, (1.0,) * preset.ranks)


def test_a_preset_is_of_its_own_number_of_ranks():
    with pytest.raises(ValueError, match="fitted on 4 ranks in lockstep, not on 2"):
        FITTED_PRESETS["b300-qwen3.6-35b-a3b-tp1-ep4-dp4"].cost(2)


def test_the_committed_table_is_what_rendering_it_gives():
    assert parse_presets(render_presets(FITTED_PRESETS)) == FITTED_PRESETS


def test_there_are_the_measured_models():
    assert {name.rpartition("-tp")[0] for name in FITTED_PRESETS} >= {
        "b300-qwen3.6-35b-a3b",
        "b300-deepseek-v4-flash",
    }


@pytest.mark.parametrize(("batch", "padded"), [(1, 1), (3, 4), (9, 16), (17, 24), (257, 272), (512, 512), (513, None)])
def test_decode_time_is_a_staircase_of_captured_sizes(batch, padded):
    model = StepModel()
    assert model.padded(batch) == padded
    cost = FittedCost(model=model, coefficients=Coefficients(decode_s=1.0, token_s=0.1), source="")
    assert cost.group_step_s([Work(decode_requests=batch)]) == pytest.approx(1.0 + 0.1 * (padded or batch))


def test_without_graphs_there_is_no_staircase_and_no_least_time_of_decoding():
    cost = FittedCost(model=StepModel(graph_sizes=()), coefficients=Coefficients(token_s=0.1, eager_s=5.0), source="")
    assert cost.group_step_s([Work(decode_requests=9)]) == pytest.approx(0.9)


def test_all_ranks_pad_to_the_fullest_one_and_read_more_experts():
    model = StepModel(experts=8, top_k=1, expert_ranks=2, ranks=2)
    few = model.decode_terms([Work(decode_requests=1), IDLE])
    many = model.decode_terms([Work(decode_requests=9), IDLE])
    assert few.expert_s == pytest.approx(4 * (1 - (7 / 8) ** 2))
    assert many.expert_s == pytest.approx(4 * (1 - (7 / 8) ** 32))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(100, 0.02), (512, 0.02), (513, 0.05), (4000, 0.05), (8000, 0.08)],
)
def test_launching_hides_the_work_of_prompts_until_that_takes_longer(tokens, expected):
    coefficients = Coefficients(decode_s=0.003, prefill_s=1e-5, piecewise_s=0.02, eager_s=0.03)
    cost = FittedCost(model=StepModel(), coefficients=coefficients, source="")
    assert cost.group_step_s([Work(prefill_tokens=tokens)]) == pytest.approx(expected)


def test_a_request_that_completes_a_piece_of_its_context_makes_the_step_longer_once():
    cost = FittedCost(model=StepModel(), coefficients=Coefficients(decode_s=1.0, compression_s=0.5), source="")
    assert cost.group_step_s([Work(decode_requests=2, compressions=1)]) == pytest.approx(1.5)
    assert cost.group_step_s([Work(decode_requests=2, compressions=2)]) == pytest.approx(1.5)


class Request:
    def __init__(self, computed):
        self.num_computed_tokens, self.is_prefill_chunk = computed, False


class Output:
    num_scheduled_tokens = {"a": 1, "b": 1, "c": 128}  # noqa: RUF012


def test_a_scheduled_step_counts_completed_pieces_of_decoding_requests_alone():
    work, _ = work_of(Output(), {"a": Request(256), "b": Request(257), "c": Request(128)})
    assert (work.decode_requests, work.compressions) == (2, 1)


FITTED = {"decodeS": 0.004, "prefillS": 1e-5, "tokenS": 1e-5, "source": "mine"}


def scenario(cost, **engines):
    return parse_scenario({"cost": cost, "engines": {"maxModelLen": 8192, **engines}}, Path())


def test_a_scenario_takes_a_preset_with_its_memory_or_a_fit():
    preset = scenario({"preset": "b300-deepseek-v4-flash-tp4-ep4"})
    assert limits_of(preset).kv_blocks == FITTED_PRESETS["b300-deepseek-v4-flash-tp4-ep4"].kv_blocks
    assert build_simulation(preset).cost.source.startswith("measured")
    cost = cost_of(scenario({"fitted": {**FITTED, "ranks": 2, "graphSizes": [1, 2, 4]}}, ranks=2))
    assert cost.coefficients == Coefficients(decode_s=0.004, prefill_s=1e-5, token_s=1e-5)
    assert (cost.model.ranks, cost.model.graph_sizes, cost.source) == (2, (1, 2, 4), "mine")


@pytest.mark.parametrize(
    ("cost", "ranks", "message"),
    [
        ({"preset": "b300-deepseek-v4-flash-tp4-ep4"}, 2, "engines.ranks: these step times were fitted on 1 ranks"),
        ({"preset": "b300-deepseek-v4-flash-tp4-ep4", "placement": "vllm"}, 1, "cost.placement: fitted step times"),
        ({"preset": "b300-deepseek-v4-flash-tp4-ep4", "redundantExperts": 8}, 1, "cost.redundantExperts: fitted"),
        ({"fitted": {"prefillS": 1.0}}, 1, "cost.fitted.decodeS: a decode step must take time"),
        ({"fitted": {**FITTED, "graphSizes": [2, 1]}}, 1, "cost.fitted.graphSizes: must rise"),
        ({"fitted": {**FITTED, "pairS": -1}}, 1, "cost.fitted.pairS: input should be greater than or equal to 0"),
        ({"fitted": {**FITTED, "ranks": 4}}, 1, "engines.ranks: these step times were fitted on 4 ranks"),
    ],
)
def test_a_scenario_that_does_not_fit_its_step_times_is_refused(cost, ranks, message):
    with pytest.raises(InvalidInput) as caught:
        scenario(cost, ranks=ranks)
    assert any(message in str(error) for error in caught.value.errors), caught.value.errors
