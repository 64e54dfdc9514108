"""A browser for `BROWSER`, as a program: it writes what it was given and what it was led to."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Browser:
    """`window` exists as long as the browser does not end by itself."""

    seen: Path
    window: Path

    def wait_opened(self) -> tuple[str, str]:
        """Its argument, and the text of the file that this names."""
        give_up_s = time.monotonic() + PATIENCE_S
        while not self.seen.exists():
            assert time.monotonic() < give_up_s, "no browser was opened"
            time.sleep(0.05)
        given, _, text = self.seen.read_text().partition("\n")
        return given, text

    def has_opened(self) -> bool:
        return self.seen.exists()


def make_browser(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Browser:
    program, seen, window = folder / "browser", folder / "seen", folder / "window"
    copy = f'{{ echo "$1"; cat "${{1#file://}}"; ls -l "${{1#file://}}"; }} > "{seen}.new" && mv "{seen}.new" "{seen}"'
    wait = f'while [ -e "{window}" ]; do sleep 0.1; done'
    program.write_text(f"#!/bin/sh\nexec > /dev/null 2>&1\n{copy}\n{wait}\n")
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(program))
    return Browser(seen=seen, window=window)
