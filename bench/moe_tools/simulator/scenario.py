"""The scenario file of `moeserving simulate`: its models, validated like the resource, and the simulation it asks for.

Sections, durations and errors are those of the resource (`moe_operator.api`): camelCase, unknown keys refused, a
message with the path and the known choices. `scheduling` is the resource's own section.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from moe_contract.documents import invalid_input
from moe_contract.input_errors import InputError, InvalidInput, render_choices, unknown_choice
from moe_operator.api import engine_settings, load_document, request_settings
from moe_operator.api.scheduling import EngineScheduling, RequestScheduling
from moe_operator.api.section import Section
from moe_operator.api.units import DurationBetween, duration_s
from pydantic import Field, ValidationError

from moe_tools.shapes import Shape, ShapeSettings, build_shape
from moe_tools.simulator.arrivals import ArrivalShape, Senders, arrange
from moe_tools.simulator.cost_sections import Cost, build_cost, check_cost, memory_blocks
from moe_tools.simulator.costs import CostModel
from moe_tools.simulator.rank import OURS, STOCK, EngineLimits
from moe_tools.simulator.rivals import RIVALS
from moe_tools.simulator.signals import Loss, SignalKind, SignalPlan
from moe_tools.simulator.simulation import Clients, Simulation, default_signals, server_name
from moe_tools.simulator.world import ServerFailure
from moe_tools.traces import TraceRequest, cut_piece, fit_lengths, mean_rate, read_trace, scale_lengths

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[str, DurationBetween("0s", "24h")]
SHORT_NAMES = {"ordered": OURS, "stock": STOCK}


class Tenant(Section):
    """A sender; `weight` is its share of the requests beside the others'."""

    weight: Positive = 1.0


class Level(Section):
    """A level of priority and its weight among the requests."""

    priority: int
    weight: Positive = 1.0


class Loop(Section):
    """A closed loop: each client has one request at a time."""

    clients: Count
    think_time: Duration = "0s"


class Workload(Section):
    """The requests: a trace file, or a generated shape."""

    trace: Path | None = None
    format: str | None = None
    shape: Shape = Shape.RANDOM
    count: Count = 1000
    start: Annotated[int, Field(ge=0)] = 0
    rate: Positive | None = None
    arrivals: ArrivalShape = ArrivalShape.TRACE
    scale_lengths: Positive = 1.0
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    shortest_prompt: Count = 16
    longest_prompt: Count = 3072
    median_output: Count = 48
    longest_output: Count = 512
    sessions: Annotated[int, Field(ge=0)] = 0
    tenants: tuple[Tenant, ...] = (Tenant(),)
    priorities: tuple[Level, ...] = (Level(priority=0),)
    closed_loop: Loop | None = None


class Engines(Section):
    """The fleet; names of limits are vLLM's."""

    servers: Annotated[int, Field(ge=1, le=1000)] = 1
    ranks: Annotated[int, Field(ge=1, le=256)] = 1
    scheduler: str = "ordered"
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 2048
    kv_blocks: Count | None = None
    max_model_len: Count = 32_768
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] = 0
    prefill_schedule_interval: Count = 1
    async_scheduling: bool = True
    startup: Duration = "0s"


class Scheduling(Section):
    """Layers 1 and 2, with the field names of the resource."""

    request: RequestScheduling = RequestScheduling()
    engine: EngineScheduling = EngineScheduling()


class Gateways(Section):
    """The gateways; `rival` names another's choice of the engine instead of the product's."""

    count: Annotated[int, Field(ge=1, le=100)] = 1
    rival: str | None = None
    hold_requests: Annotated[int, Field(ge=0)] = 1000
    hold_timeout: Duration = "60s"


class LossSection(Section):
    """Nothing of the server (of any, where it is absent) arrives in this time."""

    after: Duration
    until: Duration | None = None
    server: Annotated[int, Field(ge=0)] | None = None


class Signals(Section):
    """Source, period and delay of the engines' signals."""

    source: SignalKind = SignalKind.AGENT
    period: Annotated[str, DurationBetween("1ms", "1h")] = "10ms"
    delay: Duration = "3ms"
    losses: tuple[LossSection, ...] = ()


