"""How a request that the dispatcher rejects is answered."""

from collections.abc import Iterable

from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.http.replies import RequestOutcome

REJECTIONS = {
    Rejection.NO_ENGINE_CONFIGURED: (RequestOutcome.NO_ENGINE, "no engine is configured"),
    Rejection.NO_FITTING_ENGINE: (
        RequestOutcome.NO_ENGINE,
        "no engine that serves this model, or has the response that is continued, accepts requests",
    ),
    Rejection.QUEUE_FULL_NO_ENGINE: (RequestOutcome.NO_ENGINE, "no engine accepts requests and the queue is full"),
    Rejection.QUEUE_FULL_SATURATED: (RequestOutcome.BUSY, "all engines are saturated and the queue is full"),
    Rejection.TIMEOUT_NO_ENGINE: (RequestOutcome.NO_ENGINE, "no engine accepted requests in time"),
    Rejection.TIMEOUT_SATURATED: (RequestOutcome.NO_ENGINE, "every engine stayed saturated"),
    Rejection.DEADLINE: (RequestOutcome.DEADLINE_EXCEEDED, "X-Request-Timeout passed before the answer began"),
}


def explain_unknown_model(name: str, known: Iterable[str]) -> str:
    """Why a model cannot be asked for."""
    return f"the model {name[:200]!r} does not exist; known: {', '.join(sorted(known))}"


def explain_lost_response(response_id: str) -> str:
    """Why a response cannot be continued, read or cancelled."""
    reason = "there was none, or its engine, or with keys its gateway, restarted"
    return f"no engine is known to have the response {response_id[:200]!r}: {reason}"
