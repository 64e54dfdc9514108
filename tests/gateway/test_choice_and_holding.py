"""Where requests go, as the policies in force say, and in which order those go that have to wait."""

import asyncio
import json

import pytest

from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, json_answer, post, prompt
from tests.gateway.peers import answer_ok, never
from tests.gateway.waiting import until

FCFS = {"policy": "fcfs"}


def names_of(engine) -> list[str]:
    return [json.loads(request.body)["prompt"] for request in engine.requests]


async def hold(served, texts, **fields):
    """Clients whose requests are held, one after the other."""
    clients = []
    for text in texts:
        client = await served.connect()
        client.send(post(prompt(text, **fields)))
        clients.append(client)
        await served.held(len(clients))
    return clients


# Policies.


async def test_round_robin_takes_turns(make_engine, serve):
    engines = [await make_engine() for _ in range(3)]
    served = await serve(*engines, dispatch={"policy": "roundRobin"})
    for _ in range(9):
        await served.ask(post(prompt("the same prompt" * 100)))
    assert [len(engine.requests) for engine in engines] == [3, 3, 3]


async def test_least_requests_goes_where_least_is_in_flight(make_engine, serve):
    engines = [await make_engine(never) for _ in range(2)]
    served = await serve(*engines, dispatch={"policy": "leastRequests"})
    for count in range(1, 5):
        client = await served.connect()
        client.send(post(prompt()))
        await until(lambda count=count: sum(len(engine.requests) for engine in engines) == count)
    assert [len(engine.requests) for engine in engines] == [2, 2]


async def test_predicted_avoids_the_engine_whose_agent_says_that_it_is_loaded(make_engine, serve):
    loaded, free = await make_engine(), await make_engine()
    served = await serve(loaded, free)
    loaded.agent.say_rank(waiting=9, waiting_prefill_tokens=50_000)
    await until(lambda: served.target_state(loaded.name).signal.waiting == 9)
    for _ in range(6):
        await served.ask(post(prompt()))
    assert (len(loaded.requests), len(free.requests)) == (0, 6)


async def test_predicted_counts_what_was_just_sent(make_engine, serve):
    engines = [await make_engine(never) for _ in range(2)]
    served = await serve(*engines)
    for count in range(1, 7):
        client = await served.connect()
        client.send(post(prompt(f"{count}" * 4000)))
        await until(lambda count=count: sum(len(engine.requests) for engine in engines) == count)
    assert [len(engine.requests) for engine in engines] == [3, 3]


async def test_an_engine_that_answers_later_than_it_says_gets_less(make_engine, serve):
    async def late(_request, writer):
        await asyncio.sleep(0.25)
        writer.write(SSE_HEAD + event("a") + SSE_END)

    async def at_once(_request, writer):
        writer.write(SSE_HEAD + event("a") + SSE_END)

    slow, quick = await make_engine(late), await make_engine(at_once)
    served = await serve(slow, quick)
    for _ in range(4):
        await served.ask(post(prompt("a" * 4000, stream=True)))
    await until(lambda: served.target_state(slow.name).ttft_factor > served.target_state(quick.name).ttft_factor)
    before = len(slow.requests)
    for number in range(6):
        await served.ask(post(prompt(f"{number}" * 4000, stream=True)))
    assert len(slow.requests) == before


async def test_two_gateways_that_share_engines_do_not_choose_the_same(make_engine, serve):
    engines = [await make_engine(never) for _ in range(4)]
    gateways = [await serve(*engines) for _ in range(2)]
    for engine in engines:
        # From here on neither learns what the other sends.
        engine.agent.mute = True
    for count in range(1, 9):
        client = await gateways[count % 2].connect()
        client.send(post(prompt(f"{count}" * 4000)))
        await until(lambda count=count: sum(len(engine.requests) for engine in engines) == count)
    assert [len(engine.requests) for engine in engines] == [2, 2, 2, 2]


async def test_a_gateway_learns_its_share_of_the_work_from_what_engines_say(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine)
    client = await served.connect()
    client.send(post(prompt()))
    await until(lambda: engine.requests)
    assert served.target_state(engine.name).traffic_share == 1.0
    engine.agent.say_rank(running=200)
    await until(lambda: served.target_state(engine.name).traffic_share < 0.5)
    assert served.gateway.dispatcher.targets.traffic_share == served.target_state(engine.name).traffic_share


