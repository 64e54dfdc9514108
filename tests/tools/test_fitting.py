"""The fit of a real engine's step time: known lines are found again, and a curve shows as an error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_tools.calibration.calibrate import build_fit_document, render_fit
from moe_tools.calibration.fitting import LEAST_STEPS, MeasuredStep, fit_cost
from moe_tools.simulator.costs import LinearCost, Work
from moe_tools.simulator.scenario import cost_of, parse_scenario
from yaml import safe_load

TERM = st.floats(1e-7, 1e-3)


def steps(cost, count=400, seed=0, noise=0.0):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prefill, decode = int(random.integers(0, 2048)), int(random.integers(0, 64))
        work = Work(prefill, decode, decode * int(random.integers(10, 4000)), prefill * int(random.integers(1, 3000)))
        rows.append(MeasuredStep(work=work, step_s=cost.group_step_s([work]) * (1 + noise * random.normal())))
    return rows


@given(st.floats(1e-4, 0.1), TERM, TERM, st.floats(1e-9, 1e-6), st.floats(1e-11, 1e-8))
def test_a_line_is_found_again(base_s, prefill_s, decode_s, context_s, pair_s):
    cost = LinearCost(base_s, prefill_s, decode_s, context_s, pair_s)
    fit = fit_cost(steps(cost), "test")
    for work in (Work(100, 3, 500, 50_000), Work(0, 40, 80_000, 0)):
        assert fit.cost.group_step_s([work]) == pytest.approx(cost.group_step_s([work]), rel=1e-3)
    assert fit.error_median < 1e-3
    assert fit.bias == pytest.approx(1.0, abs=1e-3)


def test_noise_is_the_error_that_is_reported():
    fit = fit_cost(steps(LinearCost(0.01, 1e-4, 1e-4), noise=0.1), "test")
    assert 0.03 < fit.error_median < 0.15
    assert fit.cost.prefill_s == pytest.approx(1e-4, rel=0.1)


def test_no_term_is_negative_whatever_was_measured():
    random = np.random.default_rng(1)
    rows = [MeasuredStep(work=step.work, step_s=float(random.random()) + 0.01) for step in steps(LinearCost(1, 1, 1))]
    cost = fit_cost(rows, "test").cost
    assert min(cost.base_s, cost.prefill_s, cost.decode_s, cost.context_s, cost.pair_s) >= 0


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=f"{LEAST_STEPS} are needed"):
        fit_cost(steps(LinearCost(0.01, 1e-4, 1e-4), count=LEAST_STEPS - 1), "test")


def test_the_same_steps_give_the_same_fit():
    rows = steps(LinearCost(0.01, 1e-4, 1e-4), noise=0.1)
    assert fit_cost(rows, "test", seed=3) == fit_cost(rows, "test", seed=3)


def test_what_is_printed_is_a_section_of_a_scenario(tmp_path):
    fit = fit_cost(steps(LinearCost(0.01, 1e-4, 1e-4)), "measured: tiny on this machine")
    text = render_fit(fit)
    scenario = parse_scenario(safe_load(text[: text.index("Fitted on")]), tmp_path)
    assert cost_of(scenario) == fit.cost
    assert build_fit_document(fit, [])["fit"]["cost"]["base_s"] == fit.cost.base_s
