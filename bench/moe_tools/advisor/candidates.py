"""The shapes that are simulated for a number of GPUs, and why some are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_tools.advisor.clocks import ServerParallelism
from moe_tools.advisor.fleet import FleetShape

# Parts of the servers that compute prompts in a fixed split; more of them would be simulated for little news.
PREFILL_PARTS = (0.25, 0.5, 0.75)
# Prompt tokens of a step that are tried for the best shape beside those of the file.
STEP_TOKENS = (512, 2048, 8192)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A shape with its words for the table.

    Attributes:
        shape: the shape.
        servers: such as `2 of 4`: two servers of four data-parallel ranks of one GPU.
        roles: value of the resource's field, such as `unified`, `auto` or `{prefill: 1, decode: 1}`.
        step_tokens: vLLM's `max_num_batched_tokens`.
        is_present: whether the file has this shape.
    """

    shape: FleetShape
    servers: str
    roles: str
    step_tokens: int
    is_present: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Excluded:
    """Servers that are not simulated, and why."""

    servers: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PresentShape:
    """The shape of the file.

    Attributes:
        group: parallelism of a server.
        roles: as `Candidate` has them.
        prefill: servers that compute prompts in a fixed split; None without one.
    """

    group: ServerParallelism
    roles: str = "unified"
    prefill: int | None = None


def name_split(prefill: int, decode: int) -> str:
    """Returns the value of the resource's field for a fixed split."""
    return f"{{prefill: {prefill}, decode: {decode}}}"


def list_candidates(
    gpus: int,
    *,
    step_tokens: int,
    present: PresentShape,
    groups: Callable[[int], Sequence[ServerParallelism]],
    kv_tokens: Callable[[ServerParallelism], int],
    longest_tokens: int,
) -> tuple[list[Candidate], list[Excluded]]:
    """Returns the shapes of this many GPUs, the fewest servers first, and those that do not fit.

    Args:
        gpus: in all.
        step_tokens: tokens of a step in each of them.
        present: the file's own shape; its split is one of the shapes.
        groups: returns, for a number of GPUs, the parallelism of the servers whose step times are known.
        kv_tokens: tokens that fit into the KV cache of one rank of a server.
        longest_tokens: longest prompt with its answer, which has to fit.
    """
    found: list[Candidate] = []
    excluded: list[Excluded] = []
    for size in (size for size in range(gpus, 0, -1) if gpus % size == 0):
        servers = gpus // size
        if not (known := groups(size)):
            reason = f"step times of a group of {size} are not among the fitted ones"
            excluded.append(Excluded(servers=f"{servers} of {size}", reason=reason))
        for group in known:
            name = f"{servers} of {group.describe()}"
            if reason := _why_not(kv_tokens(group), longest_tokens):
                excluded.append(Excluded(servers=name, reason=reason))
                continue
            is_present = group == present.group
            found += [
                Candidate(
                    shape=replace(shape, limits={"max_num_batched_tokens": step_tokens}),
                    servers=name,
                    roles=roles,
                    step_tokens=step_tokens,
                    is_present=is_present and roles == present.roles,
                )
                for roles, shape in _by_roles(group, servers, present.prefill if is_present else None).items()
            ]
    return found, excluded


def _why_not(kv_tokens: int, longest_tokens: int) -> str:
    """Why servers with room for this many tokens a rank are left out; empty where none is."""
    if kv_tokens > longest_tokens:
        return ""
    room = f"the weights leave room for {max(0, kv_tokens):,} tokens of KV cache a rank"
    return f"{room}, and a request may have {longest_tokens:,}"


def _by_roles(group: ServerParallelism, servers: int, prefill_of_file: int | None) -> dict[str, FleetShape]:
    unified = FleetShape(servers=(group.ranks,) * servers, tensor=group.tensor, expert=group.expert)
    found = {"unified": unified}
    if servers > 1:
        found["auto"] = replace(unified, pairs=True, moves=True)
    splits = {round(servers * part) for part in PREFILL_PARTS} | {prefill_of_file or 0}
    for prefill in sorted(splits - {0, servers}):
        found[name_split(prefill, servers - prefill)] = replace(unified, prefill=prefill, pairs=True)
    return found


def list_refinements(best: Candidate, copies: int) -> Sequence[Candidate]:
    """Returns variants of the best shape: other tokens of a step, and copies of experts.

    Args:
        best: the shape.
        copies: of experts, for each layer, that are tried; 0: none.
    """
    found = [
        replace(
            best,
            shape=replace(best.shape, limits={**best.shape.limits, "max_num_batched_tokens": tokens}),
            step_tokens=tokens,
            is_present=False,
        )
        for tokens in STEP_TOKENS
        if tokens != best.step_tokens
    ]
    if copies:
        found.append(replace(best, shape=replace(best.shape, redundant=copies), is_present=False))
    return found
