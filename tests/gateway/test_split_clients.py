"""What one client of split requests can do to the requests of others: nothing."""

import pytest

from tests.gateway.messages import post
from tests.gateway.split_engines import PATHS, body_of
from tests.gateway.split_fleet import ask_without_reading, right
from tests.gateway.waiting import until


async def test_a_client_that_does_not_read_cannot_make_a_computed_prompt_seem_new(fleet):
    """Its earlier answers fill the connection, so that those of the engines might wait unread beyond the lease."""
    it = await fleet()
    it.prefill.fails["prefill"] = ["hangs"]
    client, connection = await ask_without_reading(it)
    connection.resume_writing()
    right(await client.answer(), "chat")
    assert (it.placements.fall_backs, it.placements.transfers) == ({}, 1)
    it.settled()


async def test_a_client_that_does_not_read_slows_the_engine_that_decodes(fleet):
    it = await fleet()
    it.prefill.fails["prefill"], it.decode.fails["decode"] = ["hangs"], ["hangs"]
    client, connection = await ask_without_reading(it)
    upstream = connection._exchange._upstream
    assert not upstream.transport.is_reading()
    connection.resume_writing()
    assert upstream.transport.is_reading()
    it.decode.go.set()
    right(await client.answer(), "chat")
    it.settled()


@pytest.mark.parametrize("fields", [{"metadata": {"a": "x" * (5 << 20)}}, {"instructions": "x" * (5 << 20)}])
async def test_a_client_that_makes_the_first_answer_too_long_goes_whole_alone(fleet, fields):
    """As vLLM's responses repeat these fields of their request."""
    it = await fleet()
    it.prefill.echoes = ("metadata", "instructions")
    answer = await it.ask("responses", **fields)
    assert answer.status == 200
    # What the first engine need not read is not sent there.
    expected = {} if "metadata" in fields else {"prefill_no_params": 1}
    assert (it.placements.fall_backs, it.placements._paused) == (expected, {})
    right(await it.ask(prompt="Others? " * 300), "chat", prompt="Others? " * 300)
    assert it.placements.transfers == (2 if "metadata" in fields else 1)
    it.settled()


async def test_an_engine_on_trial_gets_one_pair_at_a_time(fleet):
    it = await fleet()
    dispatcher = it.served.gateway.dispatcher
    target = it.served.target_state("decode-1").target
    dispatcher.fail(target, it.served.gateway._context.clock() - 10.0)
    await until(lambda: dispatcher.is_accepting(target))
    it.prefill.fails["prefill"], it.decode.fails["decode"] = ["hangs"], ["hangs"]
    client, other = await it.served.connect(), await it.served.connect()
    client.send(post(body_of("chat", stream=True), PATHS["chat"]))
    await until(lambda: it.prefill.phases)
    assert not dispatcher.is_accepting(target)
    other.send(post(body_of("chat", stream=True, prompt="Others? " * 300), PATHS["chat"]))
    right(await other.answer(), "chat", prompt="Others? " * 300)
    it.prefill.go.set()
    await until(lambda: it.decode.phases)
    assert (it.prefill.phases, it.decode.phases) == (["prefill", "whole"], ["decode"])
    assert not dispatcher.is_accepting(target)
    it.decode.go.set()
    right(await client.answer(), "chat")
    assert dispatcher.is_accepting(target)
    it.settled()
