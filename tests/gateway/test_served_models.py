"""A name goes to the engines that serve it, and the list of models is the union of what engines serve."""

import asyncio

import pytest
from moe_contract.gateway_config import EngineAddress
from moe_gateway.engines.fleet import EngineFleet
from moe_gateway.engines.served_models import find_partial, list_models, model_row

from tests.gateway.messages import OK, json_answer, post
from tests.gateway.peers import always
from tests.gateway.waiting import until

TURNS = {"policy": "roundRobin"}
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"


def fleet_of(**names: tuple[str, ...]):
    fleet = EngineFleet()
    fleet.replace([EngineAddress(name=name, url=f"http://{name}") for name in names])
    for name, models in names.items():
        fleet.set_models(name, {model: {"id": model, "root": name} for model in models})
    return fleet.engines.values()


@pytest.mark.parametrize(
    ("engines", "partial"),
    [
        ({"a": ("m",), "b": ("m",)}, {}),
        ({"a": ("m", "lora"), "b": ("m", "lora")}, {}),
        ({"a": ("m", "lora"), "b": ("m",)}, {"lora": {"a"}}),
        ({"a": ("m", "lora"), "b": ("m",), "c": ()}, {"m": None, "lora": {"a", "c"}}),
        ({"a": ("m",), "b": ("canary",)}, {"m": {"a"}, "canary": {"b"}}),
        ({}, {}),
    ],
)
def test_the_engines_of_a_name(engines, partial):
    expected = {name: servers for name, servers in partial.items() if servers is not None}
    assert find_partial(fleet_of(**engines)) == expected


def test_an_engine_may_serve_any_name_until_it_has_listed_its_own():
    fleet = EngineFleet()
    fleet.replace([EngineAddress(name=name, url=f"http://{name}") for name in ("a", "b")])
    fleet.set_models("a", {"m": {}, "lora": {}})
    assert fleet.set_models("b", {"m": {}}, listed=False) is not None
    assert find_partial(fleet.engines.values()) == {}
    assert fleet.set_models("b", {"m": {}}) is not None
    assert find_partial(fleet.engines.values()) == {"lora": {"a"}}
    assert fleet.set_models("b", {"m": {}}, listed=False) is None


def test_the_union_has_each_name_once_as_its_first_engine_lists_it():
    listed = list_models(fleet_of(a=("m",), b=("m", "lora")))
    assert listed == {"object": "list", "data": [{"id": "m", "root": "a"}, {"id": "lora", "root": "b"}]}
    assert model_row("x")["id"] == "x"


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "plain"])
@pytest.mark.parametrize("policy", ["predicted", "roundRobin"])
async def test_an_adapter_is_asked_for_where_it_is_loaded(make_engine, serve, agent, policy):
    with_adapter, without = await make_engine(agent=agent, start=False), await make_engine(agent=agent)
    with_adapter.models = ["tiny", "summaries"]
    await with_adapter.start()
    served = await serve(with_adapter, without, dispatch={"policy": policy})
    await until(lambda: served.gateway.dispatcher.models == {"tiny", "summaries"}, "the names")
    for _ in range(6):
        assert (await served.ask(post({"model": "summaries", "prompt": "x"}))).json == OK
    assert (len(with_adapter.requests), len(without.requests)) == (6, 0)
    for _ in range(6):
        assert (await served.ask(post({"model": "tiny", "prompt": "x"}))).json == OK
    assert len(without.requests) >= 1
    listed = await served.ask(MODELS)
    assert [row["id"] for row in listed.json["data"]] == ["summaries", "tiny"]
    refused = await served.ask(post({"model": "other", "prompt": "x"}))
    assert (refused.status, refused.json["error"]["code"]) == (404, "model_not_found")


async def test_a_request_for_an_engine_that_is_away_is_refused_and_holds_up_no_other(make_engine, serve):
    with_adapter, without = await make_engine(start=False), await make_engine()
    with_adapter.models = ["tiny", "summaries"]
    await with_adapter.start()
    served = await serve(with_adapter, without, dispatch=TURNS)
    await until(lambda: "summaries" in served.gateway.dispatcher.models, "the names")
    with_adapter.agent.say(accepting=False, phase="draining")
    await served.takes(without)
    answer = await served.ask(post({"model": "summaries", "prompt": "x"}))
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_engine")
    assert answer.headers[b"retry-after"]
    assert (await served.ask(post({"model": "tiny", "prompt": "x"}))).json == OK


