"""The experts of an engine for a terminal: load by layer and rank, hottest experts, decisions, affinity. Pure."""

from collections.abc import Iterator

from moe_contract.experts_state import AffinityPart, BalancePart, Decision, ExpertsState
from moe_scheduling.expert.cost import load_of_ranks
from moe_scheduling.expert.placement import Floats
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_operator.experts.load import find_hottest, over_mean, read_load, read_placement

# Ranks up to which a cell shows a number; above, a shade.
MAX_NUMBERED_RANKS = 12
HOTTEST = 5
_SHADES = "·░▒▓█"
# Colour of a cell whose load over the mean is below the bound.
_STYLES = ((0.8, "blue"), (0.95, "cyan"), (1.05, ""), (1.2, "yellow"), (1.5, "red"))
_HOT_STYLE = "bold white on red"


def render_experts(name: str, document: ExpertsState) -> Group:
    """Returns everything shown of one engine."""
    return Group(*_parts(name, document))


def _parts(name: str, document: ExpertsState) -> Iterator[RenderableType]:
    yield Text.assemble((name, "bold"), f"  {_summary(document)}")
    if (balance := document.recorded) is not None:
        yield Text(_balance(balance, document))
    load, placement = read_load(document), read_placement(document.placement.physical_to_logical, document)
    if load is None or placement is None:
        yield Text(
            "no load recorded yet: that takes `scheduling.expert.window` steps with requests"
            if document.recorded is None
            else "the agent gives no load by expert"
        )
    else:
        yield render_heat(over_mean(load_of_ranks(load, placement)))
        yield Text("hottest experts (tokens over the mean of their layer):")
        for hot in find_hottest(load, placement, HOTTEST):
            where = ", ".join(map(str, hot.ranks))
            yield Text(f"  layer {hot.layer} expert {hot.expert}: {hot.ratio:.2f} on rank {where}")
    yield from _decisions(document)
    for problem in document.problems:
        yield Text(f"{problem.kind}: {problem.message}", style="red")


def _summary(document: ExpertsState) -> str:
    copies = document.ranks * document.slots_per_rank - document.experts
    return (
        f"mode {document.mode}, {document.layers} layers, {document.experts} experts and {copies} copies over "
        f"{document.ranks} ranks on {document.nodes} node{'s' * (document.nodes > 1)}, "
        f"placement {document.placement.version}"
    )


def _balance(balance: BalancePart, document: ExpertsState) -> str:
    remote = "" if document.remote_fraction is None else f", {document.remote_fraction:.0%} of tokens to other ranks"
    return (
        f"balance {balance.mean:.2f} (busiest rank over the mean; worst layer {balance.worst:.2f}) over "
        f"{document.load.steps:.0f} steps{remote}"
    )


def render_heat(ratios: Floats) -> Text:
    """Returns a line for each layer with a cell for each rank: its load over the mean of the layer, ratios [layer,
    rank].
    """
    layers, ranks = ratios.shape
    width = len(str(layers - 1))
    numbers = ranks <= MAX_NUMBERED_RANKS
    head = "".join(f"{rank:>6}" for rank in range(ranks)) if numbers else f" rank 0 to {ranks - 1}: {_legend()}"
    text = Text(f"layer {' ' * max(0, width - 5)}{head}\n", style="bold")
    for layer, row in enumerate(ratios):
        text.append(f"{layer:>{max(5, width)}} ", style="dim")
        for value in row:
            cell = f"{value:5.2f}" if numbers else _SHADES[shade(value)]
            text.append(" " * numbers)
            text.append(cell, style=_style(value))
        text.append("\n")
    text.rstrip()
    return text


def shade(value: float) -> int:
    """Returns the shade of a load over the mean: 0 below 0.8, 1 to 0.95, 2 to 1.05, 3 to 1.2, 4 above."""
    return sum(value >= bound for bound, _ in _STYLES[:4])


def _legend() -> str:
    bounds = [f"{bound:g}" for bound, _ in _STYLES[:4]]
    return f"{_SHADES[0]} below {bounds[0]}, " + ", ".join(
        f"{sign} from {bound}" for sign, bound in zip(_SHADES[1:], bounds, strict=True)
    )


def _style(value: float) -> str:
    return next((style for bound, style in _STYLES if value < bound), _HOT_STYLE)


def _decisions(document: ExpertsState) -> Iterator[RenderableType]:
    if not document.decisions:
        yield Text("no decision yet")
        return
    table = Table(box=None, pad_edge=False)
    for column in ("decision", "ago", "outcome", "moves", "balance", "gain a step", "cost", "reason"):
        table.add_column(column, justify="right" if column in ("decision", "ago", "moves", "cost") else "left")
    for decision in document.decisions:
        table.add_row(*_decision(decision))
    yield table
    totals = document.totals
    yield Text(f"{totals.moves} experts moved since the start, {totals.lost_s:.3g} s spent, {totals.won_s:.3g} s won")


def _decision(decision: Decision) -> tuple[str | Text, ...]:
    before, after = decision.balance_before, decision.balance_after
    gain = _seconds(decision.measured_gain_s, " measured") or _seconds(decision.predicted_gain_s, " predicted")
    return (
        str(decision.number),
        f"{decision.age_s:.0f} s",
        decision.outcome,
        str(decision.moves),
        "" if before is None else f"{before:.2f}" + ("" if after is None else f" -> {after:.2f}"),
        gain,
        _seconds(decision.cost_s, ""),
        Text(decision.reason),
    )


def _seconds(value: float | None, word: str) -> str:
    if value is None:
        return ""
    scale, unit = (1e6, "us") if abs(value) < 1e-3 else (1e3, "ms") if abs(value) < 1.0 else (1.0, "s")
    return f"{value * scale:.3g} {unit}{word}"


def render_affinity(name: str, affinity: AffinityPart) -> Group:
    """Returns the view of one engine's inter-layer affinity."""
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "expert", "expert of the next layer", "tokens", "times chance"):
        table.add_column(column, justify="right")
    for pair in affinity.strongest:
        numbers = (pair.layer, pair.expert, pair.next, pair.tokens)
        table.add_row(*map(str, numbers), f"{pair.over_chance:.2f}")
    recorded = f"{affinity.tokens} tokens of {affinity.passes} passes of the first rank"
    return Group(
        Text(f"{name}: experts of neighbouring layers that the same tokens take ({recorded})"),
        table,
        Text(
            "No decision uses this: vLLM returns each token to its own rank after every layer, so that nothing is "
            "gained by experts of neighbouring layers on one rank."
        ),
    )