@pytest.mark.parametrize("where", ["header", "user"])
async def test_a_session_stays_at_its_engine(make_engine, serve, where):
    engines = [await make_engine() for _ in range(2)]
    served = await serve(*engines)
    for turn in range(8):
        for session in ("a", "b"):
            extra = b"X-Session-Id: %b\r\n" % session.encode() if where == "header" else b""
            fields = {"user": session} if where == "user" else {}
            await served.ask(post(prompt(f"{session} {turn}", **fields), extra=extra))
    homes = {text[0]: engine.name for engine in engines for text in names_of(engine)}
    assert all(homes[text[0]] == engine.name for engine in engines for text in names_of(engine))


async def test_a_prefix_goes_where_it_was_computed_until_that_engine_restarts(make_engine, serve):
    engines = [await make_engine() for _ in range(2)]
    served = await serve(*engines)
    shared = "once upon a time " * 1000
    for turn in range(6):
        await served.ask(post(prompt(shared + str(turn))))
    home, other = sorted(engines, key=lambda engine: -len(engine.requests))
    assert (len(home.requests), len(other.requests)) == (6, 0)
    job, _ = served.gateway.dispatcher.build_job(parsed_of(shared), None)
    assert job.cached.keys() == {(home.name, 0)}
    home.agent.say(engine=home.agent.state["engine"] | {"pid": 2})
    await until(lambda: served.gateway.dispatcher.engines[home.name].pid == 2)
    job, _ = served.gateway.dispatcher.build_job(parsed_of(shared), None)
    assert job.cached == {}


def parsed_of(text):
    from moe_gateway.http.routes import Route
    from moe_gateway.request.parsing import parse_body

    return parse_body(Route.COMPLETIONS, json.dumps(prompt(text)).encode())


async def test_the_size_of_prompts_is_learned_from_what_engines_report(make_engine, serve):
    async def dense(_request, writer):
        writer.write(json_answer({"usage": {"prompt_tokens": 6000}}))

    served = await serve(await make_engine(dense))
    before = served.gateway.dispatcher.build_job(parsed_of("x" * 8000), None)[0].prompt_tokens
    for _ in range(5):
        await served.ask(post(prompt("x" * 8000)))
    assert served.gateway.dispatcher.build_job(parsed_of("x" * 8000), None)[0].prompt_tokens > before * 1.5


# Holding.


