"""The variants: the product, its ablations, and the rivals, each in the strongest way that it can be run.

A variant changes a simulation: the scheduler, its limits, the choice of the engine. `is_rival` says whether it is one
of those that the product is measured against.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings
from moe_tools.simulator.rank import OURS, STOCK
from moe_tools.simulator.signals import Loss, SignalKind, SignalPlan
from moe_tools.simulator.simulation import SCRAPED, Simulation


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
        lost_from: part of the time in which requests come after which no signal arrives; 1: none is lost.
    """

    label: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    is_rival: bool = False
    uses_product: bool = False
    by_length: bool = False
    lost_from: float = 1.0

    def apply(self, simulation: Simulation) -> Simulation:
        """The simulation under this variant."""
        senders = replace(simulation.senders, by_length=self.by_length)
        limits = replace(simulation.limits, **self.limits)
        changed = replace(simulation, **self.changes, limits=limits, senders=senders)
        if self.lost_from < 1.0:
            loss = Loss(from_s=self.lost_from * max(row.arrival_s for row in simulation.trace))
            changed = replace(changed, signals=SignalPlan(losses=(loss,)))
        return changed

    def describe(self) -> str:
        """All that its runs depend on, beside the sources of the simulator and of the product."""
        return f"{self!r}\n{inspect.getsource(Variant)}"


def _stock(
    label: str,
    rival: str = "vllmInternal",
    *,
    by_length: bool = False,
    gateways: int = 1,
    ahead: bool = True,
    **limits: Any,
) -> Variant:
    return Variant(
        label=label,
        changes={"scheduler": STOCK, "dispatch": rival, "gateways": gateways, "async_scheduling": ahead},
        limits=limits,
        is_rival=True,
        by_length=by_length,
    )


_REQUEST = RequestSettings()


def _ours(label: str, **changes: Any) -> Variant:
    whole = {"scheduler": OURS, "dispatch": EngineSettings(), "request": _REQUEST, **changes}
    return Variant(label=label, changes=whole, uses_product=True)


def _less(label: str, **settings: Any) -> Variant:
    """With one lever of layer 1 otherwise."""
    return _ours(label, request=replace(_REQUEST, **settings))


GATEWAYS = 4
# Layer 1 as vLLM has it.
_AS_VLLM = RequestSettings(policy=RequestPolicy.FCFS)
GIMBAL_SCHEDULER = "moe_tools.simulator.gimbal.GimbalScheduler"
HRRN_SCHEDULER = "moe_tools.simulator.hrrn.HrrnScheduler"
REFERENCE = "vllm"
PRODUCT = "ours"
VARIANTS: Mapping[str, Variant] = {
    PRODUCT: _ours("ours"),
    # Ablations: one layer at a time.
    "oursRequest": Variant(
        label="ours, layer 1 alone",
        changes={"scheduler": OURS, "dispatch": "vllmInternal", "request": _REQUEST},
        uses_product=True,
    ),
    "oursEngine": Variant(
        label="ours, layer 2 alone",
        changes={"scheduler": OURS, "dispatch": EngineSettings(), "request": _AS_VLLM},
        uses_product=True,
    ),
    # Ablations: one lever of layer 1 otherwise at a time. Without a shift for its size a request's key is its arrival.
    "oursNoOrder": _less("ours, by arrival", ageing_horizon_s=0.0),
    "oursNoYield": _less("ours, chunks do not yield", yield_prefills=False),
    "oursNoCut": _less("ours, prefills not cut", cut_prefills=False),
    "oursNotLate": _less("ours, steps not deferred", defer_scheduling=False),
    "oursNoGrowth": _less("ours, no room to grow", kv_growth_blocks=0),
    "oursUnfair": _less("ours, without tenants", fairness_horizon_s=0.0),
    # A number in place of the measured speed, which is the default; the plan knows it by its former name.
    "oursDefaultAgeing": _less("ours, a second makes up for 8,000 tokens", ageing_rate=8000.0),
    # The same with less to go by.
    "oursScraped": _ours("ours, vLLM's metrics alone", signals=SCRAPED),
    "oursBlind": _ours("ours, no signals", signals=SignalPlan(source=SignalKind.NONE, period_s=1.0)),
    "oursStale": _ours("ours, signals a second old", signals=SignalPlan(delay_s=1.0)),
    "oursLost": replace(_ours("ours, signals lost half way"), lost_from=0.5),
    "oursGateways": _ours("ours, four gateways", gateways=GATEWAYS),
    # vLLM, stock and tuned.
    REFERENCE: _stock("vLLM 0.32"),
    "vllm512": _stock("vLLM, 512 tokens a step", max_num_batched_tokens=512, max_num_seqs=512),
    "vllm2048": _stock("vLLM, 2,048 tokens a step", max_num_batched_tokens=2048),
    "vllm16384": _stock("vLLM, 16,384 tokens a step", max_num_batched_tokens=16_384),
    "vllmInterval2": _stock("vLLM, prefills in every second step", prefill_schedule_interval=2),
    "vllmInterval3": _stock("vLLM, prefills in every third step", prefill_schedule_interval=3),
    "vllmLongPrefill": _stock("vLLM, 512 tokens of a long prompt a step", long_prefill_token_threshold=512),
    "vllmPriority": _stock("vLLM, priority by length", by_length=True, scheduling_policy="priority"),
    "vllmNotAhead": _stock("vLLM, steps not scheduled ahead", ahead=False),
    # vLLM behind others' routers.
    "roundRobin": _stock("vLLM, round robin", "roundRobin"),
    "powerOfTwo": _stock("vLLM, vllm-router power of two", "powerOfTwo"),
    "consistentHash": _stock("vLLM, vllm-router consistent hash", "consistentHash"),
    "cacheAware": _stock("vLLM, vllm-router cache aware", "cacheAware"),
    "llmD": _stock("vLLM, llm-d's scorers", "llmD"),
    "predictedLatency": _stock("vLLM, llm-d's predicted latency, reconstructed", "predictedLatency"),
    "dynamo": _stock("vLLM, Dynamo's router", "dynamo"),
    "dynamoNotAhead": _stock("vLLM, Dynamo's router, steps not scheduled ahead", "dynamo", ahead=False),
    "vllmGateways": replace(_stock("vLLM, four API servers", gateways=GATEWAYS), is_rival=False),
    "gimbal": Variant(
        label="Gimbal, reconstructed",
        changes={"scheduler": GIMBAL_SCHEDULER, "dispatch": "gimbal"},
        is_rival=True,
    ),
    "hrrn": Variant(
        label="vLLM with SGLang's order, HRRN",
        changes={"scheduler": HRRN_SCHEDULER, "dispatch": "vllmInternal"},
        is_rival=True,
    ),
}
