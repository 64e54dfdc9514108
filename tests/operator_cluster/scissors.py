"""An operator's process that ends at any call to the API server."""

from collections.abc import Awaitable, Callable
from typing import Any


class Killed(BaseException):
    """Stands for the end of the operator's process."""


class Scissors:
    """A connection that ends with its process: before a call reaches the API server, or after it did."""

    def __init__(self, server: Any, calls_left: int, *, after: bool) -> None:
        self._server, self._calls_left, self._after = server, calls_left, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._server, name)
        return self._cutting(method) if name in ("apply", "merge", "create", "replace", "delete", "get") else method

    def _cutting(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **options: Any) -> Any:
            # Of calls that are made together each has its own number; those that have begun go on without the process.
            self._calls_left -= 1
            number = self._calls_left
            if number < 0 or (number == 0 and not self._after):
                raise Killed
            try:
                return await method(*arguments, **options)
            finally:
                if number == 0:
                    raise Killed

        return call
