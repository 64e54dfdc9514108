"""A decision as the controller asks for it and gets it: computed in a thread, because a step must not wait for it.

`Planner.ask` returns at once; the result is polled in later sync rounds. `Decider` runs the decision of
`moe_scheduling.expert.decision` and keeps its history.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertHistory,
    ExpertSettings,
    Move,
    RegretBound,
    StepSizes,
    add_steps,
    plan_experts,
)

from moe_agent.experts.directive import GroupShape
from moe_agent.experts.load import Floats, Slots, make_load, make_placement

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """Seconds, as measured so far.

    Attributes:
        token_s: expert work of one token.
        remote_token_s: transfer of one token, in one direction, between two ranks of a node.
        internode_token_s: transfer of one token, in one direction, between two nodes.
        move_s: one expert moved to another rank.
        expert_s: one expert more that got a token; 0: not known.
    """

    token_s: float
    remote_token_s: float
    internode_token_s: float
    move_s: float
    expert_s: float = 0.0

    def over(self, horizon_steps: int) -> ExpertCosts:
        """Returns them as coefficients of the cost model for a number of steps until the next decision."""
        return ExpertCosts(
            token_s=self.token_s,
            expert_s=self.expert_s,
            remote_token_s=self.remote_token_s,
            internode_token_s=self.internode_token_s,
            move_s=self.move_s,
            horizon_steps=horizon_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Input of one decision.

    Attributes:
        tokens: [source, layer, expert], tokens a step.
        steps: steps of the window that they were recorded in.
        placement: [layer, slot] in force.
        version: version of that placement.
        shape: sizes of the group.
        costs: as measured so far.
        settings: in force.
        horizon_steps: steps until the next decision.
        regret: gains and costs until `accounted_steps` ago; None: the placement in force is the beginning.
        step: number of the present step.
        accounted_steps: steps since `regret`, all with the placement in force.
        sizes: how often steps are small and large; None: not known.
    """

    tokens: Floats
    steps: float
    placement: Slots
    version: int
    shape: GroupShape
    costs: MeasuredCosts
    settings: ExpertSettings
    horizon_steps: int
    regret: RegretBound | None = None
    step: int = 0
    accounted_steps: int = 0
    sizes: StepSizes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """Result of one decision.

    Attributes:
        pays: whether to move.
        stay_reason: class of the reason not to move; empty where it pays.
        reason: the reason as a sentence.
        placement: [layer, slot], the candidate, also where it does not pay.
        gain_s: predicted gain in seconds a step.
        cost_s: seconds that moving takes.
        balance_before: tokens of the busiest rank over the mean, with the placement in force.
        balance_after: the same with the candidate.
        seconds: duration of the decision.
        regret: gains and costs with the steps of the request.
    """

    pays: bool
    stay_reason: str
    reason: str
    placement: Slots
    gain_s: float
    cost_s: float
    balance_before: float
    balance_after: float
    seconds: float
    regret: RegretBound | None = None


class Planner(Protocol):
    """Decides outside the step: `ask` returns at once, `poll` returns the result once, when it is there."""

    def ask(self, request: PlanRequest) -> None: ...

    def poll(self) -> PlanResult | Exception | None: ...


Decide = Callable[[PlanRequest], PlanResult]


class ThreadedPlanner:
    """A planner that calls `decide` in a thread."""

    def __init__(self, decide: Decide, thread: ThreadPoolExecutor) -> None:
        self._decide, self._thread = decide, thread
        self._future: Future[PlanResult] | None = None

    def ask(self, request: PlanRequest) -> None:
        """Starts a decision in the thread; `poll` returns its result."""
        self._future = self._thread.submit(self._decide, request)

    def poll(self) -> PlanResult | Exception | None:
        """Returns the result or the error of the decision, once; None while there is none."""
        future = self._future
        if future is None or not future.done():
            return None
        self._future = None
        try:
            return future.result()
        except Exception as error:
            log.exception("the decision about experts failed")
            return error


class Decider:
    """Runs decisions, with the history that each passes on to the next."""

    def __init__(self) -> None:
        self._history = ExpertHistory()

    def decide(self, request: PlanRequest) -> PlanResult:
        """Returns whether to move which experts where.

        Raises:
            ValueError: the load does not fit the group.
        """
        begun_s = time.perf_counter()
        load = make_load(request.tokens, request.steps, request.sizes)
        placement = make_placement(request.placement, request.shape, request.version)
        costs = request.costs.over(request.horizon_steps)
        known = replace(self._history, regret=request.regret)
        known = add_steps(known, load, placement, costs, request.accounted_steps)
        found = plan_experts(load, placement, costs, request.settings, known)
        self._history = found.history
        return PlanResult(
            pays=isinstance(found, Move),
            stay_reason="" if isinstance(found, Move) else found.reason.value,
            reason="; ".join(found.reasons) if isinstance(found, Move) else f"{found.reason}: {found.why}",
            placement=found.candidate.physical_to_logical,
            gain_s=found.gain_s,
            cost_s=found.cost_s,
            balance_before=found.balance_before.mean,
            balance_after=found.balance_after.mean,
            seconds=time.perf_counter() - begun_s,
            regret=known.regret,
        )