class FailureSection(Section):
    """A server dies; a new one is ready `startup` later, never where it is absent."""

    server: Annotated[int, Field(ge=0)]
    after: Duration
    startup: Duration | None = None


class Scenario(Section):
    """One simulation, as its file describes it."""

    name: str = ""
    seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    cost: Cost
    workload: Workload = Workload()
    engines: Engines = Engines()
    scheduling: Scheduling = Scheduling()
    gateways: Gateways = Gateways()
    signals: Signals | None = None
    failures: tuple[FailureSection, ...] = ()


def load_scenario(path: Path) -> Scenario:
    """The scenario in a YAML file, a relative trace made absolute against the file's folder.

    Raises:
        InvalidInput: the file cannot be read, or is no valid scenario.
    """
    return parse_scenario(load_document(path), path.absolute().parent)


def parse_scenario(document: object, folder: Path) -> Scenario:
    """The scenario in a document; relative paths count from the folder.

    Raises:
        InvalidInput: it is no valid scenario.
    """
    if not isinstance(document, Mapping):
        raise InvalidInput([InputError("", f"a mapping of fields is needed, got {document!r:.80}")])
    try:
        scenario = Scenario.model_validate(document, by_alias=True, by_name=False)
    except ValidationError as error:
        raise invalid_input(Scenario, error) from None
    if errors := _check(scenario):
        raise InvalidInput(errors)
    trace = scenario.workload.trace
    if trace is None:
        return scenario
    workload = scenario.workload.model_copy(update={"trace": folder / trace})
    return scenario.model_copy(update={"workload": workload})


def _check(scenario: Scenario) -> list[InputError]:
    """What spans sections, or names what other modules know."""
    errors: list[InputError] = []
    cost, engines, rival = scenario.cost, scenario.engines, scenario.gateways.rival
    errors += check_cost(cost, engines.ranks)
    if rival is not None and rival not in RIVALS:
        errors.append(unknown_choice("gateways.rival", rival, RIVALS))
    if engines.scheduler not in SHORT_NAMES and "." not in engines.scheduler:
        known = f"{render_choices(SHORT_NAMES)}, or a class as package.module.Class"
        errors.append(InputError("engines.scheduler", f"unknown {engines.scheduler!r}; known: {known}"))
    if engines.max_num_batched_tokens < engines.max_num_seqs:
        errors.append(InputError("engines.maxNumBatchedTokens", "must be at least maxNumSeqs"))
    for index, failure in enumerate(scenario.failures):
        if failure.server >= engines.servers:
            errors.append(InputError(f"failures[{index}].server", f"there are servers 0 to {engines.servers - 1}"))
    if not errors:
        errors += _check_experts(scenario) or _check_memory(scenario)
    return errors


def _check_experts(scenario: Scenario) -> list[InputError]:
    try:
        cost_of(scenario)
    except ValueError as error:
        return [InputError("cost.redundantExperts", str(error))]
    return []


def _check_memory(scenario: Scenario) -> list[InputError]:
    """vLLM does not start where the longest request does not fit into the KV cache."""
    blocks, tokens = limits_of(scenario).kv_blocks, scenario.engines.max_model_len
    if blocks * 16 > tokens:
        return []
    return [InputError("engines.maxModelLen", f"{tokens} tokens do not fit into {max(0, blocks)} KV blocks of 16")]


def cost_of(scenario: Scenario) -> CostModel:
    """Returns the cost model that a scenario names: linear, fitted or by preset."""
    return build_cost(scenario.cost, scenario.engines.ranks, scenario.seed)


def limits_of(scenario: Scenario) -> EngineLimits:
    """The limits of each rank."""
    engines, cost = scenario.engines, cost_of(scenario)
    blocks = engines.kv_blocks
    if blocks is None:
        blocks = memory_blocks(cost, engines.ranks)
    return EngineLimits(
        max_num_seqs=engines.max_num_seqs,
        max_num_batched_tokens=engines.max_num_batched_tokens,
        kv_blocks=blocks,
        max_model_len=engines.max_model_len,
        scheduling_policy=engines.scheduling_policy,
        long_prefill_token_threshold=engines.long_prefill_token_threshold,
        prefill_schedule_interval=engines.prefill_schedule_interval,
    )


