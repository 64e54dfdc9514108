"""Only serving routes pass the engine's middleware, however the path is spelt."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.vllm.middleware import SERVING_ROUTES, ServingRoutesOnly
from moe_contract.serving_routes import CORE


async def call(
    path: str, *, kind: str = "http", raw: bytes | None = None, root: str = ""
) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the request got through, and what was sent instead."""
    passed, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body is not read")

    scope = {"type": kind, "method": "POST", "path": path, "raw_path": raw or path.encode(), "root_path": root}
    await ServingRoutesOnly(app)(scope, receive, send)
    return bool(passed), sent


@pytest.mark.parametrize("path", [*sorted(SERVING_ROUTES - {CORE}), "/v1/models/tiny", "/v1/responses/resp_1/cancel"])
async def test_serving_routes_pass(path):
    passed, sent = await call(path)
    assert passed
    assert not sent


@pytest.mark.parametrize(
    "path",
    [
        *("/collective_rpc", "/pause", "/resume", "/sleep", "/wake_up", "/server_info", "/reset_prefix_cache"),
        *("/scale_elastic_ep", "/is_scaling_elastic_ep", "/fault_tolerance/apply", "/v1/load_lora_adapter"),
        *("/start_profile", "/update_weights", "/inference/v1/abort_requests", "/docs", "/openapi.json", "/", ""),
        *("/V1/models", "/health/", "/v1/models/../../sleep", "//sleep", "/v1//models", "/v1/models/;/sleep"),
        *("/v1/models/./x", "/v1/models/\\sleep", "/v1/models/%2e%2e", "/v1/responses/../x"),
    ],
)
async def test_all_else_is_not_found_in_openai_shape(path):
    passed, (start, body) = await call(path)
    assert not passed
    assert start["status"] == 404
    assert (b"content-type", b"application/json") in start["headers"]
    error = json.loads(body["body"])["error"]
    assert error["code"] == 404
    assert error["type"] == "NotFoundError"
    assert path in error["message"]


async def test_an_encoded_slash_is_refused():
    passed, sent = await call("/v1/models/a/b", raw=b"/v1/models/a%2Fb")
    assert not passed
    assert sent[0]["status"] == 404


async def test_a_mount_point_hides_nothing():
    assert (await call("/api/v1/models", root="/api"))[0]
    assert not (await call("/api/sleep", root="/api"))[0]


async def test_websockets_are_refused_and_the_lifespan_passes():
    passed, sent = await call("/v1/realtime", kind="websocket")
    assert not passed
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert (await call("", kind="lifespan"))[0]


@pytest.mark.parametrize(
    ("outcome", "answers"),
    [(False, True), (True, True), (RuntimeError("Engines returned different results"), True), (OSError("dead"), False)],
    ids=["awake", "asleep", "ranks differ", "dead"],
)
async def test_the_core_is_asked_by_the_middleware_itself(outcome, answers):
    async def is_sleeping() -> bool:
        if isinstance(outcome, Exception):
            raise outcome
        return bool(outcome)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(is_sleeping=is_sleeping)))
    scope = {"type": "http", "method": "GET", "path": CORE, "headers": [], "app": app}
    await ServingRoutesOnly(None)(scope, None, send)
    assert sent[0]["status"] == 200
    assert json.loads(sent[1]["body"]) == {"answers": answers}


async def test_a_server_without_a_core_says_so():
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": CORE, "headers": [], "app": SimpleNamespace(state=None)}
    await ServingRoutesOnly(None)(scope, None, send)
    assert json.loads(sent[1]["body"]) == {"answers": False}


async def answers_of(*, errored: bool, messages: list[dict[str, Any]]) -> list[Any]:
    """What passes to the server of messages that vLLM sends for a request."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(errored=errored)))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "app": app}
    await ServingRoutesOnly(answer)(scope, None, send)
    return sent


def start(status: int) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}


def part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


ERROR_EVENTS = [b'data: {"error": {"message": "no"}}\n\n', b'event: error\ndata: {"type":"error","error":{}}\n\n']


async def test_what_a_dead_core_lets_the_server_say_is_marked_for_the_gateway():
    from moe_gateway.engines.engine_death import says_engine_is_dead

    (head, body) = await answers_of(errored=True, messages=[start(500), part(b'{"error": {"message": "no"}}')])
    assert head["headers"] == [(b"content-type", b"application/json"), (b"moeserving-engine", b"dead")]
    assert body["body"] == b'{"error": {"message": "no"}}'
    assert says_engine_is_dead(b"HTTP/1.1 500 \r\nmoeserving-engine: dead\r\n\r\n")
    for event in ERROR_EVENTS:
        (_, marked) = await answers_of(errored=True, messages=[start(200), part(event)])
        assert marked["body"] == b": moeserving-engine: dead\n\n" + event
        assert says_engine_is_dead(marked["body"])


@pytest.mark.parametrize(
    ("errored", "status", "body"),
    [
        *((False, 500, event) for event in ERROR_EVENTS),
        (True, 200, b'data: {"choices": []}\n\n'),
        (True, 400, b'{"error": {"message": "no"}}'),
        (True, 200, b"data: [DONE]\n\n"),
    ],
)
async def test_all_else_passes_as_it_is(errored, status, body):
    messages = [start(status), part(body)]
    assert await answers_of(errored=errored, messages=messages) == messages
