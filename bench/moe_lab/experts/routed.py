"""Real routing under placements, timed by measured kernels: what a placement is worth at small and at large steps.

The routing is that of DeepSeek-V2-Lite on texts of two domains; the seconds are modelled from measured kernels: a plane
fitted to the rows of Qwen3-30B-A3B (vLLM 0.24, bfloat16, balanced) and scaled to the experts of DeepSeek-V2-Lite, of
which no table exists. A run has rounds; each policy sees the load counted in the round before, on one half of the
tokens, and is timed on steps drawn from the other half.
"""

import csv
import gzip
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.expert.decision import ExpertCosts, ExpertLoad, ExpertSettings, Placement, StepSizes, count_moves
from moe_scheduling.expert.gpu_priors import work_prior
from moe_scheduling.expert.idle_slots import serving_slots
from moe_scheduling.expert.placement import Flags, Ints

from moe_lab.experts.loads import GroupSizes
from moe_lab.experts.rivals import Ours, Policy, make_policies

Ids = npt.NDArray[np.uint8]

EXPERTS = 64
RUNS: Mapping[str, tuple[int, ...]] = {
    "decode": (8, 16, 32, 64, 128, 256),
    "prefill": (2048, 4096, 8192),
    "both": (64, 64, 64, 64, 64, 64, 64, 2048),
    "chunks": (64, 64, 64, 64, 64, 64, 64, 8192),
}
MIXES: Mapping[str, tuple[str, ...]] = {
    "intent": ("intent",),
    "law": ("law",),
    "mixed": ("both",),
    "switching": ("intent", "intent", "law", "law"),
}
# An expert of DeepSeek-V2-Lite: three matrices of 2,048 by 1,408 in bfloat16.
_EXPERT_BYTES = 3 * 2048 * 1408 * 2
_TABLE_INTER = 768
_KNUTH = 2654435769
_OTHERS = ("static", "vLLM", "DeepSeek, global")
FLOOR = "floor"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPlane:
    """Seconds of a layer by a rank's distinct experts and (token, expert) pairs, and by the step's tokens.

    Attributes:
        launch_s: of each layer.
        step_token_s: of each token of the step, wherever its experts are.
        expert_s: of each expert that got a token.
        pair_s: of each (token, expert) pair.
        median_error: relative, on the rows that it was fitted to.
        rows: of the table.
    """

    launch_s: float
    step_token_s: float
    expert_s: float
    pair_s: float
    median_error: float
    rows: int

    def layers_s(self, distinct: Ints, pairs: Ints, tokens: int) -> float:
        """Returns the seconds of all layers, given [layer, rank]: each waits for its slowest rank."""
        work = self.expert_s * distinct + self.pair_s * pairs
        return float(work.max(1).sum()) + len(distinct) * (self.launch_s + self.step_token_s * tokens)

    def least_s(self, distinct: Ints, pairs: int, ranks: int, tokens: int) -> float:
        """Returns seconds of all layers below which no placement is, with whatever copies.

        The slowest rank has at least the mean work of all, and some rank reads at least the mean number of experts,
        rounded up, each for one pair or more.

        Args:
            distinct: [layer], experts of the whole step.
            pairs: of a layer.
            ranks: of the group.
            tokens: of the step.
        """
        mean = (self.expert_s * distinct + self.pair_s * pairs) / ranks
        whole = (self.expert_s + self.pair_s) * np.ceil(distinct / ranks)
        return self.layers_s(np.zeros((len(distinct), 1), np.int64), np.zeros(1, np.int64), tokens) + float(
            np.maximum(mean, whole).sum()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedRow:
    """One policy in one run: means over its rounds.

    Attributes:
        gpu: whose kernels.
        ranks: of the group.
        redundant: slots beside one for each expert.
        mix: domains of the tokens.
        run: sizes of the steps.
        policy: who places; `FLOOR`: nobody can place the experts so that a step takes less.
        step_ms: modelled time of the experts in a step, the first round left out.
        by_size: the same by the step's size.
        moves: of all rounds.
        moves_s: time that they take.
        run_s: time of the experts in all rounds, moves included.
    """

    gpu: str
    ranks: int
    redundant: int
    mix: str
    run: str
    policy: str
    step_ms: float
    by_size: Mapping[int, float]
    moves: int
    moves_s: float
    run_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiesBound:
    """The most that copies could win that serve steps of some sizes alone: each size with its fastest placement.

    The product's own placements are left out, since theirs are idle where they do not pay.

    Attributes:
        mix: domains of the tokens.
        run: sizes of the steps.
        redundant: slots beside one for each expert, where there are copies.
        without_ms: mean step of the fastest placement without copies.
        with_ms: mean step of the fastest placement with copies, which all steps use.
        by_size_ms: mean step where each size has the fastest placement for it, with copies or without.
    """

    mix: str
    run: str
    redundant: int
    without_ms: float
    with_ms: float
    by_size_ms: float


def bound_copies(rows: Sequence[RoutedRow]) -> list[CopiesBound]:
    """Returns the bounds of the groups with copies; none where no group is without them."""
    bounds = []
    for mix, run, redundant in dict.fromkeys((row.mix, row.run, row.redundant) for row in rows if row.redundant):
        same = [row for row in rows if (row.mix, row.run) == (mix, run) and row.policy in _OTHERS]
        without, copied = ([row for row in same if row.redundant == slots] for slots in (0, redundant))
        if without:
            fastest_ms = [min(row.by_size[size] for row in [*without, *copied]) for size in RUNS[run]]
            bounds.append(
                CopiesBound(
                    mix=mix,
                    run=run,
                    redundant=redundant,
                    without_ms=min(row.step_ms for row in without),
                    with_ms=min(row.step_ms for row in copied),
                    by_size_ms=float(np.mean(fastest_ms)),
                )
            )
    return bounds


def read_routing(data: Path) -> dict[str, Ids]:
    """Returns [layer, token, place] of each domain.

    Raises:
        InvalidInput: a file is missing, or is not such an array.
    """
    read = {}
    for domain in ("intent", "law"):
        path = data / "routing" / f"deepseek_v2_lite_esft_{domain}.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                ids = arrays["expert_ids"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidInput([InputError(str(path), f"no recorded routing: {error}")]) from None
        if ids.ndim != 3 or ids.max() >= EXPERTS:
            raise InvalidInput([InputError(str(path), f"expert_ids must be [layer, token, place] below {EXPERTS}")])
        read[domain] = ids
    return read


def fit_kernels(data: Path, gpu: str) -> KernelPlane:
    """Returns the plane through the table of a GPU (`h100` or `h200`), least squares of the relative error.

    Raises:
        InvalidInput: the table is missing or has no such rows.
    """
    path = data / "step_time" / f"moe_kernel_{gpu}_vllm0.24.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [_read_row(row) for row in csv.DictReader(file) if _is_used(row)]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput([InputError(str(path), f"no table of kernels: {error}")]) from None
    if len(rows) < 10:
        raise InvalidInput([InputError(str(path), "has too few rows of Qwen3-30B-A3B in bfloat16")])
    table = np.array(rows)
    features, seconds = np.c_[np.ones(len(table)), table[:, :3]], table[:, 3]
    fitted = np.linalg.lstsq(features / seconds[:, None], np.ones(len(table)), rcond=None)[0]
    larger = _EXPERT_BYTES / (3 * 2048 * _TABLE_INTER * 2)
    return KernelPlane(
        launch_s=float(fitted[0]),
        step_token_s=float(fitted[1]),
        expert_s=float(fitted[2]) * larger,
        pair_s=float(fitted[3]) * larger,
        median_error=float(np.median(np.abs(features @ fitted / seconds - 1))),
        rows=len(table),
    )


def _is_used(row: Mapping[str, str]) -> bool:
    wanted = {"model_shape": "Qwen3-30B-A3B", "dtype": "bfloat16", "moe_tp": "1", "distribution": "balanced"}
    return all(row[name] == value for name, value in wanted.items()) and _pairs(row) >= 1


def _pairs(row: Mapping[str, str]) -> float:
    return int(row["num_tokens"]) * int(row["topk"]) / int(row["moe_ep"])


def _read_row(row: Mapping[str, str]) -> tuple[float, float, float, float]:
    """Returns tokens of the step, distinct experts and pairs of a rank, and seconds."""
    pairs = _pairs(row)
    distinct = min(int(row["experts"]) / int(row["moe_ep"]), pairs)
    return float(row["num_tokens"]), distinct, pairs, float(row["latency_ms"]) * 1e-3


def run_all(
    data: Path, gpu: str, *, ranks: int, redundant: Sequence[int], rounds: int, steps: int, move_s: float, seed: int
) -> Iterator[RoutedRow]:
    """Yields all policies on all mixes and runs.

    Args:
        data: folder with `routing` and `step_time`.
        gpu: `h100` or `h200`.
        ranks: of the group.
        redundant: slots beside one for each expert, one group for each.
        rounds: of 3,000 steps between two decisions.
        steps: timed in each round and size.
        move_s: seconds of one expert moved.
        seed: of the steps' tokens.

    Raises:
        InvalidInput: data is missing.
    """
    routing, kernels = read_routing(data), fit_kernels(data, gpu)
    for slots in redundant:
        for mix, domains in MIXES.items():
            for run, sizes in RUNS.items():
                timed = _TimedRun(routing, kernels, domains, sizes, rounds, steps, seed)
                group = GroupSizes(layers=len(routing["law"]), experts=EXPERTS, ranks=ranks, nodes=1, redundant=slots)
                for name, policy in _policies(group, gpu, move_s).items():
                    yield timed.follow(name, policy, group, move_s, {"gpu": gpu, "mix": mix, "run": run})


def _policies(group: GroupSizes, gpu: str, move_s: float) -> dict[str, Policy]:
    """The product's decisions on the prior of the GPU, its decisions by tokens alone, rivals, and the floor."""
    work = work_prior(f"NVIDIA {gpu.upper()}", _EXPERT_BYTES, "bfloat16")
    assert work is not None
    by_tokens = ExpertCosts(token_s=work.token_s, move_s=move_s)
    costs = replace(by_tokens, expert_s=work.expert_s)
    rivals = make_policies(group, by_tokens, ExpertSettings())
    return {
        **{name: rivals[name] for name in _OTHERS},
        "by tokens alone": rivals["ours"],
        "ours": Ours(costs, ExpertSettings()),
        FLOOR: lambda _load, placement: placement,
    }


@dataclass(frozen=True, slots=True)
class _TimedRun:
    routing: Mapping[str, Ids]
    kernels: KernelPlane
    domains: Sequence[str]
    sizes: Sequence[int]
    rounds: int
    steps: int
    seed: int

    def follow(
        self, name: str, policy: Policy, group: GroupSizes, move_s: float, labels: Mapping[str, str]
    ) -> RoutedRow:
        """Runs one policy over all rounds; the steps are the same for each policy."""
        generator = np.random.default_rng(self.seed)
        placement, moves, by_size = group.start, 0, {size: list[float]() for size in self.sizes}
        before = self.domains[0]
        for number in range(self.rounds):
            domain = self.domains[number * len(self.domains) // self.rounds]
            if number:
                after = policy(self._load(before), placement)
                moves += int(count_moves(placement, after).sum())
                placement = after
            for size, kept in by_size.items():
                times = [self._step_s(domain, size, placement, name, generator) for _ in range(self.steps)]
                kept.append(float(np.mean(times)))
            before = domain
        # The first round has the placement at the start with each policy.
        means = {size: float(np.mean(times[1:])) for size, times in by_size.items()}
        step_s, parts = float(np.mean([means[size] for size in self.sizes])), len(self.sizes)
        total_s = sum(float(sum(by_size[size])) for size in self.sizes) / parts * ExpertCosts(token_s=0.0).horizon_steps
        return RoutedRow(
            gpu=labels["gpu"],
            ranks=group.ranks,
            redundant=group.redundant,
            mix=labels["mix"],
            run=labels["run"],
            policy=name,
            step_ms=step_s * 1e3,
            by_size={size: mean * 1e3 for size, mean in means.items()},
            moves=moves,
            moves_s=moves * move_s,
            run_s=total_s + moves * move_s,
        )

    def _half(self, domain: str, half: int) -> Ids:
        """Returns one half of a domain's tokens; `both` has as many of each."""
        if domain != "both":
            ids = self.routing[domain]
            return ids[:, half::2]
        parts = [self._half(name, half) for name in self.routing]
        count = min(part.shape[1] for part in parts)
        return np.concatenate([part[:, :count] for part in parts], axis=1)

    def _load(self, domain: str) -> ExpertLoad:
        ids = self._half(domain, 0)
        parts = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in ids]) / ids.shape[1]
        sizes, counts = np.unique(self.sizes, return_counts=True)
        tokens = parts * (sizes @ counts / counts.sum())
        known = StepSizes(tokens=tuple(map(float, sizes)), parts=tuple((counts / counts.sum()).tolist()))
        return ExpertLoad(tokens=tokens[None], steps=1000, sizes=known)

    def _step_s(self, domain: str, size: int, placement: Placement, name: str, generator: np.random.Generator) -> float:
        """A small step has tokens of as many sequences, a large one runs of a text."""
        ids = self._half(domain, 1)
        count = ids.shape[1]
        if size >= 2048:
            chosen = (generator.integers(count) + np.arange(size)) % count
        else:
            chosen = generator.choice(count, size, replace=False)
        if name == FLOOR:
            experts = np.array([len(np.unique(layer)) for layer in ids[:, chosen]])
            return self.kernels.least_s(experts, size * ids.shape[2], placement.ranks, size)
        distinct, pairs = count_work(ids[:, chosen], placement, idle=name == "ours")
        return self.kernels.layers_s(distinct, pairs, size)