def trace_of(scenario: Scenario) -> tuple[TraceRequest, ...]:
    """The requests, cut to what the engines take, at the wanted rate.

    Raises:
        InvalidInput: the trace cannot be read, or has no such requests.
    """
    workload = scenario.workload
    if workload.trace is not None:
        whole = read_trace(workload.trace, workload.format, scenario.seed)
        if workload.start >= len(whole):
            raise InvalidInput([InputError("workload.start", f"the trace has {len(whole)} requests")])
        requests = cut_piece(whole, workload.start, workload.count)
    else:
        requests = build_shape(workload.shape, _shape_settings(scenario))
    limit = min(workload.max_tokens or scenario.engines.max_model_len, scenario.engines.max_model_len)
    fitted = fit_lengths(scale_lengths(requests, workload.scale_lengths), limit).requests
    if workload.arrivals is ArrivalShape.TRACE and (workload.rate is None or len(fitted) < 2):
        return fitted
    return arrange(fitted, workload.arrivals, workload.rate or mean_rate(fitted), scenario.seed)


def _shape_settings(scenario: Scenario) -> ShapeSettings:
    workload = scenario.workload
    return ShapeSettings(
        rate=workload.rate or 1.0,
        count=workload.count,
        seed=scenario.seed,
        shortest_tokens=workload.shortest_prompt,
        longest_tokens=workload.longest_prompt,
        median_output_tokens=workload.median_output,
        longest_output_tokens=workload.longest_output,
    )


def build_simulation(scenario: Scenario) -> Simulation:
    """The simulation that a scenario asks for.

    Raises:
        InvalidInput: its trace cannot be read, or it asks for signals that its scheduler does not publish.
    """
    engines, gateways, workload = scenario.engines, scenario.gateways, scenario.workload
    loop = workload.closed_loop
    simulation = Simulation(
        trace=trace_of(scenario),
        cost=cost_of(scenario),
        servers=engines.servers,
        ranks=engines.ranks,
        limits=limits_of(scenario),
        scheduler=SHORT_NAMES.get(engines.scheduler, engines.scheduler),
        request=request_settings(scenario.scheduling.request, scenario.scheduling.engine),
        dispatch=gateways.rival or engine_settings(scenario.scheduling.engine),
        gateways=gateways.count,
        hold_requests=gateways.hold_requests,
        hold_timeout_s=duration_s(gateways.hold_timeout),
        signals=_signals(scenario.signals),
        clients=None if loop is None else Clients(count=loop.clients, think_s=duration_s(loop.think_time)),
        senders=_senders(workload, gateways.count),
        startup_s=duration_s(engines.startup),
        failures=[_failure(row) for row in scenario.failures],
        async_scheduling=engines.async_scheduling,
        seed=scenario.seed,
    )
    signals = simulation.signals or default_signals(simulation)
    if signals.source is SignalKind.AGENT and simulation.scheduler == STOCK:
        raise InvalidInput([InputError("signals.source", "vLLM's own scheduler publishes nothing: scrape or none")])
    return simulation


def _signals(section: Signals | None) -> SignalPlan | None:
    if section is None:
        return None
    return SignalPlan(
        source=section.source,
        period_s=duration_s(section.period),
        delay_s=duration_s(section.delay),
        losses=[
            Loss(
                from_s=duration_s(row.after),
                until_s=float("inf") if row.until is None else duration_s(row.until),
                server=None if row.server is None else server_name(row.server),
            )
            for row in section.losses
        ],
    )


def _senders(workload: Workload, gateways: int) -> Senders:
    return Senders(
        tenant_weights=tuple(row.weight for row in workload.tenants),
        sessions=workload.sessions,
        priorities=tuple((row.priority, row.weight) for row in workload.priorities),
        gateways=gateways,
    )


def _failure(row: FailureSection) -> ServerFailure:
    return ServerFailure(
        server=server_name(row.server),
        at_s=duration_s(row.after),
        startup_s=None if row.startup is None else duration_s(row.startup),
    )
