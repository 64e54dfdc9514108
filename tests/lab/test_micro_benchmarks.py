"""The micro-benchmarks run to their end; how long things take is theirs to say, not a test's."""

from pathlib import Path

import moe_lab
from moe_lab import scheduling
from moe_lab.__main__ import find_benchmarks, render_rows


def test_every_decision_is_measured(monkeypatch):
    monkeypatch.setattr(scheduling, "CALLS", 2)
    monkeypatch.setattr(scheduling, "BATCHES", 2)
    rows = list(scheduling.run())
    assert {row.benchmark for row in rows} == {"queue", "prefill", "choice of the engine", "prefix", "books"}
    assert all(row.values and min(row.values) >= 0 for row in rows)
    assert render_rows(rows).row_count == len(rows)


def test_the_modules_with_benchmarks_are_found():
    assert {"scheduling", "telemetry", "expert_decisions"} <= set(find_benchmarks(Path(moe_lab.__file__).parent))
