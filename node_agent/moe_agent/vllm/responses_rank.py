"""Lets vLLM 0.32 send a request of `/v1/responses` to the rank that its `X-data-parallel-rank` names.

vLLM 0.33 does so itself. 0.32 reads the header on its other routes alone and chooses the rank of a response by its own
figures, so that a gateway would count its load at a rank that does not have it.
"""

import functools
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

from moe_agent.vllm.version import find_version, minor_of, replace_attribute

PATH = "/v1/responses"
_HEADER = b"x-data-parallel-rank"
_MOST_DIGITS = 6
_repaired: set[type[Any]] = set()
# Of the request that this task serves; the tasks that vLLM makes for it inherit it.
_rank: ContextVar[int | None] = ContextVar("rank of a response", default=None)


def keep_rank(path: str, headers: Iterable[tuple[bytes, bytes]], client: Any) -> None:
    """Keeps the rank that a request names, where its route is one on which the installed vLLM ignores it.

    Args:
        path: of the request.
        headers: of the request, with names in lower case.
        client: vLLM's client of the core, which is to take the rank.
    """
    # Not that of the request before on its connection, within whose task the server may begin this one.
    _rank.set(None)
    if path != PATH or not _ignores_rank():
        return
    named = next((value for name, value in headers if name == _HEADER), b"")
    if named.isdigit() and len(named) <= _MOST_DIGITS:
        _rank.set(int(named))
    _repair(type(client))


@functools.cache
def _ignores_rank() -> bool:
    return minor_of(find_version()) == "0.32"


def _repair(client: type[Any]) -> None:
    """Makes the class of the client take the rank that was kept, where its caller names none."""
    if client in _repaired:
        return
    _repaired.add(client)
    generate = client.generate

    @functools.wraps(generate)
    def generate_at_rank(self: Any, *args: Any, data_parallel_rank: int | None = None, **kwargs: Any) -> Any:
        rank = _rank.get() if data_parallel_rank is None else data_parallel_rank
        return generate(self, *args, data_parallel_rank=rank, **kwargs)

    replace_attribute(client, "generate", generate_at_rank)
