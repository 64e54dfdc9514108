"""What an agent says of the experts of its engine: `GET /v1/experts` as frozen values.

Read from peers that may be newer, so unknown fields are left alone; a document that lacks what is needed is none.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Natural = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Balance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slots = tuple[tuple[int, ...], ...]
OFF = "off"


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PlacementPart(_Part):
    """Which expert is in which slot.

    Attributes:
        version: rises by one at each change.
        directive: version of the newest directive that was carried out; 0 before the first.
        physical_to_logical: `[layer][slot]`, slots rank by rank; None in the brief form.
    """

    version: Natural
    directive: Natural = 0
    physical_to_logical: Slots | None = None


class LoadPart(_Part):
    """What was recorded.

    Attributes:
        steps: over how many steps; 0 before the first.
        tokens: `[source][layer][expert]`, tokens a step; None in the brief form.
    """

    steps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    tokens: tuple[tuple[tuple[Number, ...], ...], ...] | None = None


class BalancePart(_Part):
    """Load of the busiest rank over the mean.

    Attributes:
        mean: over the layers, weighted by their tokens.
        worst: of the worst layer.
        by_layer: of each layer.
        by_rank: tokens of each rank over the mean.
    """

    mean: Balance
    worst: Balance
    by_layer: tuple[Balance, ...] = ()
    by_rank: tuple[Balance, ...] = ()


class Decision(_Part):
    """One decision; the newest of `decisions` carries its placement, where it had one."""

    number: Natural
    age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    outcome: str
    reason: str = ""
    moves: Natural = 0
    predicted_gain_s: Number | None = None
    measured_gain_s: Number | None = None
    cost_s: Number | None = None
    balance_before: Balance | None = None
    balance_after: Balance | None = None
    physical_to_logical: Slots | None = None


class Totals(_Part):
    """Since the engine's start."""

    moves: Natural = 0
    lost_s: Number = 0.0
    won_s: Number = 0.0


class PairPart(_Part):
    """Tokens that take `expert` in `layer` and `next` in the following one, and how many times as many as by chance."""

    layer: Natural
    expert: Natural
    next: Natural
    tokens: Natural
    over_chance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AffinityPart(_Part):
    """Inter-layer affinity, recorded on request.

    Attributes:
        directive: version of the directive that asked for it.
        passes: forward passes recorded so far.
        wanted_passes: passes after which it is complete.
        tokens: tokens recorded.
        strongest: pairs that exceed chance by most tokens, the strongest first.
    """

    directive: Natural
    passes: Natural
    wanted_passes: Natural
    tokens: Natural
    strongest: tuple[PairPart, ...] = ()


class ProblemPart(_Part):
    """What is wrong."""

    kind: str
    message: str = ""


class ExpertsDocument(_Part):
    """The whole answer."""

    mode: str
    ranks: Annotated[int, Field(ge=1)]
    nodes: Annotated[int, Field(ge=1)] = 1
    layers: Natural
    experts: Natural
    slots_per_rank: Natural
    step: Natural = 0
    placement: PlacementPart
    load: LoadPart = LoadPart()
    balance: BalancePart | None = None
    remote_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    costs: dict[str, Number | None] | None = None
    decisions: tuple[Decision, ...] = ()
    totals: Totals = Totals()
    affinity: AffinityPart | None = None
    problems: tuple[ProblemPart, ...] = ()

    @property
    def recorded(self) -> BalancePart | None:
        """The balance, where a load was recorded at all."""
        return self.balance if self.load.steps else None

    @property
    def newest(self) -> Decision | None:
        """The last decision."""
        return self.decisions[0] if self.decisions else None


def read_experts(document: Any) -> ExpertsDocument | None:
    """The document; None when it is none."""
    try:
        return ExpertsDocument.model_validate(document)
    except ValidationError:
        return None
