"""What it is worth to tell the dispatch of the experts, in virtual time: `python -m moe_lab.expert_feedback`.

Two engines, each an expert group of two ranks in lockstep, behind the product's own books, choice of the engine and fit
of the step time. What differs between the variants is what the signals say of the experts; all else, arrivals and
lengths included, is equal, so the variants are compared in pairs. The balance of each engine is the scenario's.

A step takes `HOST_S + max(own work of a rank) + experts of the busiest rank`: in each layer all ranks wait for the
busiest one; where work overlaps, a rank's own and its experts' are on the same clock, which takes `HOST_S + max(own
work + experts of the same rank)`: a bound, no engine hides that much.
"""

import argparse
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import numpy as np
from moe_agent.step_time import StepTimeFit
from moe_scheduling.engine.choice import EngineSettings, Job, Send, choose_target
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.engine.ttft_model import EXPERT_PART
from moe_scheduling.signals import EngineSignal, StepTime, Target
from moe_tools.statistics import paired_ratio

GROUPS, RANKS = 2, 2
# A middling GPU: seconds of a step, of a prompt's token in it (`EXPERT_PART` of them for its experts), of a decode.
HOST_S, TOKEN_S, DECODE_S = 0.005, 40e-6, 100e-6
PREFILL_BUDGET = 2048
# Prompts and answers: medians and sigma of their logarithms.
PROMPT, ANSWER = (700, 1.0), (60, 0.7)
LOAD = 0.8
# Steps after which a token in the engine's window of expert load weighs 1/e (`ExpertSettings.window_steps`).
WINDOW_STEPS = 1000
SIGNAL_AGE_S = 0.01
WARM_UP_S = 20.0

Balance = Callable[[int, float], tuple[float, bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """How the balance of the engines behaves.

    Attributes:
        balance: of engine and time: max / mean, and whether it is known at once (a placement) or through the window.
        overlap: a rank's own work and its experts' are on the same clock.
    """

    balance: Balance
    overlap: bool = False


def _steady(engine: int, now_s: float) -> tuple[float, bool]:
    return (1.0, 1.6)[engine], False


def _drifting(engine: int, now_s: float) -> tuple[float, bool]:
    """Now the one engine has the hot topic, now the other, a minute each, as when tenants come and go."""
    return (1.0, 1.6)[(engine + int(now_s / 60.0)) % GROUPS], False


def _moving(engine: int, now_s: float) -> tuple[float, bool]:
    """The load drifts away from the placement in a minute, and experts are moved after it, in turn."""
    return 1.05 + 0.55 * ((now_s / 60.0 + engine / GROUPS) % 1.0), True


SCENARIOS = MappingProxyType(
    {
        "steady": Scenario(balance=_steady),
        "drifting": Scenario(balance=_drifting),
        "moving": Scenario(balance=_moving),
        "moving, overlap": Scenario(balance=_moving, overlap=True),
    }
)


@dataclass(slots=True, kw_only=True)
class Known:
    """What an engine knows of its experts.

    Attributes:
        windowed: balance as its window of load has it.
        true: balance of the moment.
        steps: that were made.
    """

    windowed: float = 1.0
    true: float = 1.0
    steps: int = 0


def _slower(line: StepTime, factor: float) -> StepTime:
    return StepTime(base_s=line.base_s * factor, prefill_s=line.prefill_s * factor, decode_s=line.decode_s * factor)


Variant = Callable[[StepTime, Known, int], tuple[StepTime, float]]
"""From an engine's fitted line, what it knows and a rank, to the line and the balance that the dispatch is told."""

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        # The line alone: it was fitted to steps in which the imbalance was.
        "line": lambda line, known, rank: (line, 1.0),
        # A fixed part of the imbalance on top of that, whatever the line knows: what a constant weight does.
        "a quarter": lambda line, known, rank: (_slower(line, 1.0 + 0.25 * (known.windowed - 1.0)), 1.0),
        # As it is: what has changed since the line was fitted, by the window of load that engines have.
        "balance": lambda line, known, rank: (line, known.windowed),
        # The same, were the balance known at once.
        "balance at once": lambda line, known, rank: (line, known.true),
        # Away from the rank that has the hot experts.
        "pressed rank": lambda line, known, rank: (_slower(line, 1.0 + EXPERT_PART * (pressure(known, rank) - 1)), 1.0),
    }
)


def pressure(known: Known, rank: int) -> float:
    """Tokens of a rank over the mean: the first one has the hot experts."""
    return known.windowed if rank == 0 else (RANKS - known.windowed) / (RANKS - 1)


