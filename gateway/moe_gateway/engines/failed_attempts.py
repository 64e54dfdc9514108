"""Tells the dispatcher of an attempt that failed at an engine. Called by exchanges."""

from moe_scheduling.engine.attempts import AttemptFailure
from moe_scheduling.signals import Target

from moe_gateway.engines.dispatcher import Dispatcher


def report_failure(
    dispatcher: Dispatcher, target: Target, failure: AttemptFailure, now_s: float, *, is_answering: bool
) -> None:
    """Has an engine paused or ejected for a failure; `is_answering`: within an answer that had begun.

    The beginning of the next answer ends an ejection, so an engine that breaks its answers off is also counted an
    error, which a whole answer alone forgives.
    """
    if failure is AttemptFailure.NOT_SERVED:
        return
    if failure is AttemptFailure.ENGINE_FULL:
        dispatcher.pause_full(target, now_s)
    elif failure is AttemptFailure.ENGINE_ERROR:
        dispatcher.count_error(target, now_s)
    else:
        dispatcher.fail(target, now_s, dead=failure is AttemptFailure.ENGINE_DEAD)
        if is_answering and failure is AttemptFailure.BROKEN:
            dispatcher.count_error(target, now_s)
