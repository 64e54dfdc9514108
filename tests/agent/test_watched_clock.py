"""Time in which the agent itself stood still ends no engine."""

from types import SimpleNamespace

import aiohttp
import pytest
from moe_agent.supervisor.supervisor import EngineSupervisor, SupervisorRules
from moe_agent.supervisor.watched_clock import MOST_GAP_S, WatchedClock
from moe_contract.agent_config import EngineConfig

QUICK = SupervisorRules(health_every_s=0.0)


def test_a_gap_between_two_readings_is_left_out():
    times = iter([100.0, 100.0 + MOST_GAP_S, 1000.0, 1001.0, 5000.0, 5000.5])
    clock = WatchedClock(lambda: next(times))
    first_s = 100.0 + MOST_GAP_S
    assert [clock.read() for _ in range(6)] == [100.0, first_s, first_s, first_s + 1.0, first_s + 1.0, first_s + 1.5]


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([0.0, 20.0, 40.0, 61.0], "no healthy answer for 60 s"),
        # Its question was on the way when the container was frozen, and is given up at once afterwards.
        ([0.0, 3600.0], "the end at 0"),
    ],
)
async def test_an_engine_that_was_frozen_with_its_agent_is_asked_again(tmp_path, unused_tcp_port, times, reason):
    engine = EngineConfig(port=unused_tcp_port, model="m", served_name="m", liveness_timeout_s=60.0)
    supervisor = EngineSupervisor(engine, ["false"], {}, tmp_path / "engine.log", QUICK)
    supervisor._ready_since_s = 0.0
    left = iter(times)
    clock = WatchedClock(lambda: next(left))

    async def look(now_s: float) -> str | None:
        return None if now_s else "the end at 0"

    async with aiohttp.ClientSession(supervisor.url) as session:
        hangs = SimpleNamespace(look=look)
        assert await supervisor._watch_until_it_fails(session, hangs, clock) == reason
