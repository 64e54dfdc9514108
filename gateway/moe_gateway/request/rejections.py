"""How a request that the dispatcher rejects is answered."""

from moe_gateway.engines.hold_queue import Rejection
from moe_gateway.http.replies import Outcome

REJECTIONS = {
    Rejection.NO_ENGINE_CONFIGURED: (Outcome.NO_ENGINE, "no engine is configured"),
    Rejection.NO_FITTING_ENGINE: (
        Outcome.NO_ENGINE,
        "no engine that serves this model, or has the response that is continued, accepts requests",
    ),
    Rejection.QUEUE_FULL_NO_ENGINE: (Outcome.NO_ENGINE, "no engine accepts requests and the queue is full"),
    Rejection.QUEUE_FULL_SATURATED: (Outcome.BUSY, "all engines are saturated and the queue is full"),
    Rejection.TIMEOUT_NO_ENGINE: (Outcome.NO_ENGINE, "no engine accepted requests in time"),
    Rejection.TIMEOUT_SATURATED: (Outcome.NO_ENGINE, "every engine stayed saturated"),
}
