"""Our scheduler with a watch: what each step carried and how long it took, for `calibrate`.

Named to vLLM by `--scheduler-cls`. The time of a step is from the output of the one before it, or from its scheduling
after a pause, to its own output, as the product's own fit counts it: host work is in it.
"""

import time
from collections import deque
from typing import Any

from moe_agent.vllm.scheduler import OrderedScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from moe_tools.calibration.fitting import MeasuredStep
from moe_tools.simulator.costs import Work
from moe_tools.simulator.rank import work_of


class RecordingScheduler(OrderedScheduler):
    """Our scheduler, which also measures the work and the duration of each step.

    Attributes:
        measured: the steps so far.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.measured: list[MeasuredStep] = []
        self._watched: deque[tuple[Work, float]] = deque()
        self._ended_s: float | None = None

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        began_s = time.perf_counter()
        output = super().schedule(throttle_prefills)
        self._watched.append((work_of(output, self.requests)[0], began_s))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        now_s = time.perf_counter()
        work, began_s = self._watched.popleft()
        if work.tokens:
            began_s = began_s if self._ended_s is None else self._ended_s
            self.measured.append(MeasuredStep(work=work, step_s=now_s - began_s))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._ended_s = now_s if self.has_unfinished_requests() else None
        return outputs
