"""The order of a measurement, its load, the knee, and the report."""

import json
import math
import os
from typing import Any

import pytest
from aiohttp import web
from moe_lab.gateway.comparison import read_machine
from moe_lab.serving import measurement
from moe_lab.serving.knee import NoKnee, find_knee
from moe_lab.serving.measurement import Side, measure
from moe_lab.serving.report import build_document, describe, describe_goal, describe_slowdown, render
from moe_tools.compare_command import ComparisonEffort
from moe_tools.comparison import compare_metrics
from moe_tools.replay_command import Source
from rich.console import Console

from tests.lab.serving.stand_ins import (
    SIDES,
    measured_of,
)


async def test_requests_go_to_the_side_whose_turn_it_is_and_both_are_watched(server, monkeypatch):
    spent_s = {1: 0.0, 2: 0.0}

    def spend(processes) -> float:
        """At each look a process has taken as many seconds more as its number."""
        spent_s[processes[0]] += processes[0]
        return spent_s[processes[0]]

    monkeypatch.setattr(measurement, "read_cpu_s", spend)
    monkeypatch.setattr(measurement, "suspend", lambda processes: switched.append(f"-{processes[0]}"))
    monkeypatch.setattr(measurement, "resume", lambda processes: switched.append(f"+{processes[0]}"))
    switched: list[str] = []
    stock = Side(policy=SIDES.stock, url=server.url, processes=(1,))
    ours = Side(policy=SIDES.ours, url="http://127.0.0.1:9", processes=(2,))
    said: list[str] = []
    effort = ComparisonEffort(pairs=2, piece_s=0.1, rate=40.0)
    found = await measure(stock, ours, server.url, Source(limit=40), effort, said.append)
    assert all(len(pair.stock.failed) == 0 and len(pair.ours.answered) == 0 for pair in found.pairs)
    assert [row.label for row in found.work] == ["stock", "ours", "ours", "stock"]
    assert [(row.busy_cpu_s, row.idle_cpu_s) for row in found.work] == [(1, 2), (2, 1), (2, 1), (1, 2)]
    assert found.idle_cores == pytest.approx(6 / sum(row.wall_s for row in found.work))
    stock_works, ours_works = ["-2", "+1"], ["-1", "+2"]
    warm = [*stock_works, *ours_works]
    assert switched == [*warm, *stock_works, *ours_works, *ours_works, *stock_works, "+1", "+2"]
    assert (found.capacities, found.rate) == (None, 40.0)
    assert sum(line.startswith("warming up") for line in said) == 2


async def test_the_load_follows_from_the_capacity_of_stock(server):
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]
    effort = ComparisonEffort(pairs=1, piece_s=0.2, load=0.5)
    server.first_token_s = 0.02
    found = await measure(*sides, server.url, Source(limit=200), effort, lambda _: None)
    assert found.rate == pytest.approx(found.capacities[0] * 0.5)
    assert found.capacities[1] > 0


@pytest.mark.parametrize(
    ("slowdown", "share"),
    [
        # That of a queue with one server at 80, 100 and 120 % of the capacity.
        (lambda load: 5.0 if load < 0.8 else 5.1, 0.8),
        (lambda load: 1.0 / max(1e-9, 1.25 - load), 1.05),
        (lambda load: math.exp(load / 1.2 * math.log(5.0)), 1.2),
        # Far from the capacity.
        (lambda load: 15.0 * load, 1 / 3),
        (lambda load: 2.0 * load, 2.5),
    ],
)
async def test_the_knee_is_found_within_five_percent(slowdown, share):
    async def slowdown_at(rate: float) -> float:
        return slowdown(rate / 30.0)

    assert await find_knee(slowdown_at, 30.0) == pytest.approx(30.0 * share, rel=0.05)


@pytest.mark.parametrize(("slowdown", "at"), [(1.0, r"99\.65"), (100.0, r"9\.03")])
async def test_a_knee_that_is_nowhere_near_is_not_made_up(slowdown, at):
    async def slowdown_at(_: float) -> float:
        return slowdown

    with pytest.raises(NoKnee, match=f"at {at} requests/s the mean TTFT is {slowdown} times"):
        await find_knee(slowdown_at, 30.0)


