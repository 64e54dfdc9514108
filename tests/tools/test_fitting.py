"""The fit of an engine's step times: known coefficients are found again, noise shows as the error."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_tools.calibration import calibrate
from moe_tools.calibration.calibrate import build_fit_document, read_step_model, render_fit
from moe_tools.calibration.fitting import LEAST_STEPS, MeasuredStep, TooFewSteps, fit_and_check, fit_cost
from moe_tools.calibration.step_errors import StepKind, by_shape, cross_validate, kind_of, render_errors, summarize
from moe_tools.calibration.step_fit import StepMeasurement, fit_coefficients, predict
from moe_tools.simulator.costs import Work
from moe_tools.simulator.scenario import cost_of, parse_scenario
from moe_tools.simulator.step_time import Coefficients, FittedCost, StepModel
from yaml import safe_load

CPU = StepModel(graph_sizes=())
GPU = StepModel(experts=64, top_k=4)
LINE = Coefficients(decode_s=0.01, prefill_base_s=0.012, token_s=1e-4, request_s=1e-4, prefill_s=1e-4)


def draw_works(count=400, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(count):
        prefill = int(random.integers(16, 2048)) * int(random.integers(0, 2))
        decode = 0 if prefill and random.random() < 0.5 else int(random.integers(1, 64))
        yield Work(prefill, decode, decode * int(random.integers(10, 4000)), prefill * int(random.integers(1, 3000)))


def steps(coefficients, model=CPU, count=400, noise=0.0):
    cost = FittedCost(model=model, coefficients=coefficients, source="test")
    random = np.random.default_rng(1)
    return [
        MeasuredStep(work=work, step_s=cost.group_step_s([work]) * (1 + noise * random.normal()))
        for work in draw_works(count)
    ]


@settings(max_examples=15, deadline=None)
@given(
    decode_s=st.floats(1e-3, 0.05),
    more_s=st.floats(0.0, 0.05),
    request_s=st.floats(1e-6, 1e-3),
    prefill_s=st.floats(1e-6, 1e-3),
    context_s=st.floats(1e-9, 1e-6),
    pair_s=st.floats(1e-11, 1e-8),
)
def test_an_engine_without_graphs_is_found_again(decode_s, more_s, request_s, prefill_s, context_s, pair_s):
    """Where prompts never make a step shorter, each step has one alternative: the fit is exact."""
    true = Coefficients(
        decode_s=decode_s,
        prefill_base_s=decode_s + more_s,
        token_s=request_s,
        request_s=request_s,
        prefill_s=prefill_s,
        context_s=context_s,
        pair_s=pair_s,
    )
    rows = steps(true, count=100)
    found = fit_cost(rows, CPU, "test")
    assert max(abs(found.group_step_s([row.work]) / row.step_s - 1) for row in rows) < 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_least_times_and_experts_are_found_again(noise):
    true = Coefficients(
        decode_s=0.004,
        prefill_base_s=0.005,
        expert_s=4e-5,
        prefill_s=1e-5,
        request_s=1e-5,
        context_s=4e-9,
        piecewise_s=0.015,
        eager_s=0.02,
    )
    model = StepModel(experts=64, top_k=4)
    rows = steps(true, model, count=800, noise=noise)
    found = fit_coefficients(model, [StepMeasurement(steps=((r.work,),), seconds=r.step_s, shape="") for r in rows])
    assert found.piecewise_s == pytest.approx(true.piecewise_s, rel=0.05)
    assert found.piecewise_s + found.eager_s == pytest.approx(true.piecewise_s + true.eager_s, rel=0.05)
    fitted = FittedCost(model=model, coefficients=found, source="")
    errors = [abs(fitted.group_step_s([row.work]) / row.step_s - 1) for row in rows]
    assert np.median(errors) < 0.01 + noise


def test_some_steps_that_take_far_longer_move_no_median():
    rows = steps(LINE)
    slow = [
        MeasuredStep(work=row.work, step_s=row.step_s * (20 if number % 25 == 0 else 1))
        for number, row in enumerate(rows)
    ]
    found = fit_coefficients(CPU, [StepMeasurement(steps=((r.work,),), seconds=r.step_s, shape="") for r in slow])
    fitted = FittedCost(model=CPU, coefficients=found, source="")
    assert np.median([abs(fitted.group_step_s([row.work]) / row.step_s - 1) for row in rows]) < 0.02


def test_chunks_that_were_measured_together_are_fitted_together():
    rows = steps(LINE)
    cost = FittedCost(model=CPU, coefficients=LINE, source="")
    pairs = [
        StepMeasurement(
            steps=((one.work,), (other.work,)),
            seconds=cost.group_step_s([one.work]) + cost.group_step_s([other.work]),
            shape="",
        )
        for one, other in zip(rows[::2], rows[1::2], strict=True)
    ]
    found = fit_coefficients(CPU, pairs)
    assert predict(CPU, found, pairs[0]) == pytest.approx(pairs[0].seconds, rel=0.02)


def test_no_coefficient_is_negative_whatever_was_measured():
    random = np.random.default_rng(1)
    for model in (CPU, GPU):
        rows = [MeasuredStep(work=work, step_s=float(random.random()) + 0.01) for work in draw_works()]
        assert min(fit_cost(rows, model, "test").coefficients) >= 0


def test_nothing_to_fit_is_refused():
    with pytest.raises(ValueError, match="no steps to fit"):
        fit_coefficients(CPU, [])


def test_noise_is_the_error_that_is_reported_for_each_kind():
    fit = fit_and_check(steps(LINE, noise=0.1), CPU, "test")
    assert [row.kind for row in fit.errors] == list(StepKind)
    for row in fit.errors:
        assert 0.02 < row.median < 0.2 or row.kind is StepKind.PROMPT
        assert row.bias == pytest.approx(1.0, abs=0.1)
    # Of one rank, its own tokens and the group's are the same.
    coefficients = fit.cost.coefficients
    assert coefficients.prefill_s + coefficients.group_token_s == pytest.approx(1e-4, rel=0.1)


def test_too_few_steps_are_refused():
    with pytest.raises(ValueError, match=f"{LEAST_STEPS} are needed"):
        fit_cost(steps(LINE, count=LEAST_STEPS - 1), CPU, "test")


def test_steps_of_one_shape_alone_have_no_held_out_error():
    rows = [measured(1.0), measured(1.1)]
    with pytest.raises(ValueError, match="one fold"):
        cross_validate(CPU, rows, by_shape(rows))
    with pytest.raises(TooFewSteps, match="of one shape"):
        fit_and_check([MeasuredStep(work=ONE_ANSWER, step_s=0.01)] * LEAST_STEPS, CPU, "test")


def test_the_same_steps_give_the_same_fit():
    rows = steps(LINE, noise=0.1)
    assert fit_and_check(rows, CPU, "test", seed=3) == fit_and_check(rows, CPU, "test", seed=3)


ONE_ANSWER = Work(0, 1)


def measured(seconds, shape="decode 1", work=ONE_ANSWER):
    return StepMeasurement(steps=((work,),), seconds=seconds, shape=shape)


def test_all_of_a_shape_are_held_out_together():
    rows = [measured(1.0, shape) for shape in ["a", "b", "c", "d", "e", "f"] * 3]
    folds = by_shape(rows, seed=2)
    assert len({(row.shape, fold) for row, fold in zip(rows, folds, strict=True)}) == 6
    assert set(folds) == set(range(5))


@pytest.mark.parametrize(
    ("work", "kind"),
    [
        (Work(0, 3), StepKind.DECODE),
        (Work(5, 0), StepKind.PROMPT),
        (Work(5, 1), StepKind.MIXED),
    ],
)
def test_the_kind_of_a_measurement_is_that_of_its_work(work, kind):
    assert kind_of(measured(1.0, work=work)) is kind


def test_errors_are_of_steps_and_of_the_medians_of_shapes_without_outliers():
    rows = [measured(1.0), measured(1.2), measured(1.4), measured(30.0), measured(2.0, "decode 2")]
    (row,) = summarize(rows, [1.2, 1.2, 1.2, 1.2, 1.0])
    assert (row.measurements, row.left_out, row.shapes) == (4, 1, 2)
    assert row.median == pytest.approx((0.2 + 0.2 / 1.4) / 2)
    assert row.shape_median == pytest.approx(0.25 + 0.0, abs=0.05)
    assert row.bias == pytest.approx(4.6 / 5.6)
    assert row.bias_of_all == pytest.approx(5.8 / 35.6)
    assert render_errors({"x": [row]}, "title").row_count == 1


def test_printed_is_a_section_of_a_scenario_and_the_document_has_all():
    fit = fit_and_check(steps(LINE), CPU, "measured: tiny on this machine")
    text = render_fit(fit)
    scenario = parse_scenario(safe_load(text[: text.index("Fitted on")]), Path())
    assert cost_of(scenario) == fit.cost
    assert build_fit_document(fit, [])["fit"]["cost"]["coefficients"]["decode_s"] == fit.cost.coefficients.decode_s


@pytest.mark.parametrize(
    ("text", "cpu", "experts", "top_k", "graph_sizes"),
    [
        ({"num_experts": 64, "num_experts_per_tok": 8}, False, 64, 8, (1, 2, 4)),
        ({"n_routed_experts": 256, "num_experts_per_tok": 6}, True, 256, 6, ()),
        ({}, True, 1, 1, ()),
    ],
)
def test_sizes_come_from_vllms_configuration(monkeypatch, text, cpu, experts, top_k, graph_sizes):
    monkeypatch.setattr(calibrate, "is_cpu_build", lambda: cpu)
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(**text), enforce_eager=False),
        parallel_config=SimpleNamespace(tensor_parallel_size=2, enable_expert_parallel=True),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[4, 2, 1]),
    )
    assert read_step_model(config) == StepModel(experts=experts, top_k=top_k, expert_ranks=2, graph_sizes=graph_sizes)
