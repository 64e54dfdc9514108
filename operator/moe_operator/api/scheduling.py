"""Section `spec.scheduling`: the settings of the three layers, generated from the dataclasses of the decisions."""

from dataclasses import replace
from functools import lru_cache
from typing import Annotated

from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.expert.settings import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import Field

from moe_operator.api.section import Count, Section
from moe_operator.api.settings import read_settings, settings_section


class RequestScheduling(settings_section(RequestSettings)):  # type: ignore[misc]
    """Order of waiting requests, in each engine and in the gateway's hold queue."""


class EngineScheduling(settings_section(EngineSettings)):  # type: ignore[misc]
    """Choice of the engine for a request, in the gateway."""


class ExpertScheduling(settings_section(ExpertSettings)):  # type: ignore[misc]
    """Placement of the experts within an engine. Only with `engine.parallelism.expert`."""

    redundant_experts: Annotated[Count, Field(ge=0, le=4096)] = Field(
        default=0,
        description="Slots for further copies of hot experts, in each layer, over all ranks of a replica; each takes "
        "the memory of one expert a layer, and time in small steps; only large steps can win by them. Experts and "
        "these must divide by the ranks. A change rolls the engines.",
    )


class Scheduling(Section):
    """Settings of the three scheduling layers."""

    request: RequestScheduling = RequestScheduling()
    engine: EngineScheduling = EngineScheduling()
    expert: ExpertScheduling = ExpertScheduling()


@lru_cache
def request_settings(request: RequestScheduling, engine: EngineScheduling) -> RequestSettings:
    """The settings of the order of requests, with the bound between tokens, which engines keep too."""
    settings = read_settings(request, RequestSettings)
    return replace(settings, inter_token_s=engine_settings(engine).targets.inter_token_s)


@lru_cache
def engine_settings(section: EngineScheduling) -> EngineSettings:
    """The settings of the choice of the engine."""
    return read_settings(section, EngineSettings)


def expert_settings(section: ExpertScheduling) -> ExpertSettings:
    """The settings of the placement of experts."""
    return read_settings(section, ExpertSettings)
