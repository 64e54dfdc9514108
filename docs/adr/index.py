"""Writes or checks the list of decisions, `docs/adr/README.md`, from the records beside it: `--write | --check`."""

import re
import sys
from pathlib import Path

from moe_contract.generated_files import read_choice, write_or_check

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("docs/adr")
INDEX = FOLDER / "README.md"
HEAD = """# Decisions

Written by `make generate` from the records. A superseded record stays as it was written.

| | decision | status |
|---|---|---|
"""
_TITLE = re.compile(r"# (\d{4}): (.+)")
_STATUS = re.compile(r"Status: (accepted|superseded in part|superseded by \D*(\d{4}))\b(.*)")


def render_index(folder: Path) -> str:
    """The page.

    Raises:
        ValueError: a record does not begin with its number, its title and a known status.
    """
    return HEAD + "".join(_row(path) for path in sorted(folder.glob("[0-9]*.md")))


def _row(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    title = _TITLE.fullmatch(lines[0])
    status = _STATUS.fullmatch(lines[2])
    if title is None or title[1] != path.name[:4]:
        raise ValueError(f"{path.name}: the first line must be '# {path.name[:4]}: title'")
    if status is None or (status[2] and not list(path.parent.glob(f"{status[2]}-*.md"))):
        known = "'Status: accepted', 'Status: superseded in part' or 'Status: superseded by NNNN'"
        raise ValueError(f"{path.name}: the third line must begin with {known}")
    shown = f"superseded by {status[2]}" if status[2] else status[1]
    if "superseded" in status[3]:
        shown += ", in part superseded"
    return f"| [{title[1]}]({path.name}) | {title[2]} | {shown} |\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs `--write` or `--check`; returns the exit status."""
    choice = read_choice(arguments, program="python docs/adr/index.py", description="The list of decisions.", root=ROOT)
    return write_or_check({INDEX: render_index(choice.root / FOLDER)}, choice)


if __name__ == "__main__":
    sys.exit(main())
