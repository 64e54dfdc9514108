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
_STREAM_BEGINS_WITH_ERROR = re.compile(rb"(?:[0-9a-fA-F]{1,8}\r\n)?(?:event: error\r?\n)?data: \{[^{]{0,40}\"error\"")


def says_engine_is_dead(status: int, body: bytes) -> bool:
    """Whether an answer reports a dead engine; `body` is its first bytes, of a stream the first event."""
    if ENGINE_DEAD not in body or _MESSAGE_BEGINS_WITH_IT.search(body) is None:
        return False
    return status == 500 or (status == 200 and _STREAM_BEGINS_WITH_ERROR.match(body) is not None)
