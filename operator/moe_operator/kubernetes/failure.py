"""Failures of a pass: what went wrong in words for the status, and parts of a pass that go on without each other."""

import itertools
import logging
import re
from collections.abc import Awaitable
from typing import TypeVar

from moe_contract.api_server import ApiError

from moe_operator.kubernetes.api import NotLeading

Result = TypeVar("Result")
TERSE = 500
# The first line of two objects side by side, as go-cmp writes them; its blanks may be of either kind.
_LISTING = re.compile(r"\s\s[\w.*&\[\]]+\{")
SEE_LOG = "it is tried again; the operator's log has more"
# No answer, no login, too many calls, not available, no answer in time: other calls of the pass would fare no better.
AWAY = {0, 401, 429, 503, 504}

log = logging.getLogger("moeserving.operator")


def in_one_line(message: str) -> str:
    """The API server's words for a condition: without the listing of both objects that follows some, and not long."""
    lines = itertools.takewhile(lambda line: not _LISTING.fullmatch(line), message.splitlines())
    return " ".join(" ".join(lines).split())[:TERSE]


class PassFailed(Exception):
    """A pass did not do all that it should; the status says so, and the pass is to be tried again."""


class Parts:
    """Runs the parts of a pass; one that fails keeps none of the others.

    Attributes:
        problems: what failed, in words.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    async def run(self, what: str, part: Awaitable[Result], default: Result) -> Result:
        """Returns the result of a part, or the default when the part fails.

        Args:
            what: the part, for the status.
            part: the work.
            default: stands for the result of a part that failed.

        Raises:
            NotLeading: another operator leads.
            ApiError: the API server is away, so that the rest of the pass would fail too.
        """
        try:
            return await part
        except NotLeading:
            raise
        except Exception as error:
            if isinstance(error, ApiError) and error.status in AWAY:
                raise
            self.problems.append(f"{what}: {describe(error)}")
            log.log(logging.WARNING if is_expected(error) else logging.ERROR, "%s failed", what, exc_info=error)
            return default


def is_expected(error: Exception) -> bool:
    """Whether the error comes from outside, so that its text says enough."""
    return isinstance(error, ApiError | OSError | TimeoutError | NotLeading | PassFailed)


def describe(error: Exception) -> str:
    """What went wrong, in one line for people."""
    if isinstance(error, ApiError):
        said = in_one_line(error.message) or "nothing"
        return (
            f"the API server answered {error.status}: {said}"
            if error.status
            else f"no answer of the API server: {said}"
        )
    text = f"{type(error).__name__}: {error}".rstrip(": ")[:TERSE]
    if isinstance(error, OSError | TimeoutError | PassFailed):
        return text
    return f"an error in the operator itself, {text}"
