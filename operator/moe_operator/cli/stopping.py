"""How far the stop of a deployment is, in one line."""

import aiohttp
from moe_contract.clients import GatewayClient, PeerError
from moe_contract.quantities import describe_time

from moe_operator.local.record import Record

_ANSWER_TIMEOUT_S = 1.0


async def describe_stop(record: Record, elapsed_s: float) -> tuple[str, str]:
    """The line, and what of it changes with a phase and not with its numbers.

    Args:
        record: of the deployment, read before the stop.
        elapsed_s: since it was asked to stop.
    """
    async with aiohttp.ClientSession() as session:
        try:
            state = await GatewayClient(session, record.gateway.url, timeout_s=_ANSWER_TIMEOUT_S).state()
        except PeerError:
            return f"{record.name}: the gateway has ended, engines stop ({describe_time(elapsed_s)})", "engines"
    left = state.in_flight + state.held
    most = describe_time(max(0.0, record.drain_timeout_s - elapsed_s))
    return f"{record.name}: {left} requests left after {describe_time(elapsed_s)}, at most {most} to go", "requests"
