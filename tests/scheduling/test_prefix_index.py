"""Which target holds which beginning of a prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.engine.prefix_index import DEFAULT_BLOCK_BYTES, PrefixIndex, block_keys
from moe_scheduling.signals import Target

A, B = Target("a"), Target("b", 1)


def leading_run(keys, others):
    run = 0
    for key, other in zip(keys, others, strict=False):
        if key != other:
            break
        run += 1
    return run


@pytest.mark.parametrize(("n_bytes", "blocks"), [(0, 0), (511, 0), (512, 1), (1023, 1), (1024, 2), (4096, 8)])
def test_only_full_blocks_have_keys(n_bytes, blocks):
    assert DEFAULT_BLOCK_BYTES == 512
    assert len(block_keys(b"x" * n_bytes)) == blocks


def test_blocks_of_equal_bytes_differ_by_what_is_before_them():
    keys = block_keys(b"abab" * 10, 2)
    assert len(set(keys)) == len(keys) == 20


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(1, 7))
def test_keys_are_shared_exactly_as_far_as_the_full_blocks(left, right, block_bytes):
    blocks = [
        [prompt[at : at + block_bytes] for at in range(0, len(prompt) - block_bytes + 1, block_bytes)]
        for prompt in (left, right)
    ]
    shared = leading_run(block_keys(left, block_bytes), block_keys(right, block_bytes))
    assert shared == leading_run(*blocks)


def test_the_longest_leading_run_of_each_target_is_held():
    index = PrefixIndex()
    index.record((1, 2, 3), A)
    index.record((1, 2, 7, 8), B)
    assert index.held_blocks((1, 2, 3, 4, 5)) == {A: 3, B: 2}
    assert index.held_blocks((1, 2, 7, 8)) == {A: 2, B: 4}
    assert index.held_blocks((9, 2, 3)) == {}
    assert index.held_blocks(()) == {}


def test_a_look_changes_nothing():
    index = PrefixIndex(capacity_blocks=2)
    index.record((1,), A)
    index.record((2,), A)
    index.held_blocks((1,))
    index.record((3,), A)
    assert index.held_blocks((1,)) == {}


def test_what_was_used_last_stays_and_leaves_from_its_end():
    index = PrefixIndex(capacity_blocks=4)
    index.record((1, 2, 3), A)
    index.record((5, 6), A)
    assert index.held_blocks((1, 2, 3)) == {A: 2}
    assert index.held_blocks((5, 6)) == {A: 2}


def test_of_a_prompt_beyond_the_capacity_the_beginning_stays():
    index = PrefixIndex(capacity_blocks=3)
    index.record(tuple(range(100)), A)
    assert index.held_blocks(tuple(range(100))) == {A: 3}


def test_the_capacity_is_that_of_each_target():
    index = PrefixIndex(capacity_blocks=2)
    index.record((1, 2), A)
    index.record((3, 4), B)
    assert index.held_blocks((1, 2)) == {A: 2}


def test_a_forgotten_target_holds_nothing():
    index = PrefixIndex()
    index.record((1, 2), A)
    index.record((1, 2), B)
    index.forget(A)
    index.forget(Target("never seen"))
    assert index.held_blocks((1, 2)) == {B: 2}


def held(index: PrefixIndex, target: Target, keys: range) -> int:
    """Blocks held of a prompt that was sent there."""
    index.record(tuple(keys), target)
    return index.held_blocks(tuple(keys)).get(target, 0)


def test_a_target_with_more_room_is_remembered_for_longer():
    index = PrefixIndex(capacity_blocks=4, spare_blocks=100)
    index.set_room(A, 10)
    index.set_room(B, 3)
    assert held(index, A, range(50)) == 10
    assert held(index, B, range(50)) == 4
    index.set_room(A, 0)
    assert held(index, A, range(50)) == 4


def test_targets_share_what_is_spare_and_get_back_what_others_leave():
    index = PrefixIndex(capacity_blocks=4, spare_blocks=10)
    index.set_room(A, 100)
    assert held(index, A, range(50)) == 14
    index.set_room(B, 100)
    assert index.held_blocks(tuple(range(50))) == {A: 9}
    assert held(index, B, range(50)) == 9
    index.forget(B)
    assert held(index, A, range(50)) == 14


ROOMS = st.lists(
    st.tuples(st.sampled_from([A, B, Target("c")]), st.one_of(st.none(), st.integers(0, 40)), st.integers(0, 60)),
    max_size=20,
)


@given(ROOMS, st.integers(1, 8), st.integers(0, 30))
def test_rooms_keep_the_bound_of_all_and_the_least_of_each(steps, capacity_blocks, spare_blocks):
    index, targets = PrefixIndex(capacity_blocks, spare_blocks), set()
    for target, room, prompt_blocks in steps:
        if room is None:
            index.forget(target)
        else:
            index.set_room(target, room)
        targets.add(target)
        assert held(index, target, range(prompt_blocks)) >= min(prompt_blocks, capacity_blocks)
        counts = index.count_blocks()
        assert sum(counts.values()) <= len(targets) * capacity_blocks + spare_blocks
        assert set(counts) <= targets


@pytest.mark.parametrize("make", [lambda: PrefixIndex(0), lambda: block_keys(b"", 0)])
def test_sizes_below_one_are_refused(make):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        make()


PROMPTS = st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=8), st.sampled_from([A, B])), max_size=30)


@given(PROMPTS, st.integers(1, 12))
def test_what_is_held_is_the_run_that_a_plain_walk_finds(prompts, capacity_blocks):
    index = PrefixIndex(capacity_blocks)
    recent = {A: [], B: []}
    for path, target in prompts:
        keys = tuple(tuple(path[: end + 1]) for end in range(len(path)))
        index.record(keys, target)
        recent[target] = [key for key in recent[target] if key not in keys] + list(reversed(keys))
        recent[target] = recent[target][-capacity_blocks:]
    for path, _ in prompts:
        keys = tuple(tuple(path[: end + 1]) for end in range(len(path)))
        walked = {target: leading_run(keys, [key for key in keys if key in held]) for target, held in recent.items()}
        assert index.held_blocks(keys) == {target: run for target, run in walked.items() if run}


def test_blocks_of_a_request_that_computed_nothing_are_held_no_more():
    index = PrefixIndex()
    index.record((1, 2), A)
    uncomputed = index.record((1, 2, 3, 4), A, request=7)
    assert (tuple(uncomputed), index.held_blocks((1, 2, 3, 4))) == ((3, 4), {A: 4})
    index.discard(uncomputed, A, 7)
    assert index.held_blocks((1, 2, 3, 4)) == {A: 2}


def test_blocks_that_another_request_computes_stay():
    index = PrefixIndex()
    first = index.record((1, 2), A, request=1)
    second = index.record((1, 2, 3), A, request=2)
    index.discard(first, A, 1)
    assert index.held_blocks((1, 2, 3)) == {A: 3}
    index.confirm(second, A)
    index.discard(second, A, 2)
    assert index.held_blocks((1, 2, 3)) == {A: 3}


def test_a_confirmed_block_is_nobodys_to_discard():
    index = PrefixIndex()
    first, second = index.record((1, 2), A, request=1), index.record((1, 2), A, request=2)
    index.confirm(first, A)
    index.discard(second, A, 2)
    assert index.held_blocks((1, 2)) == {A: 2}
    index.forget(A)
    index.confirm(first, A)
    index.discard(second, A, 2)
    assert index.held_blocks((1, 2)) == {}


REQUESTS = st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.booleans()), max_size=12)


@given(REQUESTS)
def test_after_all_have_ended_only_what_was_computed_is_held(requests):
    index, computed = PrefixIndex(), set()
    paths = [tuple(hash(tuple(blocks[: end + 1])) for end in range(len(blocks))) for blocks, _ in requests]
    sent = [index.record(keys, A, request=number) for number, keys in enumerate(paths, 1)]
    for number, (keys, uncomputed, (_, succeeds)) in enumerate(zip(paths, sent, requests, strict=True), 1):
        if succeeds:
            index.confirm(uncomputed, A)
            computed.update(keys)
        else:
            index.discard(uncomputed, A, number)
    for keys in paths:
        held = index.held_blocks(keys).get(A, 0)
        assert set(keys[:held]) <= computed
        assert held == next((at for at, key in enumerate(keys) if key not in computed), len(keys))
