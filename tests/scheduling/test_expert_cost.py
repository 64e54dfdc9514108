"""What a placement costs, by hand."""

import re

import numpy as np
import pytest
from moe_scheduling.expert.cost import (
    ExpertCosts,
    ExpertLoad,
    link_costs,
    score_placement,
    traffic_costs,
)
from moe_scheduling.expert.placement import Placement


def placed(*rows, ranks=2, nodes=1):
    return Placement(physical_to_logical=np.array(rows), ranks=ranks, nodes=nodes)


def test_the_busiest_rank_of_each_layer_counts():
    load = ExpertLoad(tokens=[[[6, 2, 1, 1], [1, 1, 1, 1]]])
    terms, balance = score_placement(load, placed([0, 1, 2, 3], [0, 1, 2, 3]), ExpertCosts(token_s=0.5))
    assert (terms.load_s, terms.balanced_s, terms.total_s) == (5.0, 3.5, 5.0)
    assert balance.by_layer.tolist() == [1.6, 1.0]
    assert balance.mean == pytest.approx((1.6 * 10 + 1.0 * 4) / 14)
    assert (balance.worst, balance.by_rank.tolist()) == (1.6, pytest.approx([10 / 7, 4 / 7]))


def test_copies_share_alike():
    load = ExpertLoad(tokens=[[[6, 2, 1]]])
    terms, _ = score_placement(load, placed([0, 1, 0, 2]), ExpertCosts(token_s=1.0))
    assert terms.load_s == 5.0


def test_traffic_goes_there_and_back_on_links_side_by_side():
    load = ExpertLoad(tokens=[[[6, 2]], [[1, 3]], [[0, 0]], [[0, 4]]])
    placement = placed([0, 0, 1, 0], ranks=4, nodes=2)
    costs = ExpertCosts(token_s=0.0, remote_token_s=1.0, internode_token_s=10.0)
    terms, balance = score_placement(load, placement, costs)
    # Expert 0 lies on ranks 0, 1 and 3, a third of its tokens each; expert 1 on rank 2.
    remote = 6 / 3 + 1 / 3 + 4
    internode = 6 / 3 + 2 + 1 / 3 + 3
    assert terms.traffic_s == pytest.approx(2 * (remote + 10 * internode) / 4)
    assert balance.remote_fraction == pytest.approx((remote + internode) / 16)
    assert balance.internode_fraction == pytest.approx(internode / 16)


def test_the_traffic_of_the_parts_sums_to_the_traffic():
    generator = np.random.default_rng(3)
    load = ExpertLoad(tokens=generator.random((2, 3, 6)))
    table = np.array([generator.permutation(6) for _ in range(3)])
    placement = Placement(physical_to_logical=np.hstack([table, table[:, :2]]), ranks=4, nodes=2)
    costs = ExpertCosts(token_s=0.0, remote_token_s=1.0, internode_token_s=3.0)
    traffic = traffic_costs(load, link_costs(load, placement, costs))
    copies = np.array([np.bincount(row, minlength=6) for row in placement.physical_to_logical])
    total = sum(
        traffic[layer, expert, slot // 2] / copies[layer, expert]
        for layer, row in enumerate(placement.physical_to_logical)
        for slot, expert in enumerate(row)
    )
    assert total == pytest.approx(score_placement(load, placement, costs)[0].traffic_s, rel=1e-5)


def test_a_source_of_several_ranks_reaches_all_of_them_at_no_cost():
    load = ExpertLoad(tokens=[[[4, 4, 0, 0]], [[0, 0, 2, 2]]])
    costs = ExpertCosts(token_s=0.0, remote_token_s=1.0)
    assert score_placement(load, placed([0, 1, 2, 3], ranks=4), costs)[0].traffic_s == 0.0
    assert score_placement(load, placed([2, 3, 0, 1], ranks=4), costs)[1].remote_fraction == 1.0


def test_a_source_on_several_nodes_is_on_each_of_them():
    load = ExpertLoad(tokens=[[[1, 1, 1, 1]], [[1, 1, 1, 1]]])
    _, balance = score_placement(load, placed([0, 1, 2, 3], ranks=4, nodes=4), ExpertCosts(token_s=1.0))
    assert (balance.remote_fraction, balance.internode_fraction) == (0.5, 0.5)


def test_a_single_source_says_nothing_of_traffic():
    load = ExpertLoad(tokens=[[[4, 4]]])
    costs = ExpertCosts(token_s=1.0, remote_token_s=1.0, internode_token_s=1.0)
    terms, balance = score_placement(load, placed([0, 1], nodes=2), costs)
    assert (terms.traffic_s, balance.remote_fraction, balance.internode_fraction) == (0.0, 0.0, 0.0)


def test_an_idle_group_is_balanced():
    load = ExpertLoad(tokens=np.zeros((2, 1, 2)))
    terms, balance = score_placement(load, placed([0, 1]), ExpertCosts(token_s=1.0, remote_token_s=1.0))
    assert (terms.total_s, balance.mean, balance.worst, balance.remote_fraction) == (0.0, 1.0, 1.0, 0.0)
    assert balance.by_rank.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": [[1.0]]}, "tokens must have 3 dimensions and not be empty"),
        ({"tokens": np.zeros((1, 0, 2))}, "tokens must have 3 dimensions and not be empty"),
        ({"tokens": [[[1.0, np.nan]]]}, "tokens must be finite"),
        ({"tokens": [[[1.0, -1.0]]]}, "tokens must not be negative"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_a_load_that_is_none_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ExpertLoad(**({"tokens": [[[1.0, 2.0]]]} | fields))


@pytest.mark.parametrize("name", ["token_s", "remote_token_s", "internode_token_s", "move_s"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_a_cost_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 0 and finite"):
        ExpertCosts(**({"token_s": 1.0} | {name: value}))


def test_a_horizon_is_at_least_a_step():
    with pytest.raises(ValueError, match="horizon_steps must be at least 1"):
        ExpertCosts(token_s=1.0, horizon_steps=0)


def test_sources_that_do_not_divide_the_ranks_are_refused():
    with pytest.raises(ValueError, match="3 sources do not divide 2 ranks evenly"):
        score_placement(ExpertLoad(tokens=np.ones((3, 1, 2))), placed([0, 1]), ExpertCosts(token_s=1.0))
