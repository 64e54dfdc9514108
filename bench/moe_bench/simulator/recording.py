"""vLLM's scheduler with a watch: what each step carried and how long it took, for `calibrate`.

Named to vLLM by `--scheduler-cls`. A plain `Scheduler` turns asynchronous scheduling off, so that steps follow each
other and the time of one is from its scheduling to that of the next, host work included.
"""

import time
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from moe_bench.simulator.costs import Work
from moe_bench.simulator.fitting import MeasuredStep
from moe_bench.simulator.rank import work_of


class RecordingScheduler(Scheduler):
    """See the module.

    Attributes:
        measured: the steps so far; the last one is not in it, since its end is not known.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.measured: list[MeasuredStep] = []
        self._began: tuple[Work, float] | None = None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        now_s = time.perf_counter()
        output = super().schedule(throttle_prefills)
        if self._began is not None:
            work, began_s = self._began
            self.measured.append(MeasuredStep(work=work, step_s=now_s - began_s))
        work, _ = work_of(output, self.requests)
        # After a step without work comes a pause, or the end.
        self._began = (work, now_s) if work.tokens else None
        return output