@dataclass(slots=True, kw_only=True)
class Request:
    """One request on its way; `left` are prompt tokens, then answer tokens, to be computed."""

    key: int
    arrival_s: float
    prompt: int
    answer: int
    left: int = 0
    first_token_s: float = math.nan
    predicted_s: float = math.nan


@dataclass(slots=True)
class Rank:
    """Queue and batch of one rank."""

    target: Target
    waiting: deque[Request] = field(default_factory=deque)
    decoding: list[Request] = field(default_factory=list)
    fit: StepTimeFit = field(default_factory=StepTimeFit)
    prefilling: list[tuple[Request, int]] = field(default_factory=list)

    def begin(self) -> tuple[int, int]:
        """Takes prompt tokens up to the budget; these, and the requests that decode."""
        self.prefilling = []
        budget = PREFILL_BUDGET
        for request in self.waiting:
            taken = min(budget, request.left)
            self.prefilling.append((request, taken))
            budget -= taken
            if not budget:
                break
        return PREFILL_BUDGET - budget, len(self.decoding)

    def end(self, now_s: float) -> Iterator[tuple[Request, bool]]:
        """What the step brought: requests with their first token (True) or their last (False)."""
        for request in self.decoding:
            request.left -= 1
        yield from ((request, False) for request in self.decoding if not request.left)
        self.decoding = [request for request in self.decoding if request.left]
        for request, taken in self.prefilling:
            request.left -= taken
            if not request.left:
                self.waiting.popleft()
                request.first_token_s, request.left = now_s, request.answer
                self.decoding.append(request)
                yield request, True


class Group:
    """One engine: ranks in lockstep."""

    def __init__(self, number: int, scenario: Scenario) -> None:
        self.number, self._scenario = number, scenario
        self.ranks = [Rank(Target(f"e{number}", rank)) for rank in range(RANKS)]
        self.known = Known()
        self.busy = False
        self._work: list[tuple[int, int]] = []
        self._took_s = 0.0

    def begin(self, now_s: float) -> float:
        """Starts a step; the time at which it ends."""
        self.busy = True
        self.known.true, at_once = self._scenario.balance(self.number, now_s)
        self._learn(at_once)
        self._work = [rank.begin() for rank in self.ranks]
        self._took_s = self._step_s()
        return now_s + self._took_s

    def _learn(self, at_once: bool) -> None:
        known = self.known
        known.windowed = known.true if at_once else known.windowed + (known.true - known.windowed) / WINDOW_STEPS
        known.steps += 1

    def _step_s(self) -> float:
        own = [prefill * TOKEN_S * (1 - EXPERT_PART) + decode * DECODE_S for prefill, decode in self._work]
        mean = sum(prefill for prefill, _ in self._work) / RANKS * TOKEN_S * EXPERT_PART
        experts = [mean * self.known.true, mean * (RANKS - self.known.true) / (RANKS - 1)]
        if self._scenario.overlap:
            return HOST_S + max(map(sum, zip(own, experts, strict=True)))
        return HOST_S + max(own) + max(experts)

    def end(self, now_s: float) -> list[tuple[Target, Request, bool]]:
        """Ends the step."""
        told = []
        for rank, (prefill, decode) in zip(self.ranks, self._work, strict=True):
            rank.fit.observe(prefill_tokens=prefill, decoding_requests=decode, step_s=self._took_s)
            told += [(rank.target, request, first) for request, first in rank.end(now_s)]
        self.busy = False
        return told

    @property
    def has_work(self) -> bool:
        return any(rank.waiting or rank.decoding for rank in self.ranks)

    def signal(self, rank: Rank, variant: Variant) -> EngineSignal:
        """What a rank says of itself; the variant's view of the experts is in its line."""
        line, balance = rank.fit.line, 1.0
        if line is not None:
            line, balance = variant(line, self.known, rank.target.rank)
        return EngineSignal(
            step=self.known.steps,
            running=len(rank.decoding),
            waiting=len(rank.waiting),
            waiting_prefill_tokens=sum(request.left for request in rank.waiting),
            decode_tokens=len(rank.decoding),
            step_time=line,
            expert_balance=balance,
        )


def draw(seconds: float, seed: int) -> Iterator[Request]:
    """Poisson arrivals at `LOAD` of what balanced engines could do."""
    randomness = random.Random(seed)
    mean_prompt = PROMPT[0] * math.exp(PROMPT[1] ** 2 / 2)
    mean_answer = ANSWER[0] * math.exp(ANSWER[1] ** 2 / 2)
    # An answer's tokens share their steps with others; with these lengths a step carries prefills most of the time.
    rate = LOAD * GROUPS * RANKS / (mean_prompt * (TOKEN_S + HOST_S / PREFILL_BUDGET) + mean_answer * DECODE_S) / 1.6
    now_s = 0.0
    for key in range(10**9):
        now_s += randomness.expovariate(rate)
        if now_s > seconds:
            return
        prompt, answer = (
            max(1, int(randomness.lognormvariate(math.log(median), sigma))) for median, sigma in (PROMPT, ANSWER)
        )
        yield Request(key=key, arrival_s=now_s, prompt=prompt, answer=answer, left=prompt)


