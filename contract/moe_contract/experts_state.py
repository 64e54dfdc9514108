"""The experts of an engine, `GET /v1/experts` of its agent: placement, load, balance, decisions.

The first rank of an expert group writes these fields (`moe_agent.experts.document`), its agent serves them, and the
operator and the command line read them with `read_experts`. With `?brief=1` the fields that grow with the model are
absent: every `physical_to_logical`, and `load.tokens`; `?heat=1` is the brief form with `heat`. A reader skips unknown
fields.
"""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Natural = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Balance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Slots = tuple[tuple[int, ...], ...]
OFF = "off"


# Of an engine that has just started; each change adds one.
FIRST_PLACEMENT = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class PlacementPart(_Part):
    """The placement of the experts.

    Attributes:
        version: rises by one at each change.
        directive: version of the newest directive that was carried out; 0 before the first.
        physical_to_logical: `[layer][slot]`, slots rank by rank; None in the brief form.
    """

    version: Natural
    directive: Natural = 0
    physical_to_logical: Slots | None = None


class HotExpertPart(_Part):
    """One of the experts with the most tokens.

    Attributes:
        layer: its layer.
        expert: its logical number.
        tokens: tokens a step over all sources.
    """

    layer: Natural
    expert: Natural
    tokens: Number


class LoadPart(_Part):
    """The load of the experts.

    Attributes:
        steps: of the window; 0 before the first.
        tokens: `[source][layer][expert]`, tokens a step; None in the brief form.
        hottest: the experts with the most tokens, the hottest first.
        sizes: `[tokens, part]`, how often steps have which size; None before the first.
    """

    steps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0
    tokens: tuple[tuple[tuple[Number, ...], ...], ...] | None = None
    hottest: tuple[HotExpertPart, ...] = ()
    sizes: tuple[tuple[Number, Number], ...] | None = None


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


class HeatPart(_Part):
    """The load of each expert and of each rank as bytes, for the live page: a hundredth of the numbers' text.

    Attributes:
        unit: load over the mean of the layer for which one step of a byte stands.
        by_expert: base64 of a byte for each [layer, expert]; 255 stands for more too.
        by_rank: the same for each [layer, rank].
    """

    unit: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    by_expert: str
    by_rank: str


class Decision(_Part):
    """One decision about the placement.

    Attributes:
        number: counted from the engine's start.
        step: of the engine, at the decision.
        age_s: time since then.
        outcome: `moved`, `stayed`, `dryRun`, `rolledBack`, `applied` or `failed`.
        reason: in words.
        moves: experts moved, or that would move.
        predicted_gain_s: step time that the placement should save, in seconds.
        measured_gain_s: step time that it saved; None before it was measured.
        cost_s: seconds that moving takes.
        balance_before: busiest rank over mean before.
        balance_after: the same after.
        seconds: time that the decision took.
        physical_to_logical: the candidate, of the newest decision alone; None in the brief form.
    """

    number: Natural
    step: Natural = 0
    age_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    outcome: str
    reason: str = ""
    moves: Natural = 0
    predicted_gain_s: Number | None = None
    measured_gain_s: Number | None = None
    cost_s: Number | None = None
    balance_before: Balance | None = None
    balance_after: Balance | None = None
    seconds: Number | None = None
    physical_to_logical: Slots | None = None


class TotalsPart(_Part):
    """Counters since the engine's start.

    Attributes:
        moves: experts moved.
        decisions: decisions by outcome.
        stayed: decisions without a move by reason.
        lost_s: time that moving took.
        won_s: time that moves saved, as measured.
    """

    moves: Natural = 0
    decisions: dict[str, Natural] = Field(default_factory=dict)
    stayed: dict[str, Natural] = Field(default_factory=dict)
    lost_s: Number = 0.0
    won_s: Number = 0.0


class PairPart(_Part):
    """Experts of neighbouring layers that the same tokens take.

    Attributes:
        layer: of the first expert.
        expert: its logical number.
        next: logical number of the expert in the following layer.
        tokens: tokens that take both experts.
        over_chance: `tokens` over the number expected by chance.
    """

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
    """Something that keeps the experts from being balanced.

    Attributes:
        kind: `no_decision`, `slow_move`, `version_skew` or `backoff`.
        message: in words.
    """

    kind: str
    message: str = ""


class ExpertsState(_Part):
    """The whole answer.

    Attributes:
        mode: `off`, `observe`, `dryRun` or `active`.
        ranks: of the group.
        nodes: over which it is spread.
        layers: with experts.
        experts: logical experts of a layer.
        slots_per_rank: places for experts on each rank.
        step: number of the engine's step.
        placement: which expert is where.
        load: tokens of the experts.
        balance: load of the busiest rank over the mean; None before the first load.
        remote_fraction: part of the tokens whose expert is on another rank, 0 to 1.
        costs: seconds by name: of a token's expert work, of its traffic, of one moved expert.
        decisions: the last 20, the newest first.
        totals: counters.
        affinity: inter-layer affinity; None until it was recorded on request.
        problems: present obstacles to balancing the experts.
        heat: load as bytes, in the form `?heat=1` alone, once a load was recorded.
    """

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
    totals: TotalsPart = TotalsPart()
    affinity: AffinityPart | None = None
    problems: tuple[ProblemPart, ...] = ()
    heat: HeatPart | None = None

    @property
    def recorded(self) -> BalancePart | None:
        """The balance, where a load was recorded at all."""
        return self.balance if self.load.steps else None

    @property
    def newest(self) -> Decision | None:
        """The last decision; None before the first."""
        return self.decisions[0] if self.decisions else None


def read_experts(text: bytes) -> ExpertsState:
    """The state in a JSON text.

    Raises:
        ValueError: it is no JSON, lacks a required field, or a field has another type or range.
    """
    return ExpertsState.model_validate_json(text)