async def test_the_load_follows_from_the_knee_of_stock(server, monkeypatch):
    async def find(slowdown_at: Any, capacity: float) -> float:
        assert await slowdown_at(capacity) > 0
        return 2.0 * capacity

    monkeypatch.setattr(measurement, "find_knee", find)
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]
    effort = ComparisonEffort(pairs=1, piece_s=0.5, load=0.5, of_knee=True)
    server.first_token_s = 0.02
    said: list[str] = []
    found = await measure(*sides, server.url, Source(limit=400), effort, said.append)
    assert 0.02 <= found.alone_s < 1.0
    assert found.rate == pytest.approx(found.capacities[0])
    assert any(line.startswith("arrivals at 50% of stock's knee: ") for line in said)
    assert [row.label for row in found.work] == ["stock", "ours"]
    assert "mean TTFT over that of requests alone under A" in describe_slowdown(found)[0]
    prompts = [tuple(body["prompt"][:16]) for body in server.asked]
    pairs = 2 * len(found.pairs[0].stock.outcomes)
    assert not set(prompts[:-pairs]) & set(prompts[-pairs:])


async def test_no_knee_is_named_where_requests_fail(server):
    sides = [Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours)]

    async def refuse(*_):
        return web.Response(status=503)

    server.misbehave = refuse
    with pytest.raises(NoKnee, match="no knee can be found: HTTP 503"):
        await measure(*sides, server.url, Source(limit=40), ComparisonEffort(piece_s=0.1, of_knee=True), lambda _: None)


async def test_no_prompt_is_sent_twice_by_what_is_measured_and_what_is_not(server):
    stock, ours = (Side(policy=policy, url=server.url, processes=()) for policy in (SIDES.stock, SIDES.ours))
    await measure(
        stock, ours, server.url, Source(limit=40), ComparisonEffort(pairs=2, piece_s=0.1, rate=40.0), lambda _: None
    )
    prompts = [tuple(body["prompt"][:16]) for body in server.asked]
    warm = len(prompts) - 4 * 4
    assert len(set(prompts[warm:])) == 16
    assert not set(prompts[:warm]) & set(prompts[warm:])


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(1.0, 0.5), (1.0, 0.51), (1.0, 0.49)], "is reached: 0.50 [0.4"),
        ([(1.0, 0.8), (1.0, 0.81), (1.0, 0.79)], "is not reached: 0.80"),
        ([(1.0, 0.1), (1.0, 2.0)], "is not reached: 0.45 [0.00"),
    ],
)
def test_the_goal_is_reached_by_value_and_interval(pairs, says):
    assert says in describe_goal(compare_metrics(measured_of(*pairs).pairs))


def test_a_goal_that_was_not_measured_is_reported():
    assert "was not measured" in describe_goal(compare_metrics(()))


def test_table_lines_and_json_have_sides_versions_and_what_disturbs():
    measured = measured_of((1.0, 0.5), (1.0, 0.6), idle_s=2.0)
    machine = read_machine("9.9.9", "cache_aware") | {"load_average": 99.0}
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 - closed with the console
    with console.file:
        console.print(render(measured, SIDES, machine))
    text = " ".join(console.export_text().split())
    for part in ("A: stock. B: ours.", "TTFT, mean", "vllm-router 9.9.9", "0 under stock vLLM", "Arrivals: 2.00"):
        assert part in text
    lines = describe(measured, machine)
    assert "took 0.200 cores" in lines[1]
    assert len(lines) == 4
    document = build_document(measured, SIDES, Source(), ComparisonEffort(), machine, {"vllm-router": ("a", "b")})
    read = json.loads(json.dumps(document, default=str))
    assert read["policies"]["ours"]["label"] == "ours"
    assert len(read["pairs"]) == 2
    assert read["environment"]["vllm_router"] == "9.9.9"


def test_a_quiet_machine_warns_of_nothing():
    assert len(describe(measured_of((1.0, 0.5)), read_machine("0", "random") | {"load_average": 0.0})) == 2
