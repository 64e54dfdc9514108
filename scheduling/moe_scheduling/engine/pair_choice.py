"""Layer 2 with disaggregation: one target for the whole request, or a pair: prefill at one, decode at another.

`choose_placement` is called for each request where KV blocks can travel. It changes nothing: the caller then updates
the `TargetState` of each chosen target, the prefix index and the `PrefillShares`.

Objective, in seconds (`LatencyTargets`): the request's own time to the first token, and `answer_weight` times the
seconds that answers take longer. These are three: its own answer at the target that decodes; the requests that its
prompt delays at the group that computes it; the answers that one more request makes longer at the group that decodes.
A request whose prompt is still ahead counts as one that decodes: it does so when this prompt is computed.

Without bounds a pair has to cost less than the soonest whole request, and its first token may come later by
`ttft_growth` at most: the requests that will wait behind its prompt are not in the sum. At an engine with the role
`PREFILL` that holds for the time until the prompt is computed.

With bounds, a placement that keeps them is preferred to one that does not, of those that break one the least overrun,
and then TTFT is least.

A group is the ranks of one server. They end a step together, so a prompt interrupts the answers on all of them; a
prompt that is hidden behind a longer one on another rank interrupts none.

Invariants: the decision depends on the arguments alone; a target that does not accept or is excluded is never chosen;
the two targets of a pair belong to different servers; a role that leaves no candidate is ignored rather than refused.
O(targets) and, for each value of `peers`, `NEAREST` squared. Of a large fleet a sample of each kind of targets is
compared, as in `target_list.py`.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from enum import StrEnum
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

from moe_scheduling.engine.choice import Hold, HoldReason, Job, Refuse, RefuseReason, fleet_default_model
from moe_scheduling.engine.disaggregation import STEPS_TO_FIRST_TOKEN, EngineRole, KvTransfer, LatencyTargets
from moe_scheduling.engine.target_list import HOLDERS, LARGE_FLEET, TargetList, draw
from moe_scheduling.engine.target_state import TargetState
from moe_scheduling.signals import StepTime, Target

# Most servers of each side that are combined into pairs, of those between which KV blocks can travel: those with the
# least cost of their own.
NEAREST = 8
# Uncached prompt tokens that an engine preferred for decoding computes itself: a step of a decode engine reads the
# weights for few tokens, so this many more hardly make it longer, and a transfer costs more than they do. Set by hand.
DECODE_COMPUTES_TOKENS = 256
# Greatest part of its time that a rank is taken to spend on prompts.
_MOST_SHARE = 0.95
_SATURATED = Hold(HoldReason.SATURATED)


class PlacementReason(StrEnum):
    """Why a placement was chosen; a metric label."""

    LEAST_COST = "least_cost"
    LEAST_OVERRUN = "least_overrun"
    WITHIN_BOUNDS = "within_bounds"


class LatencyPrediction(NamedTuple):
    """The predicted figures of a placement, all in seconds.

    Attributes:
        ttft_s: from sending to the first token.
        prefill_s: part of `ttft_s` until the prompt is computed.
        transfer_s: part of `ttft_s` in which KV blocks travel; 0 for a whole request.
        inter_token_s: mean time between the tokens of its answer.
        longest_step_s: longest step at the groups it takes part in while prompts are computed.
        cost_s: the objective without bounds.
    """

    ttft_s: float
    prefill_s: float
    transfer_s: float
    inter_token_s: float
    longest_step_s: float
    cost_s: float


class RequestPlacement(NamedTuple):
    """Compute the prompt at `prefill` and the answer at `decode`, which are one target for a whole request."""

    prefill: Target
    decode: Target
    prediction: LatencyPrediction
    reason: PlacementReason

    @property
    def is_pair(self) -> bool:
        """Whether KV blocks travel between two engines."""
        return self.prefill != self.decode


class PairContext(NamedTuple):
    """What the choice knows beside the job and the targets.

    Attributes:
        targets: the objective.
        transfer: of KV blocks; None: they cannot travel, and only whole requests are placed.
        roles: by server; a server that is absent is `UNIFIED`.
        prefill_shares: part of its time that each rank of a server spends on prompts, by server.
        met: pairs of servers, prefill first, that have had contact.
        answer_tokens: mean length of the answers.
        stale_after_s: age from which a signal is ignored.
        peers: by server, a text that is equal for servers between which KV blocks can travel; a server that is absent
            takes part in no pair. None: they can travel between any two.
        prefill_wait_s: predicted wait up to which an engine with the role `PREFILL` is in time for every prompt: what
            the plan of the roles allows (`fleet/role_latency.py`).
        saturation_s: predicted wait at which a target is saturated; a request is held while all are that may compute
            its prompt. None: it never is.
    """

    targets: LatencyTargets = LatencyTargets()
    transfer: KvTransfer | None = None
    roles: Mapping[str, EngineRole] = MappingProxyType({})
    prefill_shares: Mapping[str, float] = MappingProxyType({})
    met: Collection[tuple[str, str]] = ()
    answer_tokens: float = 128.0
    stale_after_s: float = 2.0
    peers: Mapping[str, str] | None = None
    prefill_wait_s: float = 0.0
    saturation_s: float | None = None

    def is_able(self, server: str) -> bool:
        """Returns whether a server may take part in a pair."""
        return self.peers is None or server in self.peers

    def peers_of(self, server: str) -> str | None:
        """Returns the value that this server's peers have in common; None where all servers are peers."""
        return None if self.peers is None else self.peers.get(server)


