"""Which engine computes the prompt of a request and which its answer, where KV blocks can travel between engines.

Owned by the dispatcher, on the event loop's thread. The decisions are `choose_placement`'s, for each request, and
`plan_roles`', at intervals: this module knows what they need of the engines and of the recent load, and counts.

Invariants: only engines whose agents say that they are peers exchange blocks; an engine that failed in a pair takes
part in none for `PAUSE_S`.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from moe_contract.kv_transfer import Disaggregation, KvTransferState
from moe_scheduling.engine.choice import Decision, DispatchPolicy, Job, Send, SendReason, choose_target
from moe_scheduling.engine.disaggregation import EngineRole, KvTransfer
from moe_scheduling.engine.pair_choice import PairContext, RequestPlacement, choose_placement
from moe_scheduling.engine.prefill_share import PrefillShares
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.fleet.measured_load import MeasuredLoad, observe_roles
from moe_scheduling.fleet.role_latency import RoleObservation, find_prefill_wait_s
from moe_scheduling.fleet.roles import RoleHistory, RoleSettings, SetRole, plan_roles
from moe_scheduling.signals import Target

if TYPE_CHECKING:
    from moe_gateway.engines.dispatcher import Dispatcher

# Seconds between two decisions about roles.
ROLES_PERIOD_S = 1.0
# Seconds for which an engine that failed in a pair takes part in none.
PAUSE_S = 10.0
# Part of a lease that has to be left when the request reaches the second engine, which prolongs it from then on.
LEASE_MARGIN = 1 / 3
# Until an agent has measured them: a network of 25 Gbit/s, and Qwen3-30B-A3B in 16 bits.
DEFAULT_BYTES_PER_S, DEFAULT_TOKEN_BYTES = 3e9, 98_304.0

log = logging.getLogger("moeserving.gateway")


class Placements:
    """The choice of one engine or two for each request, and the roles of the engines.

    Args:
        config: whether roles move; None: no request is split, and bounds alone are kept.
        dispatcher: with the engines and their states.

    Attributes:
        roles: of the engines that exchange blocks, by name.
        pairs: pairs chosen, by reason; a metric.
        fall_backs: pairs that were left for one engine before the answer began, by reason; a metric.
        transfers: answers that began at an engine that had not computed their prompt; a metric.
        role_changes: by reason; a metric.
        load: of the recent requests that may be split.
    """

    def __init__(self, config: Disaggregation | None, dispatcher: "Dispatcher") -> None:
        self._splits = config is not None
        self._moves_roles = config is not None and config.moves_roles
        self._dispatcher = dispatcher
        self._states: dict[str, KvTransferState] = {}
        self._peers: dict[str, str] = {}
        self._fixed_roles: dict[str, EngineRole] = {}
        self._link = KvTransfer(token_bytes=DEFAULT_TOKEN_BYTES, bytes_per_s=DEFAULT_BYTES_PER_S)
        self._paused: dict[str, float] = {}
        self._met: set[tuple[str, str]] = set()
        self._shares = PrefillShares()
        self._history = RoleHistory()
        self._roles_due_s = -math.inf
        self._prefill_wait_s = 0.0
        self.load = MeasuredLoad()
        self.roles: dict[str, EngineRole] = {}
        self.pairs: Counter[str] = Counter()
        self.fall_backs: Counter[str] = Counter()
        self.role_changes: Counter[str] = Counter()
        self.transfers = 0

    # Engines.

    def set_transfer(self, name: str, state: KvTransferState | None) -> None:
        """What an engine's agent says of its transfers; None: it takes no part."""
        before = self._states.get(name)
        if state == before or not self._splits:
            return
        if state is None:
            self.forget(name)
            return
        self._states[name] = state
        if before is None or (state.role, state.peers) != (before.role, before.peers):
            self.roles[name] = state.role
        self._gather()

    def forget(self, name: str) -> None:
        """The engine is gone, or another process: what it said and did counts no more."""
        self._states.pop(name, None)
        self.roles.pop(name, None)
        self._paused.pop(name, None)
        self._shares.forget(name)
        self._met = {pair for pair in self._met if name not in pair}
        self._gather()

    def _gather(self) -> None:
        states = self._states.values()
        self._peers = {name: state.peers for name, state in self._states.items() if state.peers}
        self._fixed_roles = {name: state.role for name, state in self._states.items()}
        rates = [state.bytes_per_s for state in states if 0.0 < state.bytes_per_s < math.inf]
        sizes = [state.token_bytes for state in states if 0.0 < state.token_bytes < math.inf]
        self._link = KvTransfer(
            token_bytes=max(sizes, default=DEFAULT_TOKEN_BYTES),
            bytes_per_s=sum(rates) / len(rates) if rates else DEFAULT_BYTES_PER_S,
        )

    def longest_wait_s(self, prefill: str) -> float:
        """Seconds from the end of a prompt at this engine within which another engine has to get the request."""
        state = self._states.get(prefill)
        return 0.0 if state is None else state.lease_s * (1.0 - LEASE_MARGIN)

    # A request.

    def choose(
        self, job: Job, states: Sequence[TargetState], turn: int, now_s: float, tried: Collection[Target]
    ) -> Decision:
        """Which target or pair of targets takes a job now; under policies without predictions it is one target."""
        settings = self._dispatcher.settings
        is_usual = settings.policy is not DispatchPolicy.PREDICTED
        is_usual = is_usual or not (self._peers or settings.targets.is_bounded)
        if is_usual:
            return choose_target(job, states, settings, turn=turn, now_s=now_s, exclude=tried)
        placement = choose_placement(
            job, states, self._context(now_s, splits=job.splits), turn=turn, now_s=now_s, exclude=tried
        )
        if not isinstance(placement, RequestPlacement):
            return placement
        prediction = placement.prediction
        if not placement.is_pair:
            return Send(placement.decode, prediction.ttft_s, SendReason.LEAST_PREDICTED)
        self.pairs[placement.reason] += 1
        prefill = Send(placement.prefill, prediction.prefill_s, SendReason.PREFILL)
        return Send(placement.decode, prediction.ttft_s - prediction.prefill_s, SendReason.DECODE, prefill)

    def _context(self, now_s: float, *, splits: bool) -> PairContext:
        peers = self._peers
        if self._paused:
            self._paused = {name: until_s for name, until_s in self._paused.items() if now_s < until_s}
            peers = {name: value for name, value in peers.items() if name not in self._paused}
        settings, is_split = self._dispatcher.settings, splits and bool(peers)
        return PairContext(
            targets=settings.targets,
            transfer=self._link if is_split else None,
            # A role that the load gave is for the requests that can use it.
            roles=self.roles if is_split else self._fixed_roles,
            prefill_shares=self._shares.at(now_s),
            met=self._met,
            answer_tokens=self.load.answer_tokens,
            stale_after_s=settings.stale_after_s,
            peers=peers,
            prefill_wait_s=self._prefill_wait_s,
            saturation_s=settings.saturation_s,
        )

    def count_prompt(self, job: Job, target: Target, now_s: float) -> None:
        """A prompt is sent to a target: the ranks of its engine compute side by side, so it takes its part of them."""
        state, engine = self._dispatcher.target_states.get(target), self._dispatcher.engines.get(target.server)
        if state is not None and engine is not None:
            stale_after_s = self._dispatcher.settings.stale_after_s
            prefill_s = state.added_prefill_s(job.uncached_tokens(target), now_s, stale_after_s)
            self._shares.add(target.server, prefill_s / len(engine.targets), now_s)

    def note_transfer(self, prefill: str, decode: str) -> None:
        """The answer of a pair has begun."""
        self.transfers += 1
        self._met.add((prefill, decode))

    def fall_back(self, reason: str, server: str | None, now_s: float) -> None:
        """A pair was left for one engine; `server` is the one of them that failed, None where none did."""
        self.fall_backs[reason] += 1
        if server is not None:
            self._paused[server] = now_s + PAUSE_S

    def note_end(self, target: Target, answer_s: float | None, lasted_s: float, now_s: float) -> None:
        """A request got its whole answer from there, whose tokens took `answer_s`; None where that is not known."""
        state = self._dispatcher.target_states.get(target)
        model = None if state is None else state.step_time_model
        answer_tokens = self.load.answer_tokens
        if answer_s is not None and state is not None and model is not None:
            stale_after_s = self._dispatcher.settings.stale_after_s
            step_s = model.decode_step_s(state.decoding(now_s, stale_after_s))
            left = 1.0 - self._shares.share(target.server, now_s)
            answer_tokens = answer_s * left / step_s if step_s > 0.0 else answer_tokens
        self.load.ended(answer_tokens, lasted_s)

    # Roles.

    def tick(self, now_s: float) -> None:
        """Called a few times a second: moves the role of an engine where the load asks for it."""
        if self._moves_roles and now_s >= self._roles_due_s:
            self._roles_due_s = now_s + ROLES_PERIOD_S
            load, settings = self._observe(now_s), RoleSettings()
            self._prefill_wait_s = find_prefill_wait_s(load, settings.ttft_growth)
            decision, self._history = plan_roles(load, settings, self._history, now_s)
            if isinstance(decision, SetRole):
                self.roles[decision.server] = decision.role
                self.role_changes[decision.reason] += 1
                self.load.forget_measured()
                extra = {"engine": decision.server, "role": decision.role, "reason": decision.reason}
                log.info("an engine has another role", extra=extra)

    def _observe(self, now_s: float) -> RoleObservation:
        """The load of the engines whose agents leave their role open, as far as requests of this gateway show it.

        Without engines while not all are peers, as in a rollout: which part of the load each kind takes is not known.
        """
        dispatcher, load = self._dispatcher, self.load
        states = [row for row in dispatcher.targets.ordered if row.accepting]
        if len({self._peers.get(row.target.server) for row in states}) > 1:
            states = []
        movable = {name for name in self._peers if self._states[name].role is EngineRole.UNIFIED}
        states = [row for row in states if row.target.server in movable]
        return observe_roles(
            load,
            states,
            self.roles,
            transfer_s=self._link.transfer_s(round(load.prompt_tokens), met=True),
            now_s=now_s,
            stale_after_s=dispatcher.settings.stale_after_s,
            traffic_share=dispatcher.targets.traffic_share,
        )


def make_placements(config: Disaggregation | None, dispatcher: "Dispatcher") -> Placements | None:
    """Returns what the settings ask for; None: each request goes to the engine with the least time to first token."""
    if config is None and not dispatcher.settings.targets.is_bounded:
        return None
    return Placements(config, dispatcher)
