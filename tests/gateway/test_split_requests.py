"""Requests whose prompt one engine computes and whose answer another one decodes, and every way in which that fails."""

import asyncio
import itertools
import json

import pytest
from moe_gateway.engines import target_states
from moe_gateway.request import exchange

from tests.gateway.messages import SSE_HEAD, chunk, json_answer, post
from tests.gateway.split_engines import PATHS, WRONG, Cluster, SplitEngine, body_of, read_stream, text_of
from tests.gateway.split_fleet import begin_chat, right
from tests.gateway.waiting import until


@pytest.mark.parametrize("route", PATHS)
async def test_the_prompt_is_computed_at_one_engine_and_the_answer_at_another(fleet, route):
    it = await fleet(ranks=2)
    answer = await it.ask(route)
    right(answer, route)
    assert (it.prefill.phases, it.decode.phases) == (["prefill"], ["decode"])
    first, second = it.prefill.bodies[0][1], it.decode.bodies[0][1]
    original = body_of(route, stream=True)
    limit = "max_output_tokens" if route == "responses" else "max_tokens"
    assert (first[limit], first["stream"]) == (1, False)
    assert {name: value for name, value in second.items() if name != "kv_transfer_params"} == original
    assert second["kv_transfer_params"]["remote_engine_id"] == it.prefill.engine_id
    assert all(b"x-data-parallel-rank" in head for head in (*it.prefill.heads, *it.decode.heads))
    assert (it.placements.transfers, it.placements.fall_backs, it.prefill.cluster.held) == (1, {}, 0)
    it.settled()
    stats = it.served.gateway.stats
    assert (sum(stats.ttft.counts), stats.retried, stats.finished) == (1, 0, 1)


@pytest.mark.parametrize("route", PATHS)
async def test_an_answer_in_one_piece_is_that_of_the_engine_that_decodes(fleet, route):
    it = await fleet()
    answer = await it.ask(route, stream=False)
    assert answer.json["choices"][0]["text"] == text_of(body_of(route))
    assert (it.prefill.phases, it.decode.phases) == (["prefill"], ["decode"])
    it.settled()


async def test_it_is_explained_with_both_engines(fleet):
    it = await fleet()
    answer = await it.ask()
    record = it.served.gateway.recent.record(answer.headers[b"x-request-id"].decode())
    assert [(row.name, row.reason) for row in record.attempts] == [("prefill-0", "prefill"), ("decode-1", "decode")]
    assert dict(it.served.gateway.dispatcher.decisions) == {"prefill": 1, "decode": 1}
    assert it.placements.pairs == {"least_cost": 1}


async def test_state_and_metrics_show_roles_transfers_and_fall_backs(fleet):
    it = await fleet()
    await it.ask()
    it.decode.fails["decode"] = ["event"]
    await it.ask(prompt="Others? " * 300)
    state, text = await it.read_admin()
    assert [row["role"] for row in state["engines"]] == ["prefill", "decode"]
    assert state["splits"] == {"transfers": 1, "fall_backs": {"decode_error": 1}, "role_changes": {}}
    for line in (
        "moeserving_gateway_split_transfers_total 1.0",
        'moeserving_gateway_split_choices_total{reason="least_cost"} 2.0',
        'moeserving_gateway_split_fallbacks_total{reason="decode_error"} 1.0',
        'moeserving_gateway_engine_role{engine="decode-1",role="decode"} 1.0',
        'moeserving_gateway_dispatch_total{reason="prefill"} 2.0',
    ):
        assert f"\n{line}\n" in text


# What goes whole.


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"max_tokens": 1},
        {"tool_choice": "required"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"model": "adapter"},
        {"messages": [{"role": "user", "content": "short"}]},
    ],
    ids=["n", "one token", "a tool", "an image", "an adapter", "short"],
)
async def test_a_request_that_cannot_be_split_goes_whole(fleet, fields):
    it = await fleet()
    rows = {"tiny": {"id": "tiny"}, "adapter": {"id": "adapter", "parent": "tiny"}}
    for engine in it.engines:
        it.served.gateway.dispatcher.set_models(engine.name, rows)
    answer = await it.ask(**fields)
    right(answer, "chat", **fields)
    assert it.prefill.phases + it.decode.phases == ["whole"]
    assert it.placements.fall_backs == {}
    it.settled()


