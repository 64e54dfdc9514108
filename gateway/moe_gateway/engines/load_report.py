"""Reports the load that the choice of an engine sees, for state and metrics. Reads the dispatcher, changes nothing."""

from enum import StrEnum

from moe_scheduling.engine.choice import Job, explain
from moe_scheduling.signals import Target

from moe_gateway.engines.dispatcher import Dispatcher


class SignalSource(StrEnum):
    """Source of an engine's load in a choice: its agent, a scrape of its metrics, or only the requests sent to it."""

    AGENT = "agent"
    SCRAPE = "scrape"
    IN_FLIGHT = "in_flight"


def find_source(dispatcher: Dispatcher, target: Target, now_s: float) -> SignalSource:
    """Returns the source of the load of a target as the choice sees it."""
    if not dispatcher.target_states[target].is_fresh(now_s, dispatcher.settings.stale_after_s):
        return SignalSource.IN_FLIGHT
    is_plain = dispatcher.engines[target.server].address.agent_url is None
    return SignalSource.SCRAPE if is_plain else SignalSource.AGENT


def least_wait_s(dispatcher: Dispatcher, now_s: float) -> float | None:
    """Predicted seconds until a new request begins to be computed, where that is soonest; None without a target."""
    rows = explain(Job(1), list(dispatcher.open_targets()), dispatcher.settings, now_s=now_s)
    return min((row.wait_s for row in rows), default=None)
