"""Where the responses of `/v1/responses` are kept: in the engine that made them, so that only it can continue one.

Owned by the dispatcher. Each gateway knows the responses that went through it.
"""

from collections import OrderedDict

REMEMBERED_RESPONSES = 100_000


class ResponseHomes:
    """The engine of each response, by the response's id; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._servers: OrderedDict[str, str] = OrderedDict()

    def record(self, response_id: str, server: str) -> None:
        """A response came from this engine."""
        self._servers[response_id] = server
        if len(self._servers) > REMEMBERED_RESPONSES:
            self._servers.popitem(last=False)

    def find(self, response_id: str) -> str | None:
        """Returns the name of the engine that has a response; None where that is not known."""
        return self._servers.get(response_id)

    def forget(self, server: str) -> None:
        """The engine is gone or is another process: its responses are lost."""
        for response_id in [response_id for response_id, home in self._servers.items() if home == server]:
            del self._servers[response_id]