class Run:
    """One run: the events, and the dispatch between them."""

    def __init__(self, scenario: Scenario, variant: Variant) -> None:
        self._variant = variant
        self._groups = {f"e{number}": Group(number, scenario) for number in range(GROUPS)}
        self._ranks = {rank.target: rank for group in self._groups.values() for rank in group.ranks}
        self._books = {target: TargetState(target) for target in self._ranks}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._pushed = 0

    def serve(self, requests: Iterable[Request]) -> None:
        """Until all have their answers."""
        for request in requests:
            self._push(request.arrival_s, partial(self._arrive, request))
        while self._events:
            now_s, _, happen = heapq.heappop(self._events)
            happen(now_s)

    def _push(self, time_s: float, happen: Callable[[float], None]) -> None:
        self._pushed += 1
        heapq.heappush(self._events, (time_s, self._pushed, happen))

    def _arrive(self, request: Request, now_s: float) -> None:
        job, books = Job(request.prompt), list(self._books.values())
        decision = choose_target(job, books, EngineSettings(), turn=request.key, now_s=now_s)
        assert isinstance(decision, Send)
        request.predicted_s = decision.predicted_s
        self._books[decision.target].sent(request.key, request.prompt, now_s)
        self._ranks[decision.target].waiting.append(request)
        self._begin(self._groups[decision.target.server], now_s)

    def _begin(self, group: Group, now_s: float) -> None:
        if not group.busy and group.has_work:
            self._push(group.begin(now_s), partial(self._end, group))

    def _end(self, group: Group, now_s: float) -> None:
        for target, request, first in group.end(now_s):
            books = self._books[target]
            (books.first_token if first else books.settled)(request.key, now_s)
        for rank in group.ranks:
            signal = group.signal(rank, self._variant)
            self._push(now_s + SIGNAL_AGE_S, partial(self._observe, rank.target, signal, now_s))
        self._begin(group, now_s)

    def _observe(self, target: Target, signal: EngineSignal, observed_s: float, now_s: float) -> None:
        self._books[target].observe(signal, observed_s)


def simulate(scenario: Scenario, variant: Variant, seconds: float, seed: int) -> np.ndarray:
    """Of the requests that came after the warm-up: [times to first token, how far the predictions were off]."""
    requests = list(draw(seconds, seed))
    Run(scenario, variant).serve(requests)
    steady = [row for row in requests if row.arrival_s > WARM_UP_S]
    ttft = np.array([row.first_token_s - row.arrival_s for row in steady])
    return np.stack([ttft, np.abs(ttft - [row.predicted_s for row in steady])])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m moe_lab.expert_feedback", description=__doc__)
    parser.add_argument("--seeds", type=int, default=12, help="pairs of runs (default: 12)")
    parser.add_argument("--seconds", type=float, default=300.0, help="virtual seconds a run (default: 300)")
    parser.add_argument("--scenario", choices=SCENARIOS, help="one alone (default: all)")
    options = parser.parse_args()
    print("scenario | variant | mean TTFT | p99 TTFT | error of the prediction (over those of the line alone, 95 %)")
    for name, scenario in SCENARIOS.items():
        if options.scenario not in (None, name):
            continue
        runs = {
            label: [simulate(scenario, variant, options.seconds, seed) for seed in range(options.seeds)]
            for label, variant in VARIANTS.items()
        }
        for label in VARIANTS:
            print(" | ".join([name, label, *_cells(runs["line"], runs[label], is_base=label == "line")]), flush=True)


def _cells(base: list[np.ndarray], runs: list[np.ndarray], *, is_base: bool) -> Iterator[str]:
    for figure in (_mean_ttft, _p99_ttft, _mean_error):
        if is_base:
            yield f"{np.mean([figure(run) for run in base]) * 1000:.1f} ms"
        else:
            ratio = paired_ratio([(figure(one), figure(other)) for one, other in zip(base, runs, strict=True)])
            yield f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _mean_ttft(run: np.ndarray) -> float:
    return float(run[0].mean())


def _p99_ttft(run: np.ndarray) -> float:
    return float(np.percentile(run[0], 99))


def _mean_error(run: np.ndarray) -> float:
    return float(run[1].mean())


if __name__ == "__main__":
    main()
