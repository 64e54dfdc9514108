"""A request whose body is being read: it stands in the place of an exchange until there is one."""

from collections.abc import Callable

from moe_contract.gateway_config import Limits


class PendingBody:
    """Keeps what a client's connection says meanwhile.

    Args:
        refuse: answers that the gateway was stopped by force.

    Attributes:
        is_over: whether the client is gone or has its answer, so that the body is read for nobody.
    """

    __slots__ = ("_refuse", "is_over")

    def __init__(self, refuse: Callable[[], None]) -> None:
        self._refuse = refuse
        self.is_over = False

    def abandon(self) -> None:
        """The client is gone, so nobody waits for the body."""
        self.is_over = True

    def force_stop(self) -> None:
        """The gateway stops at once."""
        if not self.is_over:
            self.is_over = True
            self._refuse()

    def pause(self) -> None:
        """The client reads slowly; it gets nothing yet."""

    def resume(self) -> None:
        """The client has caught up."""

    def check(self, now_s: float, limits: Limits) -> None:
        """The gateway itself works, so nothing is overdue."""
