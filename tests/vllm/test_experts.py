"""A real expert group of two data-parallel ranks on the CPU: experts move under load and no answer changes.

One group serves the whole file, in float32; the tests build on each other. What it answers is compared with a plain
engine, which has all experts and never moves any.
"""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_tools.tiny import TinySettings, ensure_tiny_model

LAYERS, EXPERTS, TOP_K, REDUNDANT = 4, 16, 2, 2
MIGRATIONS = 1000
PROMPTS = 12
OUTPUT_TOKENS = 24
WAIT_S = 300.0


@pytest.fixture(scope="module")
def trained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    return ensure_tiny_model(folder, settings=TinySettings(steps=60), show_progress=False)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    dice = random.Random(11)
    return [[dice.randrange(300, 4000) for _ in range(dice.randrange(20, 80))] for _ in range(PROMPTS)]


@pytest.fixture(scope="module")
def expected(trained_model: Path, prompts: list[list[int]], start_agent: Any) -> Any:
    """What a plain engine answers."""
    plain = start_agent("plain", trained_model)
    answers = [answer(plain, prompt) for prompt in prompts]
    assert plain.process.stop() == 0
    return answers


@pytest.fixture(scope="module")
def group(trained_model: Path, expected: Any, start_agent: Any) -> Any:
    return start_agent("group", trained_model, data_parallel=2, expert_parallel=True, redundant_experts=REDUNDANT)


def answer(agent: Any, prompt: list[int], rank: int | None = None, tokens: int = OUTPUT_TOKENS) -> list[int]:
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "return_token_ids": True,
    }
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    status, found = agent.engine("POST", "/v1/completions", body, headers)
    assert status == 200, found
    ids: list[int] = found["choices"][0]["token_ids"]
    return ids


def answer_all(agent: Any, prompts: list[list[int]]) -> list[list[int]]:
    """All prompts at once, half of them on each rank."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(lambda row: answer(agent, row[1], row[0] % 2), enumerate(prompts)))


def experts(agent: Any) -> Any:
    status, document = agent.control("GET", "/v1/experts")
    assert status == 200, document
    return document


def configure(agent: Any, **settings: Any) -> None:
    status, found = agent.control("PUT", "/v1/config", {"expert": settings})
    assert status == 200, found


def direct(agent: Any, **body: Any) -> int:
    status, found = agent.control("POST", "/v1/experts", body)
    assert status == 202, found
    version: int = found["version"]
    return version


def serve_until(agent: Any, what: str, condition: Callable[[Any], bool], rank: int | None = None) -> Any:
    """Requests, one after the other, until the document fulfils the condition; an idle engine makes no steps."""
    end_s = time.monotonic() + WAIT_S
    while time.monotonic() < end_s:
        if condition(document := experts(agent)):
            return document
        answer(agent, [7] * 5, rank, tokens=12)
    raise AssertionError(f"never: {what}; the document is {json.dumps(document)[:3000]}")


def random_placement(dice: random.Random) -> list[list[int]]:
    rows = [[*range(EXPERTS), *(dice.randrange(EXPERTS) for _ in range(REDUNDANT))] for _ in range(LAYERS)]
    for row in rows:
        dice.shuffle(row)
    return rows


def test_each_rank_serves_the_requests_that_name_it_and_has_its_own_record(group, prompts, expected):
    before = {row["rank"]: row["computed_tokens"] for row in group.state()["ranks"]}
    assert before.keys() == {0, 1}
    for rank in (0, 1):
        assert answer(group, prompts[0], rank) == expected[0]
        computed = {row["rank"]: row["computed_tokens"] - before[row["rank"]] for row in group.state()["ranks"]}
        assert computed[rank] == len(prompts[0]) + OUTPUT_TOKENS - 1
        assert computed[1 - rank] == (len(prompts[0]) + OUTPUT_TOKENS - 1) * rank


def test_the_load_recorded_of_a_rank_equals_a_count_by_hand(group, trained_model, prompts, expected):
    configure(group, mode="off")
    serve_until(group, "off", lambda document: document["mode"] == "off")
    configure(group, mode="observe", window_steps=10**9, interval_steps=10**6)
    serve_until(group, "observe", lambda document: document["mode"] == "observe", rank=1)
    assert answer(group, prompts[1], 0) == expected[1]
    known = experts(group)["load"]["steps"]
    direct(group, action="plan")
    load = serve_until(group, "a gather", lambda document: document["load"]["steps"] > known, rank=1)["load"]
    found = np.round(np.array(load["tokens"])[0] * load["steps"])
    assert found.astype(int).tolist() == count_by_hand(trained_model, [*prompts[1], *expected[1][:-1]])


def count_by_hand(model: Path, ids: list[int]) -> list[list[int]]:
    """`[layer][expert]` of the tokens, by another implementation of the model."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = plain(torch.tensor([ids]), output_router_logits=True).router_logits
    return [torch.bincount(layer.topk(TOP_K).indices.flatten(), minlength=EXPERTS).tolist() for layer in logits]


