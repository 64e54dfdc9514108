"""Recognises the answers of a vLLM server whose engine process has died. Pure.

The server outlives its engine by some seconds. It answers running and new requests with status 500, and streams with an
error event in place of the first token. Neither is an answer: another engine can take the request over, or the same one
once it has started anew.
"""

import re

# `EngineDeadError` of vLLM; a test of the agent compares it with vLLM's. An error of another kind may have it within
# its message, as a text of the client's, whose quotes are escaped there.
ENGINE_DEAD = b"EngineCore encountered an issue"
_MESSAGE_BEGINS_WITH_IT = re.compile(rb"\"message\": ?\"" + ENGINE_DEAD)


def says_engine_is_dead(error: bytes) -> bool:
    """Whether an error reports a dead engine.

    Args:
        error: first bytes of an answer of status 500, or of a stream up to an event that is an error.
    """
    return ENGINE_DEAD in error and _MESSAGE_BEGINS_WITH_IT.search(error) is not None
