"""Answers to requests that do not pass the gate. Pure."""

import math
from dataclasses import dataclass

from moe_gateway.access.quotas import OverQuota, QuotaBound
from moe_gateway.http.replies import RequestOutcome, build_error
from moe_gateway.request.context import ClientRequest

# Anthropic's API has errors of its own shape.
ANTHROPIC_PATH = b"/v1/messages"


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """An answer to a request that does not pass.

    Attributes:
        outcome: label, status and kind of the error.
        message: for the client.
        retry_after_s: when it may ask again; None: never with this request.
        challenge: value of `WWW-Authenticate`; empty: none.
        param: field of the body that is refused; None: none is.
    """

    outcome: RequestOutcome
    message: str
    retry_after_s: int | None = None
    challenge: bytes = b""
    param: str | None = None


def deny_over(over: OverQuota) -> Denial:
    """The answer to a request that is over its quota."""
    seconds = max(1, math.ceil(over.wait_s))
    message = f"the limit of {over.bound} {over.limit} is reached"
    if over.limit is not QuotaBound.CONCURRENCY:
        message += f"; ask again in {seconds} s"
    return Denial(outcome=RequestOutcome.OVER_QUOTA, message=message, retry_after_s=seconds)


def deny_caller(message: str, challenge: bytes) -> Denial:
    """The answer to a request without a credential that is in force."""
    return Denial(outcome=RequestOutcome.UNAUTHORIZED, message=message, challenge=challenge)


def deny_field(message: str, param: str) -> Denial:
    """The answer to a request with a field that is not allowed where there are keys."""
    return Denial(outcome=RequestOutcome.BAD_REQUEST, message=message, param=param)


def build_denial(request: ClientRequest, denial: Denial, *, close: bool) -> bytes:
    """The HTTP response, in the shape of the API that was asked."""
    return build_error(
        denial.outcome,
        denial.message,
        request_id=request.request_id,
        param=denial.param,
        close=close,
        retry_after_s=denial.retry_after_s,
        challenge=denial.challenge,
        is_anthropic=request.url.startswith(ANTHROPIC_PATH),
    )
