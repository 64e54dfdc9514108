"""One replica over two nodes, both played by this machine: a leader with the server, and a node without one."""

from typing import Any


def test_ranks_on_two_nodes_serve_behind_the_leader(start_nodes):
    leader, other = start_nodes(2, data_parallel=2, expert_parallel=True)
    for rank in (0, 1):
        body = {"model": "tiny", "prompt": [5] * 50, "max_tokens": 10, "ignore_eos": True}
        status, answer = leader.engine("POST", "/v1/completions", body, {"X-data-parallel-rank": str(rank)})
        assert status == 200, answer
        assert answer["usage"]["completion_tokens"] == 10
    assert {row["rank"]: computed(row) for row in leader.state()["ranks"]} == {0: True}
    assert {row["rank"]: computed(row) for row in other.state()["ranks"]} == {1: True}
    status, taken = other.control("PUT", "/v1/config", {"request": {"policy": "fcfs"}})
    assert (status, taken["request"]["policy"]) == (200, "fcfs")


def computed(row: dict[str, Any]) -> bool:
    """Whether the rank computed a prompt of 50 tokens and 10 more, and no second such request."""
    return 59 <= row["computed_tokens"] < 118