class _Group(NamedTuple):
    """Terms that the ranks of one server have in common.

    Attributes:
        most_ahead: prompt tokens ahead at the rank that has the most.
        next_ahead: at the rank that has the most of the others.
        decoding: requests that decode, of all ranks.
        requests: of all ranks.
        most_requests: at the rank that has the most.
        left: part of the time in which no rank computes a prompt.
    """

    most_ahead: int
    next_ahead: int
    decoding: int
    requests: int
    most_requests: int
    left: float


class _Side(NamedTuple):
    """Terms of one target, as the one that computes the prompt and as the one that decodes.

    Attributes:
        target: the target.
        role: of its server.
        own_tokens: uncached prompt tokens here.
        wait_s: seconds until the prompt begins to be computed here.
        first_token_s: seconds until the prompt is computed here.
        interrupted_s: seconds that the requests at the group wait in all while the prompt is computed.
        prefill_step_s: longest step of the group while the prompt is computed; 0 where nobody decodes.
        arrive_s: seconds from the arrival of the KV blocks to the first token.
        inter_token_s: mean time between tokens of the answer here.
        crowded_s: seconds for each token that the other answers of the group take longer in all.
        decode_step_s: longest step of the group while the prompts that it has already are computed.
    """

    target: Target
    role: EngineRole
    own_tokens: int
    wait_s: float
    first_token_s: float
    interrupted_s: float
    prefill_step_s: float
    arrive_s: float
    inter_token_s: float
    crowded_s: float
    decode_step_s: float


def choose_placement(
    job: Job,
    states: Sequence[TargetState],
    context: PairContext,
    *,
    turn: int,
    now_s: float,
    exclude: Collection[Target] = (),
) -> RequestPlacement | Hold | Refuse:
    """Returns where the prompt and the answer of a job are computed, or why nowhere.

    Of a large fleet, given as a `TargetList`, a sample alone is compared.

    Args:
        job: the request; `cached` tokens are neither computed again nor moved.
        states: one for each known target, in a stable order.
        context: objective, transfer, roles and recent load.
        turn: a number that rises by one with each request; decides ties.
        now_s: the time, on the clock of the states.
        exclude: targets that failed this request before.
    """
    accepting = [state for state in states if state.accepting]
    if not accepting:
        return Refuse(RefuseReason.NO_ENGINE)
    candidates = [state for state in accepting if state.target not in exclude]
    if not candidates:
        return Refuse(RefuseReason.NO_OTHER_ENGINE)
    groups = _by_server(candidates)
    context = _with_usable_roles(context, groups)
    if len(candidates) > LARGE_FLEET and isinstance(states, TargetList):
        candidates = _sample(job, groups, context, turn)
    sides = _sides(job, candidates, groups, context, fleet_default_model(states), now_s)
    if _is_saturated(sides, context):
        return _SATURATED
    start = turn % len(sides)
    sides = sides[start:] + sides[:start]
    placed = _within_growth(_wholes(sides, context), _pairs(job, sides, context), sides, context)
    if not placed:
        # Roles are preferences: with one of them alone left, its engines do everything.
        placed = [_whole(side, context) for side in sides]
    key = _key(context.targets)
    best = min(placed, key=lambda placement: key(placement.prediction))
    return best._replace(reason=_reason(context.targets, best.prediction))


