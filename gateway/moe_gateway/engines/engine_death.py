"""Recognises the answers of a vLLM server whose engine process has died. Pure.

The server outlives its engine by some seconds. It answers running and new requests with status 500, and streams with an
error event in place of the first token. Neither is an answer: another engine can take the request over, or the same one
once it has started anew. The engine's middleware marks such an answer, whatever vLLM says in it (`engine_death` of the
contract). vLLM's own texts for it are known as well.
"""

import re

from moe_contract.engine_death import COMMENT, NAME, VALUE

_COMMENT = COMMENT.rstrip()
_MARK = re.compile(rb"(?:\n%b:[ \t]*%b\r|(?:^|\n)%b[\r\n])" % (NAME, VALUE, _COMMENT), re.IGNORECASE)
# What `EngineDeadError` says to clients in vLLM 0.32 and 0.33; a test of the agent compares it with vLLM's. An error of
# another kind may have it within its message, as a text of the client's, whose quotes are escaped there. That of 0.33
# is the whole message: other services begin theirs with the same words.
ENGINE_DEAD = (b"EngineCore encountered an issue", b'The server had an error while processing your request."')
_MESSAGE_BEGINS_WITH_IT = re.compile(rb"\"message\": ?\"(?:%b)" % b"|".join(map(re.escape, ENGINE_DEAD)))


def is_death_mark(event: bytes) -> bool:
    """Whether an event is the comment that marks the next one, an error, as that of a dead engine."""
    return event.rstrip() == _COMMENT


def says_engine_is_dead(error: bytes) -> bool:
    """Whether an error reports a dead engine.

    Args:
        error: first bytes of an answer of status 500, its head included, or of a stream up to an event that is an
            error.
    """
    return _MARK.search(error) is not None or _MESSAGE_BEGINS_WITH_IT.search(error) is not None
