"""What is compared: the product, its ablations, and the rivals, each in the strongest way that it can be run.

A variant changes a simulation: the scheduler, its limits, the choice of the engine. `is_rival` says whether it is one
of those that the product is measured against.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_scheduling.engine import EngineSettings
from moe_scheduling.request import RequestPolicy, RequestSettings

from moe_bench.simulator.rank import OURS, STOCK
from moe_bench.simulator.simulation import Simulation


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to serve.

    Attributes:
        label: for tables.
        changes: fields of the simulation.
        limits: fields of the engines' limits.
        is_rival: whether the product is measured against it.
        uses_product: whether code of the product decides in it.
        by_length: whether clients send the length of the prompt as the priority.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    is_rival: bool = False
    uses_product: bool = False
    by_length: bool = False

    def apply(self, simulation: Simulation) -> Simulation:
        """The simulation under this variant."""
        senders = replace(simulation.senders, by_length=self.by_length)
        limits = replace(simulation.limits, **self.limits)
        return replace(simulation, **self.changes, limits=limits, senders=senders)


def _stock(label: str, rival: str = "vllmInternal", *, by_length: bool = False, **limits: Any) -> Variant:
    return Variant(
        label=label,
        changes={"scheduler": STOCK, "dispatch": rival},
        limits=limits,
        is_rival=True,
        by_length=by_length,
    )


_FCFS = RequestSettings(policy=RequestPolicy.FCFS)
GIMBAL_SCHEDULER = "moe_bench.simulator.gimbal.GimbalScheduler"
REFERENCE = "vllm"
PRODUCT = "ours"
VARIANTS: Mapping[str, Variant] = {
    PRODUCT: Variant(label="ours", changes={"scheduler": OURS, "dispatch": EngineSettings()}, uses_product=True),
    # Ablations: one layer at a time.
    "oursRequest": Variant(
        label="ours, layer 1 alone", changes={"scheduler": OURS, "dispatch": "vllmInternal"}, uses_product=True
    ),
    "oursEngine": Variant(
        label="ours, layer 2 alone",
        changes={"scheduler": OURS, "dispatch": EngineSettings(), "request": _FCFS},
        uses_product=True,
    ),
    # vLLM, as it comes and tuned.
    REFERENCE: _stock("vLLM 0.32"),
    "vllm512": _stock("vLLM, 512 tokens a step", max_num_batched_tokens=512),
    "vllm1024": _stock("vLLM, 1,024 tokens a step", max_num_batched_tokens=1024),
    "vllm8192": _stock("vLLM, 8,192 tokens a step", max_num_batched_tokens=8192),
    "vllmInterval3": _stock("vLLM, prefills in every third step", prefill_schedule_interval=3),
    "vllmLongPrefill": _stock("vLLM, 512 tokens of a long prompt a step", long_prefill_token_threshold=512),
    "vllmPriority": _stock("vLLM, priority by length", by_length=True, scheduling_policy="priority"),
    # vLLM behind others' routers.
    "roundRobin": _stock("vLLM, round robin", "roundRobin"),
    "powerOfTwo": _stock("vLLM, vllm-router power of two", "powerOfTwo"),
    "consistentHash": _stock("vLLM, vllm-router consistent hash", "consistentHash"),
    "cacheAware": _stock("vLLM, vllm-router cache aware", "cacheAware"),
    "llmD": _stock("vLLM, llm-d's scorers", "llmD"),
    "dynamo": _stock("vLLM, Dynamo's router", "dynamo"),
    "gimbal": Variant(
        label="Gimbal, reconstructed",
        changes={"scheduler": GIMBAL_SCHEDULER, "dispatch": "gimbal"},
        is_rival=True,
    ),
}
