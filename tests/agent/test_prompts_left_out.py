"""A waiting prompt that the plan leaves out ends the admission of its step, whichever supported vLLM schedules it.

vLLM 0.32 ends its loop over waiting requests at the first that is granted no token; 0.33 goes on with the next one.
"""

from typing import Any

import pytest
from moe_tools.virtual_engine import VirtualEngine

LATER = 40


def with_little_room(make_engine: Any, settings: Any, *, waiting: int) -> VirtualEngine:
    """An engine whose answers hold most KV blocks, an old prompt that lacks room, and short prompts 39 s younger."""
    settings.put(policy="sjf", kv_growth_blocks=2)
    engine = make_engine(max_num_seqs=64, step_tokens=2048, kv_blocks=64)
    engine.now_s = 1.0
    for number in range(4):
        engine.add(f"answer{number}", 150, out=40, arrival_s=0.0)
    engine.step()
    engine.add("old", 480, out=2, arrival_s=1.0)
    engine.now_s = 40.0
    for number in range(waiting):
        engine.add(f"later{number}", 20, out=2, arrival_s=40.0)
    return engine


def test_requests_that_came_much_later_do_not_overtake_one_that_lacks_kv_blocks(make_engine, settings):
    engine = with_little_room(make_engine, settings, waiting=LATER)
    order = [name for name in engine.run().first_token_order if not name.startswith("answer")]
    assert order[0] == "old"
    assert len(order) == 1 + LATER


def test_requests_behind_one_that_is_left_out_are_not_looked_at(make_engine, settings):
    """vLLM looks up the prefix cache and takes out of the queue what it looks at: a cost for each, in each step."""
    engine = with_little_room(make_engine, settings, waiting=LATER)
    asked: list[str] = []
    grant = engine.scheduler._plan.grant

    def count(request: Any, tokens: int) -> int:
        asked.append(request.request_id)
        return int(grant(request, tokens))

    engine.scheduler._plan.grant = count
    engine.step()
    assert [name for name in asked if not name.startswith("answer")] == ["old"]


def test_a_request_that_is_left_out_counts_as_waiting_and_not_as_skipped(make_engine, settings):
    engine = with_little_room(make_engine, settings, waiting=LATER)
    engine.step()
    stats = engine.scheduler.make_stats()
    assert (stats.num_waiting_reqs, stats.num_skipped_waiting_reqs) == (1 + LATER, 0)
    # vLLM throttles no prefills where a step could not admit all.
    assert engine.scheduler.prefill_capacity_bound


def test_the_next_step_admits_again(make_engine, settings):
    engine = with_little_room(make_engine, settings, waiting=LATER)
    limit = engine.scheduler.max_num_active_reqs
    engine.step()
    assert engine.scheduler.max_num_active_reqs == limit
    engine.abort("old")
    engine.step()
    assert "later0" in engine.schedules[-1]


def test_the_limit_is_given_back_when_a_step_fails(make_engine, settings, monkeypatch):
    engine = with_little_room(make_engine, settings, waiting=1)
    limit = engine.scheduler.max_num_active_reqs

    def fail(*_: Any) -> None:
        raise RuntimeError("after the admission")

    monkeypatch.setattr(engine.scheduler, "_update_after_schedule", fail)
    with pytest.raises(RuntimeError, match="after the admission"):
        engine.step()
    assert engine.scheduler.max_num_active_reqs == limit
