"""Lines about the progress of long work: one that is rewritten in a terminal, else one a phase.

Used by `up`, `drain` and the experiments of `moe_lab`.
"""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from moe_contract.quantities import describe_time

# Without a terminal a phase that goes on is named again after this time, so that a silent log is a dead one.
AGAIN_AFTER_S = 30.0
_CLEAR_LINE = "\r\x1b[2K"


class ProgressLine:
    """The present state of one piece of work.

    Args:
        output: where the lines go.
        columns: width of the terminal; None: `output` is none.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        output: TextIO | None = None,
        columns: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output = output or sys.stderr
        self._columns, self._clock = columns, clock
        self._phase, self._said_s, self._is_open = "", 0.0, False

    def show(self, text: str, phase: str | None = None) -> None:
        """Shows how far the work is.

        Args:
            text: the line.
            phase: what changes with a phase of the work and not with its numbers; None: the text itself.
        """
        if self._columns is not None:
            self._output.write(f"{_CLEAR_LINE}{text[: self._columns - 1]}")
            self._is_open = True
        elif (phase or text) != self._phase or self._clock() - self._said_s >= AGAIN_AFTER_S:
            self._phase, self._said_s = phase or text, self._clock()
            self._output.write(f"{text}\n")
        self._output.flush()

    def close(self) -> None:
        """Removes the line from a terminal."""
        if self._is_open:
            self._output.write(_CLEAR_LINE)
            self._output.flush()
            self._is_open = False


def stderr_line() -> ProgressLine:
    """A line of progress on stderr, for this terminal."""
    import shutil

    return ProgressLine(sys.stderr, shutil.get_terminal_size().columns if sys.stderr.isatty() else None)


def describe_share(done: float, total: float, elapsed_s: float) -> str:
    """`3 of 8, about 50 s left`; without a time before the first is done. Pure."""
    left = estimate_left_s(done, total, elapsed_s)
    words = f"{done:g} of {total:g}"
    return words if left is None else f"{words}, about {describe_time(left)} left"


def estimate_left_s(done: float, total: float, elapsed_s: float) -> float | None:
    """Seconds that the rest takes at the pace so far; None before there is a pace. Pure."""
    if done <= 0 or total <= 0:
        return None
    return max(0.0, total - done) * elapsed_s / done
