"""Curves over the load, one SVG for each workload, without a date: the same results give the same file."""

from collections.abc import Sequence
from pathlib import Path

from moe_lab.experiments.results import BY_NAME, Case, Results
from moe_lab.experiments.variants import PRODUCT, REFERENCE, VARIANTS

PANELS = ("ttft_mean", "ttft_p99", "ttft_p99_longest", "tpot_mean")
_GREY = "0.75"


def plot_workload(results: Results, fleet: str, workload: str, path: Path) -> None:
    """Ours and vLLM by name, the other rivals in grey."""
    import matplotlib

    matplotlib.use("svg")
    # Text as text, and ids that do not change.
    matplotlib.rcParams.update({"svg.hashsalt": "moeserving", "svg.fonttype": "none"})
    from matplotlib import pyplot

    loads = results.loads(fleet, workload)
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4.2 * len(PANELS), 3.4), constrained_layout=True)
    for panel, axis in zip(PANELS, axes, strict=True):
        column = BY_NAME[panel]
        for name in _drawn(results, fleet, workload, loads):
            points = [
                (load, value * column.scale)
                for load in loads
                if (value := results.mean(Case(fleet=fleet, workload=workload, load=load), name, panel)) == value
            ]
            if points:
                style = _style(name)
                axis.plot(*zip(*points, strict=True), **style)
        axis.set_title(f"{column.label}, {column.unit}", fontsize=9)
        axis.set_xlabel("load, part of vLLM's saturation", fontsize=8)
        axis.set_yscale("log")
        axis.grid(visible=True, linewidth=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{workload}: {fleet} (modelled)", fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def _drawn(results: Results, fleet: str, workload: str, loads: Sequence[float]) -> list[str]:
    """Variants that are there, those in front last."""
    present = {name for load in loads for name in results.variants(Case(fleet=fleet, workload=workload, load=load))}
    rivals = [name for name in VARIANTS if name in present and VARIANTS[name].is_rival and name != REFERENCE]
    return [*rivals, *(name for name in (REFERENCE, PRODUCT) if name in present)]


def _style(name: str) -> dict[str, object]:
    if name == PRODUCT:
        return {"color": "C0", "linewidth": 2.2, "marker": "o", "label": VARIANTS[name].label}
    if name == REFERENCE:
        return {"color": "C3", "linewidth": 1.8, "marker": "s", "label": VARIANTS[name].label}
    return {"color": _GREY, "linewidth": 0.9}
