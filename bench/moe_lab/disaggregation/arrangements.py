"""The arrangements that are compared on a number of GPUs, by name.

GPUs are cut into servers, each a lockstep group. The servers take requests whole (`unified`), have fixed roles (`4+4`:
the first four GPUs compute prompts, the others decode), or take each request whole or as a pair, with roles that move
with the load (`auto`).
"""

from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.request.order import RequestSettings
from moe_tools.advisor.clocks import RooflineClock
from moe_tools.advisor.fleet import FleetLoad, FleetShape
from moe_tools.simulator.hardware import PRESETS
from moe_tools.traces import TraceRequest

# Fitted step times are of groups of 1, 2, 4 and 8 ranks, and splits by hand have others.
CLOCK = RooflineClock(preset=PRESETS["h100-qwen3-30b-a3b"])
REFERENCE = "vLLM 0.32"


def arrangements(gpus: int) -> dict[str, FleetShape]:
    """The arrangements of this number of GPUs, by name; the first one is the reference."""
    whole = (gpus,)
    found = {
        REFERENCE: FleetShape(servers=whole, stock=True),
        "vLLM, interval 2": FleetShape(servers=whole, stock=True, limits={"prefill_schedule_interval": 2}),
        "unified": FleetShape(servers=whole),
    }
    for prefill in range(max(1, gpus // 2), gpus):
        cut = (prefill, gpus - prefill)
        found[f"{prefill}+{gpus - prefill}"] = FleetShape(servers=cut, prefill=1, pairs=True)
        found[f"vLLM, {prefill}+{gpus - prefill}"] = FleetShape(servers=cut, prefill=1, pairs=True, stock=True)
    for count in (2, 4, 8):
        if count <= gpus:
            found |= _alike(gpus, count)
    return found


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
        found[f"{prefill}+{count - prefill}, {name}"] = FleetShape(servers=cut, prefill=prefill, pairs=True)
    return found


def load_of(trace: tuple[TraceRequest, ...], seed: int, *, targets: LatencyTargets, max_model_len: int) -> FleetLoad:
    """The load of a run.

    Args:
        trace: the requests.
        seed: of the experts' popularity.
        targets: objective of the choice between whole requests and pairs.
        max_model_len: longest prompt with its answer.
    """
    return FleetLoad(
        clock=CLOCK, trace=trace, max_model_len=max_model_len, request=RequestSettings(), targets=targets, seed=seed
    )
