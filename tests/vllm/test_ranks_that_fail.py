"""A real engine of two data-parallel ranks on the CPU: how soon the agent notices a core that is killed or suspended.

The times are printed and not asserted, for they are those of a machine that may be busy.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.shared_memory.turn_record import TurnRecords


@pytest.fixture(scope="module")
def group(tiny_model: Path, start_agent: Any) -> Any:
    return start_agent("group", tiny_model, data_parallel=2, expert_parallel=True)


def pid_of(agent: Any, rank: int) -> int:
    return RankRecords(agent.folder / "run", range(2)).read()[rank].pid


@contextmanager
def busy(agent: Any, *ranks: int) -> Iterator[None]:
    """Requests without an end at these ranks; how they end is not looked at."""

    def ask(rank: int) -> None:
        body = {"model": "tiny", "prompt": [7] * 20, "max_tokens": 1900, "ignore_eos": True}
        try:
            agent.engine("POST", "/v1/completions", body, {"X-data-parallel-rank": str(rank)})
        except OSError:
            return

    asked = [threading.Thread(target=ask, args=[rank], daemon=True) for rank in ranks]
    for thread in asked:
        thread.start()
    for rank in ranks:
        agent.wait_for(f"rank {rank} is busy", lambda state, rank=rank: state["ranks"][rank]["step"] > 20)
    yield
    for thread in asked:
        thread.join(300)


def trouble_of(state: Any, rank: int) -> str:
    return next((str(row["trouble"]) for row in state["ranks"] if row["rank"] == rank), "")


def test_each_rank_publishes_the_turns_of_the_group(group):
    """Also a rank without requests of its own."""
    turns = TurnRecords(group.folder / "run", range(2))
    first = turns.read()
    with busy(group, 0):
        group.wait_for("turns", lambda _: all(row.turn > first[rank].turn for rank, row in turns.read().items()))
    assert turns.read().keys() == {0, 1}
    group.wait_for("the same turn", lambda _: len({row.turn for row in turns.read().values()}) == 1)
    assert group.state()["ranks"][1]["step"] == 0, "it made dummy passes alone"


@pytest.mark.parametrize(("rank", "busy_ranks"), [(1, (0, 1)), (1, (0,)), (0, (0, 1))])
def test_a_suspended_core_is_named_and_the_engine_starts_anew(group, rank, busy_ranks):
    restarts = group.wait_ready()["engine"]["restarts"]
    with busy(group, *busy_ranks):
        os.kill(pid_of(group, rank), signal.SIGSTOP)
        begun_s = time.monotonic()
        state = group.wait_for("suspended", lambda state: trouble_of(state, rank) == "suspended")
        print(f"rank {rank} suspended, busy {busy_ranks}: noticed after {time.monotonic() - begun_s:.2f} s")
        assert not state["accepting"]
        assert trouble_of(state, 1 - rank) == ""
        group.wait_for("ended", lambda state: state["engine"]["restarts"] > restarts)
    assert group.state()["engine"]["last_exit"].startswith(f"rank {rank}: its process is suspended")
    group.wait_ready()
    group.complete([7] * 5, 4)


def test_a_killed_core_is_named_and_the_engine_starts_anew(group):
    restarts = group.wait_ready()["engine"]["restarts"]
    with busy(group, 0, 1):
        os.kill(pid_of(group, 1), signal.SIGKILL)
        begun_s = time.monotonic()
        group.wait_for("ended", lambda state: state["engine"]["restarts"] > restarts)
        print(f"rank 1 killed: the engine has ended after {time.monotonic() - begun_s:.2f} s")
    assert group.state()["engine"]["last_exit"].startswith("rank 1: its process has ended")
    group.wait_ready()
    group.complete([7] * 5, 4)
