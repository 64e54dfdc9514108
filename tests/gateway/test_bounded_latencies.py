"""Latencies beside the bounds of `scheduling.engine.targets`: what is counted, for how long, and what is said."""

import asyncio

import aiohttp
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.latency_record import WINDOW_S, bucket_of
from moe_gateway.bounded_latencies import BoundedLatencies, LatencyWindow
from moe_scheduling.engine.disaggregation import LatencyTargets

from tests.gateway.clients import get
from tests.gateway.messages import OK, SSE_END, SSE_HEAD, event, json_answer, post, prompt

BOUNDS = {"dispatch": {"targets": {"ttft_s": 30.0, "inter_token_s": 20.0}}}


def test_a_window_forgets_what_is_older():
    window = LatencyWindow(1.0)
    window.observe(0.5, 1000.0)
    window.observe(3.0, 1200.0)
    assert window.record(1200.0).counts == ((bucket_of(0.5, 1.0), 1), (bucket_of(3.0, 1.0), 1))
    assert window.record(1000.0 + WINDOW_S).measured == 1
    assert window.measured(1200.0 + WINDOW_S) == 0


@given(st.lists(st.tuples(st.floats(0.0, 200.0), st.floats(0.0, 50.0)), max_size=40))
def test_what_is_counted_is_at_most_a_window_and_at_least_a_window_less_a_slot_old(rows):
    window, now_s, times = LatencyWindow(1.0), 1e6, []
    for after_s, latency_s in rows:
        now_s += after_s
        window.observe(latency_s, now_s)
        times.append(now_s)
    least = sum(now_s - at_s < WINDOW_S - 10 for at_s in times)
    most = sum(now_s - at_s <= WINDOW_S for at_s in times)
    assert least <= window.measured(now_s) == window.record(now_s).measured <= most


def test_another_bound_begins_anew_and_the_same_one_does_not():
    bounded = BoundedLatencies()
    assert bounded.measured(0.0) == ()
    bounded.set_bounds(LatencyTargets(ttft_s=1.0, inter_token_s=0.05))
    bounded.ttft.observe(0.5, 1.0)
    bounded.set_bounds(LatencyTargets(ttft_s=1.0))
    assert (bounded.measured(1.0), bounded.inter_token) == ((1,), None)
    bounded.set_bounds(LatencyTargets(ttft_s=2.0))
    assert bounded.measured(1.0) == (0,)


async def read_admin(served):
    async with aiohttp.ClientSession(served.admin_url) as session, session.get("/metrics") as answer:
        return (await get(served, "/v1/state"))[1], await answer.text()


async def three_tokens(request, writer):
    """A stream of three tokens in pieces of their own, or a whole answer."""
    if b'"stream": true' not in request.body and b'"stream":true' not in request.body:
        writer.write(json_answer(OK))
        return
    writer.write(SSE_HEAD)
    for text in ("a", "b", "c"):
        writer.write(event(text))
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write(SSE_END)


async def test_a_gateway_counts_first_tokens_and_pieces_of_streams_beside_their_bounds(make_engine, serve):
    served = await serve(await make_engine(three_tokens), **BOUNDS)
    for _ in range(2):
        assert (await served.ask(post(prompt(stream=True)))).status == 200
    await served.ask(post(prompt()))
    state, metrics = await read_admin(served)
    assert sum(count for _, count in state["ttft"]["counts"]) == 2
    assert sum(count for _, count in state["inter_token"]["counts"]) >= 2
    assert all(bucket < 0 for bucket, _ in state["ttft"]["counts"] + state["inter_token"]["counts"])
    assert 'moeserving_gateway_target_seconds{target="ttft"} 30.0' in metrics
    assert 'moeserving_gateway_target_p95_seconds{target="inter_token"}' in metrics


async def test_without_bounds_nothing_is_counted(make_engine, serve):
    served = await serve(await make_engine(three_tokens))
    assert (await served.ask(post(prompt(stream=True)))).status == 200
    state, metrics = await read_admin(served)
    assert (state["ttft"], state["inter_token"]) == (None, None)
    assert "moeserving_gateway_target_" not in metrics