def _by_server(states: Sequence[TargetState]) -> dict[str, list[TargetState]]:
    by_server: dict[str, list[TargetState]] = {}
    for state in states:
        by_server.setdefault(state.target.server, []).append(state)
    return by_server


def _with_usable_roles(context: PairContext, servers: Collection[str]) -> PairContext:
    """Returns the context in which servers of the role `PREFILL` do everything where no other one decodes for them.

    They take part in no pair: their engines may be able to send KV blocks and not to receive any.
    """
    roles, peers = context.roles, context.peers
    if context.transfer is None or not roles:
        return context
    prefill = [server for server in servers if roles.get(server) is EngineRole.PREFILL]
    decode = {
        context.peers_of(server)
        for server in servers
        if roles.get(server) is not EngineRole.PREFILL and context.is_able(server)
    }
    alone = {server for server in prefill if not context.is_able(server) or context.peers_of(server) not in decode}
    if not alone:
        return context
    return context._replace(
        roles={**roles, **dict.fromkeys(alone, EngineRole.UNIFIED)},
        peers={} if peers is None else {name: value for name, value in peers.items() if name not in alone},
    )


def _sample(
    job: Job, groups: Mapping[str, Sequence[TargetState]], context: PairContext, turn: int
) -> list[TargetState]:
    """Returns the states of a large fleet to compare in this turn: a draw of each role and value of `peers`.

    A draw of all would miss the few engines of a role. Those that hold a prefix of the prompt are added.
    """
    kinds: dict[Hashable, list[TargetState]] = {}
    for server, group in groups.items():
        kinds.setdefault((context.roles.get(server), context.peers_of(server)), []).extend(group)
    sample = [state for kind in kinds.values() for state in draw(kind, turn)]
    cached = list(job.cached)
    begin = turn % max(1, len(cached) - HOLDERS + 1)
    holders = cached[begin : begin + HOLDERS]
    sample += [state for target in holders for state in groups.get(target.server, ()) if state.target == target]
    return list(dict.fromkeys(sample))


def _sides(
    job: Job,
    states: Sequence[TargetState],
    groups: Mapping[str, Sequence[TargetState]],
    context: PairContext,
    default: StepTime,
    now_s: float,
) -> list[_Side]:
    """Returns the terms of these states; those of a group are computed once, of all its states."""
    servers = dict.fromkeys(state.target.server for state in states)
    terms = {server: _group(server, groups[server], context, now_s) for server in servers}
    return [
        _side(job, state, terms[state.target.server], context, state.step_time_model or default, now_s)
        for state in states
    ]


def _group(server: str, states: Sequence[TargetState], context: PairContext, now_s: float) -> _Group:
    stale_after_s = context.stale_after_s
    most_ahead = next_ahead = decoding = requests = most_requests = 0
    for state in states:
        ahead = state.ahead_prefill_tokens(now_s, stale_after_s)
        if ahead > most_ahead:
            most_ahead, next_ahead = ahead, most_ahead
        elif ahead > next_ahead:
            next_ahead = ahead
        here = state.requests(now_s, stale_after_s)
        requests += here
        most_requests = max(most_requests, here)
        decoding += state.decoding(now_s, stale_after_s)
    left = _left(context.prefill_shares.get(server, 0.0), len(states))
    return _Group(most_ahead, next_ahead, decoding, requests, most_requests, left)


