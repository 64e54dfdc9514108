"""How the experts of an engine look in a terminal."""

from io import StringIO
from typing import Any

import numpy as np
import pytest
from experts_documents import decided, experts, in_brief
from moe_contract.experts_state import ExpertsState
from moe_operator.experts.heat import MAX_NUMBERED_RANKS, render_experts, render_heat, shade
from moe_operator.experts.load import find_hottest, over_mean, read_costs, read_load, read_placement
from rich.console import Console


def read(document: dict[str, Any]) -> ExpertsState:
    return ExpertsState.model_validate(document)


def shown(document: dict[str, Any]) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(render_experts("e0", read(document)))
    return console.export_text()


def test_few_ranks_are_numbers_and_many_are_shades() -> None:
    few = render_heat(np.array([[1.0, 2.0], [0.5, 1.5]])).plain.splitlines()
    assert few == ["layer      0     1", "    0   1.00  2.00", "    1   0.50  1.50"]
    many = render_heat(np.full((2, MAX_NUMBERED_RANKS + 1), 1.0)).plain.splitlines()
    assert many[1:] == ["    0 " + "▒" * (MAX_NUMBERED_RANKS + 1), "    1 " + "▒" * (MAX_NUMBERED_RANKS + 1)]
    assert "· below 0.8, ░ from 0.8, ▒ from 0.95, ▓ from 1.05, █ from 1.2" in many[0]


@pytest.mark.parametrize(("value", "place"), [(0.0, 0), (0.8, 1), (0.95, 2), (1.0, 2), (1.05, 3), (1.2, 4), (9.0, 4)])
def test_a_shade_rises_with_the_load(value: float, place: int) -> None:
    assert shade(value) == place


def test_a_map_of_a_large_model_has_a_line_for_each_layer_and_fits_a_terminal() -> None:
    lines = render_heat(np.random.default_rng(0).uniform(0, 2, (61, 64))).plain.splitlines()
    assert len(lines) == 62
    assert max(map(len, lines[1:])) <= 80


def test_what_was_not_recorded_is_said_and_no_map_is_shown() -> None:
    assert "no load recorded yet: that takes `scheduling.expert.window` steps" in shown(experts(load={"steps": 0}))
    assert "no decision yet" in shown(experts())
    assert "the agent gives no load by expert" in shown(in_brief(experts()))


def test_problems_and_measured_gains_are_shown() -> None:
    said = shown(decided("moved", measured_gain_s=0.0021) | {"problems": [{"kind": "slow_move", "message": "0.3 s"}]})
    assert "slow_move: 0.3 s" in said
    assert "2.1 ms measured" in said
    assert "400 us predicted" in shown(decided("dryRun"))


def test_a_reason_with_marks_of_a_terminal_library_stays_text() -> None:
    assert "[red]x" in shown(decided("stayed", reason="[red]x"))


def test_a_row_without_tokens_is_even() -> None:
    assert over_mean(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[1.0, 1.0], [0.5, 1.5]]


def test_the_hottest_are_above_their_layers_mean_and_have_all_their_ranks() -> None:
    document = read(experts(placement={"version": 1, "physical_to_logical": [[0, 1, 2, 0, 2, 3]] * 2}))
    load, placement = read_load(document), read_placement(document.placement.physical_to_logical, document)
    assert load is not None
    assert placement is not None
    hottest = find_hottest(load, placement, 5)
    assert [(row.layer, row.expert, row.ranks) for row in hottest] == [(0, 0, (0, 1)), (0, 1, (0,))]
    assert hottest[0].ratio == 2.0


@pytest.mark.parametrize(
    "changes",
    [
        {"load": {"steps": 0, "tokens": [[[1.0] * 4] * 2] * 2}},
        {"load": {"steps": 9, "tokens": [[[1.0] * 3] * 2] * 2}},
        {"load": {"steps": 9, "tokens": [[[-1.0] * 4] * 2] * 2}},
        {"load": {"steps": 9, "tokens": [[[1.0] * 4] * 2, [[1.0] * 4]]}},
        {"load": {"steps": 9, "tokens": [[[1.0] * 4] * 2] * 3}},
        {"load": {"steps": 9}},
    ],
)
def test_a_load_that_does_not_fit_the_group_is_none(changes: dict[str, Any]) -> None:
    assert read_load(read(experts(**changes))) is None


def test_a_window_that_has_lost_some_of_its_steps_is_a_load_too() -> None:
    document = experts()
    load = read_load(read(document | {"load": {**document["load"], "steps": 632.1}}))
    assert load is not None
    assert load.steps == 632


@pytest.mark.parametrize("costs", [None, {}, {"token_s": 0.0}, {"token_s": None}, {"token_s": 1e-6, "move_s": -1.0}])
def test_costs_that_were_not_measured_are_none(costs: Any) -> None:
    assert read_costs(read(experts(costs=costs)), 3000) is None


def test_costs_are_those_of_the_engine_over_the_time_to_its_next_decision() -> None:
    costs = read_costs(read(experts(costs={"token_s": 1e-6, "move_s": 0.001, "horizon_steps": 7, "new": 1.0})), 500)
    assert costs is not None
    assert (costs.token_s, costs.move_s, costs.horizon_steps) == (1e-6, 0.001, 500)