def test_the_dry_run_decides_and_moves_nothing(group, prompts, expected):
    before = experts(group)["placement"]
    configure(group, mode="dryRun", interval_steps=40, window_steps=40)
    document = serve_until(group, "three decisions", lambda document: sum(document["totals"]["decisions"].values()) > 3)
    assert answer_all(group, prompts) == expected
    assert {row["outcome"] for row in document["decisions"]} <= {"dryRun", "stayed"}
    assert experts(group)["placement"] == before
    assert experts(group)["totals"]["moves"] == 0


def test_a_thousand_migrations_under_load_change_no_answer(group, prompts, expected):
    configure(group, mode="observe", max_stall_s=0.05, window_steps=50, interval_steps=10**6)
    dice, rounds = random.Random(3), 0
    while experts(group)["totals"]["moves"] < MIGRATIONS:
        placement = random_placement(dice)
        version = experts(group)["placement"]["version"]
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(answer_all, group, prompts)
            direct(group, action="apply", physical_to_logical=placement)
            assert answers.result() == expected
        document = serve_until(group, "applied", lambda document, old=version: document["placement"]["version"] > old)
        assert document["placement"]["physical_to_logical"] == placement
        assert answer_all(group, prompts) == expected
        rounds += 1
        assert rounds < 100
    document = experts(group)
    assert document["totals"]["decisions"]["applied"] >= rounds
    assert not {row["kind"] for row in document["problems"]} - {"slow_move"}
    totals = document["totals"]
    print(f"{totals['moves']} migrations in {rounds} rounds held steps up for {totals['lost_s']:.3f} s")


def test_a_person_takes_a_move_back(group, prompts, expected):
    before = experts(group)
    direct(group, action="rollback")
    version = before["placement"]["version"]
    document = serve_until(group, "rolled back", lambda document: document["placement"]["version"] > version)
    assert document["decisions"][0]["outcome"] == "rolledBack"
    assert document["placement"]["physical_to_logical"] != before["placement"]["physical_to_logical"]
    assert answer_all(group, prompts) == expected


def test_the_pressure_of_the_ranks_reaches_their_records(group, prompts):
    crowded = [[*range(9), *range(9, 16), 15, 15] for _ in range(LAYERS)]
    direct(group, action="apply", physical_to_logical=crowded)
    answer_all(group, prompts)
    document = serve_until(group, "a load", lambda document: document["balance"]["mean"] > 1.0)
    ranks = {row["rank"]: row for row in group.state()["ranks"]}
    pressures = [ranks[rank]["expert_pressure"] for rank in (0, 1)]
    assert sum(pressures) == pytest.approx(2.0)
    assert max(pressures) > 1.0
    assert ranks[0]["expert_balance"] == ranks[1]["expert_balance"] > 1.0
    assert pressures == pytest.approx(document["balance"]["by_rank"], abs=0.3)


def test_modes_are_switched_under_load_and_answers_stay_the_same(group, prompts, expected):
    for mode in ("off", "active", "observe", "dryRun", "off", "active"):
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(answer_all, group, prompts)
            configure(group, mode=mode, interval_steps=30, window_steps=30)
            serve_until(group, mode, lambda document, mode=mode: document["mode"] == mode)
            assert answers.result() == expected


def test_active_decides_by_itself_measures_and_answers_stay_the_same(group, prompts, expected):
    configure(group, mode="active", interval_steps=40, window_steps=40)
    known = sum(experts(group)["totals"]["decisions"].values())
    end_s, document = time.monotonic() + WAIT_S, experts(group)
    while sum(document["totals"]["decisions"].values()) < known + 4:
        assert time.monotonic() < end_s, document["decisions"][:3]
        assert answer_all(group, prompts) == expected
        document = experts(group)
    for row in document["decisions"]:
        print({name: value for name, value in row.items() if name != "physical_to_logical"})
    assert {row["kind"] for row in document["problems"]} <= {"slow_move", "backoff"}
