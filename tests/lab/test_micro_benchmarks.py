"""The micro-benchmarks run to their end; how long things take is theirs to say, not a test's."""

from pathlib import Path

import moe_lab
import pytest
from moe_lab import scheduling
from moe_lab.__main__ import find_benchmarks, render_rows
from moe_lab.rows import BenchmarkRow


def test_every_decision_is_measured(monkeypatch):
    monkeypatch.setattr(scheduling, "CALLS", 2)
    monkeypatch.setattr(scheduling, "BATCHES", 2)
    rows = list(scheduling.run())
    assert {row.benchmark for row in rows} == {
        "queue",
        "prefill",
        "choice of the engine",
        "prefix",
        "in-flight accounting",
    }
    assert all(row.values and min(row.values) >= 0 for row in rows)
    assert render_rows(rows).row_count == len(rows)


def test_the_modules_with_benchmarks_are_found():
    assert {"scheduling", "telemetry", "expert_decisions"} <= set(find_benchmarks(Path(moe_lab.__file__).parent))


def test_benchmarks_are_found_by_their_run_function(tmp_path):
    (tmp_path / "one.py").write_text("def run():\n    return []\n")
    (tmp_path / "two.py").write_text("def run(x):\n    return []\n")
    (tmp_path / "three.py").write_text("def other():\n    return []\n")
    assert list(find_benchmarks(tmp_path)) == ["one"]


def test_rows_become_a_table_with_their_sample_size():
    table = render_rows([BenchmarkRow(benchmark="b", case="c", unit="us", values=[1.0, 2.0, 3.0], goal="< 20")])
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[2].startswith("2 [")
    assert (cells[4], cells[5], cells[6]) == ("us", "3", "< 20")
    assert "moeserving" in str(table.caption)
    with pytest.raises(ValueError, match="at least one value"):
        BenchmarkRow(benchmark="b", case="c", unit="us", values=[])
