"""Waiting for a condition, and free ports."""

import asyncio
import contextlib
import itertools
import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 10.0


async def until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Waits until the condition holds."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"{what} did not come about"
        await asyncio.sleep(0.005)


# Each worker of a parallel run has ports of its own, and none comes twice before all others have been used.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
_PORTS = itertools.cycle(random.sample(range(20_000 + _WORKER * 3000, 23_000 + _WORKER * 3000), 3000))


def free_port() -> int:
    """A free port below those that the kernel gives to connections, one of which could take it before it is used."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
