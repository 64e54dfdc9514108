"""The walks of docs/architecture.md: files that exist, in at most 15 steps, none of them twice."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
WALKS = {
    part.partition("\n")[0]: re.findall(r"^\d+\. `([^`]+)`", part, re.MULTILINE) for part in PAGE.split("\n### ")[1:]
}


def test_the_four_walks_are_there():
    assert list(WALKS) == ["One chat request", "One changed field", "One step's signal", "One expert decision"]


@pytest.mark.parametrize("name", WALKS)
def test_a_walk_is_short_and_never_goes_back(name):
    files = WALKS[name]
    assert 5 < len(files) <= 15
    assert len(set(files)) == len(files)
    assert [path for path in files if not (ROOT / path).is_file()] == []
