"""The engine's log file: appended to over restarts, and read once for why an engine ended."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 64 * 1024
_ROTATE_BYTES = 64 * 1024 * 1024
_LINE_LENGTH = 300
# A line of vLLM's log: `(EngineCore_DP0 pid=7) WARNING 08-01 12:00:00 [core.py:5] text`; the level may have colours.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(
    r"^(?:\([^()]*pid=\d+\)\s*)?(?:\[rank\d+\]:\s*)?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)\s+[\d-]+ (?:[\d:.]+ )?(?:\[[^\]]*\]\s*)?)?"
)
# Warnings of Python's own module, and of the logs of PyTorch and of glog.
_WARNING = re.compile(r"^\[?[WI]\d{4}\b|\b\w*Warning: ")
# The last line of a traceback, of argparse, of C++'s end of a process or of the interpreter's.
_ERROR = re.compile(
    r"^(?:[\w.]+\.)?[A-Z]\w*(?:Error|Exception|Interrupt)(?:: .+)?$|(?<=: )error: .+|^Fatal Python error: .+"
    r"|^terminate called after .+"
)
# Pydantic names the problem on the next line.
_HEADING = re.compile(r"\d+ validation errors? for ")
# Says only that another process, whose error stands above, failed.
_SECOND_HAND = re.compile(r"See root cause above|See stack trace \(above\) for the root cause")
_QUIET = ("DEBUG", "INFO", "WARNING")


class EngineLog:
    """One log file, `engine.log`; when it has grown large, a start moves it to `engine.log.1`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def open_for_start(self) -> BinaryIO:
        """The file to hand to the engine; remembers where this start begins."""
        if self._path.exists() and self._path.stat().st_size > _ROTATE_BYTES:
            os.replace(self._path, self._path.with_suffix(".log.1"))
        file = self._path.open("ab")
        self._offset = file.tell()
        return file

    def last_error(self) -> str:
        """The line since the last start that says best why the engine ended; empty when it wrote nothing."""
        with self._path.open("rb") as file:
            file.seek(max(self._offset, self._path.stat().st_size - _TAIL_BYTES))
            return find_error_line(file.read().decode(errors="replace"))


def find_error_line(log: str) -> str:
    """The line of a log that says best why its process ended; empty where none does.

    In this order: the last error of a traceback that is first-hand, the last line of the level ERROR, a second-hand
    error, the last line that is no log message. Messages of lower levels are no cause: they give advice.
    """
    best: dict[int, str] = {}
    lines = [*map(_read_line, log.splitlines()), ("", "")]
    for (level, line), (_, after) in pairwise(lines):
        if line and level not in _QUIET and not _WARNING.search(line):
            error = _ERROR.search(line)
            rank = _rank(line, level, is_error=error is not None)
            best[rank] = (error.group() if error else line) + _what_follows(line, after)
    # People read it in terminals, whose control characters an engine's log may have.
    text = best[min(best)] if best else ""
    return "".join(char if char.isprintable() else " " for char in text)[:_LINE_LENGTH]


def _what_follows(line: str, after: str) -> str:
    return f": {after}" if _HEADING.search(line) and after else ""


def _read_line(raw: str) -> tuple[str, str]:
    """Level and text of a line; the level is empty where it is no log message."""
    line = _COLOUR.sub("", raw).strip()
    match = _PREFIX.match(line)
    return ("", line) if match is None else (match["level"] or "", line[match.end() :].strip())


def _rank(line: str, level: str, *, is_error: bool) -> int:
    if _SECOND_HAND.search(line):
        return 2
    if is_error:
        return 0
    return 1 if level in ("ERROR", "CRITICAL") else 3
