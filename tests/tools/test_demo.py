"""The end of the demo: a verdict where the interval allows one, and a modelled comparison where it does not."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from moe_tools import demo, demo_report
from moe_tools.compare_command import ComparisonEffort
from moe_tools.comparison import PiecePair, Plan, Policy, compare, compare_metrics
from moe_tools.demo_report import WIDEST, Verdict, judge, render_conclusion, render_next_steps
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay import ReplayResult
from moe_tools.replay_command import Source
from moe_tools.traces import TraceRequest
from rich.console import Console

from tests.tools.test_comparison import run_of

CLEAR = ((1.0, 0.6), (1.0, 0.65), (1.0, 0.7), (1.0, 0.62))
WORSE = tuple((ours, stock) for stock, ours in CLEAR)
NOISY = ((1.0, 0.4), (1.0, 1.9), (1.0, 0.8))
WIDE = ((1.0, 0.1), (1.0, 0.3), (1.0, 0.2))
NARROW = ((1.0, 0.96), (1.0, 1.04), (1.0, 0.98), (1.0, 1.02))


def pairs_of(ratios) -> tuple[PiecePair, ...]:
    return tuple(PiecePair(stock=run_of(stock, stock), ours=run_of(ours, ours)) for stock, ours in ratios)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        (CLEAR, Verdict.BETTER),
        (WORSE, Verdict.WORSE),
        (NOISY, Verdict.UNCLEAR),
        (WIDE, Verdict.UNCLEAR),
        (CLEAR[:1], Verdict.UNCLEAR),
        ((), Verdict.UNCLEAR),
    ],
    ids=["better", "worse", "covers 1", "clear of 1 but wide", "one pair", "nothing measured"],
)
def test_the_verdict_follows_from_the_interval_of_the_mean_ttft(ratios, verdict):
    assert judge(compare_metrics(pairs_of(ratios))) is verdict


def test_a_wide_interval_is_one_that_is_clear_of_1():
    ratio = demo_report.find(compare_metrics(pairs_of(WIDE)), demo_report.DECIDING).ratio
    assert ratio.high < 1
    assert ratio.high / ratio.low > WIDEST


@pytest.mark.parametrize(("ratios", "says"), [(CLEAR, "wait 36% less"), (WORSE, "wait 56% longer")])
def test_a_clear_result_is_said_in_words_either_way(ratios, says):
    measured = compare_metrics(pairs_of(ratios))
    assert says in render_conclusion(judge(measured), measured)[0]


def slower(run: ReplayResult, factor: float = 1.5) -> ReplayResult:
    """The same first tokens, with more time between the tokens after them."""
    rows = [replace(row, last_token_s=row.ttft_s + factor * (row.last_token_s - row.ttft_s)) for row in run.answered]
    return ReplayResult(outcomes=tuple(rows), wall_s=run.wall_s)


def shown(monkeypatch, ratios, modelled=CLEAR) -> tuple[str, list[object]]:
    asked: list[object] = []

    def model(source, effort):
        asked.append((source, effort))
        return pairs_of(modelled)

    monkeypatch.setattr(demo, "model", model)
    console = Console(width=80, record=True, quiet=False, file=SimpleNamespace(write=len, flush=lambda: None))
    demo.show(pairs_of(ratios), Source(), ComparisonEffort(), ProgressPrinter(console))
    return console.export_text(), asked


def test_a_measurement_that_shows_a_difference_needs_no_model(monkeypatch):
    text, asked = shown(monkeypatch, CLEAR)
    assert asked == []
    assert "modelled" not in text.lower()
    assert "0.64 [" in text


def test_a_noisy_measurement_says_so_and_shows_the_modelled_one_beside_it(monkeypatch):
    text, asked = shown(monkeypatch, NOISY)
    assert asked == [(Source(), ComparisonEffort())]
    for part in ("too noisy", "B/A, measured here", "B/A, modelled", "no verdict", "wait 36% less", "0.85 [0.12"):
        assert part in text, part
    assert max(len(line) for line in text.splitlines() if "│" in line or "┃" in line) <= 80


def test_a_narrow_measurement_without_a_difference_is_not_called_noise(monkeypatch):
    text, asked = shown(monkeypatch, NARROW)
    assert asked == [(Source(), ComparisonEffort())]
    assert "no difference is shown on this machine" in text
    assert "The modelled gain is not seen here" in text
    assert "too noisy" not in text


def test_a_model_without_a_difference_claims_none(monkeypatch):
    text, _ = shown(monkeypatch, NOISY, modelled=NOISY)
    assert "no difference is shown" in text


@pytest.mark.parametrize("ratios", [CLEAR, NOISY, NARROW, CLEAR[:1]], ids=["clear", "noisy", "narrow", "one pair"])
def test_no_line_of_the_end_is_broken_by_a_terminal_of_80_columns(monkeypatch, ratios):
    text, _ = shown(monkeypatch, ratios)
    end = text[text.index("A: ") :].splitlines()
    assert [line for line in end if len(line.rstrip()) > 80] == []
    assert not [line for line in end if line.rstrip().endswith(", where")], "lines of the caption are whole"
    assert "1 pairs" not in text


def test_what_gets_worse_is_said_in_words(monkeypatch):
    worse = tuple(
        PiecePair(stock=run_of(1.0), ours=slower(run_of(0.6 + step / 100), 1.5 + step / 100)) for step in range(4)
    )
    monkeypatch.setattr(demo, "model", lambda source, effort: worse)
    (row,) = [row for row in compare_metrics(worse) if row.metric == "TPOT, mean"]
    assert row.verdict == "worse"
    for measured, modelled in ((worse, ()), (pairs_of(NOISY), worse)):
        said = render_conclusion(judge(compare_metrics(measured)), compare_metrics(measured), compare_metrics(modelled))
        assert any(line.startswith("Worse: TPOT, mean") for line in said), said
    assert not [line for line in render_conclusion(Verdict.BETTER, compare_metrics(pairs_of(CLEAR))) if "Worse" in line]


def test_the_end_names_what_to_try_next(monkeypatch):
    text, _ = shown(monkeypatch, CLEAR)
    assert "moeserving compare" in text
    root = Path(__file__).parents[2]
    assert (root / "docs" / "results" / "README.md").is_file()
    assert any("docs/results/README.md" in line for line in render_next_steps())


@pytest.mark.parametrize(("until_s", "pairs"), [(None, 3), (0.0, 1), (1e18, 3)])
async def test_the_clock_ends_the_pairs_after_the_first(until_s, pairs):
    lines: list[str] = []

    async def switch(_: Policy) -> None:
        return None

    async def measure(piece, salt):
        return run_of(1.0)

    piece = (TraceRequest(arrival_s=0.0, prompt_tokens=1, output_tokens=1),)
    plan = Plan(pieces=(piece,) * 3, seed=0, until_s=until_s)
    assert len(await compare(plan, switch, measure, lines.append)) == pairs
    assert any("time is up: 1 of 3 pairs" in line for line in lines) == (pairs < 3)


def test_the_demo_measures_a_generated_shape_where_no_trace_is_named(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(demo, "plan_deployment", lambda manifest, folder: SimpleNamespace(checkout=tmp_path))
    monkeypatch.setattr(demo, "measure", lambda plan, source, effort, say: asked.append((source, effort)))
    monkeypatch.setattr(demo, "show", lambda pairs, source, effort, say: None)
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 3}\n')
    for named in (None, trace):
        demo.run_demo(trace=named, manifest=Path("mine.yaml"), effort=ComparisonEffort(), seed=1)
    assert [(source.trace, source.shape) for source, _ in asked] == [(None, "twoEnd"), (trace, "random")]
    assert all(0 < effort.until_s - time.monotonic() <= demo.MEASURE_UNTIL_S for _, effort in asked)
