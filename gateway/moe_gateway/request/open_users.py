"""Which values of the field `user` have requests under way. Owned by the gateway, asked by exchanges.

`user` may name a person, whose requests follow one another, or an application, whose requests run side by side. Only
the first is a session.
"""


class OpenUsers:
    """Counts the requests under way by user; a user without one is forgotten."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def enter(self, user: str) -> bool:
        """A request of this user begins; returns whether it is the only one."""
        count = self._counts[user] = self._counts.get(user, 0) + 1
        return count == 1

    def leave(self, user: str) -> None:
        """A request of this user has ended."""
        count = self._counts.pop(user) - 1
        if count:
            self._counts[user] = count

    def __len__(self) -> int:
        return len(self._counts)
