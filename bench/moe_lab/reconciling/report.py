"""The figures of the benchmark as a table for people and as JSON for programs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from moe_tools.report import read_environment
from moe_tools.statistics import estimate, percentile_of
from rich.console import RenderableType
from rich.table import Table

from moe_lab.reconciling.bound import Bound
from moe_lab.reconciling.measurement import BenchmarkPhase, ReconcilingResult

MIB = 1 << 20
HEADINGS = (
    "phase",
    "build",
    "s",
    "passes",
    "p50 ms",
    "p99 ms",
    "calls",
    "writes",
    "CPU s",
    "servers' CPU s",
    "RSS MiB",
    "USS MiB",
)
WAITS = {
    "changes_s": "from a changed resource to its Deployment",
    "readiness_s": "from a pod's changed readiness to the status",
    "crowded_s": "the same while an operator takes over, all at once",
    "states_s": "from an agent's changed state to the status",
}


def report(bound: Bound, builds: Mapping[str, ReconcilingResult], *, plans_differ: bool) -> Iterable[RenderableType]:
    """The table and the lines below it."""
    yield render(builds)
    if plans_differ:
        yield (
            "the builds' CRDs differ: each is measured with its own, and is done when its own plan is real. Compared "
            "are time, calls, processor time and memory; the bound is that of this build's plan"
        )
    yield (
        f"the API server's own bound: a bare client makes {bound.writes} writes in {bound.seconds:.1f} s with "
        f"{bound.in_flight} at a time (CPU: client {bound.client_cpu_s:.1f} s, servers {bound.server_cpu_s:.1f} s)"
    )
    for build, measured in builds.items():
        first = measured.phases[0]
        yield f"{build}, {first.name}: {first.seconds / bound.seconds:.2f} times the bound, {first.writes} writes"
        for name, words in WAITS.items():
            yield f"{build}, {words}: {_describe(getattr(measured, name))}"
        yield f"{build}, {_describe_idle(measured)}"


def render(builds: Mapping[str, ReconcilingResult]) -> Table:
    """The table: one phase of one build in each row."""
    environment = read_environment()
    count = next(iter(builds.values())).resources
    table = Table(
        title=f"The operator under {count} resources",
        caption=f"Python {environment['python']}, {environment['cores']} cores, shared with the API server and etcd",
        caption_justify="left",
        title_justify="left",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("phase", "build") else "right")
    for rows in zip(*(measured.phases for measured in builds.values()), strict=True):
        for build, phase in zip(builds, rows, strict=True):
            table.add_row(*_cells(build, phase))
    return table


def _cells(build: str, phase: BenchmarkPhase) -> tuple[str, ...]:
    return (
        phase.name,
        build,
        f"{phase.seconds:.1f}",
        f"{phase.passes}" if not phase.failed else f"{phase.passes} ({phase.failed} failed)",
        f"{phase.p50_s * 1e3:.0f}",
        f"{phase.p99_s * 1e3:.0f}",
        f"{sum(phase.calls.values()):.0f}",
        f"{phase.writes}",
        f"{phase.cpu_s:.1f}",
        f"{sum(phase.servers_cpu_s.values()):.1f}",
        f"{phase.memory_bytes / MIB:.0f}",
        f"{phase.own_memory_bytes / MIB:.0f}",
    )


def _describe(seconds: Sequence[float]) -> str:
    half, most = (estimate(seconds, percentile_of(percent)) for percent in (50, 99))
    return (
        f"p50 {half.value * 1e3:.0f} ms [{half.low * 1e3:.0f}, {half.high * 1e3:.0f}], "
        f"p99 {most.value * 1e3:.0f} ms, {half.count} changes"
    )


def _describe_idle(measured: ReconcilingResult) -> str:
    phase = next(phase for phase in measured.phases if phase.name == "idle")
    a_minute = 60 / phase.seconds
    calls = {f"{verb} {kind}": count * a_minute for (verb, kind), count in phase.calls.items() if count}
    rows = ", ".join(f"{name} {count:.0f}" for name, count in sorted(calls.items()))
    return (
        f"idle, API calls a minute: {sum(calls.values()):.0f} ({rows or 'none'}); "
        f"CPU seconds a minute: {phase.cpu_s * a_minute:.2f}"
    )


def build_document(bound: Bound, builds: Mapping[str, ReconcilingResult]) -> dict[str, object]:
    """All figures as a JSON document."""
    return {
        "environment": read_environment(),
        "bound": asdict(bound),
        "builds": {build: _measured_document(measured) for build, measured in builds.items()},
    }


def _measured_document(measured: ReconcilingResult) -> dict[str, object]:
    return asdict(measured) | {"phases": [phase_document(phase) for phase in measured.phases]}


def phase_document(phase: BenchmarkPhase) -> dict[str, object]:
    """The figures of one phase as JSON values; calls by verb and kind in one text."""
    calls = {f"{verb} {kind}": count for (verb, kind), count in phase.calls.items()}
    return asdict(phase) | {"calls": calls}
