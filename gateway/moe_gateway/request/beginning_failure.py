"""What the beginning of an answer that is an engine's error says of the attempt. Pure."""

from moe_scheduling.engine.attempts import AttemptFailure

from moe_gateway.engines.engine_death import says_engine_is_dead
from moe_gateway.request.answer_beginning import AnswerBeginning
from moe_gateway.request.stream_events import find_error


def read_failure(beginning: AnswerBeginning) -> AttemptFailure:
    """Returns the failure that an engine's error before the first token stands for.

    `ENGINE_DEAD`: the engine's core has died. `ENGINE_FULL`: it takes no new request now, as a paused engine of vLLM
    0.33 says in the first event of a stream. `ENGINE_ERROR`: any other error.
    """
    if (beginning.status == 500 or beginning.is_events) and says_engine_is_dead(beginning.head + beginning.body):
        return AttemptFailure.ENGINE_DEAD
    if beginning.is_events and find_error(beginning.data) == 503:
        return AttemptFailure.ENGINE_FULL
    return AttemptFailure.ENGINE_ERROR
