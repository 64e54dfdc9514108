"""The demo's comparison in virtual time: the measured procedure, without a machine's noise."""

import pytest
from moe_tools.compare_command import ComparisonEffort
from moe_tools.comparison import compare_metrics
from moe_tools.replay_command import Source, read_source
from moe_tools.server import ServedModel
from moe_tools.simulator.simulation import load_vllm
from moe_tools.virtual_comparison import TINY_MODEL_LIMITS, VirtualEngines, model_pairs

SEED = 3
# vLLM is loaded once, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(900)


def model(**effort):
    served = ServedModel(name="", max_tokens=TINY_MODEL_LIMITS.max_model_len)
    requests = read_source(Source(shape="twoEnd", answer_tokens=16, limit=400, seed=SEED), served).requests
    return model_pairs(requests, ComparisonEffort(**effort), SEED, VirtualEngines(), load_vllm())


def ttft(pairs):
    return next(row for row in compare_metrics(pairs) if row.metric == "TTFT, mean")


def test_at_the_knee_short_prompts_do_not_wait_for_long_ones():
    row = ttft(model(pairs=4, piece_s=6.0, load=1.4))
    assert row.ratio.high < 1
    assert row.ratio.count == 4


def test_far_below_the_capacity_every_order_is_alike():
    low, high = ttft(model(pairs=3, piece_s=6.0, load=0.3)), ttft(model(pairs=3, piece_s=6.0, load=1.4))
    assert low.ratio.value > 0.85
    assert low.stock < high.stock / 2


def test_both_policies_serve_the_same_requests_and_all_are_answered():
    for pair in model(pairs=2, piece_s=4.0, rate=8.0):
        assert [row.prompt_tokens for row in pair.stock.answered] == [row.prompt_tokens for row in pair.ours.answered]
        assert len(pair.stock.outcomes) == 32
        assert not pair.stock.failed
        assert all(0 < row.ttft_s <= row.last_token_s == row.end_s <= pair.ours.wall_s for row in pair.ours.answered)


def test_the_same_effort_gives_the_same_figures():
    first, second = (model(pairs=1, piece_s=3.0, load=1.0) for _ in range(2))
    assert first == second
    assert ttft(first).stock != pytest.approx(ttft(model(pairs=1, piece_s=3.0, load=0.5)).stock)
