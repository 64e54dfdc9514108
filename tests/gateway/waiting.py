"""Waiting for a condition, and free ports."""

import asyncio
import contextlib
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


def free_port() -> int:
    """A free port below those that the kernel gives to connections, one of which could take it before it is used."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
