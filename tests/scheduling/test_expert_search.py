"""The path of the search: what it says of each state is what a placement in that state is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.expert.copies import wanted_copies
from moe_scheduling.expert.placement import Placement, count_copies, count_moves
from moe_scheduling.expert.search import Path, SearchInput, apply_steps, search_steps


@st.composite
def problems(draw):
    """Loads, traffic or none, and a placement with copies anywhere."""
    ranks, places, layers = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, ranks * places))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spare = ranks * places - experts
    rows = [np.concatenate([np.arange(experts), generator.integers(0, experts, spare)]) for _ in range(layers)]
    table = np.array([generator.permutation(row) for row in rows])
    work = generator.pareto(draw(st.sampled_from([0.5, 1.5])), (layers, experts)) * draw(st.sampled_from([0.0, 1.0]))
    traffic = generator.random((layers, experts, ranks)).astype(np.float32) if draw(st.booleans()) else None
    inputs = SearchInput(work_s=work, traffic_s=traffic, move_price_s=0.01, max_moves=draw(st.integers(0, 20)))
    return inputs, Placement(physical_to_logical=table, ranks=ranks)


def cost(inputs: SearchInput, table: np.ndarray, ranks: int) -> np.ndarray:
    """[layer]: the busiest rank and the traffic."""
    layers, experts = inputs.work_s.shape
    copies = count_copies(table, experts)
    rank, layer = np.arange(table.shape[1]) // (table.shape[1] // ranks), np.arange(layers)[:, None]
    load = (inputs.work_s / copies)[layer, table].reshape(layers, ranks, -1).sum(2).max(1)
    traffic = (
        np.zeros(layers) if inputs.traffic_s is None else (inputs.traffic_s[layer, table, rank] / copies[layer, table])
    )
    return load + traffic.reshape(layers, -1).sum(1)


def states(path: Path):
    count, layers = path.moves.shape
    return [np.full(layers, number) for number in range(count)]


@given(problems())
def test_each_state_of_the_path_wins_and_moves_what_it_says(given_input):
    inputs, placement = given_input
    path, start = search_steps(inputs, placement), placement.physical_to_logical
    before = cost(inputs, start, placement.ranks)
    for number, state in enumerate(states(path)):
        table = apply_steps(path, start, state)
        won = before - cost(inputs, table, placement.ranks)
        assert won == pytest.approx(path.gain_s[number], rel=1e-3, abs=1e-4 * (1 + before.max()))
        after = Placement(physical_to_logical=table, ranks=placement.ranks)
        assert count_moves(placement, after).tolist() == path.moves[number].tolist()
        assert (count_copies(table, inputs.work_s.shape[1]) > 0).all()


@given(problems())
def test_the_search_leaves_what_it_was_given_as_it_was(given_input):
    inputs, placement = given_input
    table, work = placement.physical_to_logical.copy(), inputs.work_s.copy()
    search_steps(inputs, placement)
    assert (placement.physical_to_logical == table).all()
    assert (inputs.work_s == work).all()


@given(problems(), st.integers(0, 2**32 - 1))
def test_a_layer_is_searched_as_if_it_were_alone(given_input, seed):
    inputs, placement = given_input
    order = np.random.default_rng(seed).permutation(placement.layers)
    for layer in order[:1]:
        traffic = None if inputs.traffic_s is None else inputs.traffic_s[[layer]]
        alone = SearchInput(
            work_s=inputs.work_s[[layer]], traffic_s=traffic, move_price_s=0.01, max_moves=inputs.max_moves
        )
        table = placement.physical_to_logical
        one = search_steps(alone, Placement(physical_to_logical=table[[layer]], ranks=placement.ranks))
        every = search_steps(inputs, placement)
        end = apply_steps(every, table, np.full(placement.layers, len(every.moves)))[layer]
        assert (apply_steps(one, table[[layer]], np.array([len(one.moves)]))[0] == end).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 16), st.integers(1, 6), st.integers(0, 12))
def test_no_more_copies_are_wanted_than_there_is_room_for(seed, ranks, places, spare):
    spare = min(spare, ranks * places - 1)
    work = np.random.default_rng(seed).pareto(0.7, (3, ranks * places - spare)).astype(np.float32)
    wanted = wanted_copies(work, spare, ranks, places)
    assert wanted.min() >= 1
    assert (wanted - 1).sum(1).max() <= spare


@given(st.integers(0, 2**32 - 1), st.integers(2, 16), st.integers(1, 6), st.integers(0, 12), st.integers(0, 12))
def test_copies_beyond_the_cheap_ones_are_only_of_what_fills_a_rank(seed, ranks, places, spare, cheap):
    spare = min(spare, ranks * places - 1)
    work = np.random.default_rng(seed).pareto(0.7, (3, ranks * places - spare)).astype(np.float32)
    wanted = wanted_copies(work, spare, ranks, places, cheap=cheap)
    assert (wanted <= wanted_copies(work, spare, ranks, places)).all()
    assert (wanted - 1).sum(1).max() <= spare
    many = (wanted - 1).sum(1) > cheap
    fewer = np.maximum(wanted - 1, 1)[many]
    filling = 0.8 * work.sum(1)[many, None] / ranks
    # One copy less of what has some is a share that fills most of a rank.
    assert ((wanted[many] == 1) | (work[many] / fewer > filling * 0.999)).all()