def count_work(ids: Ids, placement: Placement, *, idle: bool) -> tuple[Ints, Ints]:
    """Returns the distinct experts and the pairs of each rank, [layer, rank], of a step.

    Args:
        ids: [layer, token, place], logical experts.
        placement: where they lie.
        idle: whether second slots of an expert on a rank take no tokens, as in the product; else a token's replica is
            that of its position, as in vLLM.
    """
    table, slots = placement.physical_to_logical, placement.slots
    serving = serving_slots(table, placement.ranks) if idle else np.ones_like(table, dtype=np.bool_)
    turns = (np.arange(ids.shape[1]) * _KNUTH) & 0xFFFFFFFF
    counts = np.stack(
        [
            np.bincount(_slots_of(row, of, serves, turns), minlength=slots)
            for row, of, serves in zip(ids, table, serving, strict=True)
        ]
    ).reshape(len(table), placement.ranks, -1)
    return np.asarray((counts > 0).sum(2)), np.asarray(counts.sum(2))


def _slots_of(ids: Ids, of: Ints, serves: Flags, turns: Ints) -> Ints:
    order = np.argsort(np.where(serves, of, EXPERTS), kind="stable")
    copies = np.bincount(of[serves], minlength=EXPERTS)
    first = np.cumsum(copies) - copies
    experts = ids.astype(np.int64)
    return np.asarray(order[first[experts] + turns[:, None] % copies[experts]].ravel())
