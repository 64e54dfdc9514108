"""Placements as values: what fits together, what counts as a move, which slots are kept."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.expert.placement import (
    Placement,
    check_experts,
    count_copies,
    count_moves,
    initial_placement,
    keep_slots,
)


def placed(*rows, ranks=2, nodes=1):
    return Placement(physical_to_logical=np.array(rows), ranks=ranks, nodes=nodes)


def test_the_placement_at_the_start_is_that_of_vllm():
    placement = initial_placement(layers=2, experts=4, redundant=2, ranks=3)
    assert placement.physical_to_logical.tolist() == [[0, 1, 2, 3, 0, 1]] * 2
    assert (placement.layers, placement.slots, placement.slots_per_rank) == (2, 6, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"physical_to_logical": np.array([0, 1])}, "must be a table [layer, slot] of whole numbers"),
        ({"physical_to_logical": np.zeros((0, 4), int)}, "must be a table [layer, slot] of whole numbers"),
        ({"physical_to_logical": np.array([[0.5, 1.0]])}, "must be a table [layer, slot] of whole numbers"),
        ({"physical_to_logical": np.array([[0, -1]])}, "must hold experts' numbers, 0 and up"),
        ({"ranks": 0}, "must divide evenly by ranks (0)"),
        ({"ranks": 3}, "the 4 slots of a layer must divide evenly by ranks (3)"),
        ({"nodes": 0}, "ranks (2) must divide evenly by nodes (0)"),
        ({"ranks": 4, "nodes": 3}, "ranks (4) must divide evenly by nodes (3)"),
    ],
)
def test_what_is_no_placement_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Placement(**({"physical_to_logical": np.array([[0, 1, 2, 3]]), "ranks": 2} | fields))


@pytest.mark.parametrize("numbers", [{"layers": 0}, {"experts": 0}, {"redundant": -1}])
def test_a_start_without_layers_or_experts_is_refused(numbers):
    with pytest.raises(ValueError, match="must be at least 1, redundant at least 0"):
        initial_placement(**({"layers": 1, "experts": 4, "redundant": 0, "ranks": 2} | numbers))


@pytest.mark.parametrize(
    ("rows", "experts", "message"),
    [
        ([[0, 1, 2, 3]], 3, "layer 0, slot 3: no expert 3; the load has 3"),
        ([[0, 1, 2, 2]], 4, "layer 0: expert 3 has no slot"),
        ([[0, 1, 2, 3]] * 2, 4, "the placement has 2 layers, the load 1"),
    ],
)
def test_a_placement_that_does_not_fit_the_load_is_refused(rows, experts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_experts(placed(*rows), layers=1, experts=experts)


@pytest.mark.parametrize(
    ("before", "after", "moves"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 0),
        ([0, 1, 2, 3], [1, 0, 3, 2], 0),
        ([0, 1, 2, 3], [2, 1, 0, 3], 2),
        ([0, 1, 2, 0], [0, 1, 2, 1], 1),
        ([0, 1, 0, 1], [0, 0, 1, 1], 0),
    ],
)
def test_a_move_is_an_expert_that_its_rank_did_not_have(before, after, moves):
    assert count_moves(placed(before), placed(after)).tolist() == [moves]


def test_copies_are_counted_by_layer():
    assert count_copies(np.array([[0, 1, 1], [2, 0, 1]]), 3).tolist() == [[1, 2, 0], [1, 1, 1]]


tables = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(
        st.just(shape),
        *(
            st.lists(
                st.lists(st.integers(0, 5), min_size=shape[1] * shape[2], max_size=shape[1] * shape[2]),
                min_size=shape[0],
                max_size=shape[0],
            )
            for _ in range(2)
        ),
    )
)


@given(tables)
def test_what_stays_on_its_rank_stays_in_its_slot(given_tables):
    (layers, ranks, places), old, new = given_tables
    before, after = np.array(old), np.array(new)
    kept = keep_slots(before, after, ranks)
    for layer in range(layers):
        for rank in range(ranks):
            place = slice(rank * places, (rank + 1) * places)
            was, planned, now = (table[layer, place].tolist() for table in (before, after, kept))
            assert sorted(now) == sorted(planned)
            common = sum(min(was.count(expert), planned.count(expert)) for expert in set(was))
            assert sum(a == b for a, b in zip(was, now, strict=True)) == common
