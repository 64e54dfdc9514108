"""The `cost` section of a scenario: step times by a preset, a line, or a fit, and the cost model that it asks for."""

from typing import Annotated

from moe_contract.input_errors import InputError, unknown_choice
from moe_operator.api.section import Rule, Section
from pydantic import Field

from moe_tools.simulator.costs import CostModel, LinearCost
from moe_tools.simulator.experts import PlacementPolicy
from moe_tools.simulator.fitted_presets import FITTED_PRESETS, SIZES
from moe_tools.simulator.hardware import PRESETS, RooflineCost
from moe_tools.simulator.step_time import VLLM_GRAPH_SIZES, Coefficients, FittedCost, StepModel

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# Where neither the scenario nor a preset says how large the cache is.
_KV_BLOCKS = 8192


class Linear(Section):
    """Step times as a line, in seconds."""

    base_s: Positive
    prefill_s: NotNegative
    decode_s: NotNegative
    context_s: NotNegative = 0.0
    pair_s: NotNegative = 0.0
    source: str = "given in the scenario"


class FittedSection(Section):
    """Step times as `moeserving calibrate` prints them: `step_time.Coefficients` in seconds, and the engine's sizes."""

    experts: Count = 1
    top_k: Count = 1
    expert_ranks: Count = 1
    ranks: Annotated[int, Field(ge=1, le=256)] = 1
    graph_sizes: tuple[Count, ...] = VLLM_GRAPH_SIZES
    decode_s: NotNegative = 0.0
    prefill_base_s: NotNegative = 0.0
    expert_s: NotNegative = 0.0
    token_s: NotNegative = 0.0
    request_s: NotNegative = 0.0
    prefill_s: NotNegative = 0.0
    group_token_s: NotNegative = 0.0
    context_s: NotNegative = 0.0
    pair_s: NotNegative = 0.0
    compression_s: NotNegative = 0.0
    piecewise_s: NotNegative = 0.0
    eager_s: NotNegative = 0.0
    source: str = "given in the scenario"
    rules = (
        Rule(
            field="decodeS",
            message="a decode step must take time: decodeS, expertS or tokenS above 0",
            cel="self.decodeS + self.expertS + self.tokenS > 0.0",
            holds=lambda fitted: fitted.decode_s + fitted.expert_s + fitted.token_s > 0.0,
        ),
        Rule(
            field="graphSizes",
            message="must rise",
            cel="self.graphSizes == self.graphSizes.sort()",
            holds=lambda fitted: list(fitted.graph_sizes) == sorted(set(fitted.graph_sizes)),
        ),
    )


class Cost(Section):
    """Step times: a preset, a line, or a fit."""

    preset: str | None = None
    placement: PlacementPolicy = PlacementPolicy.INITIAL
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    linear: Linear | None = None
    fitted: FittedSection | None = None
    rules = (
        Rule(
            field="preset",
            message="exactly one of preset, linear and fitted is needed",
            cel="[has(self.preset), has(self.linear), has(self.fitted)].filter(x, x).size() == 1",
            holds=lambda cost: sum(part is not None for part in (cost.preset, cost.linear, cost.fitted)) == 1,
        ),
    )


def check_cost(cost: Cost, ranks: int) -> list[InputError]:
    """Returns errors in names and sizes of the section, for engines of `ranks` ranks."""
    known = {**PRESETS, **FITTED_PRESETS}
    if cost.preset is not None and cost.preset not in known:
        return [unknown_choice("cost.preset", cost.preset, known)]
    return _check_fitted(cost, ranks)


def _check_fitted(cost: Cost, ranks: int) -> list[InputError]:
    """Fitted step times are of one number of ranks, with the experts as they lay."""
    fitted = FITTED_PRESETS.get(cost.preset or "") or cost.fitted
    if fitted is None:
        return []
    errors, fitted_ranks = [], fitted.ranks
    if ranks != fitted_ranks:
        message = f"these step times were fitted on {fitted_ranks} ranks in lockstep, got {ranks}"
        errors.append(InputError("engines.ranks", message))
    if cost.placement is not PlacementPolicy.INITIAL:
        errors.append(InputError("cost.placement", "fitted step times have the placement that was measured"))
    if cost.redundant_experts:
        errors.append(InputError("cost.redundantExperts", "fitted step times have no copies of experts"))
    return errors


def build_cost(cost: Cost, ranks: int, seed: int) -> CostModel:
    """Returns the cost model that a section asks for.

    Args:
        cost: the section.
        ranks: of each server.
        seed: of the experts' popularity.

    Raises:
        ValueError: slots of experts do not divide among the ranks.
    """
    if cost.linear is not None:
        return LinearCost(**cost.linear.model_dump(by_alias=False))
    if cost.fitted is not None:
        return _fitted_cost(cost.fitted)
    assert cost.preset is not None
    if cost.preset in FITTED_PRESETS:
        return FITTED_PRESETS[cost.preset].cost(ranks)
    return PRESETS[cost.preset].cost(ranks, placement=cost.placement, redundant=cost.redundant_experts, seed=seed)


def _fitted_cost(fitted: FittedSection) -> FittedCost:
    values = fitted.model_dump(by_alias=False)
    return FittedCost(
        model=StepModel(**{name: values[name] for name in (*SIZES, "graph_sizes")}),
        coefficients=Coefficients(**{name: values[name] for name in Coefficients._fields}),
        source=fitted.source,
    )


def memory_blocks(cost: CostModel, ranks: int) -> int:
    """Returns the KV blocks of a rank that the step times' engine has."""
    if isinstance(cost, RooflineCost):
        return cost.kv_blocks(ranks)
    return (cost.memory_blocks if isinstance(cost, FittedCost) else None) or _KV_BLOCKS
