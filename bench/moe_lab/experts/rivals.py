"""Rival placements of experts: each function takes a load and the present placement and gives the next one.

vLLM's policy is imported from vLLM. DeepSeek's is written from the description in the README of DeepSeek's EPLB and in
the DeepSeek-V3 report; Gimbal's from the published parts of Algorithm 3 of arXiv 2602.21626, of which no formula is
published: a pool of experts with the strongest affinity is pinned to one anchor rank, the rest is spread greedily by
load.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from moe_scheduling.expert.decision import (
    ExpertCosts,
    ExpertHistory,
    ExpertLoad,
    ExpertSettings,
    Move,
    Placement,
    add_steps,
    plan_experts,
)
from moe_scheduling.expert.placement import Ints, keep_slots
from vllm.distributed.eplb.policy import EPLB_POLICIES

from moe_lab.experts.loads import GroupSizes, PairedLoad

Policy = Callable[[ExpertLoad, Placement], Placement]

# Gimbal's threshold and pool size are not published: here a pair counts when it is clearly more frequent than chance,
# and the pool fills half of the anchor.
_AFFINITY = 1.2
_POOL_PART = 0.5


def make_policies(group: GroupSizes, costs: ExpertCosts, settings: ExpertSettings) -> Mapping[str, Policy]:
    """All of them, for a group; those with a memory begin anew."""
    return {
        "static": lambda _load, placement: placement,
        "ours": Ours(costs, settings),
        "ours, no gate": _without_gate(costs, settings),
        "vLLM": _vllm(group),
        "DeepSeek, by node": _deepseek(group.routing_groups, group.nodes),
        "DeepSeek, global": _deepseek(1, 1),
        "Gimbal, anchor": plan_anchor,
    }


class Ours:
    """The product's decision with its history, as an engine keeps it; `decisions` has all that were made."""

    def __init__(self, costs: ExpertCosts, settings: ExpertSettings) -> None:
        self._costs = costs
        self._settings = settings
        self._history: ExpertHistory | None = None
        self.decisions: list[object] = []

    def __call__(self, load: ExpertLoad, placement: Placement) -> Placement:
        history = add_steps(self._history, load, placement, self._costs, self._costs.horizon_steps)
        decision = plan_experts(load, placement, self._costs, self._settings, history)
        self._history = decision.history
        self.decisions.append(decision)
        if not isinstance(decision, Move):
            return placement
        assert self._history.regret is not None
        self._history = replace(self._history, regret=self._history.regret.add_moves(decision.cost_s))
        return decision.placement


def _without_gate(costs: ExpertCosts, settings: ExpertSettings) -> Policy:
    free = replace(costs, move_s=0.0)
    return lambda load, placement: plan_experts(load, placement, free, settings).candidate


def _vllm(group: GroupSizes) -> Policy:
    policy = EPLB_POLICIES["default"]

    def plan(load: ExpertLoad, placement: Placement) -> Placement:
        table = policy.rebalance_experts(
            torch.from_numpy(load.by_expert),
            placement.slots,
            group.routing_groups,
            placement.nodes,
            placement.ranks,
            torch.from_numpy(placement.physical_to_logical),
        )
        return replace(placement, physical_to_logical=table.numpy())

    return plan


def _deepseek(groups: int, nodes: int) -> Policy:
    def plan(load: ExpertLoad, placement: Placement) -> Placement:
        # Groups that do not fill whole nodes: the global way, as published.
        used_groups, used_nodes = (groups, nodes) if groups % nodes == 0 else (1, 1)
        rows = [_plan_layer(row, placement, used_groups, used_nodes) for row in load.by_expert.tolist()]
        table = keep_slots(placement.physical_to_logical, np.array(rows), placement.ranks)
        return replace(placement, physical_to_logical=table)

    return plan


def _plan_layer(work: Sequence[float], placement: Placement, groups: int, nodes: int) -> list[int]:
    """Groups of experts to nodes, then copies within each node, then copies to its ranks."""
    size = len(work) // groups
    weights = [sum(work[group * size : (group + 1) * size]) for group in range(groups)]
    row = []
    for packed in pack_evenly(weights, nodes):
        experts = [expert for group in sorted(packed) for expert in range(group * size, (group + 1) * size)]
        copies = copy_hottest([work[expert] for expert in experts], placement.slots // nodes)
        shares = [work[experts[item]] / copies.count(item) for item in copies]
        for rank in pack_evenly(shares, placement.ranks // nodes):
            row += [experts[copies[place]] for place in rank]
    return row


def pack_evenly(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items into packs of equal number: the heaviest first, each into the lightest pack with room."""
    room = len(weights) // packs
    heap: list[tuple[float, int]] = [(0.0, pack) for pack in range(packs)]
    packed: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        weight, pack = heapq.heappop(heap)
        packed[pack].append(item)
        if len(packed[pack]) < room:
            heapq.heappush(heap, (weight + weights[item], pack))
    return packed


def copy_hottest(work: Sequence[float], slots: int) -> list[int]:
    """Each item once, then one copy after the other of that with the largest share."""
    copies = list(range(len(work)))
    heap = [(-amount, item, 1) for item, amount in enumerate(work)]
    heapq.heapify(heap)
    for _ in range(slots - len(work)):
        _, item, count = heap[0]
        heapq.heapreplace(heap, (-work[item] / (count + 1), item, count + 1))
        copies.append(item)
    return copies


def plan_anchor(load: ExpertLoad, placement: Placement) -> Placement:
    """Gimbal's first form: a fixed pool by affinity on rank 0, the remaining experts greedily by load."""
    rows = [_anchor_layer(layer, load, placement) for layer in range(load.layers)]
    table: Ints = keep_slots(placement.physical_to_logical, np.array(rows), placement.ranks)
    return replace(placement, physical_to_logical=table)


def _anchor_layer(layer: int, load: ExpertLoad, placement: Placement) -> list[int]:
    work, places = load.by_expert[layer], placement.slots_per_rank
    copies = copy_hottest(work.tolist(), placement.slots)
    shares = work[copies] / np.bincount(copies)[copies]
    pool = _pool(layer, load, int(places * _POOL_PART))
    ranks: list[list[int]] = [[] for _ in range(placement.ranks)]
    ranks[0] = [copies.index(expert) for expert in pool]
    loads = [float(shares[rank].sum()) if rank else 0.0 for rank in ranks]
    for item in np.argsort(-shares, kind="stable").tolist():
        if item in ranks[0]:
            continue
        rank = min((rank for rank in range(len(ranks)) if len(ranks[rank]) < places), key=loads.__getitem__)
        ranks[rank].append(item)
        loads[rank] += float(shares[item])
    return [copies[item] for rank in ranks for item in rank]


def _pool(layer: int, load: ExpertLoad, size: int) -> list[int]:
    """Experts of a layer with the strongest tie to one of the next layer; none where pairs are not known."""
    if not isinstance(load, PairedLoad) or load.pairs is None or layer >= len(load.pairs):
        return []
    pairs = load.pairs[layer]
    chance = np.outer(pairs.sum(1), pairs.sum(0)) / max(float(pairs.sum()), 1e-300)
    linked = np.where(pairs > _AFFINITY * chance, pairs, 0.0).max(1)
    return [int(expert) for expert in np.argsort(-linked, kind="stable")[:size] if linked[expert] > 0]
