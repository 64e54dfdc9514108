"""The measurement: from nothing to many resources, an idle time, changes of single ones, another operator, the end."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lab.reconciling.cluster import BenchmarkCluster, is_converged
from moe_lab.reconciling.process import OperatorMetrics, OperatorProcess, cpu_s, quantile_s
from moe_lab.reconciling.stand_in import StandIn

LOOK_EVERY_S = 0.25
QUIET_S, QUIET_WITH_PODS_S = 5.0, 20.0
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
        servers_cpu_s: of API server and etcd, where they run on this machine.
        memory_bytes: its resident memory at the end.
        own_memory_bytes: the part that it shares with no other process.
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
    servers_cpu_s: Mapping[str, float]
    memory_bytes: int
    own_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconcilingResult:
    """The result of one measurement.

    Attributes:
        resources: how many there were.
        phases: in order.
        changes_s: from a changed resource to its changed Deployment, one of each change.
        readiness_s: from the changed readiness of an engine's pod to the resource's status, one of each pod.
        crowded_s: from the changed readiness of an engine's pod to the resource's status, while another operator that
            has just taken over looks at all resources; one of each pod, all changed at once.
        states_s: from the changed state of an engine's agent to the resource's status, one of each agent.
    """

    resources: int
    phases: tuple[BenchmarkPhase, ...]
    changes_s: tuple[float, ...]
    readiness_s: tuple[float, ...]
    crowded_s: tuple[float, ...]
    states_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSetting:
    """Where and how much is measured.

    Attributes:
        kubeconfig: of the API server.
        log: takes the operator's output.
        python: interpreter of the environment that has the operator.
        resources: how many.
        changes: single changes of each kind.
        idle_s: length of the idle phase.
        servers: processes of the API server and of etcd, by name.
    """

    kubeconfig: Path
    log: Path
    python: Path
    resources: int
    changes: int
    idle_s: float
    servers: Mapping[str, int]


async def measure(
    cluster: BenchmarkCluster, stand_in: StandIn, setting: BenchmarkSetting, progress: Callable[[str], None]
) -> ReconcilingResult:
    """Runs every phase.

    Raises:
        RuntimeError: the operator does not start, or does not come to an end.
    """
    names = [f"r{number:05d}" for number in range(setting.resources)]
    chosen = names[:: max(1, setting.resources // setting.changes)][: setting.changes]
    started_s = time.monotonic()
    await cluster.create(names)
    progress(f"{setting.resources} resources are made, in {time.monotonic() - started_s:.1f} s")
    phases = []
    async with OperatorProcess(setting.kubeconfig, setting.log, "first", setting.python) as operator:
        phases.append(await measure_phase("from nothing", operator, setting, None))
        await check_converged(cluster, setting.resources)
        progress(render_phase(phases[-1]))
        engines = await cluster.create_pods(names, stand_in.port)
        await _quiet(operator, writes_only=True)
        progress("an engine and a gateway of each stand ready")
        phases.append(await measure_phase("idle", operator, setting, setting.idle_s))
        progress(render_phase(phases[-1]))
        states_s = await _change_states(cluster, stand_in, {name: engines[name] for name in chosen})
        readiness_s = [await _change_readiness(cluster, name) for name in chosen]
        progress(f"{len(states_s)} states of agents and {len(readiness_s)} pods changed")
        changes_s = [await _change(cluster, name) for name in chosen]
        progress(f"{len(changes_s)} changes, in {sum(changes_s):.1f} s")
        await _quiet(operator, writes_only=True)
    async with OperatorProcess(setting.kubeconfig, setting.log, "second", setting.python):
        crowded_s = await _change_readiness_of_all(cluster, chosen)
        progress(f"{len(crowded_s)} pods changed while another operator took over, in {max(crowded_s):.1f} s")
    async with OperatorProcess(setting.kubeconfig, setting.log, "third", setting.python) as operator:
        phases.append(await measure_phase("taken over", operator, setting, None, at_least=setting.resources))
        progress(render_phase(phases[-1]))
        await cluster.delete(names)
        phases.append(await measure_phase("to nothing", operator, setting, None))
        if left := await cluster.servings():
            raise RuntimeError(f"{len(left)} resources are left")
        progress(render_phase(phases[-1]))
    return ReconcilingResult(
        resources=setting.resources,
        phases=tuple(phases),
        changes_s=tuple(changes_s),
        readiness_s=tuple(readiness_s),
        crowded_s=crowded_s,
        states_s=states_s,
    )


async def measure_phase(
    name: str, operator: OperatorProcess, setting: BenchmarkSetting, seconds: float | None, *, at_least: int = 1
) -> BenchmarkPhase:
    """What happens until all is quiet, or for a time.

    Args:
        name: of the phase.
        operator: which one; without a time its counters are taken from its start.
        setting: its servers' CPU is measured.
        seconds: for how long to look.
        at_least: passes before it may count as quiet.
    """
    started_s = time.monotonic()
    goes_on = name in ("idle", "to nothing")
    before, own_s = (await operator.metrics(), operator.cpu_s()) if goes_on else (None, 0.0)
    servers_s = {server: cpu_s([pid]) for server, pid in setting.servers.items()}
    if seconds is None:
        ended_s = await _quiet(operator, at_least=at_least, writes_only=name == "taken over")
    else:
        await asyncio.sleep(seconds)
        ended_s = time.monotonic()
    after = await operator.metrics()
    before = before or OperatorMetrics(calls={}, passes={}, buckets={}, queue=0.0)
    memory_bytes, own_memory_bytes = operator.memory_bytes()
    return BenchmarkPhase(
        name=name,
        seconds=ended_s - started_s,
        passes=round(after.ended - before.ended),
        p50_s=quantile_s(before.buckets, after.buckets, 0.5),
        p99_s=quantile_s(before.buckets, after.buckets, 0.99),
        calls={call: count - before.calls.get(call, 0.0) for call, count in after.calls.items()},
        writes=round(after.writes - before.writes),
        failed=round(after.passes.get("failed", 0.0) - before.passes.get("failed", 0.0)),
        cpu_s=operator.cpu_s() - own_s,
        servers_cpu_s={server: cpu_s([pid]) - servers_s[server] for server, pid in setting.servers.items()},
        memory_bytes=memory_bytes,
        own_memory_bytes=own_memory_bytes,
    )


async def _change_states(cluster: BenchmarkCluster, stand_in: StandIn, engines: Mapping[str, str]) -> tuple[float, ...]:
    """Changes the states of these engines at once; the seconds until each of their resources shows it."""
    version, started_s = await cluster.version(), time.monotonic()
    for address in engines.values():
        stand_in.restart(address)
    return await cluster.wait_until(
        engines, lambda row: any(engine.get("restarts") for engine in row["status"]["engines"]), version, started_s
    )


async def _change_readiness_of_all(cluster: BenchmarkCluster, names: Sequence[str]) -> tuple[float, ...]:
    """Ends the readiness of these engines at once; the seconds until each status shows it. They are ready then."""
    version, started_s = await cluster.version(), time.monotonic()
    _, shown = await asyncio.gather(
        cluster.set_all_ready(names, ready=False), cluster.wait_until(names, _shows_none_ready, version, started_s)
    )
    version, started_s = await cluster.version(), time.monotonic()
    await asyncio.gather(
        cluster.set_all_ready(names, ready=True),
        cluster.wait_until(names, lambda row: not _shows_none_ready(row), version, started_s),
    )
    return shown


def _shows_none_ready(row: Mapping[str, Any]) -> bool:
    return bool(row.get("status", {}).get("readyReplicas") == 0)


async def _change_readiness(cluster: BenchmarkCluster, name: str) -> float:
    """Seconds from the end of an engine's readiness to the status of its resource; the engine is ready again then."""
    version, started_s = await cluster.version(), time.monotonic()
    await cluster.set_ready(name, ready=False)
    shown = await cluster.wait_until([name], _shows_none_ready, version, started_s)
    await cluster.set_ready(name, ready=True)
    return shown[0]


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
        if not now.queue and time.monotonic() - last_s > (QUIET_WITH_PODS_S if writes_only else QUIET_S):
            return last_s
        await asyncio.sleep(LOOK_EVERY_S)
    raise RuntimeError(f"no end within {PATIENCE_S:.0f} s")


async def check_converged(cluster: BenchmarkCluster, resources: int) -> None:
    """Raises RuntimeError unless each of so many resources is as it should be."""
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


def render_phase(phase: BenchmarkPhase) -> str:
    """The phase in a line."""
    return f"{phase.name}: {phase.passes} passes and {phase.writes} writes in {phase.seconds:.1f} s"
