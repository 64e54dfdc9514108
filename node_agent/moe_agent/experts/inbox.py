"""What a person asked of an expert group and has not been dealt with yet; owned by the controller.

The newest word counts: an `apply` or a `rollback` that waits is replaced by the next one.
"""

from moe_agent.experts.directive import Directive, DirectiveAction


class Inbox:
    """See the module.

    Attributes:
        heard: version of the newest directive that came in.
        settled: version of the newest one that was dealt with, whatever came of it.
        plan_wanted: whether a decision is asked for that has not begun.
        waiting: the `apply` or `rollback` that has not begun.
    """

    def __init__(self) -> None:
        self.heard = self.settled = 0
        self.plan_wanted = False
        self.waiting: Directive | None = None

    def put(self, directive: Directive) -> None:
        """A person's word."""
        if directive.action is DirectiveAction.PLAN:
            self.plan_wanted = True
        else:
            self.waiting = directive

    def take(self) -> Directive | None:
        """The change that waits, once."""
        directive, self.waiting = self.waiting, None
        return directive

    def skip(self, version: int) -> None:
        """Directives up to this version are older than the group."""
        self.heard = self.settled = version

    def clear(self) -> None:
        """Nothing waits any more."""
        self.waiting, self.plan_wanted = None, False

    def settle(self) -> bool:
        """All that was heard is dealt with, unless it waits; whether that is news."""
        if self.plan_wanted or self.waiting is not None or self.settled == self.heard:
            return False
        self.settled = self.heard
        return True
