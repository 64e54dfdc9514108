"""An event loop in which time passes only while nobody has anything to do: hours in a moment, the same at each run."""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from typing import Any

# Time passes a little at each round, so that a date that is missed by a rounding is not missed for ever.
_ROUND_S = 1e-9


class _Nothing(selectors.BaseSelector):
    """A selector without files: waiting is moving the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, -1, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, -1, 0, None)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError("everything waits, and nothing will ever happen")
        self.now_s += max(_ROUND_S, timeout)
        return []

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing else is ready."""

    def __init__(self) -> None:
        self._nothing = _Nothing()
        super().__init__(self._nothing)

    def time(self) -> float:
        return self._nothing.now_s


def run_in_virtual_time(main: Coroutine[Any, Any, Any]) -> Any:
    """Runs a coroutine in virtual time; returns its result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
