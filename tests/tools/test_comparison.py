"""The paired comparison, with a scripted server in the place of a deployment."""

from collections import Counter

import pytest
from moe_tools.comparison import (
    OURS,
    STOCK,
    PiecePair,
    Plan,
    build_salt,
    compare,
    compare_metrics,
    plan_pieces,
    probe_capacity,
    render_comparison,
    render_failures,
    select_longest,
)
from moe_tools.prompts import PromptMaker
from moe_tools.replay import AnsweredRequest, FailedRequest, Load, ReplayResult
from moe_tools.streaming import ServerAddress
from moe_tools.traces import TraceRequest, mean_rate


def trace(count: int) -> list[TraceRequest]:
    return [TraceRequest(arrival_s=n * 0.5, prompt_tokens=10 + n, output_tokens=5) for n in range(count)]


def answered(index: int, ttft_s: float, prompt: int = 10, tpot_s: float = 0.01) -> AnsweredRequest:
    last = ttft_s + 4 * tpot_s
    times = {"due_s": 0.0, "lateness_s": 0.0, "ttft_s": ttft_s, "last_token_s": last, "end_s": last}
    return AnsweredRequest(index=index, prompt_tokens=prompt, output_tokens=5, **times)


def failed(index: int) -> FailedRequest:
    return FailedRequest(index=index, due_s=0, lateness_s=0, prompt_tokens=1, kind="HTTP 429", detail="")


def run_of(*ttfts: float, wall_s: float = 10.0) -> ReplayResult:
    return ReplayResult(outcomes=tuple(answered(n, ttft) for n, ttft in enumerate(ttfts)), wall_s=wall_s)


class Script:
    """Remembers each switch and each measurement; our policy's times are `gain` of the other's."""

    def __init__(self, gain: float) -> None:
        self.gain, self.now = gain, ""
        self.seen: list[tuple[str, int, int]] = []

    async def switch(self, policy) -> None:
        self.now = policy.label

    async def measure(self, piece, salt) -> ReplayResult:
        self.seen.append((self.now, piece[0].prompt_tokens, salt))
        base = 0.1 + 0.01 * piece[0].prompt_tokens
        return run_of(*[base * (self.gain if self.now == OURS.label else 1.0)] * 3)


def plan_of(pairs: int) -> Plan:
    return Plan(pieces=plan_pieces(trace(400), pairs=pairs, piece_s=10, rate=2.0, seed=1), seed=5)


async def test_each_piece_is_served_under_both_policies_and_the_order_turns():
    script = Script(0.8)
    await compare(plan_of(4), script.switch, script.measure)
    first, second = STOCK.label, OURS.label
    assert [label for label, _, _ in script.seen] == [first, second, second, first, first, second, second, first]
    pieces = [piece for _, piece, _ in script.seen]
    assert pieces[::2] == pieces[1::2]


async def test_no_two_runs_share_their_prompts():
    script = Script(0.8)
    await compare(plan_of(5), script.switch, script.measure)
    assert max(Counter(salt for _, _, salt in script.seen).values()) == 1
    assert build_salt(1, 0, 0) != build_salt(2, 0, 0)
    assert min(salt for _, _, salt in script.seen) > 0


async def test_a_steady_gain_is_called_better_and_none_is_called_none():
    for gain, verdict in ((0.8, "better"), (1.0, "covers 1"), (1.25, "worse")):
        script = Script(gain)
        pairs = await compare(plan_of(4), script.switch, script.measure)
        mean = compare_metrics(pairs)[0]
        assert mean.metric == "TTFT, mean"
        assert mean.ratio.value == pytest.approx(gain)
        assert mean.verdict.startswith(verdict)


def test_more_throughput_is_better_and_less_is_worse():
    faster = [PiecePair(stock=run_of(1.0, wall_s=10 + n), ours=run_of(1.0, wall_s=(10 + n) / 2)) for n in range(3)]
    slower = [PiecePair(stock=pair.ours, ours=pair.stock) for pair in faster]
    assert compare_metrics(faster)[-1].verdict == "better"
    assert compare_metrics(slower)[-1].verdict == "worse"


def test_one_pair_shows_no_difference():
    rows = compare_metrics([PiecePair(stock=run_of(1.0, 2.0), ours=run_of(0.1, 0.2))])
    assert rows[0].verdict == "covers 1: unclear"


def test_pairs_without_answers_are_left_out_and_said():
    empty = ReplayResult(outcomes=(failed(0), failed(1)), wall_s=1.0)
    nothing = compare_metrics([PiecePair(stock=empty, ours=run_of(1.0))])
    assert all(row.ratio is None and row.verdict == "not measured" for row in nothing)
    assert "2 failed (2 under vLLM's own order, 0 under ours)" in render_failures(
        [PiecePair(stock=empty, ours=run_of(1.0))]
    )
    assert render_comparison(nothing, [PiecePair(stock=empty, ours=run_of(1.0))]).row_count == len(nothing)


def test_the_longest_tenth_is_by_prompt():
    rows = [answered(n, 0.1, prompt=n) for n in range(25)]
    assert [row.prompt_tokens for row in select_longest(rows)] == [24, 23, 22]
    assert select_longest([]) == []
    assert len(select_longest(rows[:1])) == 1


def test_pieces_come_at_the_rate_and_lie_apart():
    pieces = plan_pieces(trace(400), pairs=4, piece_s=10, rate=8.0, seed=3)
    assert [len(piece) for piece in pieces] == [80] * 4
    assert all(mean_rate(piece) == pytest.approx(8.0) for piece in pieces)
    used = [row.prompt_tokens for piece in pieces for row in piece]
    assert len(set(used)) == len(used)


def test_a_short_trace_still_gives_every_pair_its_piece():
    pieces = plan_pieces(trace(30), pairs=5, piece_s=10, rate=2.0, seed=3)
    assert [len(piece) for piece in pieces] == [20] * 5
    assert len(plan_pieces(trace(3), pairs=2, piece_s=100, rate=5.0, seed=0)[0]) == 3


def test_a_trace_of_one_moment_keeps_its_moment():
    burst = [TraceRequest(arrival_s=0.0, prompt_tokens=5, output_tokens=1)] * 10
    (piece,) = plan_pieces(burst, pairs=1, piece_s=2, rate=5.0, seed=0)
    assert [row.arrival_s for row in piece] == [0.0] * 10


async def test_capacity_is_what_the_server_completes(server):
    server.first_token_s = 0.05
    load = Load(endpoint=ServerAddress.parse(server.url), model="mock", prompts=PromptMaker(tuple(range(100)), 0))
    rate = await probe_capacity(trace(400), load, 1.0, concurrency=2)
    # Two at a time, at least 50 ms each.
    assert 0 < rate <= 2 / 0.05 * 1.1
    assert server.most_in_flight == 2
