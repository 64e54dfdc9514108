"""The address of a replica's leader on its other nodes, by the name that a LeaderWorkerSet gives them.

vLLM's sockets (ZeroMQ) look a name up among IPv4 addresses alone, so an address is handed to them. The name may have
none yet: the leader's pod gets its address after this one has started.
"""

import socket
import time
from collections.abc import Callable

from moe_contract.addresses import is_address

_PAUSE_S = 1.0
_SAY_EVERY = 30


def wait_for_address(name: str, pause: Callable[[float], None] = time.sleep) -> str:
    """The first address of a name, of either family; waits until there is one. An address stays as it is."""
    if is_address(name):
        return name
    tries = 0
    while True:
        try:
            return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            if tries % _SAY_EVERY == 0:
                print(f"waiting for the leader's address: {name}: {error.strerror}", flush=True)
            tries += 1
            pause(_PAUSE_S)
