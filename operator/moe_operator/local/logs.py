"""The logs of a deployment: their last lines, and new ones."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

_TAIL_BYTES = 1024 * 1024
_LOOK_EVERY_S = 0.2


def read_tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file, of its last megabyte at most; none when it is absent."""
    return read_tail_at(path, lines)[0]


def read_tail_at(path: Path, lines: int) -> tuple[list[str], int]:
    """The last lines, and the position behind them."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
            return (text.splitlines()[-lines:] if lines else []), file.tell()
    except OSError:
        return [], 0


class Follower:
    """Reads the whole lines that are added to a file, also when another takes its place."""

    def __init__(self, path: Path, position: int) -> None:
        self._path, self._position = path, position
        self._inode = path.stat().st_ino if path.exists() else None
        self._rest = b""

    def read_new(self) -> list[str]:
        """The lines since the last call."""
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if found.st_ino != self._inode or found.st_size < self._position:
                    self._inode, self._position, self._rest = found.st_ino, 0, b""
                file.seek(self._position)
                data = self._rest + file.read()
                self._position = file.tell()
        except OSError:
            return []
        *whole, self._rest = data.split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in whole]


def follow(paths: dict[str, Path], lines: int) -> Iterator[tuple[str, str]]:
    """The last lines of each file, then new lines, as (name, line), until the caller stops."""
    followers = {}
    for name, path in paths.items():
        tail, position = read_tail_at(path, lines)
        yield from ((name, line) for line in tail)
        followers[name] = Follower(path, position)
    while True:
        added = [(name, line) for name, follower in followers.items() for line in follower.read_new()]
        yield from added
        if not added:
            time.sleep(_LOOK_EVERY_S)
