"""Predicted TTFT and time between tokens of a fleet, by its number of prefill engines."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.disaggregation import STEPS_TO_FIRST_TOKEN, EngineRole
from moe_scheduling.fleet import role_latency
from moe_scheduling.fleet.role_latency import (
    RoleObservation,
    ServerLoad,
    find_prefill_wait_s,
    predict_costs_s,
    predict_latency_s,
)
from moe_scheduling.signals import StepTime

# Qwen3.6-35B-A3B on one B300, as `StepTimeFit` finds it in a simulation on measured step times.
B300 = StepTime(base_s=0.0021, prefill_s=8.2e-6, decode_s=0.0, decode_root_s=0.00138, prefill_base_s=0.0136)
GROWTH = 0.5
# Variance of the prompts of `twoEnd` over the square of their mean.
TWO_END_VARIATION = 0.75


def observe(*, servers=4, prefill=0, **values):
    usual = {
        "step_time": B300, "step_tokens": 8192, "prompt_tokens": 4000.0, "answer_tokens": 100.0, "transfer_s": 0.006,
    }  # fmt: skip
    roles = [EngineRole.PREFILL] * prefill + [EngineRole.UNIFIED] * (servers - prefill)
    fleet = [ServerLoad(name=f"e{number}", role=role) for number, role in enumerate(roles)]
    return RoleObservation(observed_s=0.0, servers=fleet, **{**usual, **values})


@pytest.mark.parametrize(
    ("requests_per_s", "simulated"),
    [
        # Mean TTFT and TPOT (ms) of 1,500 simulated requests of `twoEnd` each.
        (41.9, {0: (76, 14.2), 1: (112, 11.2), 2: (121, 11.5), 3: (125, 12.4)}),
        (62.9, {0: (154, 45.9), 1: (203, 32.3), 2: (198, 19.4), 3: (177, 15.6)}),
    ],
)
def test_the_predictions_come_near_to_simulated_fleets(requests_per_s, simulated):
    load = observe(requests_per_s=requests_per_s, prompt_variation=TWO_END_VARIATION)
    for prefilling, (ttft_ms, tpot_ms) in simulated.items():
        ttft_s, inter_token_s = predict_latency_s(load, prefilling, GROWTH)
        assert 1000 * ttft_s == pytest.approx(ttft_ms, rel=0.32)
        assert 1000 * inter_token_s == pytest.approx(tpot_ms, rel=0.44)


def test_the_number_of_prefill_engines_is_that_of_the_cheapest_simulated_fleet():
    # Simulated ends are 1423, 1250, 1280 and 1391 ms at the lower rate, and 4003, 3178, 2075 and 1729 at the higher.
    loads = {rate: observe(requests_per_s=rate, prompt_variation=TWO_END_VARIATION) for rate in (42, 63)}
    costs_s = {rate: predict_costs_s(load, GROWTH) for rate, load in loads.items()}
    assert costs_s[42].index(min(costs_s[42])) in (1, 2)
    assert costs_s[63].index(min(costs_s[63])) == 3


def test_an_idle_engine_computes_a_prompt_in_a_step_of_its_own():
    model = B300
    ttft_s, inter_token_s = predict_latency_s(observe(requests_per_s=1e-6), 0, GROWTH)
    assert inter_token_s == pytest.approx(model.base_s, rel=1e-3)
    alone_s = model.base_s + model.prefill_base_s + model.prefill_s * 4000
    assert ttft_s == pytest.approx(alone_s + model.base_s / 2, rel=1e-3)


def test_a_prompt_of_several_steps_has_their_least_time_each():
    short, long = (predict_latency_s(observe(requests_per_s=1e-6, prompt_tokens=tokens), 0, GROWTH)[0]
                   for tokens in (8192.0, 4 * 8192.0))  # fmt: skip
    more_s = 3 * (B300.base_s + B300.prefill_base_s + 8192 * B300.prefill_s)
    assert long - short == pytest.approx(more_s, rel=1e-3)


def test_more_than_the_engines_can_serve_takes_for_ever():
    assert predict_latency_s(observe(requests_per_s=150.0), 0, GROWTH) == (math.inf, math.inf)
    # Their answers alone.
    many = observe(requests_per_s=50.0, prompt_tokens=1.0, answer_tokens=1e6)
    assert predict_latency_s(many, 0, GROWTH) == (math.inf, math.inf)


def test_without_growth_prompts_wait_at_prefill_engines_no_longer_than_elsewhere():
    load = observe(requests_per_s=42.0)
    declared = [find_prefill_wait_s(load, growth) for growth in (0.0, 0.5, 1.0)]
    whole_s = predict_latency_s(load, 0, 0.0)[0]
    own_s = B300.base_s + B300.prefill_base_s + B300.prefill_s * 4000
    assert declared == pytest.approx([(1.0 + growth) * whole_s - own_s for growth in (0.0, 0.5, 1.0)])


@pytest.mark.parametrize("values", [{"step_time": None}, {"servers": 0}, {"requests_per_s": 0.0}])
def test_nothing_waits_where_the_load_is_not_known(values):
    assert find_prefill_wait_s(observe(**{"requests_per_s": 10.0, **values}), GROWTH) == 0.0


@pytest.mark.parametrize("requests_per_s", [90.0, 150.0, 1e4])
def test_a_fleet_that_is_full_without_prefill_engines_lets_prompts_wait_as_at_the_load_that_it_can_serve(
    requests_per_s,
):
    most_s = max(find_prefill_wait_s(observe(requests_per_s=rate), GROWTH) for rate in (79.0, 80.0, 81.0))
    assert find_prefill_wait_s(observe(requests_per_s=requests_per_s), GROWTH) == pytest.approx(most_s, rel=0.05)


def test_what_comes_after_the_prompt_is_part_of_its_first_token():
    """The transfer and the steps until the first token are within the growth of TTFT that the plan keeps to."""
    near, far = (observe(requests_per_s=42.0, transfer_s=transfer_s) for transfer_s in (0.006, 0.026))
    # Fewer prompts go apart, and interrupt more answers.
    assert predict_latency_s(far, 2, GROWTH)[1] > predict_latency_s(near, 2, GROWTH)[1]
    alone = observe(requests_per_s=1e-6, answer_tokens=0.0)
    own_s = B300.base_s + B300.prefill_base_s + 4000 * B300.prefill_s
    expected_s = own_s + alone.transfer_s + STEPS_TO_FIRST_TOKEN * B300.base_s
    assert predict_latency_s(alone, 2, 10.0)[0] == pytest.approx(expected_s, rel=1e-3)


@pytest.mark.parametrize("prefilling", [1, 2, 3])
@pytest.mark.parametrize("requests_per_s", [21.0, 42.0, 63.0])
def test_as_many_prompts_go_apart_as_have_their_first_token_in_time(requests_per_s, prefilling):
    load = observe(requests_per_s=requests_per_s, prompt_variation=TWO_END_VARIATION)
    whole_s, _ = predict_latency_s(load, 0, GROWTH)
    # Where too few go apart, the other engines take longer for theirs.
    assert predict_latency_s(load, prefilling, GROWTH)[0] <= (1.0 + GROWTH) ** 2 * whole_s


def test_prompts_of_different_lengths_wait_longer_where_engines_are_busy():
    alike, mixed = (
        [predict_latency_s(observe(requests_per_s=rate, prompt_variation=variation), 0, 0.0)[0] for rate in (0.1, 75.0)]
        for variation in (0.0, 3.0)
    )
    assert mixed[0] == pytest.approx(alike[0])
    assert mixed[1] > 1.1 * alike[1]


def test_a_load_that_no_number_can_serve_is_planned_as_near_the_greatest_that_one_can():
    for requests_per_s in (120.0, 1e3):
        costs_s = predict_costs_s(observe(requests_per_s=requests_per_s), GROWTH)
        assert costs_s.index(min(costs_s)) == 3
        assert math.isfinite(costs_s[3])


def test_the_plan_of_a_large_fleet_in_overload_costs_little_more_than_in_another_load(monkeypatch):
    counted, predict = [], role_latency._predict

    def count(*arguments):
        counted.append(arguments)
        return predict(*arguments)

    monkeypatch.setattr(role_latency, "_predict", count)
    numbers = []
    for requests_per_s in (320.0, 9600.0):
        counted.clear()
        predict_costs_s(observe(servers=32, requests_per_s=requests_per_s), GROWTH)
        numbers.append(len(counted))
    # A gateway plans in its event loop.
    assert numbers[1] < 15 * numbers[0]


def test_where_no_load_can_be_served_no_prompt_waits():
    slow = StepTime(base_s=100.0, prefill_s=1.0, decode_s=1.0)
    assert find_prefill_wait_s(observe(step_time=slow, requests_per_s=10.0), GROWTH) == 0.0


def test_prefill_engines_that_lengthen_ttft_beyond_the_growth_do_not_count():
    slow = observe(requests_per_s=42.0, transfer_s=5.0)
    assert predict_costs_s(slow, GROWTH)[2] == math.inf
    assert predict_costs_s(slow, 100.0)[2] < math.inf


STEP_TIMES = st.builds(
    StepTime,
    base_s=st.floats(0, 0.1),
    prefill_s=st.floats(0, 1e-3),
    decode_s=st.floats(0, 1e-2),
    decode_root_s=st.floats(0, 1e-2),
    prefill_base_s=st.floats(0, 0.1),
)


@given(
    STEP_TIMES,
    st.floats(0, 1e4),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
    st.integers(1, 16),
    st.integers(2, 8),
    st.integers(1, 32_768),
    st.floats(0, 1e3),
    st.data(),
)
def test_predictions_are_never_negative_nor_nan(
    step_time, rate, prompt, answer, ranks, servers, step_tokens, variation, data
):
    load = observe(
        servers=servers, step_time=step_time, requests_per_s=rate, prompt_tokens=prompt, answer_tokens=answer,
        ranks=ranks, step_tokens=step_tokens, prompt_variation=variation,
        prefill=data.draw(st.integers(0, servers)),
    )  # fmt: skip
    prefilling = data.draw(st.integers(0, servers - 1))
    ttft_s, inter_token_s = predict_latency_s(load, prefilling, GROWTH)
    assert ttft_s >= 0.0
    assert inter_token_s >= 0.0
    assert (ttft_s == math.inf) is (inter_token_s == math.inf)
    costs_s = predict_costs_s(load, GROWTH)
    assert len(costs_s) == servers
    assert all(cost_s >= 0.0 for cost_s in costs_s)
    assert 0.0 <= find_prefill_wait_s(load, GROWTH) < math.inf


@given(STEP_TIMES, st.floats(0.01, 100), st.floats(1, 20_000), st.floats(0, 2000), st.integers(1, 8))
def test_more_requests_are_served_no_sooner(step_time, rate, prompt, answer, ranks):
    def latency_s(requests_per_s):
        load = observe(
            step_time=step_time, requests_per_s=requests_per_s, prompt_tokens=prompt, answer_tokens=answer, ranks=ranks
        )
        return predict_latency_s(load, 0, GROWTH)

    for less_s, more_s in zip(latency_s(rate), latency_s(1.5 * rate), strict=True):
        assert less_s <= more_s * (1 + 1e-2)