def _side(
    job: Job, state: TargetState, group: _Group, context: PairContext, step_time: StepTime, now_s: float
) -> _Side:
    stale_after_s, role = context.stale_after_s, context.roles.get(state.target.server, EngineRole.UNIFIED)
    token_s, prompt_s, step_tokens = step_time.prefill_s, step_time.prefill_base_s, state.step_tokens
    ahead = state.ahead_prefill_tokens(now_s, stale_after_s)
    others_ahead = group.next_ahead if ahead == group.most_ahead else group.most_ahead
    own = job.uncached_tokens(state.target)
    here = state.requests(now_s, stale_after_s) + 1
    # A step waits for the rank with the most requests.
    before_s = step_time.decode_step_s(group.most_requests)
    step_s = step_time.decode_step_s(here) if here > group.most_requests else before_s
    # No step is longer than one with a full chunk.
    full_step_s = step_s + prompt_s + token_s * step_tokens
    # Of hundreds of ranks that compute prompts most of the time, nothing is left in floating point.
    inter_token_s = min(step_s / group.left, full_step_s) if group.left else full_step_s
    backlog, longest = group.most_ahead, max(ahead + own, others_ahead)
    behind_s = (prompt_s if backlog else 0.0) + token_s * min(backlog, step_tokens)
    # Those whose prompts are ahead decode by then, or have left a prefill engine; those behind this one wait for it.
    delayed = group.decoding if role is EngineRole.PREFILL else group.requests
    # Steps with prompt tokens that this prompt adds.
    steps = -(-longest // step_tokens) - -(-backlog // step_tokens)
    return _Side(
        target=state.target,
        role=role,
        own_tokens=own,
        wait_s=state.wait_s(step_time, now_s, stale_after_s),
        first_token_s=state.first_token_s(own, step_time, now_s, stale_after_s),
        interrupted_s=delayed * (token_s * (longest - backlog) + prompt_s * steps),
        prefill_step_s=step_s + prompt_s + token_s * min(longest, step_tokens) if group.decoding else 0.0,
        arrive_s=state.ttft_model(step_time, now_s, stale_after_s).kv_s + STEPS_TO_FIRST_TOKEN * step_s + behind_s,
        inter_token_s=inter_token_s,
        crowded_s=group.requests * (1.0 - before_s / step_s) * inter_token_s if step_s else 0.0,
        decode_step_s=step_s + behind_s,
    )


def _left(share: float, ranks: int) -> float:
    """Returns the part of a group's time in which none of its ranks, taken as independent, computes a prompt.

    Args:
        share: part of its time that each rank spends on prompts.
        ranks: of the group.
    """
    return (1.0 - min(_MOST_SHARE, max(0.0, share))) ** ranks


def _is_saturated(sides: Sequence[_Side], context: PairContext) -> bool:
    """Returns whether all targets are saturated that may compute the prompt."""
    saturation_s = context.saturation_s
    if saturation_s is None:
        return False
    computing = [
        side for side in sides if _does_both(side) or (side.role is EngineRole.PREFILL and context.transfer is not None)
    ]
    return all(side.wait_s >= saturation_s for side in computing or sides)


def _wholes(sides: Sequence[_Side], context: PairContext) -> list[RequestPlacement]:
    """Returns the whole requests that are compared: without bounds the soonest.

    Of those that are as soon it is the first one, as in `choice.py`: without pairs both choose alike.
    """
    able = [side for side in sides if _does_both(side)]
    if able and not context.targets.is_bounded:
        able = [min(able, key=attrgetter("first_token_s"))]
    return [_whole(side, context) for side in able]


def _does_both(side: _Side) -> bool:
    if side.role is EngineRole.DECODE:
        return side.own_tokens <= DECODE_COMPUTES_TOKENS
    return side.role is EngineRole.UNIFIED


def _whole(side: _Side, context: PairContext) -> RequestPlacement:
    longer_s = side.interrupted_s + context.answer_tokens * (side.inter_token_s + side.crowded_s)
    prediction = LatencyPrediction(
        ttft_s=side.first_token_s,
        prefill_s=side.first_token_s,
        transfer_s=0.0,
        inter_token_s=side.inter_token_s,
        longest_step_s=max(side.prefill_step_s, side.decode_step_s),
        cost_s=side.first_token_s + context.targets.answer_weight * longer_s,
    )
    return RequestPlacement(side.target, side.target, prediction, PlacementReason.LEAST_COST)


def _pairs(job: Job, sides: Sequence[_Side], context: PairContext) -> list[RequestPlacement]:
    transfer, weight = context.transfer, context.targets.answer_weight
    if transfer is None:
        return []
    able = [side for side in sides if context.is_able(side.target.server)]
    prefill = [side for side in able if side.role is not EngineRole.DECODE]
    decode = [side for side in able if side.role is not EngineRole.PREFILL]
    bound_s = context.targets.inter_token_s

    def prefill_cost(side: _Side) -> tuple[float, float]:
        return _overrun(side.prefill_step_s, bound_s), side.first_token_s + weight * side.interrupted_s

    def decode_cost(side: _Side) -> tuple[float, float]:
        longer_s = context.answer_tokens * (side.inter_token_s + side.crowded_s)
        moved_s = transfer.transfer_s(_moved_tokens(job, side), met=True)
        return _overrun(side.decode_step_s, bound_s), side.arrive_s + moved_s + weight * longer_s

    nearest_prefill = _nearest(prefill, prefill_cost, context)
    return [
        _pair(job, one, other, transfer, context)
        for peers, others in _nearest(decode, decode_cost, context).items()
        for other in others
        for one in nearest_prefill.get(peers, ())
        if one.target.server != other.target.server
    ]


def _within_growth(
    wholes: list[RequestPlacement], pairs: list[RequestPlacement], sides: Sequence[_Side], context: PairContext
) -> list[RequestPlacement]:
    """Returns the whole requests and the pairs that are not much later; all where bounds decide, or pairs alone."""
    targets = context.targets
    if not wholes or targets.is_bounded:
        return pairs + wholes
    latest_s = (1.0 + targets.ttft_growth) * min(whole.prediction.ttft_s for whole in wholes)
    prefill = {side.target: side.wait_s for side in sides if side.role is EngineRole.PREFILL}

    def is_soon(pair: RequestPlacement) -> bool:
        # For an engine with the role, the fleet's plan has weighed the way of the blocks and the wait that it allows.
        if (wait_s := prefill.get(pair.prefill)) is None:
            return pair.prediction.ttft_s <= latest_s
        counted_s = wait_s if wait_s <= context.prefill_wait_s else 0.0
        return pair.prediction.prefill_s - counted_s <= latest_s

    return [*(pair for pair in pairs if is_soon(pair)), *wholes]


def _nearest(
    sides: Sequence[_Side], cost: Callable[[_Side], tuple[float, float]], context: PairContext
) -> dict[str | None, list[_Side]]:
    """Returns, by value of `peers`, the cheapest target of each of the `NEAREST` cheapest servers."""
    found: dict[str | None, dict[str, _Side]] = {}
    for side in sorted(sides, key=cost):
        server = side.target.server
        nearest = found.setdefault(context.peers_of(server), {})
        if len(nearest) < NEAREST:
            nearest.setdefault(server, side)
    return {peers: list(nearest.values()) for peers, nearest in found.items()}


def _moved_tokens(job: Job, side: _Side) -> int:
    return job.prompt_tokens - max(0, job.cached.get(side.target, 0))


def _pair(job: Job, prefill: _Side, decode: _Side, transfer: KvTransfer, context: PairContext) -> RequestPlacement:
    met = (prefill.target.server, decode.target.server) in context.met
    transfer_s = transfer.transfer_s(_moved_tokens(job, decode), met=met)
    ttft_s = prefill.first_token_s + transfer_s + decode.arrive_s
    longer_s = prefill.interrupted_s + context.answer_tokens * (decode.inter_token_s + decode.crowded_s)
    prediction = LatencyPrediction(
        ttft_s=ttft_s,
        prefill_s=prefill.first_token_s,
        transfer_s=transfer_s,
        inter_token_s=decode.inter_token_s,
        longest_step_s=max(prefill.prefill_step_s, decode.decode_step_s),
        cost_s=ttft_s + context.targets.answer_weight * longer_s,
    )
    return RequestPlacement(prefill.target, decode.target, prediction, PlacementReason.LEAST_COST)


def _key(targets: LatencyTargets) -> Callable[[LatencyPrediction], tuple[float, float, float]]:
    bounded = targets.inter_token_s is not None

    def key(prediction: LatencyPrediction) -> tuple[float, float, float]:
        return (
            _overrun(prediction.longest_step_s, targets.inter_token_s),
            _overrun(prediction.ttft_s, targets.ttft_s),
            prediction.ttft_s if bounded else prediction.cost_s,
        )

    return key


def _overrun(value_s: float, bound_s: float | None) -> float:
    """Returns by which part of a bound a value exceeds it; 0 within it, or without a bound."""
    return 0.0 if bound_s is None else max(0.0, value_s / bound_s - 1.0)


def _reason(targets: LatencyTargets, prediction: LatencyPrediction) -> PlacementReason:
    if not targets.is_bounded:
        return PlacementReason.LEAST_COST
    overrun = _overrun(prediction.longest_step_s, targets.inter_token_s) + _overrun(prediction.ttft_s, targets.ttft_s)
    return PlacementReason.LEAST_OVERRUN if overrun else PlacementReason.WITHIN_BOUNDS
