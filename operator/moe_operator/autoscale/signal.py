"""What the states of gateways and agents say of the whole fleet. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_scheduling.fleet.size import FleetSignal
from moe_scheduling.signals import EngineSignal, StepTime

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The states at one moment.

    Attributes:
        gateways: state of each gateway that answered.
        engines: state of each agent that answered, by pod.
        gateways_wanted: gateways that should answer; the signal is not known while one does not, for what it holds and
            sends is not known either.
        observed_s: when they answered, on the operator's monotonic clock.
    """

    gateways: tuple[Document, ...]
    engines: Mapping[str, Document]
    gateways_wanted: int
    observed_s: float


def build_signal(now: Fleet, before: Fleet | None) -> FleetSignal | None:
    """The fleet's signal; None when no gateway, or not every ready one, answered."""
    if not now.gateways or len(now.gateways) < now.gateways_wanted:
        return None
    ready = [engine for engine in now.engines.values() if engine.get("phase") == "ready"]
    return FleetSignal(
        observed_s=now.observed_s,
        wait_s=min(_numbers(now.gateways, "wait_s"), default=None),
        kv_usage=_mean(max((rank["kv_usage"] for rank in engine["ranks"]), default=0.0) for engine in ready),
        ttft_s=mean_ttft_s(now.gateways),
        tokens_per_s=_tokens_per_s(now, before),
        arrivals_per_s=_sum(_numbers(now.gateways, "arrivals_per_s")),
        held=int(sum(_numbers(now.gateways, "held"))),
        held_since_s=max(_numbers(now.gateways, "held_since_s"), default=None),
        in_flight=int(sum(_numbers(now.gateways, "in_flight"))),
    )


def mean_ttft_s(gateways: Iterable[Document]) -> float | None:
    """Mean time to first token over the gateways, each by its requests."""
    rows = [
        (float(state["ttft_s"]), float(state.get("arrivals_per_s") or 0.0))
        for state in gateways
        if state.get("ttft_s") is not None
    ]
    weight = sum(arrivals for _, arrivals in rows)
    if not rows:
        return None
    return sum(value * arrivals for value, arrivals in rows) / weight if weight > 0.0 else _mean(row[0] for row in rows)


def read_ranks(engine: Document) -> tuple[EngineSignal, ...]:
    """The signals of an engine's ranks."""
    return tuple(map(_read_rank, engine.get("ranks", ())))


def _read_rank(rank: Document) -> EngineSignal:
    line = rank.get("step_time")
    values = {name: rank[name] for name in EngineSignal.__dataclass_fields__ if name in rank and name != "step_time"}
    names = ("base_s", "prefill_s", "decode_s")
    step_time = None if line is None else StepTime(**{name: float(line[name]) for name in names})
    return EngineSignal(**values, step_time=step_time)


def _tokens_per_s(now: Fleet, before: Fleet | None) -> float | None:
    """By the counters of the engines that answered both times; an engine that began anew counts from zero."""
    if before is None or now.observed_s <= before.observed_s:
        return None
    tokens, common = 0.0, False
    for pod, state in now.engines.items():
        if (old := before.engines.get(pod)) is not None:
            common = True
            count, known = _computed(state), _computed(old)
            tokens += count - known if count >= known else count
    return tokens / (now.observed_s - before.observed_s) if common else None


def _computed(state: Document) -> float:
    return sum(float(rank.get("computed_tokens", 0)) for rank in state.get("ranks", ()))


def _numbers(states: Iterable[Document], name: str) -> list[float]:
    values = (state.get(name) for state in states)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _sum(values: list[float]) -> float | None:
    return sum(values) if values else None


def _mean(values: Iterable[float]) -> float | None:
    rows = list(values)
    return sum(rows) / len(rows) if rows else None
