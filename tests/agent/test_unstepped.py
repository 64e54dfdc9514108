"""For how long an engine has made no step though it has requests, from the records of its ranks."""

from contextlib import closing

import pytest
from moe_agent.shared_memory.rank_record import RankRecords, RankRecordWriter, RankState
from moe_scheduling.signals import EngineSignal


def state(written_s: float, **signal: int) -> RankState:
    return RankState(pid=1, written_s=written_s, config_version=1, signal=EngineSignal(**signal))


@pytest.mark.parametrize(
    ("ranks", "unstepped_s"),
    [
        ([], 0.0),
        ([state(100.0)], 0.0),
        ([state(100.0, running=1)], 900.0),
        ([state(100.0, waiting=2)], 900.0),
        ([state(100.0), state(990.0, running=1)], 10.0),
        ([state(100.0, running=1), state(990.0, running=1)], 900.0),
    ],
)
def test_a_rank_with_requests_counts_from_its_last_record(tmp_path, ranks, unstepped_s):
    writers = [RankRecordWriter(tmp_path, number, first) for number, first in enumerate(ranks)]
    records = RankRecords(tmp_path, range(len(ranks) + 1))
    assert records.unstepped_s(1000.0) == unstepped_s
    records.remove()
    for writer in writers:
        with closing(writer):
            pass
