"""The engine's log file: appended to over restarts, and read once for why an engine ended."""

import os
import re
from pathlib import Path
from typing import BinaryIO

_TAIL_BYTES = 64 * 1024
_ROTATE_BYTES = 64 * 1024 * 1024
_LINE_LENGTH = 300
_ERROR = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception|Interrupt): .+|: error: .+")
# Says only that another process, whose error stands above, failed.
_SECOND_HAND = "See root cause above"


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


def find_error_line(text: str) -> str:
    """The last first-hand error line of a log, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [match.group() for line in lines if (match := _ERROR.search(line)) and _SECOND_HAND not in line]
    found = (errors or lines or [""])[-1]
    return found.removeprefix(": ")[:_LINE_LENGTH]