@pytest.mark.parametrize("peers", ["", "other"])
async def test_engines_that_are_no_peers_exchange_nothing(fleet, peers):
    it = await fleet()
    it.engines[1].agent.say(kv_transfer={"role": "decode", "peers": peers})
    await until(lambda: it.placements._peers.get("decode-1", "") == peers)
    right(await it.ask(), "chat")
    assert it.prefill.phases + it.decode.phases == ["whole"]


async def test_without_the_setting_nothing_is_split(make_engine, serve):
    cluster = Cluster()
    scripts = [SplitEngine(cluster), SplitEngine(cluster)]
    engines = [await make_engine(script) for script in scripts]
    for engine in engines:
        engine.agent.say(kv_transfer={"peers": "same"})
    served = await serve(*engines)
    answer = await served.ask(post(body_of("chat", stream=True), PATHS["chat"]))
    assert read_stream(answer.body) == text_of(body_of("chat"))
    assert scripts[0].phases + scripts[1].phases == ["whole"]


# Failures. Each goes to one engine, and the client sees nothing.


def without(name):
    return lambda params: {key: value for key, value in params.items() if key != name}


def changed(**fields):
    return lambda params: params | fields


GARBAGE = {
    "none": lambda _: None,
    "text": lambda _: "x",
    "list": lambda _: [1],
    "empty": lambda _: {},
    **{f"no {name}": without(name) for name in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")},
    "no blocks": without("remote_block_ids"),
    "empty blocks": changed(remote_block_ids=[]),
    "empty groups": changed(remote_block_ids=[[], []]),
    "flat blocks": changed(remote_block_ids=[1, 2]),
    "texts as blocks": changed(remote_block_ids=[["1"]]),
    "negative blocks": changed(remote_block_ids=[[-1]]),
    "port as text": changed(remote_port="5600"),
    "port 0": changed(remote_port=0),
    "flag as port": changed(remote_port=True),
    "host as number": changed(remote_host=7),
    "no size": changed(tp_size=0),
    "no tokens": changed(remote_num_tokens=0),
    "not computed": changed(do_remote_prefill=False),
    "to be computed": changed(do_remote_decode=True),
    "huge": changed(remote_block_ids=[list(range(700_000))]),
}
OTHER_ANSWERS = {
    "no JSON": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
    "a number": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n7",
    "nothing": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a stream": SSE_HEAD + chunk(b"data: {}\n\n") + b"0\r\n\r\n",
    "a redirect": json_answer({}, status="302 Found"),
}


@pytest.mark.parametrize("kind", [*GARBAGE, *OTHER_ANSWERS])
async def test_an_odd_answer_of_the_first_engine_reaches_nobody(fleet, kind):
    it = await fleet()
    it.prefill.fails["prefill"] = [GARBAGE.get(kind) or OTHER_ANSWERS[kind]]
    right(await it.ask(), "chat")
    assert it.decode.phases + it.prefill.phases[1:] == ["whole"]
    reason = "prefill_refused" if kind == "a redirect" else "prefill_no_params"
    assert it.placements.fall_backs == {reason: 1}
    it.settled()


PREFILL_FAILURES = {
    "reset": "prefill_broken",
    "dies": "prefill_broken",
    "dead": "prefill_engine_dead",
    500: "prefill_engine_error",
    503: "prefill_engine_full",
    400: "prefill_refused",
    422: "prefill_refused",
    501: "prefill_refused",
    b"garbage\r\n\r\n": "prefill_broken",
}
DECODE_FAILURES = {
    "reset": "decode_broken",
    "dies": "decode_broken",
    "dead": "decode_engine_dead",
    "dead event": "decode_engine_dead",
    "event": "decode_error",
    500: "decode_error",
    503: "decode_engine_full",
    b"garbage\r\n\r\n": "decode_broken",
}


@pytest.mark.parametrize("route", PATHS)
@pytest.mark.parametrize(
    ("phase", "failure", "reason"),
    [
        *(("prefill", *row) for row in PREFILL_FAILURES.items()),
        *(("decode", *row) for row in DECODE_FAILURES.items()),
    ],
)
async def test_a_failure_before_the_answer_goes_to_one_engine(fleet, route, phase, failure, reason):
    it = await fleet(roles=("prefill", "decode", "unified"))
    # Enough for the third engine to compute nothing until one of the pair has failed.
    it.engines[2].agent.say_rank(waiting_prefill_tokens=10_000_000, waiting=50)
    await until(lambda: it.served.target_state("unified-2").signal.waiting == 50)
    for script in it.scripts:
        script.fails[phase] = [failure]
    answer = await it.ask(route)
    right(answer, route)
    phases = [row for script in it.scripts for row in script.phases]
    assert sorted(phases) == sorted(["prefill", "whole", *(["decode"] if phase == "decode" else [])])
    assert it.placements.fall_backs == {reason: 1}
    assert (it.placements.transfers, it.served.gateway.stats.failed) == (0, 0)
    assert sum(it.served.gateway.stats.ttft.counts) == 1
    it.settled()


async def test_a_client_error_of_the_second_engine_is_the_answer(fleet):
    it = await fleet()
    it.decode.fails["decode"] = [400]
    answer = await it.ask()
    assert (answer.status, it.placements.fall_backs, it.placements.transfers) == (400, {}, 0)
    it.settled()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_an_engine_that_cannot_be_reached(fleet, phase):
    it = await fleet()
    gone = it.engines[phase == "decode"]
    agent, gone.agent = gone.agent, None
    await gone.stop()
    gone.agent = agent
    right(await it.ask(), "chat")
    assert it.placements.fall_backs == {f"{phase}_unreachable": 1}
    it.settled()


async def test_a_request_that_ends_engines_ends_two_at_most(fleet):
    it = await fleet(roles=("prefill", "decode", "unified", "unified"))
    for script in it.scripts:
        script.fails = {phase: ["dies"] * 9 for phase in ("prefill", "decode", "whole")}
    answer = await it.ask()
    assert answer.status == 502
    assert sum(len(script.bodies) for script in it.scripts) == 2
    it.settled()


async def test_parameters_are_sent_once(fleet):
    """The engine that has fetched the blocks may have died of it; who gets the parameters again reads freed blocks."""
    it = await fleet(roles=("prefill", "decode", "decode"))
    for script in it.scripts[1:]:
        script.fails["decode"] = ["dies"]
    right(await it.ask(), "chat")
    assert sum(script.phases.count("decode") for script in it.scripts) == 1
    it.settled()


async def test_after_a_failure_the_engine_takes_part_in_no_pair_for_a_while(fleet):
    it = await fleet()
    it.decode.fails["decode"] = ["event"]
    right(await it.ask(), "chat")
    right(await it.ask(prompt="Others? " * 300), "chat", prompt="Others? " * 300)
    assert (it.prefill.phases + it.decode.phases).count("prefill") == 1
    it.placements._paused.clear()
    right(await it.ask(prompt="More of them? " * 300), "chat", prompt="More of them? " * 300)
    assert it.placements.transfers == 1


async def test_what_cannot_be_split_moves_no_roles(fleet):
    it = await fleet(roles=("unified", "unified"))
    await it.ask(n=2)
    load = it.placements.load
    assert (load.prompt_tokens, load.measured_s) == (0.0, None)
    await it.ask()
    assert load.prompt_tokens > 0.0
    await until(lambda: load.measured_s is not None)


# Leases.


async def test_a_lease_that_is_over_is_not_used(fleet, monkeypatch):
    """Nobody knows when the prompt was computed while the gateway itself stood still."""
    it = await fleet()
    it.prefill.fails["prefill"] = ["hangs"]
    client = await begin_chat(it.served)
    await until(lambda: it.prefill.phases)
    clock = it.served.gateway._context.clock
    monkeypatch.setattr(it.served.gateway._context, "clock", lambda: clock() + 21.0)
    # The checks of the gateway stand still too.
    monkeypatch.setattr(it.served.gateway, "_check_once", lambda now_s: None)
    it.prefill.go.set()
    right(await client.answer(), "chat")
    assert it.placements.fall_backs == {"lease_over": 1}
    assert it.decode.phases.count("decode") == 0
    it.settled()


async def test_a_long_prompt_does_not_use_up_the_lease(fleet, monkeypatch):
    it = await fleet()
    it.prefill.fails["prefill"] = ["hangs"]
    client = await begin_chat(it.served)
    await until(lambda: it.prefill.phases)
    clock = it.served.gateway._context.clock
    monkeypatch.setattr(it.served.gateway._context, "clock", lambda: clock() + 100.0)
    (connection,) = it.served.gateway._connections
    connection.check(clock() + 100.0)
    it.prefill.go.set()
    right(await client.answer(), "chat")
    assert (it.placements.fall_backs, it.placements.transfers) == ({}, 1)


# Clients that leave, deadlines, the end.


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_client_that_leaves_ends_both_phases(fleet, phase):
    it = await fleet()
    script = it.prefill if phase == "prefill" else it.decode
    script.fails[phase] = ["hangs"]
    client = await begin_chat(it.served)
    await until(lambda: script.phases)
    assert it.served.in_flight == (2 if phase == "prefill" else 1)
    client.reset()
    await until(lambda: it.served.in_flight == 0)
    engine = it.engines[phase == "decode"]
    await until(engine.requests[-1].gone.is_set)
    assert it.placements.fall_backs == {}
    it.settled()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_the_deadline_counts_over_both_phases(fleet, phase):
    it = await fleet()
    (it.prefill if phase == "prefill" else it.decode).fails[phase] = ["hangs"]
    answer = await it.served.ask(post(body_of("chat"), PATHS["chat"], b"x-request-timeout: 0.3\r\n"))
    assert answer.status == 504
    it.settled()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_an_engine_that_makes_no_steps_is_left(fleet, phase, monkeypatch):
    for module in (target_states, exchange):
        monkeypatch.setattr(module, "STALL_S", 0.3)
    it = await fleet()
    (it.prefill if phase == "prefill" else it.decode).fails[phase] = ["hangs"]
    right(await it.ask(), "chat")
    assert it.placements.fall_backs == {f"{phase}_engine_error": 1}
    it.settled()


async def test_a_long_prompt_does_not_make_the_other_engine_look_hung(fleet, monkeypatch):
    for module in (target_states, exchange):
        monkeypatch.setattr(module, "STALL_S", 0.3)
    it = await fleet()
    it.prefill.fails["prefill"] = ["hangs"]
    client = await begin_chat(it.served)
    steps = itertools.count(2)
    for _ in range(30):
        it.engines[0].agent.say_rank(step=next(steps))
        await asyncio.sleep(0.02)
    assert it.served.gateway.dispatcher.stalled == frozenset()
    it.prefill.go.set()
    right(await client.answer(), "chat")
    assert it.placements.transfers == 1


async def test_a_stream_is_opened_while_the_prompt_is_computed(fleet):
    it = await fleet(limits={"stream_head_after_s": 0.05})
    it.prefill.fails["prefill"] = ["hangs"]
    client = await begin_chat(it.served)
    head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 60)
    assert head.startswith(b"HTTP/1.1 200")
    it.prefill.fails["prefill"] = []
    it.prefill.go.set()
    framed, body = await client._body({b"transfer-encoding": b"chunked"})
    assert framed.endswith(b"0\r\n\r\n")
    assert read_stream(body) == text_of(body_of("chat"))
    it.settled()


