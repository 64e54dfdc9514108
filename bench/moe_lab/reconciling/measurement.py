"""The measurement: from nothing to many resources, an idle time, changes of single ones, another operator, the end."""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_lab.reconciling.cluster import BenchmarkCluster, is_converged
from moe_lab.reconciling.process import OperatorMetrics, OperatorProcess, quantile_s

LOOK_EVERY_S = 0.25
QUIET_S = 5.0
PATIENCE_S = 1800.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkPhase:
    """The work of one operator over a time.

    Attributes:
        name: what it had to do.
        seconds: until its last pass of the phase ended.
        passes: how many ended.
        p50_s: of the length of a pass, from the buckets of its histogram.
        p99_s: likewise.
        calls: to the API server, by verb and kind.
        writes: of these, those that change something, the Lease aside.
        failed: passes that ended with an error.
        cpu_s: CPU seconds of the operator.
        memory_bytes: its resident memory at the end.
    """

    name: str
    seconds: float
    passes: int
    p50_s: float
    p99_s: float
    calls: Mapping[tuple[str, str], float]
    writes: int
    failed: int
    cpu_s: float
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcilingResult:
    """The result of one measurement.

    Attributes:
        resources: how many there were.
        phases: in order.
        changes_s: from a changed resource to its changed Deployment, one of each change.
    """

    resources: int
    phases: tuple[BenchmarkPhase, ...]
    changes_s: tuple[float, ...]


async def measure(
    cluster: BenchmarkCluster, kubeconfig: Path, log: Path, port: int, *, resources: int, changes: int, idle_s: float,
    progress: Callable[[str], None],
) -> ReconcilingResult:  # fmt: skip
    """Runs every phase.

    Raises:
        RuntimeError: the operator does not start, or does not come to an end.
    """
    names = [f"r{number:05d}" for number in range(resources)]
    await cluster.prepare()
    started_s = time.monotonic()
    await cluster.create(names)
    progress(f"{resources} resources are made, in {time.monotonic() - started_s:.1f} s")
    phases = []
    async with OperatorProcess(kubeconfig, log, "first") as operator:
        phases.append(await _phase("from nothing", operator, None))
        await _check(cluster, resources)
        progress(_render(phases[-1]))
        await cluster.create_pods(names, port)
        await _quiet(operator, writes_only=True)
        progress("an engine and a gateway of each stand ready")
        phases.append(await _phase("idle", operator, idle_s))
        progress(_render(phases[-1]))
        changes_s = [await _change(cluster, name) for name in names[:: max(1, resources // changes)][:changes]]
        progress(f"{len(changes_s)} changes, in {sum(changes_s):.1f} s")
        await _quiet(operator, writes_only=True)
    async with OperatorProcess(kubeconfig, log, "second") as operator:
        phases.append(await _phase("taken over", operator, None, at_least=resources))
        progress(_render(phases[-1]))
        await cluster.delete(names)
        phases.append(await _phase("to nothing", operator, None))
        if left := await cluster.servings():
            raise RuntimeError(f"{len(left)} resources are left")
        progress(_render(phases[-1]))
    return ReconcilingResult(resources=resources, phases=tuple(phases), changes_s=tuple(changes_s))


async def _phase(name: str, operator: OperatorProcess, seconds: float | None, *, at_least: int = 1) -> BenchmarkPhase:
    """What happens until all is quiet, or for a time.

    Args:
        name: of the phase.
        operator: which one; without a time its counters are taken from its start.
        seconds: for how long to look.
        at_least: passes before it may count as quiet.
    """
    started_s = time.monotonic()
    before, cpu_s = (await operator.metrics(), operator.cpu_s()) if name in ("idle", "to nothing") else (None, 0.0)
    if seconds is None:
        ended_s = await _quiet(operator, at_least=at_least, writes_only=name == "taken over")
    else:
        await asyncio.sleep(seconds)
        ended_s = time.monotonic()
    after = await operator.metrics()
    before = before or OperatorMetrics(calls={}, passes={}, buckets={}, queue=0.0)
    return BenchmarkPhase(
        name=name,
        seconds=ended_s - started_s,
        passes=round(after.ended - before.ended),
        p50_s=quantile_s(before.buckets, after.buckets, 0.5),
        p99_s=quantile_s(before.buckets, after.buckets, 0.99),
        calls={call: count - before.calls.get(call, 0.0) for call, count in after.calls.items()},
        writes=round(after.writes - before.writes),
        failed=round(after.passes.get("failed", 0.0) - before.passes.get("failed", 0.0)),
        cpu_s=operator.cpu_s() - cpu_s,
        memory_bytes=operator.memory_bytes(),
    )


async def _quiet(operator: OperatorProcess, *, at_least: int = 1, writes_only: bool = False) -> float:
    """Waits until nothing has happened for a while; the time of the last thing that did.

    With pods there are passes all the time, for they are looked at: then only writes and the queue count.
    """
    give_up_s = time.monotonic() + PATIENCE_S
    last, last_s = -1.0, time.monotonic()
    while time.monotonic() < give_up_s:
        now = await operator.metrics()
        done = now.writes if writes_only and now.ended >= at_least else now.writes + now.ended
        if done != last or now.ended < at_least:
            last, last_s = done, time.monotonic()
        if not now.queue and time.monotonic() - last_s > QUIET_S:
            return last_s
        await asyncio.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"no end within {PATIENCE_S:.0f} s")


async def _check(cluster: BenchmarkCluster, resources: int) -> None:
    rows = await cluster.servings()
    behind = [row["metadata"]["name"] for row in rows if not is_converged(row)]
    if behind or len(rows) != resources:
        raise RuntimeError(f"of {len(rows)} resources {len(behind)} are not as they should be, such as {behind[:3]}")


async def _change(cluster: BenchmarkCluster, name: str) -> float:
    """Seconds from a change of a resource to that of its Deployment."""
    started_s = time.monotonic()
    await cluster.set_replicas(name, 2)
    while await cluster.deployed_replicas(name) != 2:
        if time.monotonic() - started_s > PATIENCE_S:
            raise RuntimeError(f"{name}: the change does not arrive")
        await asyncio.sleep(0.01)
    return time.monotonic() - started_s


def _render(phase: BenchmarkPhase) -> str:
    return f"{phase.name}: {phase.passes} passes and {phase.writes} writes in {phase.seconds:.1f} s"
