"""The measurement of what the expert layer adds to a step runs to its end, on two real ranks over gloo."""

import json
import math

import pytest
from moe_lab.experts.__main__ import app
from moe_tools.modelless import foreign_warnings
from typer.testing import CliRunner

# A gather comes after 512 passes.
PASSES = 600


@pytest.mark.timeout(400)
def test_the_overhead_of_both_shapes_is_measured(tmp_path):
    out = tmp_path / "overhead.json"
    with foreign_warnings():
        answer = CliRunner().invoke(
            app,
            ["overhead", "--requests", "2", "--passes", str(PASSES), "--repetitions", "1", "--json", str(out)],
            catch_exceptions=False,
        )
    assert answer.exit_code == 0
    assert "part of the step" in answer.output
    rows = {row["preset"]: row for row in json.loads(out.read_text())["overhead"]}
    assert rows.keys() == {"h100-qwen3-30b-a3b", "h100-deepseek-v3"}
    for row in rows.values():
        assert row["requests"] == 2
        values = {name: row[name] for name in ("pass_us", "path_us", "other_us", "counting_us")}
        assert {len(measured) for measured in values.values()} == {1}
        assert all(math.isfinite(measured[0]) for measured in values.values())
        assert 0.0 < values["path_us"][0] <= values["pass_us"][0] * 1.05, "the thread's time is in the second alone"
        assert values["other_us"][0] > 0.0
