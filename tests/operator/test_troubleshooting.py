"""The page on conditions has every reason that the code has, and no other."""

import re
from pathlib import Path

from moe_operator.api.reasons import Reason

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CELL = re.compile(r"`([A-Z][A-Za-z]+)`")


def test_each_reason_is_explained() -> None:
    missing = {reason.value for reason in Reason} - set(CELL.findall(PAGE))
    assert not missing


def test_each_reason_that_is_explained_is_one_of_the_code() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("|") and not line.startswith("|--")]
    explained = {word for cells in rows for cell in cells[: max(1, len(cells) - 1)] for word in CELL.findall(cell)}
    assert explained - {"Degraded"} <= {reason.value for reason in Reason}
    assert len(explained) > 30
