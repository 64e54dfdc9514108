"""Blocks of another engine are fetched only while that one surely holds them; used by `scheduler.py`.

The engine that computed a prompt holds its blocks for a lease. vLLM's connector does not look at the time: blocks that
are fetched later are those of another prompt, and nobody sees it but the first engine's log. A phase can come late for
reasons that no gateway sees: an HTTP server that stood still, a network, an engine that was suspended.

The first engine writes into its answer until when it holds the blocks, by the clock of its machine. The second one
fetches where a third of the lease is left when the request arrives, and where it has made steps since: as long as a
request waits here, each step of this engine that is due renews the lease. Else the prompt is computed here, as where a
transfer fails. With a clock that is behind by less than a third of a lease nothing is fetched that may be gone; one
that is further behind misses some. One that is ahead refuses as much sooner; from two thirds of a lease on it refuses
all.
"""

import logging
import math
import time
from typing import Any

HELD_UNTIL = "moeserving_held_until_s"
"""Key of `kv_transfer_params`: seconds since the epoch."""
# Of a lease that has to be left when a request arrives.
_LEFT = 1 / 3
# Of a lease for which an engine may make no step: vLLM renews at each sixth, by two thirds.
_STILL = 1 / 2
_WANTED = "do_remote_prefill"
CONNECTOR = "NixlConnector"
DEFAULT_LEASE_S = 30
"""Of vLLM 0.32 and 0.33, where the configuration names none."""

log = logging.getLogger("moeserving.engine")


class LeaseGuard:
    """Decides for the scheduler of one rank which blocks are fetched.

    Args:
        lease_s: how long an engine holds blocks, in seconds.
    """

    # Common to the machines of a cluster.
    clock = staticmethod(time.time)

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        # By request that waits to fetch: its parameters, until when its blocks are held, when that was last renewed.
        self._waiting: dict[str, tuple[dict[str, Any], float, float]] = {}

    def stamp(self, params: dict[str, Any] | None) -> None:
        """Writes into an answer until when its blocks are held."""
        if params is not None and params.get(_WANTED):
            params[HELD_UNTIL] = self.clock() + self._lease_s

    def admit(self, request: Any) -> bool:
        """Returns whether a request that arrives may fetch; one that came late then computes its prompt."""
        params = request.kv_transfer_params
        if not params or not params.get(_WANTED):
            return True
        now_s, until_s = self.clock(), params.get(HELD_UNTIL)
        if type(until_s) is not float or not math.isfinite(until_s):
            return True
        if until_s - now_s < self._lease_s * _LEFT:
            return self._refuse(request.request_id, params, now_s - until_s)
        self._waiting[request.request_id] = (params, until_s, now_s)
        return True

    def look(self) -> int:
        """Called before each step; returns how many of the requests that wait may fetch no more."""
        if not self._waiting:
            return 0
        now_s, refused = self.clock(), 0
        for name, (params, until_s, renewed_s) in list(self._waiting.items()):
            if not params.get(_WANTED):
                del self._waiting[name]
            elif now_s - renewed_s > self._lease_s * _STILL:
                del self._waiting[name]
                refused += not self._refuse(name, params, now_s - until_s)
            else:
                self._waiting[name] = (params, until_s, now_s)
        return refused

    def _refuse(self, name: str, params: dict[str, Any], after_s: float) -> bool:
        params[_WANTED] = False
        log.warning(
            "request %s: the blocks of its prompt may be held no more (%.1f s); it is computed here", name, after_s
        )
        return False


def find_lease_s(transfer: Any) -> float | None:
    """Seconds for which an engine holds blocks for others; None where no connector with leases is configured.

    Args:
        transfer: vLLM's configuration of its connector, or of several.
    """
    own = {"kv_connector": transfer.kv_connector, "kv_connector_extra_config": transfer.kv_connector_extra_config}
    parts = [own, *transfer.kv_connector_extra_config.get("connectors", ())]
    for part in parts:
        if part.get("kv_connector") == CONNECTOR:
            return float((part.get("kv_connector_extra_config") or {}).get("kv_lease_duration", DEFAULT_LEASE_S))
    return None
