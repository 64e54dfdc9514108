"""`moeserving plan --advise`: simulates the shapes that fit a resource's GPUs, and prints them side by side."""

import itertools
import json
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_operator.api import MoEServing, engine_settings, load_resource, request_settings
from moe_operator.api.engine import Engine, Runtime
from rich.console import Console

from moe_tools.advisor.candidates import (
    Candidate,
    Excluded,
    PresentShape,
    list_candidates,
    list_refinements,
    name_split,
)
from moe_tools.advisor.clocks import CLOCKS, ServerParallelism, choose_clock, list_clocks
from moe_tools.advisor.fleet import FleetLoad, build_fleet
from moe_tools.advisor.results import MODEL_ERROR, Advice, Bounds, rank, read_outcome, render, to_document
from moe_tools.advisor.settled import settle
from moe_tools.report import read_environment
from moe_tools.shapes import ShapeSettings, build_shape, parse_shape
from moe_tools.simulator.arrivals import ArrivalShape, arrange
from moe_tools.simulator.simulation import load_vllm, simulate
from moe_tools.traces import TraceRequest, cut_piece, fit_lengths, mean_rate, read_trace, speed_up

# Longest prompt with its answer where the file's arguments name none.
MAX_MODEL_LEN = 16_384
MOST_GPUS = 64
# Bounds of a good request, in seconds, where neither an option nor the file's targets name them.
TTFT_S, INTER_TOKEN_S = 2.0, 0.05
LEAST_REQUESTS = 20
FORMATS = ("table", "json")
_SUFFIXES = {"": 1, "k": 1000, "K": 1024, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
# The label by which NVIDIA's device plugin names the GPU of a node.
_GPU_LABEL = "nvidia.com/gpu.product"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdviceRequest:
    """The question of a user.

    Attributes:
        file: of the resource.
        ttft_s: bound of a good request's time to the first token; None: the file's target, or `TTFT_S`.
        inter_token_s: bound of its time between tokens; None: the file's target, or `INTER_TOKEN_S`.
        trace: file of the requests; None: a generated shape.
        trace_format: of its lines; None: by the first line.
        shape: name of the generated shape.
        rate: requests a second; None: the trace's own.
        requests: simulated for each shape.
        answer_tokens: median answer of a generated shape.
        seed: of the shape and of the experts' popularity.
        cost: name of the GPU and model whose step times are taken; None: by the file.
    """

    file: Path
    ttft_s: float | None = None
    inter_token_s: float | None = None
    trace: Path | None = None
    trace_format: str | None = None
    shape: str = "random"
    rate: float | None = None
    requests: int = 300
    answer_tokens: int = 64
    seed: int = 0
    cost: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """The request, read: candidates, those that do not fit, the load that all share, and how many requests are cut.

    `clock` says whose step times they are, and their error; `bounds` are those of a good request.
    """

    candidates: Sequence[Candidate]
    excluded: Sequence[Excluded]
    load: FleetLoad
    cut: int
    clock: str
    bounds: Bounds


def run_advise(asked: AdviceRequest, output: str) -> None:
    """Simulates and prints; progress goes to stderr.

    Args:
        asked: the request.
        output: `table` or `json`.

    Raises:
        InvalidInput: the file, the trace or an option cannot be used.
    """
    if output not in FORMATS:
        raise InvalidInput([unknown_choice("--output", output, FORMATS)])
    question = read_question(asked)
    with _quiet_stdout():
        rows = rank(_simulate_all(question))
    if output == "json":
        sys.stdout.write(json.dumps(build_document(question, rows), indent=2) + "\n")
    else:
        console = Console(highlight=False)
        console.print(render(rows, question.excluded, question.bounds, question.clock, width=console.width))


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Keeps stdout for the advice: vLLM writes its log there."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)


def build_document(question: _Question, rows: Sequence[Advice]) -> dict[str, Any]:
    """The advice as JSON: the shapes, the best first, with all that they depend on."""
    environment = read_environment()
    return {
        "model_error": MODEL_ERROR,
        "cost": question.load.clock.source,
        "cost_error": question.clock,
        "versions": {"python": environment["python"], **environment["packages"]},
        "requests": len(question.load.trace),
        "cut_requests": question.cut,
        "rate": mean_rate(question.load.trace),
        "bounds": asdict(question.bounds),
        "shapes": [to_document(row) for row in rows],
        "excluded": [{"servers": row.servers, "reason": row.reason} for row in question.excluded],
    }


def _simulate_all(question: _Question) -> list[Advice]:
    """All candidates, and then variants of the best one."""
    progress = Console(stderr=True)
    if question.cut:
        longest = f"{question.load.max_model_len:,}"
        progress.print(f"{question.cut} requests are longer than {longest} tokens and cut to that", highlight=False)
    progress.print("loading vLLM's scheduler", highlight=False)
    load_vllm()
    rows = _simulate(question.candidates, question.load, question.bounds, progress)
    best = rank(rows)[0].candidate
    refinements = list_refinements(best, question.load.clock.copies(best.shape.group(best.shape.servers[0])))
    return rows + _simulate(refinements, question.load, question.bounds, progress)


def _simulate(candidates: Sequence[Candidate], load: FleetLoad, bounds: Bounds, progress: Console) -> list[Advice]:
    rows = []
    for number, candidate in enumerate(candidates, start=1):
        began_s = time.perf_counter()
        chosen = replace(candidate, shape=settle(candidate.shape, load)) if candidate.shape.moves else candidate
        outcome = simulate(build_fleet(chosen.shape, load), load_vllm())
        rows.append(read_outcome(chosen, outcome, bounds))
        words = f"{candidate.servers}, {candidate.roles}, {candidate.step_tokens:,} tokens a step"
        took_s = time.perf_counter() - began_s
        progress.print(f"{number} of {len(candidates)}: {words}: {took_s:.0f} s", highlight=False)
    return rows


def read_question(asked: AdviceRequest) -> _Question:
    """Reads the resource and the requests.

    Raises:
        InvalidInput: one of them cannot be used.
    """
    _check_numbers(asked)
    resource = load_resource(asked.file)
    spec = resource.spec
    parallelism = spec.engine.parallelism
    gpus = max(1, spec.engine.count) * parallelism.ranks
    if gpus > MOST_GPUS:
        raise InvalidInput([InputError("spec.engine", f"has {gpus} GPUs; at most {MOST_GPUS} are simulated")])
    name, is_assumed = _name_clock(asked, resource)
    clock = choose_clock(name, gpus)
    longest = _option(spec.engine.args, "--max-model-len", MAX_MODEL_LEN)
    targets = engine_settings(spec.scheduling.engine).targets
    trace, cut = _read_requests(asked, longest)
    load = FleetLoad(
        clock=clock,
        trace=trace,
        max_model_len=longest,
        request=request_settings(spec.scheduling.request, spec.scheduling.engine),
        engine=engine_settings(spec.scheduling.engine),
        targets=targets,
        sequences=_option(spec.engine.args, "--max-num-seqs", CLOCKS[name].sequences),
        seed=asked.seed,
    )
    candidates, excluded = list_candidates(
        gpus,
        step_tokens=_option(spec.engine.args, "--max-num-batched-tokens", CLOCKS[name].step_tokens),
        present=_present_shape(spec.engine),
        groups=clock.groups,
        kv_tokens=lambda group: 16 * clock.kv_blocks(group),
        longest_tokens=longest,
    )
    if not candidates:
        reasons = "; ".join(f"{row.servers}: {row.reason}" for row in excluded)
        raise InvalidInput([InputError("spec.engine", f"no shape of {gpus} GPUs holds the model: {reasons}")])
    said = clock.describe() + (_other_gpus(name) if is_assumed else "")
    bounds = Bounds(
        ttft_s=asked.ttft_s or targets.ttft_s or TTFT_S,
        inter_token_s=asked.inter_token_s or targets.inter_token_s or INTER_TOKEN_S,
    )
    return _Question(candidates=candidates, excluded=excluded, load=load, cut=cut, clock=said, bounds=bounds)


def _present_shape(engine: Engine) -> PresentShape:
    """The file's own shape, in the words of the candidates."""
    wanted = engine.parallelism
    group = ServerParallelism(wanted.data, wanted.tensor, wanted.expert or wanted.ranks == 1)
    roles = engine.roles
    if not roles.is_fixed:
        return PresentShape(group=group, roles=roles.mode.value)
    prefill, decode = roles.prefill or 0, roles.decode or 0
    return PresentShape(group=group, roles=name_split(prefill, decode), prefill=prefill)


def _check_numbers(asked: AdviceRequest) -> None:
    errors = [
        InputError(name, f"must be more than 0, got {value:g}")
        for name, value in (
            ("--rate", 1.0 if asked.rate is None else asked.rate),
            ("--ttft", 1.0 if asked.ttft_s is None else asked.ttft_s),
            ("--inter-token", 1.0 if asked.inter_token_s is None else asked.inter_token_s),
        )
        if not 0 < value < math.inf
    ]
    if asked.requests < LEAST_REQUESTS:
        errors.append(InputError("--requests", f"must be {LEAST_REQUESTS} or more, got {asked.requests}"))
    if asked.trace is None and asked.rate is None:
        errors.append(InputError("--rate", "is needed without --trace: requests a second of the generated shape"))
    if errors:
        raise InvalidInput(errors)


def _name_clock(asked: AdviceRequest, resource: MoEServing) -> tuple[str, bool]:
    """The name of the step times, and whether their GPU is assumed.

    Raises:
        InvalidInput: none are known for the model and its GPU.
    """
    if asked.cost is not None:
        if asked.cost not in CLOCKS:
            raise InvalidInput([unknown_choice("--cost", asked.cost, CLOCKS)])
        return asked.cost, False
    known = ", ".join(sorted(CLOCKS))
    if resource.spec.engine.runtime is Runtime.VLLM_CPU:
        message = "step times of CPUs are not in the model; name those of a GPU with --cost"
        raise InvalidInput([InputError("spec.engine.runtime", f"{message}; known: {known}")])
    uri, gpu = resource.spec.model.uri, _named_gpu(resource.spec.engine)
    if found := list_clocks(uri, gpu):
        return found[0], not gpu
    message = f"no step times are known for {uri}{gpu and f' on {gpu}'}; name those of a similar one with --cost"
    raise InvalidInput([InputError("spec.model.uri", f"{message}; known: {known}")])


def _named_gpu(engine: Engine) -> str:
    """The GPU that the nodes of the engines must have, by the label of NVIDIA's device plugin; empty: any."""
    spec = engine.pod_template.get("spec")
    selector = spec.get("nodeSelector") if isinstance(spec, dict) else None
    return str(selector.get(_GPU_LABEL, "")) if isinstance(selector, dict) else ""


def _other_gpus(name: str) -> str:
    """That the file names no GPU, and which step times there are for others."""
    others = [other for other, known in CLOCKS.items() if known.model == CLOCKS[name].model and other != name]
    instead = f"; others with --cost {', '.join(others)}" if others else ""
    return f" The file names no GPU ({_GPU_LABEL}): {CLOCKS[name].gpu.upper()} is assumed{instead}."


def _option(args: Sequence[str], name: str, default: int) -> int:
    """The number that an argument of vLLM has, such as `--max-model-len=4096` or `32k`; the last one counts.

    Raises:
        InvalidInput: the value is no number.
    """
    found = default
    words = [word for argument in args for word in argument.split("=", 1)]
    for word, value in itertools.pairwise(words):
        if word.replace("_", "-") == name:
            found = _read_number(name, value)
    return found


def _read_number(name: str, value: str) -> int:
    """The whole number of a text as vLLM reads it: `k` is 1,000 and `K` is 1,024, and so on."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", value)
    number = 0.0 if match is None else float(match[1]) * _SUFFIXES[match[2]]
    if number < 1:
        message = f"{name} {value}: the simulation needs a number of at least 1, such as 4096 or 32k"
        raise InvalidInput([InputError("spec.engine.args", message)])
    return int(number)


def _read_requests(asked: AdviceRequest, longest: int) -> tuple[Sequence[TraceRequest], int]:
    """The requests, and how many of them are cut to the longest one."""
    if asked.trace is not None:
        rows = cut_piece(read_trace(asked.trace, asked.trace_format), 0, asked.requests)
        if asked.rate is not None and math.isfinite(own := mean_rate(rows)):
            rows = speed_up(rows, asked.rate / own)
        fitted = fit_lengths(rows, longest)
        return fitted.requests, fitted.cut
    settings = ShapeSettings(
        count=asked.requests,
        seed=asked.seed,
        longest_tokens=max(16, longest // 2),
        median_output_tokens=asked.answer_tokens,
        longest_output_tokens=min(16 * asked.answer_tokens, max(1, longest // 2)),
    )
    rate = asked.rate
    assert rate is not None
    return arrange(build_shape(parse_shape(asked.shape), settings), ArrivalShape.POISSON, rate, asked.seed), 0
