"""The arrangements that are compared on a number of GPUs, by name.

GPUs are cut into servers, each a lockstep group. The servers take requests whole (`unified`), have fixed roles (`4+4`:
the first four GPUs compute prompts, the others decode), or take each request whole or as a pair, with roles that move
with the load (`auto`).
"""

from dataclasses import replace

from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.request.order import RequestSettings
from moe_tools.advisor.clocks import ServerParallelism, choose_clock
from moe_tools.advisor.fleet import FleetLoad, FleetShape
from moe_tools.traces import TraceRequest

# Fitted step times of groups of one, two, four and eight GPUs; composed of kernels, compared with no engine.
CLOCK = "h200-qwen3-30b-a3b"
# As in the experiments: vLLM 0.32's default on GPUs of 70 GiB and more, and the longest steps that were measured.
_LIMITS = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192}
REFERENCE = "vLLM 0.32"


def arrangements(gpus: int, clock: str = CLOCK) -> dict[str, FleetShape]:
    """The arrangements of this number of GPUs whose servers have known step times; the first one is the reference.

    Args:
        gpus: in all.
        clock: name in `CLOCKS`.

    Raises:
        InvalidInput: there are no step times of all these GPUs as one group.
    """
    whole = (gpus,)
    found = {
        REFERENCE: FleetShape(servers=whole, stock=True),
        "vLLM, interval 2": FleetShape(servers=whole, stock=True, limits={"prefill_schedule_interval": 2}),
        "unified": FleetShape(servers=whole),
    }
    for prefill in range(max(1, gpus // 2), gpus):
        cut = (prefill, gpus - prefill)
        if prefill != gpus - prefill:
            found |= _split(f"{prefill}+{gpus - prefill}", cut, 1)
    for count in (2, 4, 8):
        if count <= gpus:
            found |= _alike(gpus, count)
    known = choose_clock(clock, gpus)
    if not known.covers(ServerParallelism(gpus)):
        raise InvalidInput([InputError("--gpus", f"{clock} has no step times of {gpus} GPUs as one group")])
    return {
        name: replace(shape, limits={**_LIMITS, **shape.limits})
        for name, shape in found.items()
        if all(known.covers(ServerParallelism(ranks)) for ranks in shape.servers)
    }


def _split(name: str, servers: tuple[int, ...], prefill: int) -> dict[str, FleetShape]:
    """Fixed roles, with our schedulers and with stock ones."""
    ours = FleetShape(servers=servers, prefill=prefill, pairs=True)
    return {name: ours, f"vLLM, {name}": replace(ours, stock=True)}


def _alike(gpus: int, count: int) -> dict[str, FleetShape]:
    """This many servers of the same size: whole requests, every fixed split, and the choice for each request."""
    cut = (gpus // count,) * count
    name = f"{count} of {gpus // count}"
    found = {
        f"vLLM, {name}": FleetShape(servers=cut, stock=True),
        f"unified, {name}": FleetShape(servers=cut),
        f"auto, {name}": FleetShape(servers=cut, pairs=True, moves=True),
    }
    for prefill in range(1, count):
        found |= _split(f"{prefill}+{count - prefill}, {name}", cut, prefill)
    return found


def load_of(
    trace: tuple[TraceRequest, ...], seed: int, *, clock: str, gpus: int, targets: LatencyTargets, max_model_len: int
) -> FleetLoad:
    """The load of a run.

    Args:
        trace: the requests.
        seed: of the experts' popularity.
        clock: name in `CLOCKS`.
        gpus: in all.
        targets: objective of the choice between whole requests and pairs.
        max_model_len: longest prompt with its answer.
    """
    return FleetLoad(
        clock=choose_clock(clock, gpus),
        trace=trace,
        max_model_len=max_model_len,
        request=RequestSettings(),
        targets=targets,
        seed=seed,
    )
