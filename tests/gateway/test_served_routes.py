"""Every route that is served to users reaches an engine as it came, and no other route does."""

import aiohttp
import pytest
from moe_contract.serving_routes import CLOSED, ENGINE_ONLY, Route
from moe_gateway.http.routes import ROUTES, find_route, read_model_name, read_response_id

from tests.gateway.messages import OK, post
from tests.gateway.waiting import until

FORM = (
    b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\ntiny\r\n'
    b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
OWN = {Route.HEALTH, Route.MODEL, Route.MODELS}
ENGINES = [route for route in Route if route not in OWN]


def target(route):
    return route.path.replace(b"{response_id}", b"resp_1").replace(b"{model}", b"tiny")


def request_of(route):
    if route.method == b"GET":
        return b"GET %b HTTP/1.1\r\nhost: h\r\n\r\n" % target(route)
    path = target(route).decode()
    if route.is_form:
        head = b"POST %b HTTP/1.1\r\nhost: h\r\ncontent-type: multipart/form-data; boundary=b\r\ncontent-length: %d"
        return head % (target(route), len(FORM)) + b"\r\n\r\n" + FORM
    return post({"model": "tiny", "input": "x"}, path)


@pytest.mark.parametrize("route", ENGINES, ids=lambda route: route.label)
async def test_a_request_reaches_the_engine_as_it_came(make_engine, serve, route):
    engine = await make_engine()
    served = await serve(engine)
    asked = request_of(route)
    assert (await served.ask(asked)).json == OK
    assert engine.requests[0].line == asked.split(b"\r\n")[0]
    assert engine.requests[0].body == asked.split(b"\r\n\r\n", 1)[1]
    assert served.gateway.stats.requests[route.label, 200] == 1
    assert served.in_flight == 0


@pytest.mark.parametrize("route", list(Route), ids=lambda route: route.label)
async def test_any_other_method_is_refused(make_engine, serve, route):
    engine = await make_engine()
    served = await serve(engine)
    answer = await served.ask(b"DELETE %b HTTP/1.1\r\nhost: h\r\n\r\n" % target(route))
    assert (answer.status, answer.headers[b"allow"]) == (405, route.method)
    assert engine.requests == []


async def test_a_websocket_is_refused_plainly(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine)
    async with aiohttp.ClientSession(served.url) as session:
        with pytest.raises(aiohttp.WSServerHandshakeError, match="404"):
            await session.ws_connect("/v1/realtime")
        async with session.get("/v1/realtime", headers={"connection": "upgrade", "upgrade": "websocket"}) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (404, "not_found")
    assert engine.requests == []


@pytest.mark.parametrize("path", sorted([*ENGINE_ONLY, *CLOSED]))
def test_what_only_engines_have_is_unknown_here(path):
    assert find_route(path.replace("{adapter_name}", "x").encode()) is None


@pytest.mark.parametrize(
    ("url", "route", "response"),
    [
        (b"/v1/responses/resp_1", Route.RESPONSE, "resp_1"),
        (b"/v1/responses/resp_1?stream=true", Route.RESPONSE, "resp_1"),
        (b"/v1/responses/resp_1/cancel", Route.RESPONSE_CANCEL, "resp_1"),
        (b"/v1/responses/render", Route.RESPONSES_RENDER, "render"),
        (b"/v1/responses/", None, ""),
        (b"/v1/responses/..", None, ""),
        (b"/v1/responses/../cancel", None, ""),
        (b"/v1/responses/./cancel", None, ""),
        (b"/v1/responses/a%2Fb", None, "a"),
        (b"/v1/responses/a/b", None, "a"),
        (b"/v1/responses/a/cancel/", None, "a"),
        (b"/v1/responses/" + b"a" * 201, None, "a" * 200),
    ],
)
def test_the_routes_of_one_response(url, route, response):
    assert find_route(url) is route
    if route is not None:
        assert read_response_id(url) == response


def test_each_path_is_found_by_its_own_spelling():
    assert len(ROUTES) == len(Route) - sum(b"{" in route.path for route in Route)
    assert all(find_route(target(route)) is route for route in Route)


@pytest.mark.parametrize(
    ("path", "name"), [("tiny", "tiny"), ("org/name", "org/name"), ("org%2Fname", "org/name"), ("%ff", "\ufffd")]
)
def test_the_name_of_a_model_may_have_a_slash(path, name):
    assert read_model_name(b"/v1/models/%b?x=y" % path.encode()) == name


async def test_one_model_is_as_an_engine_lists_it(make_engine, serve):
    engine = await make_engine(start=False)
    engine.models = ["tiny", "org/adapter"]
    await engine.start()
    served = await serve(engine)
    await until(lambda: "org/adapter" in served.gateway.dispatcher.models)
    for name in (b"tiny", b"org/adapter", b"org%2Fadapter"):
        answer = await served.ask(b"GET /v1/models/%b HTTP/1.1\r\nhost: h\r\n\r\n" % name)
        assert (answer.status, answer.json["id"]) == (200, name.decode().replace("%2F", "/"))
    unknown = await served.ask(b"GET /v1/models/other HTTP/1.1\r\nhost: h\r\n\r\n")
    assert (unknown.status, unknown.json["error"]["code"]) == (404, "model_not_found")
    assert not [request for request in engine.requests if b"/v1/models/" in request.line]