async def test_a_large_body_is_split_too(fleet):
    it = await fleet()
    prompt = "some words " * 100_000
    right(await it.ask(prompt=prompt), "chat", prompt=prompt)
    assert (it.prefill.phases, it.decode.phases) == (["prefill"], ["decode"])
    assert it.decode.bodies[0][1]["messages"][0]["content"] == prompt


async def test_a_split_stream_goes_on_elsewhere_once_it_has_begun(fleet):
    """The two settings together: the engine that decodes dies in the middle of the answer."""
    it = await fleet(continuation={})
    it.decode.fails["decode"] = ["midway"]
    answer = await it.ask("chat", temperature=0)
    assert answer.headers[b"x-moeserving-continuation"] == b"replay"
    right(answer, "chat")
    assert sorted(it.prefill.phases + it.decode.phases) == ["decode", "prefill", "whole"]
    assert it.served.gateway.stats.continuations == {"replay": 1}
    assert (it.placements.transfers, it.placements.fall_backs) == (1, {})
    it.settled()


async def test_a_broken_stream_that_cannot_go_on_ends_with_an_error(fleet):
    it = await fleet()
    it.decode.fails["decode"] = ["midway"]
    answer = await it.ask()
    assert read_stream(answer.body).startswith("error")
    assert (it.placements.transfers, it.placements.fall_backs) == (1, {})
    it.settled()


@pytest.mark.parametrize("failure", ["reset", "dead", 500, 503])
async def test_failures_with_continuation(fleet, failure):
    it = await fleet(continuation={})
    it.decode.fails["decode"] = [failure]
    right(await it.ask("completions", temperature=0), "completions")
    assert it.placements.fall_backs.total() == 1
    it.settled()


def test_the_scripts_count_a_freed_block_as_wrong():
    cluster = Cluster()
    engine = SplitEngine(cluster)
    params = engine._hold(body_of("chat", stream=False))
    assert engine._fetch(params) == text_of(body_of("chat"))
    assert engine._fetch(params) == WRONG
    assert json.dumps(params)
