"""Age of the signals that a gateway has: published by the agent at each change, scraped at intervals, or lost.

The world asks when the next message of a server is due, takes the snapshot, and delivers it after the delay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class SignalKind(StrEnum):
    """Source of the signals that the gateways see."""

    AGENT = "agent"
    SCRAPE = "scrape"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """From `from_s` until `until_s` nothing of the server arrives; None: of any server."""

    from_s: float
    until_s: float = math.inf
    server: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalPlan:
    """Source, period, delay and losses of signals.

    Attributes:
        source: `agent`: the whole signal, at each change, at most one each `period_s`, at least one a second. `scrape`:
            what vLLM's metrics say, each `period_s`. `none`: nothing.
        period_s: see `source`.
        delay_s: from the snapshot to the gateway.
        losses: when nothing arrives.
    """

    source: SignalKind = SignalKind.AGENT
    # The agent looks at the shared-memory records this often (moe_agent.api.broadcaster).
    period_s: float = 0.1
    # A wake-up of the agent, a line, the network: rather less, assumed.
    delay_s: float = 0.003
    losses: Sequence[Loss] = ()

    def arrives(self, server: str, now_s: float) -> bool:
        """Whether a message sent now arrives."""
        return not any(loss.from_s <= now_s < loss.until_s and loss.server in (None, server) for loss in self.losses)


# An agent sends a state at least once a second (docs/interfaces.md).
HEARTBEAT_S = 1.0
