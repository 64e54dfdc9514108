"""What the queues of rivals share: the requests that wait, by their ids."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Generic, TypeVar

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request

Entry = TypeVar("Entry")


class QueueById(RequestQueue, Generic[Entry]):
    """A queue of vLLM's scheduler that leaves to its heirs what comes in and which request is the first."""

    def __init__(self) -> None:
        self._waiting: dict[str, Entry] = {}

    @abstractmethod
    def peek_request(self) -> Request:
        """Returns the first request; `IndexError` where none waits."""

    def pop_request(self) -> Request:
        request = self.peek_request()
        del self._waiting[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        del self._waiting[request.request_id]

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._waiting.pop(request.request_id, None)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return len(self._waiting)