async def test_a_name_is_not_refused_before_each_engine_has_listed_its_names(make_engine, serve):
    engine, may_list = await make_engine(), asyncio.Event()
    answer_page, engine.models = engine._own_answer, ["tiny", "lora"]

    async def list_late(request, writer):
        if b"/v1/models" in request.line:
            await may_list.wait()
            writer.write(answer_page(request))
        else:
            writer.write(json_answer(OK))

    engine.script = list_late
    engine._own_answer = lambda request: b"" if b"/v1/models" in request.line else answer_page(request)
    served = await serve(engine)
    await until(lambda: served.gateway.dispatcher.models == {"tiny"}, "the name that the agent knows")
    assert (await served.ask(post({"model": "lora", "prompt": "x"}))).json == OK
    may_list.set()
    await until(lambda: served.gateway.dispatcher.models == {"tiny", "lora"}, "the names that the engine lists")
    assert (await served.ask(post({"model": "none", "prompt": "x"}))).status == 404


async def test_an_adapter_that_an_engine_has_unloaded_since_is_asked_for_at_another_one(make_engine, serve):
    unloaded = json_answer(
        {"error": {"message": "The model `lora` does not exist.", "code": 404}}, status="404 Not Found"
    )
    gone, has_it = await make_engine(always(unloaded), start=False), await make_engine(start=False)
    for engine in (gone, has_it):
        rows = [{"id": "tiny", "parent": None}, {"id": "lora", "parent": "tiny"}]
        page = json_answer({"object": "list", "data": rows})
        own = engine._own_answer
        engine._own_answer = lambda request, own=own, page=page: page if b"/v1/models" in request.line else own(request)
        await engine.start()
    served = await serve(gone, has_it, dispatch=TURNS)
    await until(lambda: served.gateway.dispatcher.models == {"tiny", "lora"}, "the names")
    for _ in range(6):
        assert (await served.ask(post({"model": "lora", "prompt": "x"}))).json == OK
    assert 1 <= len(gone.requests) <= 6
    assert dict(served.gateway.dispatcher.ejections) == {}
    # A name that is always served is not asked for twice.
    statuses = [(await served.ask(post({"model": "tiny", "prompt": "x"}))).status for _ in range(4)]
    assert sorted(statuses) == [200, 200, 404, 404]


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "plain"])
async def test_while_no_engine_is_there_the_names_known_last_are_listed_at_once(make_engine, serve, agent):
    engines = [await make_engine(agent=agent, start=False) for _ in range(2)]
    for engine in engines:
        engine.models = ["tiny", "alias"]
        await engine.start()
    served = await serve(*engines, limits={"hold_timeout_s": 30.0})
    await until(lambda: served.gateway.dispatcher.models == {"tiny", "alias"}, "the names")
    for engine in engines:
        await engine.stop()
        if agent:
            served.gateway.dispatcher.set_ready(engine.name, False, served.gateway.clock())
    await until(lambda: not served.gateway.dispatcher.accepting)
    listed = await served.ask(MODELS)
    assert [row["id"] for row in listed.json["data"]] == ["alias", "tiny"]
    assert served.gateway.dispatcher.held == 0


@pytest.mark.parametrize("agent", [True, False], ids=["agent", "plain"])
async def test_an_adapter_can_be_asked_for_as_soon_as_it_is_loaded(make_engine, serve, agent):
    loaded, other = await make_engine(agent=agent), await make_engine(agent=agent)
    served = await serve(loaded, other)
    await until(lambda: served.gateway.dispatcher.knows_all_models, "the names")
    loaded.models.append("lora")
    answers = await asyncio.gather(*(served.ask(post({"model": "lora", "prompt": "x"})) for _ in range(4)))
    assert [answer.json for answer in answers] == [OK] * 4
    assert (len(loaded.requests), len(other.requests)) == (4, 0)


async def test_engines_are_asked_for_an_unknown_name_once_a_second_at_most(make_engine, serve, monkeypatch):
    engine = await make_engine()
    served = await serve(engine)
    await until(lambda: served.gateway.dispatcher.knows_all_models, "the names")
    asked, own = [], engine._own_answer

    def count(request):
        asked.extend([request] * (b"/v1/models" in request.line))
        return own(request)

    monkeypatch.setattr(engine, "_own_answer", count)
    for number in range(20):
        answer = await served.ask(post({"model": f"other-{number}", "prompt": "x"}))
        assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
    assert 1 <= len(asked) <= 5
    assert engine.requests == []
    assert (served.in_flight, served.gateway.dispatcher.held) == (0, 0)


async def test_a_request_for_an_unknown_name_waits_for_the_engines_once(make_engine, serve, monkeypatch):
    # However long its answer takes: the next time to ask has come then.
    monkeypatch.setattr("moe_gateway.engines.name_refresh.PERIOD_S", 0.0)
    served = await serve(await make_engine())
    await until(lambda: served.gateway.dispatcher.knows_all_models, "the names")
    names, asked = served.gateway._context.names, []
    ask = names._ask

    async def count():
        asked.append(1)
        await ask()

    names._ask = count
    answer = await asyncio.wait_for(served.ask(post({"model": "other", "prompt": "x"})), 10)
    assert (answer.status, answer.json["error"]["code"], len(asked)) == (404, "model_not_found", 1)
