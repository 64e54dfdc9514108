"""ASGI middleware of the engine's HTTP server: serving routes pass, all else is 404 in OpenAI's error shape.

Named to vLLM by `--middleware moe_agent.vllm.middleware.ServingRoutesOnly`. vLLM mounts routes that steer the engine
(`/scale_elastic_ep`, `/pause`, `/sleep`, `/collective_rpc`, ...) on the same port and guards them with no key.

Invariant: an allow-list on the decoded path exactly as the router will see it; a path that has more than one spelling
(`//`, `..`, a backslash, an encoded slash) is refused rather than understood. WebSockets are refused.

`GET /core` is answered here, once the engine's core answers: vLLM's `/health` speaks for its HTTP server alone.
Errors of a server whose core has died are marked (`engine_death` of the contract), by what vLLM's client of the core
says, because the texts differ between versions of vLLM.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from moe_contract import engine_death
from moe_contract.serving_routes import CORE, ENGINE_ONLY, Route, compile_templates

from moe_agent.vllm.responses_rank import keep_rank

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SERVING_ROUTES = ENGINE_ONLY | {route.path.decode() for route in Route if b"{" not in route.path}
_ROUTES_WITH_ID = compile_templates(route.path.decode() for route in Route)
# vLLM sends each event in a message of its own; a body of JSON begins with a brace.
_ERROR_EVENT = re.compile(rb'(?:event:[^\n]*\n)?data:[^\n]*"error"')
_AMBIGUOUS = ("//", "..", "/./", "\\", "%", "\0", ";")


def is_serving_path(path: str, raw_path: bytes | None = None) -> bool:
    """Whether a request for `path` (decoded) may reach the engine's router."""
    if any(mark in path for mark in _AMBIGUOUS) or (raw_path is not None and b"%2f" in raw_path.lower()):
        return False
    return path in SERVING_ROUTES or _ROUTES_WITH_ID.fullmatch(path) is not None


class ServingRoutesOnly:
    """ASGI middleware that lets requests for serving routes pass and answers all others with 404."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"]:
            case "lifespan":
                await self._app(scope, receive, send)
            case "http" if is_serving_path(path := _routed_path(scope), scope.get("raw_path")):
                if path == CORE:
                    await _send_json(send, 200, {"answers": await core_answers(scope)})
                else:
                    client = _client_of(scope)
                    if client is not None:
                        keep_rank(path, scope.get("headers", ()), client)
                    await self._app(scope, receive, mark_death(client, send))
            case "http":
                await _send_not_found(scope, send)
            case _:
                await send({"type": "websocket.close", "code": 1008})


async def core_answers(scope: Scope) -> bool:
    """Asks the core of each rank something that takes it no time, and waits for the answers.

    Returns:
        True once all have answered; False where the server has no core, or says that it is dead.
    """
    try:
        await scope["app"].state.engine_client.is_sleeping()
    except RuntimeError:
        # Ranks that answer differently answer.
        return True
    except Exception:
        return False
    return True


def _client_of(scope: Scope) -> Any:
    """vLLM's client of the core; None in a server that has none."""
    return getattr(getattr(scope.get("app"), "state", None), "engine_client", None)


def mark_death(client: Any, send: Send) -> Send:
    """Returns a `send` that marks the errors which a server sends once its core is dead."""
    if client is None:
        return send

    async def marking(message: MutableMapping[str, Any]) -> None:
        await send(_mark(message) if client.errored else message)

    return marking


def _mark(message: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if message["type"] == "http.response.start" and message["status"] == 500:
        return {**message, "headers": [*message.get("headers", ()), (engine_death.NAME, engine_death.VALUE)]}
    if message["type"] == "http.response.body" and _ERROR_EVENT.match(body := message.get("body", b"")):
        return {**message, "body": engine_death.COMMENT + body}
    return message


def _routed_path(scope: Scope) -> str:
    """The path as Starlette's router sees it: without the mount point, if the server has one."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


async def _send_not_found(scope: Scope, send: Send) -> None:
    error = {
        "message": f"The route {scope['method']} {scope['path']} does not exist.",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }
    await _send_json(send, 404, {"error": error})


async def _send_json(send: Send, status: int, document: dict[str, Any]) -> None:
    body = json.dumps(document).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
