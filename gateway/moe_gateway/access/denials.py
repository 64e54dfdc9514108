"""Answers to requests that do not pass the gate. Pure."""

import math
from dataclasses import dataclass

import orjson

from moe_gateway.access.quotas import OverQuota, QuotaBound
from moe_gateway.http.replies import RequestOutcome, build_error, build_response
from moe_gateway.request.context import ClientRequest

# Anthropic's API has errors of its own shape.
_ANTHROPIC_PATH = b"/v1/messages"
_ANTHROPIC_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """An answer to a request that does not pass.

    Attributes:
        outcome: label, status and kind of the error.
        message: for the client.
        retry_after_s: when it may ask again; None: never with this request.
        challenge: value of `WWW-Authenticate`; empty: none.
    """

    outcome: RequestOutcome
    message: str
    retry_after_s: int | None = None
    challenge: bytes = b""


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


def build_denial(request: ClientRequest, denial: Denial, *, close: bool) -> bytes:
    """The HTTP response, in the shape of the API that was asked."""
    outcome = denial.outcome
    if not request.url.startswith(_ANTHROPIC_PATH):
        return build_error(
            outcome,
            denial.message,
            request_id=request.request_id,
            close=close,
            retry_after_s=denial.retry_after_s,
            challenge=denial.challenge,
        )
    kind = _ANTHROPIC_KINDS.get(outcome.status, "api_error")
    document = {"type": "error", "error": {"type": kind, "message": denial.message}}
    extra = b"" if denial.retry_after_s is None else b"retry-after: %d\r\n" % denial.retry_after_s
    if denial.challenge:
        extra += b"www-authenticate: %b\r\n" % denial.challenge
    body = orjson.dumps(document)
    return build_response(outcome.status, body, request_id=request.request_id, extra=extra, close=close)
