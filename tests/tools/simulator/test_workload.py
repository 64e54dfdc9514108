"""The content of prompts as the gateway and as vLLM see it, and how requests come."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_tools.simulator.arrivals import ArrivalShape, ClosedLoop, ConversationLoop, Senders, arrange
from moe_tools.simulator.workload import BYTES_PER_TOKEN, SimRequest, block_hashes, build_requests, prompt_bytes
from moe_tools.traces import TraceRequest, mean_rate


def request(index, *, prompt_tokens=100, **values):
    return SimRequest(index=index, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=4, **values)


def hashes(row, count):
    return list(islice(block_hashes(row), count))


@given(st.integers(1, 3000), st.lists(st.integers(0, 5), max_size=6), st.integers(16, 600))
def test_a_prompt_has_four_bytes_a_token(prompt_tokens, pieces, piece_tokens):
    row = request(1, prompt_tokens=prompt_tokens, pieces=tuple(pieces), piece_tokens=piece_tokens)
    assert len(prompt_bytes(row)) == prompt_tokens * BYTES_PER_TOKEN


def test_equal_pieces_share_their_beginning_and_nothing_else():
    first = request(1, prompt_tokens=1100, pieces=(7, 8))
    second = request(2, prompt_tokens=1100, pieces=(7, 9))
    shared = 512 // 16
    assert hashes(first, 80)[:shared] == hashes(second, 80)[:shared]
    assert not set(hashes(first, 80)[shared:]) & set(hashes(second, 80)[shared:])
    assert prompt_bytes(first)[: 512 * 4] == prompt_bytes(second)[: 512 * 4]
    assert prompt_bytes(first)[512 * 4 :] != prompt_bytes(second)[512 * 4 :]


def test_the_same_piece_after_another_beginning_is_another_block():
    first, second = request(1, prompt_tokens=1024, pieces=(1, 5)), request(2, prompt_tokens=1024, pieces=(2, 5))
    assert not set(hashes(first, 64)) & set(hashes(second, 64))


@given(st.integers(1, 400), st.integers(1, 400), st.integers(17, 90))
def test_hashes_are_chained_whatever_the_size_of_a_piece(first_tokens, second_tokens, piece_tokens):
    pieces = tuple(range(30))
    first = request(1, prompt_tokens=first_tokens, pieces=pieces, piece_tokens=piece_tokens)
    second = request(2, prompt_tokens=second_tokens, pieces=pieces, piece_tokens=piece_tokens)
    common = min(first_tokens, second_tokens) // 16
    assert hashes(first, 30)[:common] == hashes(second, 30)[:common]
    assert len(set(hashes(first, 30))) == 30


def test_prompts_without_pieces_share_nothing():
    assert not set(hashes(request(1), 50)) & set(hashes(request(2), 50))


TRACE = [TraceRequest(arrival_s=float(n * n), prompt_tokens=10, output_tokens=1) for n in range(500)]


@pytest.mark.parametrize("shape", [shape for shape in ArrivalShape if shape is not ArrivalShape.BURST])
def test_arrivals_have_the_rate_that_was_asked_for(shape):
    arranged = arrange(TRACE, shape, 12.5, seed=3)
    assert mean_rate(arranged) == pytest.approx(12.5)
    assert [row.arrival_s for row in arranged] == sorted(row.arrival_s for row in arranged)


def test_a_burst_comes_at_once():
    assert {row.arrival_s for row in arrange(TRACE, ArrivalShape.BURST, 5.0, seed=1)} == {0.0}


def test_bursts_are_burstier_than_poisson():
    def variation(shape):
        gaps = np.diff([row.arrival_s for row in arrange(TRACE, shape, 10.0, seed=1)])
        return gaps.std() / gaps.mean()

    assert variation(ArrivalShape.BURSTY) > 1.5 * variation(ArrivalShape.POISSON)
    assert variation(ArrivalShape.ON_OFF) > 1.5 * variation(ArrivalShape.POISSON)


def test_on_off_arrivals_come_in_bursts_with_pauses_of_seconds():
    gaps = np.diff([row.arrival_s for row in arrange(TRACE, ArrivalShape.ON_OFF, 10.0, seed=1)])
    # Within a burst five times the mean rate; of a pause 3.2 s in the mean.
    assert np.median(gaps) < 0.03
    pauses = gaps[gaps > 0.5]
    assert 4 <= len(pauses) <= 25
    assert pauses.sum() > 0.6 * gaps.sum()


def conversations(count, turns):
    rows = [
        TraceRequest(
            arrival_s=0.0, prompt_tokens=10, output_tokens=1, conversation=f"c{number % count}", think_s=float(number)
        )
        for number in range(count * turns)
    ]
    return [*rows, TraceRequest(arrival_s=0.0, prompt_tokens=10, output_tokens=1)]


def test_conversations_begin_at_a_rate_that_brings_the_one_asked_for():
    rows = conversations(40, 5)
    arranged = arrange(rows, ArrivalShape.POISSON, 10.0, seed=1)
    # 201 requests at 10 a second: their 40 begins, and the request without one, are spread over 20 s.
    assert len({row.arrival_s for row in arranged}) == 41
    assert max(row.arrival_s for row in arranged) == pytest.approx(20.0)
    for name in {row.conversation for row in rows} - {""}:
        assert len({row.arrival_s for row in arranged if row.conversation == name}) == 1


@given(st.integers(1, 6), st.integers(1, 6))
def test_each_request_of_a_conversation_comes_a_think_time_after_the_answer_before(count, turns):
    rows = build_requests(conversations(count, turns))
    loop = ConversationLoop(rows)
    open_ones, seen, now_s = list(loop.first()), [], 0.0
    assert len(open_ones) == count + 1
    while open_ones:
        ended = open_ones.pop()
        seen.append(ended)
        now_s += 3.0
        if (following := loop.after(ended, now_s)) is not None:
            assert following.conversation == ended.conversation
            assert following.index > ended.index
            assert following.arrival_s == now_s + following.think_s
            open_ones.append(following)
    assert sorted(row.index for row in seen) == [row.index for row in rows]


def test_senders_are_the_same_for_the_same_seed_and_more_gateways_do_not_change_the_tenants():
    def tenants(gateways, seed):
        senders = Senders(tenant_weights=(9.0, 1.0), sessions=5, gateways=gateways)
        return [row.tenant for row in senders.sign(build_requests(TRACE), seed)]

    assert tenants(1, 4) == tenants(3, 4) != tenants(1, 5)
    assert tenants(1, 4).count(0) > 400


def test_priorities_may_be_the_length():
    rows = Senders(by_length=True).sign([request(1, prompt_tokens=30), request(2, prompt_tokens=5)], 0)
    assert [row.priority for row in rows] == [30, 5]


def test_tenants_of_the_trace_stay_where_no_others_are_drawn():
    rows = [request(n, tenant=n) for n in range(4)]
    assert [row.tenant for row in Senders().sign(rows, 0)] == [0, 1, 2, 3]
    assert {row.tenant for row in Senders(tenant_weights=(0.0, 1.0)).sign(rows, 0)} == {1}


def test_an_open_loop_waits_for_nobody_and_a_closed_one_does():
    rows = [request(n) for n in range(4)]
    assert ConversationLoop(rows).first() == rows
    loop = ClosedLoop(rows, clients=2, think_s=0.5)
    assert loop.first() == rows[:2]
    following = loop.after(rows[0], 3.0)
    assert following is rows[2]
    assert following.arrival_s == 3.5
    assert loop.after(rows[1], 4.0) is rows[3]
    assert loop.after(rows[2], 5.0) is None
