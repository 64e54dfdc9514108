"""A stand-in for the engine core of one rank of a lockstep group: `python stand_in_core.py RANK RANKS`.

It publishes in the run folder what a scheduler of ours does. The file `way-RANK` there says what it does: `idle`,
`busy` (it has a request, and each turn ends with a step) or `stuck` (it begins no further turn). As in vLLM no rank
ends a turn that another one has not begun, so the others stop with a rank that is stuck, or whose process is.
"""

import os
import sys
import time
from pathlib import Path

from moe_agent.shared_memory.rank_record import RankRecordWriter, RankState
from moe_agent.shared_memory.turn_record import TurnRecords, TurnRecordWriter, TurnState
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_scheduling.signals import EngineSignal, StepTime

STEP_S = 0.01
FIT = StepTime(base_s=STEP_S, prefill_s=0.0, decode_s=0.0)


def main(run_dir: Path, rank: int, ranks: int) -> None:
    """Makes turns until it is killed."""
    way, others = run_dir / f"way-{rank}", TurnRecords(run_dir, range(ranks))
    running = int(way.read_text() == "busy")

    def state(turn: int) -> RankState:
        signal = EngineSignal(step=turn, running=running, step_time=FIT)
        return RankState(pid=os.getpid(), written_s=time.monotonic(), config_version=1, signal=signal)

    record, turns = RankRecordWriter(run_dir, rank, state(0)), TurnRecordWriter(run_dir, rank, TurnState(0, 0.0))
    turn = 0
    while True:
        if (doing := way.read_text()) in ("idle", "busy"):
            running, turn = int(doing == "busy"), turn + 1
            record.write(state(turn - 1))
            turns.write(TurnState(turn, time.monotonic()))
            while min((seen := others.read()).values(), default=TurnState(0, 0.0)).turn < turn or len(seen) < ranks:
                time.sleep(STEP_S)
            record.write(state(turn))
        time.sleep(STEP_S)


if __name__ == "__main__":
    main(Path(os.environ[RUN_DIR_VARIABLE]), int(sys.argv[1]), int(sys.argv[2]))
