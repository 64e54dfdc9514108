"""The comparison of expert placements: rivals are what they are said to be, loads and replays add up."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from moe_contract.input_errors import InvalidInput
from moe_lab.experts.__main__ import app
from moe_lab.experts.compare import COSTS
from moe_lab.experts.loads import DRIFTS, GroupSizes, PairedLoad, make_sequence, make_tenants, read_sequence
from moe_lab.experts.replay import render_decided, render_replayed, replay
from moe_lab.experts.rivals import copy_hottest, make_policies, pack_evenly, plan_anchor
from moe_scheduling.expert.decision import ExpertLoad, ExpertSettings, count_moves, score_placement
from typer.testing import CliRunner

GROUP = GroupSizes(layers=3, experts=32, ranks=4, nodes=2, redundant=8, routing_groups=4)
SETTINGS = ExpertSettings()


@pytest.fixture
def load():
    return make_tenants(GROUP, exponent=1.0, tenants=2, seed=1)


@pytest.mark.parametrize("name", list(make_policies(GROUP, COSTS, SETTINGS)))
def test_every_policy_gives_each_expert_a_slot(name, load):
    after = make_policies(GROUP, COSTS, SETTINGS)[name](load, GROUP.start)
    assert after.physical_to_logical.shape == (3, 40)
    for row in after.physical_to_logical:
        assert set(row) == set(range(32))


@pytest.mark.parametrize(("groups", "name"), [(4, "DeepSeek, by node"), (1, "DeepSeek, global")])
def test_deepseeks_algorithm_balances_as_vllms_which_comes_from_it(groups, name):
    """Two writings of one description: other ties, the same loads."""
    group = replace(GROUP, routing_groups=groups)
    for seed in range(5):
        load = make_tenants(group, exponent=1.0, tenants=1, seed=seed)
        # vLLM counts in single precision, in which equal shares may differ.
        load = ExpertLoad(tokens=np.round(load.tokens))
        policies = make_policies(group, COSTS, SETTINGS)
        ours, theirs = (score_placement(load, policies[key](load, group.start), COSTS)[1] for key in (name, "vLLM"))
        assert ours.by_layer == pytest.approx(theirs.by_layer, rel=0.02)


def test_groups_of_experts_stay_on_one_node(load):
    table = make_policies(GROUP, COSTS, SETTINGS)["DeepSeek, by node"](load, GROUP.start).physical_to_logical
    for row in table:
        nodes = [{expert // 8 for expert in row[start : start + 20]} for start in (0, 20)]
        assert not nodes[0] & nodes[1]


def test_packing_puts_the_heaviest_first_into_the_lightest_pack_with_room():
    assert pack_evenly([5, 4, 3, 3, 2, 1], 3) == [[0, 5], [1, 4], [2, 3]]
    assert pack_evenly([9, 1, 1, 1], 2) == [[0, 3], [1, 2]]


def test_copies_go_to_the_largest_share():
    assert Counter(copy_hottest([8, 3, 1], 6)) == {0: 3, 1: 2, 2: 1}
    assert copy_hottest([1, 1], 2) == [0, 1]


def test_the_anchor_holds_what_is_most_linked():
    pairs = np.ones((2, 32, 32))
    pairs[:, [3, 9], [5, 6]] = 100.0
    load = PairedLoad(tokens=np.ones((1, 3, 32)), pairs=pairs)
    table = plan_anchor(load, GROUP.start).physical_to_logical
    for row in table[:2]:
        assert {3, 9} <= set(row[:10])


def test_a_sequence_is_that_of_its_seed():
    for name in DRIFTS:
        first, second = (list(make_sequence(name, GROUP, rounds=4, seed=3)) for _ in range(2))
        assert len(first) == 4
        for one, other in zip(first, second, strict=True):
            assert (one.tokens == other.tokens).all()
            assert one.tokens.sum() == pytest.approx(3 * 32768)


@pytest.mark.parametrize("name", list(DRIFTS))
def test_ours_is_never_worse_than_moving_nothing_by_more_than_a_hundredth(name):
    """The closed loop: decisions see windows with noise, and pay for their moves."""
    costs = replace(COSTS, move_s=5e-2)
    loads = make_sequence(name, GROUP, rounds=30, seed=0)
    rows, decided = replay(name, loads, GROUP, costs, SETTINGS, seed=0)
    times = {row.policy: row.total_s for row in rows}
    assert times["ours"] <= times["static"] * 1.01
    assert len(decided) == 29
    assert {row.policy for row in rows} == set(make_policies(GROUP, COSTS, SETTINGS))
    assert sum(rows[0].moves) == 0


def test_a_rounds_time_has_its_moves_in_it(load):
    rows, decided = replay("still", [load] * 3, GROUP, COSTS, SETTINGS, seed=0, noise=False)
    ours = next(row for row in rows if row.policy == "ours")
    after = score_placement(load, GROUP.start, COSTS)[0].total_s - decided[0].measured_s
    assert ours.times_s[1] == pytest.approx(after * COSTS.horizon_steps + ours.moves[1] * COSTS.move_s)
    assert decided[0].predicted_s == pytest.approx(decided[0].measured_s)
    assert decided[0].outcome == "move"
    assert render_replayed(rows).row_count == 2
    assert render_decided(decided).row_count == sum(row.moves > 0 for row in decided)


def test_a_recorded_sequence_is_replayed(tmp_path, load):
    path = tmp_path / "recorded.npz"
    np.savez(path, load=np.stack([load.tokens, load.tokens * 2]))
    assert [row.tokens.sum() for row in read_sequence(path)] == pytest.approx([98304, 196608])
    assert [row.pairs for row in read_sequence(path)] == [None, None]
    np.savez(path, load=np.stack([load.tokens, load.tokens * 2]), pairs=np.stack([load.pairs, load.pairs * 2]))
    assert [row.pairs.sum() for row in read_sequence(path)] == pytest.approx([load.pairs.sum(), 2 * load.pairs.sum()])
    options = ["replay", "--recorded", str(path), "--ranks", "4", "--nodes", "2", "--redundant", "8", "--decisions"]
    result = CliRunner().invoke(app, [*options, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "worst case" in result.output
    assert "recorded" in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "3"], "--ranks: 4 sources do not divide 3 ranks evenly"),
        (["--ranks", "4", "--redundant", "1"], "--redundant: the 33 slots"),
    ],
)
def test_a_group_that_a_recording_does_not_fit_is_refused(tmp_path, load, options, message):
    path = tmp_path / "recorded.npz"
    np.savez(path, load=np.stack([load.tokens] * 2))
    result = CliRunner().invoke(app, ["replay", "--recorded", str(path), *options])
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize(
    "arrays",
    [
        {"load": np.array(5.0)},
        {"load": np.ones((2, 3))},
        {"load": np.ones((1, 1, 1, 4))},
        {"load": np.full((2, 1, 1, 4), -1.0)},
        {"load": np.ones((2, 1, 2, 4)), "pairs": np.array(5.0)},
        {"load": np.ones((2, 1, 2, 4)), "pairs": np.ones((1, 1, 4, 4))},
        {"pairs": np.ones((2, 1, 4, 4))},
    ],
)
def test_what_is_no_recording_is_refused(tmp_path, arrays):
    path = tmp_path / "recorded.npz"
    np.savez(path, **arrays)
    with pytest.raises(InvalidInput, match="no recorded sequence of loads"):
        read_sequence(path)


def test_ours_moves_a_part_of_what_vllm_moves(load):
    policies = make_policies(GROUP, COSTS, SETTINGS)
    ours, theirs = (count_moves(GROUP.start, policies[name](load, GROUP.start)).sum() for name in ("ours", "vLLM"))
    assert 0 < ours < theirs * 3 / 4
