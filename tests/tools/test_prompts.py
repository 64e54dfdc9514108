"""Prompts have the trace's lengths and share what the trace shares, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st
from moe_tools.prompts import PromptMaker
from moe_tools.traces import TraceRequest

POOL = tuple(range(5000))


def request(prompt: int, *blocks: int, block_tokens: int = 512) -> TraceRequest:
    return TraceRequest(arrival_s=0, prompt_tokens=prompt, output_tokens=1, blocks=blocks, block_tokens=block_tokens)


def shared_start(one: list[int], other: list[int]) -> int:
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


@given(st.integers(1, 12_000), st.lists(st.integers(0, 2**63), max_size=4), st.integers(1, 600), st.integers(0, 2**40))
def test_lengths_are_exact_whatever_the_blocks(prompt, blocks, block_tokens, salt):
    wanted = request(prompt, *blocks, block_tokens=block_tokens)
    built = PromptMaker(POOL, salt).build(3, wanted)
    assert len(built) == prompt
    assert set(built) <= set(POOL)
    assert built == PromptMaker(POOL, salt).build(3, wanted)


@given(st.integers(1, 40))
def test_a_pool_shorter_than_the_prompt_is_enough(size):
    assert len(PromptMaker(POOL[:size], 0).build(0, request(700))) == 700


def test_equal_blocks_give_equal_text_and_the_next_block_differs():
    maker = PromptMaker(POOL, 1)
    one, other = maker.build(0, request(1200, 7, 8, 9)), maker.build(1, request(1500, 7, 8, 10))
    assert shared_start(one, other) >= 1024
    assert one[1024:1040] != other[1024:1040]


def test_requests_without_blocks_share_not_even_a_cache_block():
    maker = PromptMaker(POOL, 1)
    prompts = [maker.build(index, request(100)) for index in range(200)]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 200


def test_another_salt_shares_nothing():
    wanted = request(600, 7, 8)
    assert PromptMaker(POOL, 1).build(0, wanted)[:16] != PromptMaker(POOL, 2).build(0, wanted)[:16]


def test_a_block_is_never_the_text_of_a_request_of_that_number():
    maker = PromptMaker(POOL, 1)
    assert maker.build(7, request(100))[:16] != maker.build(0, request(100, 7))[:16]
