"""Where the responses of `/v1/responses` are kept: in the engine that made them, so that only it can continue one.

Owned by the dispatcher. Each gateway knows the responses that went through it.
"""

from collections import OrderedDict

REMEMBERED_RESPONSES = 100_000


class ResponseHomes:
    """Engine and owner of each response, by the response's id; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._homes: OrderedDict[str, tuple[str, str | None]] = OrderedDict()

    def record(self, response_id: str, server: str, owner: str | None = None) -> None:
        """A response came from this engine, for the tenant `owner`; one that another tenant has stays as it is."""
        known = self._homes.get(response_id)
        if known is not None and known[1] != owner:
            return
        self._homes[response_id] = server, owner
        if len(self._homes) > REMEMBERED_RESPONSES:
            self._homes.popitem(last=False)

    def find(self, response_id: str) -> str | None:
        """Returns the name of the engine that has a response; None where that is not known."""
        home = self._homes.get(response_id)
        return None if home is None else home[0]

    def belongs_to(self, response_id: str, owner: str) -> bool:
        """Whether a response is known and was made for this tenant."""
        home = self._homes.get(response_id)
        return home is not None and home[1] == owner

    def forget(self, server: str) -> None:
        """The engine is gone or is another process: its responses are lost."""
        for response_id in [response_id for response_id, home in self._homes.items() if home[0] == server]:
            del self._homes[response_id]