async def test_without_an_engine_that_accepts_a_request_waits_for_one(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(phase="starting", accepting=False)
    served = await serve(engine, ready=False)
    (client,) = await hold(served, ["waits"])
    engine.agent.say(phase="ready", accepting=True)
    assert (await client.answer()).json == OK


async def test_a_request_is_held_up_to_its_timeout_and_then_gets_a_retry_after(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False, limits={"hold_timeout_s": 0.2})
    answer = await served.ask(post(prompt()))
    assert (answer.status, answer.json["error"]["code"]) == (503, "no_engine")
    assert int(answer.headers[b"retry-after"]) >= 1
    assert served.gateway.dispatcher.held == 0


async def test_without_any_engine_configured_a_request_is_refused_at_once(serve):
    answer = await (await serve()).ask(post(prompt()))
    assert (answer.status, answer.headers[b"retry-after"]) == (503, b"1")


async def test_the_queue_has_a_bound(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, dispatch={"saturation_s": 1.0}, limits={"hold_requests": 2})
    engine.agent.say_rank(waiting=100, waiting_prefill_tokens=100_000)
    await until(lambda: served.target_state(engine.name).signal.waiting == 100)
    clients = await hold(served, ["a", "b"])
    answer = await served.ask(post(prompt("c")))
    assert (answer.status, answer.json["error"]["code"]) == (429, "busy")
    assert answer.json["error"]["type"] == "rate_limit_error"
    assert int(answer.headers[b"retry-after"]) >= 1
    engine.agent.say_rank(waiting=0, waiting_prefill_tokens=0)
    assert [(await client.answer()).status for client in clients] == [200, 200]


@pytest.mark.parametrize(
    ("policy", "order"),
    [("sjf", ["small", "middle", "the largest of all"]), ("fcfs", ["middle", "the largest of all", "small"])],
)
async def test_what_is_held_goes_in_the_order_of_the_policy(make_engine, serve, policy, order):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(
        engine, ready=False, request={"policy": policy, "ageing_rate": 1.0, "ageing_horizon_s": 3600.0}
    )
    sizes = {"middle": 3000, "the largest of all": 9000, "small": 100}
    clients = await hold(served, [name.ljust(size) for name, size in sizes.items()])
    engine.agent.say(accepting=True)
    for client in clients:
        await client.answer()
    assert [name.strip() for name in names_of(engine)] == order


async def test_priority_orders_what_is_held(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False, request={"policy": "priority"})
    clients = []
    for text, level in (("later", 5), ("first", -1), ("middle", 0)):
        client = await served.connect()
        client.send(post(prompt(text, priority=level)))
        clients.append(client)
        await served.held(len(clients))
    engine.agent.say(accepting=True)
    for client in clients:
        await client.answer()
    assert names_of(engine) == ["first", "middle", "later"]


MODELS = b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"
QUESTIONS = [MODELS, post(prompt(), path="/tokenize"), post({"model": "tiny", "tokens": [1]}, path="/detokenize")]


@pytest.mark.parametrize("question", QUESTIONS, ids=["models", "tokenize", "detokenize"])
async def test_a_question_that_needs_no_computing_is_not_held_behind_those_that_do(make_engine, serve, question):
    engine = await make_engine()
    served = await serve(engine, dispatch={"saturation_s": 1.0}, limits={"hold_requests": 1})
    engine.agent.say_rank(waiting=100, waiting_prefill_tokens=100_000)
    await until(lambda: served.target_state(engine.name).signal.waiting == 100)
    (held,) = await hold(served, ["held"])
    assert (await served.ask(question)).status == 200
    assert served.gateway.dispatcher.held == 1
    engine.agent.say_rank(waiting=0, waiting_prefill_tokens=0)
    assert (await held.answer()).json == OK


async def test_a_question_is_held_too_where_there_is_no_engine(make_engine, serve):
    engine = await make_engine()
    engine.agent.say(accepting=False)
    served = await serve(engine, ready=False)
    client = await served.connect()
    client.send(QUESTIONS[1])
    await served.held(1)
    engine.agent.say(accepting=True)
    assert (await client.answer()).status == 200


async def test_saturation_holds_by_the_requests_in_flight_until_an_answer_begins(make_engine, serve):
    first_token = asyncio.Event()

    async def waits(request, writer):
        await first_token.wait()
        await answer_ok(request, writer)

    engine = await make_engine(waits)
    served = await serve(engine, dispatch={"saturation_s": 0.5})
    client = await served.connect()
    client.send(post(prompt("x" * 100_000)))
    await until(lambda: engine.requests)
    engine.agent.mute = True
    (second,) = await hold(served, ["second"])
    assert len(engine.requests) == 1
    first_token.set()
    assert (await client.answer()).json == OK
    assert (await second.answer()).json == OK


async def test_a_stale_signal_holds_no_request(make_engine, serve):
    engine = await make_engine()
    served = await serve(engine, dispatch={"saturation_s": 1.0, "stale_after_s": 0.5})
    engine.agent.say_rank(waiting=100, waiting_prefill_tokens=100_000)
    await until(lambda: served.target_state(engine.name).signal.waiting == 100)
    (client,) = await hold(served, ["held"])
    engine.agent.mute = True
    assert (await client.answer()).json == OK


async def test_a_newcomer_does_not_overtake_what_is_held(make_engine, serve):
    engine = await make_engine(never)
    served = await serve(engine, dispatch={"saturation_s": 0.5}, request=FCFS)
    engine.agent.say_rank(waiting=100, waiting_prefill_tokens=100_000)
    await until(lambda: served.target_state(engine.name).signal.waiting == 100)
    await hold(served, ["x" * 100_000, "second"])
    # The line grows short without anybody telling the queue, and the next to act is a newcomer.
    dispatcher = served.gateway.dispatcher
    engine.agent.mute = True
    dispatcher.settings = type(dispatcher.settings)(saturation_s=200.0)
    newcomer = await served.connect()
    newcomer.send(post(prompt("newcomer")))
    await until(lambda: len(engine.requests) == 3)
    assert [name[:10] for name in names_of(engine)] == ["x" * 10, "second", "newcomer"]


async def test_held_requests_survive_a_change_of_all_engines(make_engine, serve):
    before, after = await make_engine(name="before"), await make_engine(name="after")
    before.agent.say(accepting=False)
    served = await serve(before, ready=False)
    (client,) = await hold(served, ["held"])
    gateway = served.gateway
    from moe_contract.gateway_config import EngineAddress

    change = type(gateway.in_force)(
        dispatch=gateway.in_force.dispatch,
        request=gateway.in_force.request,
        engines=(EngineAddress.model_validate(after.address),),
    )
    gateway.apply(change)
    assert (await client.answer()).json == OK
    assert len(after.requests) == 1
