"""What logs, records and traces read of a request, whoever sends it to its engine."""

from typing import Protocol

from moe_scheduling.engine.choice import Job
from moe_scheduling.signals import Target

from moe_gateway.http.routes import Route
from moe_gateway.request.context import ClientRequest


class DispatchedRequest(Protocol):
    """A request that is meant for an engine: sent by an exchange, or by a proxy that asked the endpoint picker.

    Attributes:
        request: as the client sent it.
        route: of the request.
        job: what it asks of an engine.
    """

    request: ClientRequest
    route: Route
    job: Job

    @property
    def target(self) -> Target | None:
        """Where it was sent last; None before."""

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its arrival to the first token of its stream; None before, and for an answer without one."""

    @property
    def continued(self) -> str:
        """How its stream, which had begun, goes on at its target; empty for one that began there."""
