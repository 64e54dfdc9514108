"""The load of an engine's experts as a picture, PNG or SVG: layers by ranks, and layers by experts."""

from pathlib import Path
from typing import Any

from moe_contract.experts_state import ExpertsState
from moe_scheduling.expert.cost import load_of_ranks

from moe_operator.experts.load import over_mean, read_load, read_placement
from moe_operator.local.failure import Failure

# Load over the mean at which the colours end; hotter experts look the same.
_HOTTEST = 2.0


def draw_experts(name: str, document: ExpertsState, path: Path, kind: str) -> None:
    """Writes the picture; `kind` is `png` or `svg`.

    Raises:
        Failure: there is no load to draw, matplotlib is missing, or the file cannot be written.
    """
    load, placement = read_load(document), read_placement(document.placement.physical_to_logical, document)
    if load is None or placement is None:
        raise Failure(f"{name}: no load recorded yet, so there is nothing to draw")
    figure = _new_figure()
    by_rank, by_expert = figure.subplots(1, 2, width_ratios=(1, 3))
    _draw(by_rank, over_mean(load_of_ranks(load, placement)), "rank")
    shown = _draw(by_expert, over_mean(load.tokens.sum(axis=0)), "expert")
    figure.colorbar(shown, ax=(by_rank, by_expert), label="tokens over the mean of the layer", extend="max")
    figure.suptitle(
        f"{name}: load of the experts over {document.load.steps:.0f} steps, placement {document.placement.version}"
    )
    try:
        figure.savefig(path, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {error.strerror}") from None


def _new_figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise Failure("a picture needs matplotlib: pip install 'moeserving[bench]'") from None
    return Figure(figsize=(12, 5), layout="constrained")


def _draw(axes: Any, ratios: Any, name: str) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    shown = axes.imshow(
        ratios, aspect="auto", interpolation="nearest", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, _HOTTEST)
    )
    axes.set_xlabel(name)
    axes.set_ylabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return shown
