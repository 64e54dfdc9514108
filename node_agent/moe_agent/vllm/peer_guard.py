"""ASGI middleware of an engine that is guarded: requests of the deployment's own gateways pass, others are 401.

Named to vLLM by `--middleware moe_agent.vllm.peer_guard.PeersOnly` where clients need keys: whoever reaches the port of
the engine would otherwise need none. Health, that of the core, the list of models and whether the engine sleeps stay
open: the agent asks for them, and they say nothing of users. The file of control tokens is named by
`MOESERVING_PEER_TOKENS`.
"""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from moe_contract.peer_tokens import HEADER, TOKENS_VARIABLE, PeerTokens
from moe_contract.serving_routes import CORE

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/v1/models", "/is_sleeping", "/is_paused", CORE})
_NAME = HEADER.encode()


class PeersOnly:
    """ASGI middleware; reads which file has the tokens from the environment.

    Raises:
        KeyError: the environment does not say.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._tokens = PeerTokens(Path(os.environ[TOKENS_VARIABLE]))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _send_unauthorised(send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may_pass(self, scope: Scope) -> bool:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in OPEN_PATHS:
            return True
        return any(name == _NAME and self._is_known(value, scope) for name, value in scope["headers"])

    def _is_known(self, value: bytes, scope: Scope) -> bool:
        if self._tokens.allow(value):
            return True
        if scope["type"] != "http":
            return False
        path = scope.get("raw_path") or scope["path"].encode()
        return self._tokens.allow_request(value, scope["method"].encode(), path.partition(b"?")[0])


async def _send_unauthorised(send: Send) -> None:
    message = "This engine answers its own gateways alone."
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
