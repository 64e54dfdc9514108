"""A request whose body is being read, or whose engine is looked for: it stands in the place of its exchange."""

from collections.abc import Callable

from moe_contract.gateway_config import Limits

from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.request.parsing import Parsed
from moe_gateway.request.rejections import REJECTIONS


class PendingBody:
    """Keeps what a client's connection says meanwhile.

    Args:
        refuse: answers the request with an outcome and its message, in the place of an exchange.
        deadline_s: when the answer must have begun.
        parsed: the body, where it is read already.

    Attributes:
        is_over: whether the client is gone or has its answer, so that the body is read for nobody.
    """

    __slots__ = ("_deadline_s", "_refuse", "is_over", "parsed")

    def __init__(
        self, refuse: Callable[[RequestOutcome, str], None], deadline_s: float, parsed: Parsed | None = None
    ) -> None:
        self.parsed = parsed
        self._refuse = refuse
        self._deadline_s = deadline_s
        self.is_over = False

    def abandon(self) -> None:
        """The client is gone, so nobody waits for the body."""
        self.is_over = True

    def force_stop(self) -> None:
        """The gateway stops at once."""
        self._end(RequestOutcome.GATEWAY_ENDED, "the gateway was stopped by force")

    def fail(self) -> None:
        """Reading the body failed by a fault of the gateway."""
        self._end(RequestOutcome.INTERNAL_ERROR, "the gateway failed to read the body")

    def _end(self, outcome: RequestOutcome, message: str) -> None:
        if not self.is_over:
            self.is_over = True
            self._refuse(outcome, message)

    def pause(self) -> None:
        """The client reads slowly; it gets nothing yet."""

    def resume(self) -> None:
        """The client has caught up."""

    def check(self, now_s: float, limits: Limits) -> None:
        """Ends the request at its deadline."""
        if now_s >= self._deadline_s:
            self._end(*REJECTIONS[Rejection.DEADLINE])
