"""The leader of a replica over several nodes, as a worker sees it: when it has ended, so that the worker may end.

A worker lends its devices to the streams of its leader. Both may get the signal at once, as when a group is deleted in
the foreground, and the leader then drains for longer than a worker would take. The leader's address is looked up while
all is well: its name goes with its Service, which may be deleted before it.
"""

import asyncio
import logging
import socket

import aiohttp
from moe_contract.clients import AgentClient, PeerError

log = logging.getLogger(__name__)

LOOK_UP_EVERY_S, ASK_EVERY_S = 1.0, 0.5
# This number of questions without an answer, one after the other, means that the leader's agent is gone.
SILENT = 4
# Phases in which the leader's engine may have streams.
_MAY_SERVE = ("ready", "draining")


class Leader:
    """The leader's agent.

    Args:
        name: host name or address of the leader.
        port: of its agent.
        every_s: time between two questions, and between two tries to find its address.
    """

    def __init__(self, name: str, port: int, *, every_s: float = ASK_EVERY_S) -> None:
        self._name, self._port, self._every_s = name, port, every_s
        self.url = ""

    async def find(self) -> None:
        """Looks the address up until there is one, and keeps it."""
        loop = asyncio.get_running_loop()
        while not self.url:
            try:
                found = await loop.getaddrinfo(self._name, self._port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError):
                await asyncio.sleep(LOOK_UP_EVERY_S)
            else:
                host = str(found[0][4][0])
                self.url = f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"
                log.info("the leader %s is at %s", self._name, host)

    async def wait_for_end(self) -> None:
        """Returns once the leader's engine has no streams any more: it says so, or its agent is gone."""
        if not self.url:
            # Its address was never known: the group has not met.
            return
        log.info("waits for the leader at %s to end", self.url)
        silent = 0
        async with aiohttp.ClientSession() as session:
            client = AgentClient(session, self.url)
            while silent < SILENT:
                try:
                    phase = (await client.state()).phase
                except PeerError:
                    silent += 1
                else:
                    silent = 0
                    if phase not in _MAY_SERVE:
                        return
                await asyncio.sleep(self._every_s)
