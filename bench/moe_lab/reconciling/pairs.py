"""From nothing, several times for each of two builds in turns, each pair beside the API server's own bound.

One pair on a shared machine shows little: the order alternates, and the ratio has an interval.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from moe_tools.report import read_environment
from moe_tools.statistics import paired_ratio

from moe_lab.reconciling.bound import Bound
from moe_lab.reconciling.build_crd import Document
from moe_lab.reconciling.cluster import BenchmarkCluster
from moe_lab.reconciling.measurement import (
    BenchmarkPhase,
    BenchmarkSetting,
    check_converged,
    measure_phase,
    render_phase,
)
from moe_lab.reconciling.process import OperatorProcess
from moe_lab.reconciling.report import phase_document


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPair:
    """Both builds from nothing, one after the other.

    Attributes:
        bound: of the API server, just before.
        phases: by build.
    """

    bound: Bound
    phases: Mapping[str, BenchmarkPhase]


async def measure_pairs(
    cluster: BenchmarkCluster,
    settings: Mapping[str, BenchmarkSetting],
    crds: Mapping[str, Document],
    pairs: int,
    progress: Callable[[str], None],
) -> list[BuildPair]:
    """Measures from nothing alone, for each build once in each pair.

    Raises:
        RuntimeError: an operator does not start, or does not come to an end.
    """
    measured = []
    first = next(iter(settings.values()))
    names = [f"r{number:05d}" for number in range(first.resources)]
    for number in range(pairs):
        await cluster.prepare(crds["now"])
        bound = await cluster.bound(names, first.servers.values())
        progress(f"a bare client makes {bound.writes} writes in {bound.seconds:.1f} s")
        phases = {}
        for build in sorted(settings, reverse=number % 2 == 1):
            await cluster.prepare(crds[build])
            await cluster.create(names)
            setting = settings[build]
            async with OperatorProcess(
                setting.kubeconfig, setting.log, f"{build}-{number}", setting.python
            ) as operator:
                phases[build] = await measure_phase("from nothing", operator, setting, None)
            await check_converged(cluster, setting.resources)
            await cluster.empty()
            progress(f"{build}, {render_phase(phases[build])}")
        measured.append(BuildPair(bound=bound, phases=phases))
    return measured


def report_pairs(measured: Sequence[BuildPair], resources: int) -> Iterable[str]:
    """The ratios of the pairs, in lines."""
    yield f"from nothing, {resources} resources, {len(measured)} pairs: geometric means and 95 % intervals"
    if "before" in measured[0].phases:
        yield _ratio_line(
            "seconds, now beside before",
            [(pair.phases["before"].seconds, pair.phases["now"].seconds) for pair in measured],
        )
        for whose, cpu_of in (("the operator", _own_cpu_s), ("the servers", _servers_cpu_s), ("both", _all_cpu_s)):
            yield _ratio_line(
                f"CPU seconds of {whose}, now beside before",
                [(cpu_of(pair.phases["before"]), cpu_of(pair.phases["now"])) for pair in measured],
            )
    for build in measured[0].phases:
        yield _ratio_line(
            f"seconds, {build} beside the bound",
            [(pair.bound.seconds, pair.phases[build].seconds) for pair in measured],
        )


def build_pairs_document(measured: Sequence[BuildPair]) -> dict[str, object]:
    """All figures of the pairs as a JSON document."""
    return {
        "environment": read_environment(),
        "pairs": [
            {
                "bound": asdict(pair.bound),
                "phases": {build: phase_document(phase) for build, phase in pair.phases.items()},
            }
            for pair in measured
        ],
    }


def _own_cpu_s(phase: BenchmarkPhase) -> float:
    return phase.cpu_s


def _servers_cpu_s(phase: BenchmarkPhase) -> float:
    return sum(phase.servers_cpu_s.values())


def _all_cpu_s(phase: BenchmarkPhase) -> float:
    return _own_cpu_s(phase) + _servers_cpu_s(phase)


def _ratio_line(words: str, pairs: Sequence[tuple[float, float]]) -> str:
    ratio = paired_ratio(pairs)
    values = ", ".join(f"{second:.1f} and {first:.1f}" for first, second in pairs)
    return f"{words}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] ({values})"
