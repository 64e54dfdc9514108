"""`moeserving calibrate`: the step time of a real engine on this machine, as a cost model for scenarios.

The engine runs in this process, with our scheduler watched (`recording`). It serves prompts of all lengths at all
degrees of concurrency, and then open loops, in whose steps prompts meet answers as they do in use; what its steps
carried and took is fitted, and the fit is checked on shapes of steps not fitted on. With `--validate` fitting and
comparing take turns, so that a machine that gets slower or faster meanwhile does so for both.
"""

import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from moe_agent.shared_memory.control_record import Control, ControlRecordWriter
from moe_agent.vllm.version import is_cpu_build
from moe_contract.engine_process import RUN_DIR_VARIABLE
from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.request.order import RequestSettings
from pydantic.alias_generators import to_camel
from rich.console import Console
from rich.progress import track

from moe_tools.calibration.fitting import Fit, MeasuredStep, TooFewSteps, fit_and_check, fit_cost
from moe_tools.calibration.step_errors import render_errors
from moe_tools.calibration.validate import Agreement, Course, agrees, read_limits, render_agreement
from moe_tools.modelless import foreign_warnings
from moe_tools.replay_command import write_json
from moe_tools.report import read_environment
from moe_tools.simulator.fitted_presets import SIZES
from moe_tools.simulator.step_time import StepModel

RECORDER = "moe_tools.calibration.recording.RecordingScheduler"
# Names of the same numbers in the configurations of models.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOP_K = ("num_experts_per_tok", "moe_top_k", "top_k_experts")
SHORTEST_PROMPT = 16
MEAN_OUTPUT = 24
TURNS = 3
# Less than the longest prompt: prompts are cut into pieces, and others wait for their turn. On a GPU vLLM chooses.
CPU_ENGINE = {"max_num_seqs": 32, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 2**30}
GPU_ENGINE = {"max_num_seqs": 256}


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationEffort:
    """How much is measured: rounds of requests, and requests under each order to check the simulator with; 0: none."""

    rounds: int = 36
    validate_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibratedEngine:
    """The engine to calibrate: the model's folder, the longest prompt with its answer, and more of vLLM's arguments."""

    model: Path
    max_model_len: int
    arguments: Mapping[str, Any]


def read_arguments(text: str) -> Mapping[str, Any]:
    """Arguments of vLLM's `LLM` from the command line.

    Raises:
        InvalidInput: the text is no JSON object.
    """
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise InvalidInput([InputError("--engine-args", f"is no JSON: {error}")]) from None
    if not isinstance(arguments, dict):
        raise InvalidInput([InputError("--engine-args", 'must be an object, such as {"load_format": "dummy"}')])
    return arguments


def run_calibrate(engine: CalibratedEngine, effort: CalibrationEffort, seed: int, json_out: Path | None) -> bool:
    """The whole command; False when the simulator was checked and does not agree."""
    if not (engine.model / "config.json").is_file():
        raise InvalidInput([InputError(str(engine.model), "is no model's folder; make one: moeserving model tiny DIR")])
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUN_DIR_VARIABLE] = folder
        with ControlRecordWriter(Path(folder), Control(version=1, request=RequestSettings())) as control:
            llm = _load(engine)
            source = f"measured: {engine.model.name} on this machine, {read_environment()['system']}"
            try:
                fit, steps, rows = _measure(llm, control, console, effort, source, seed)
            except TooFewSteps as error:
                raise InvalidInput([InputError("--rounds", f"more are needed: {error}")]) from None
    document = build_fit_document(fit, [asdict(step) for step in steps])
    if rows:
        document["validation"] = [asdict(row) for row in rows]
    if json_out is not None:
        write_json(json_out, document)
    return agrees(rows)


def _measure(
    llm: Any, control: Any, console: Console, effort: CalibrationEffort, source: str, seed: int
) -> tuple[Fit, Sequence[MeasuredStep], tuple[Agreement, ...]]:
    """Fits the step time, and compares with the simulator where asked for, in turns; prints the results."""
    measured = llm.llm_engine.engine_core.engine_core.scheduler.measured
    course = Course(llm, control, seed)
    steps: list[MeasuredStep] = []
    turns = TURNS if effort.validate_requests else 1
    limits, model = read_limits(llm), read_step_model(llm.llm_engine.vllm_config)
    all_rounds = list(_rounds(effort.rounds, limits.max_model_len, limits.max_num_seqs, seed))
    for turn, rounds in enumerate(_share(all_rounds, turns)):
        seen = len(measured)
        for prompts, outputs in track(rounds, "serving", console=console):
            _serve(llm, prompts, outputs)
        course.serve_open(fit_cost([*steps, *measured[seen:]], model, source))
        steps += measured[seen:]
        if effort.validate_requests and turn == 0:
            course.plan(fit_cost(steps, model, source), effort.validate_requests)
        if effort.validate_requests:
            course.compare()
    fit = fit_and_check(steps, model, source, seed)
    console.print(render_fit(fit), highlight=False, soft_wrap=True)
    console.print(
        render_errors({"this engine": fit.errors}, "Relative error on shapes of steps that were not fitted on")
    )
    rows = course.conclude(fit.cost) if effort.validate_requests else ()
    if rows:
        console.print(render_agreement(rows))
    return fit, steps, rows


def _load(engine: CalibratedEngine) -> Any:
    # In this process, so that the scheduler can be read; set before vLLM reads it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    arguments = {
        "model": str(engine.model),
        "scheduler_cls": RECORDER,
        "max_model_len": engine.max_model_len,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "disable_log_stats": True,
        **(CPU_ENGINE if is_cpu_build() else GPU_ENGINE),
        **engine.arguments,
    }
    with foreign_warnings():
        from vllm import LLM

        try:
            return LLM(**arguments)
        except (TypeError, ValueError) as error:
            raise InvalidInput([InputError("the engine's arguments", f"vLLM refuses them: {error}")]) from None


def read_step_model(config: Any) -> StepModel:
    """Returns the sizes of an engine without data parallelism that decide its step times, from vLLM's configuration."""
    model, parallel, compiled = config.model_config, config.parallel_config, config.compilation_config
    text = model.hf_text_config
    experts = next((found for name in _EXPERTS if (found := getattr(text, name, None))), 1)
    top_k = next((found for name in _TOP_K if (found := getattr(text, name, None))), 1)
    spread = parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
    sizes = () if is_cpu_build() or model.enforce_eager else tuple(sorted(compiled.cudagraph_capture_sizes or ()))
    return StepModel(experts=experts, top_k=min(top_k, experts), expert_ranks=spread, graph_sizes=sizes)


def _rounds(rounds: int, max_model_len: int, max_num_seqs: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Lengths of prompts and answers; each round has as many requests as are in flight at once."""
    draw = random.Random(seed)
    concurrencies = [1 << power for power in range(max_num_seqs.bit_length())]
    longest = max_model_len * 3 // 4
    for number in range(rounds):
        count = concurrencies[number % len(concurrencies)]
        prompts = [round(SHORTEST_PROMPT * (longest / SHORTEST_PROMPT) ** draw.random()) for _ in range(count)]
        yield prompts, [1 + round(draw.expovariate(1 / MEAN_OUTPUT)) % (max_model_len // 8) for _ in range(count)]


def _share(rounds: Sequence[Any], turns: int) -> list[Sequence[Any]]:
    """As many parts, none of them empty, each in the order of the whole."""
    bounds = [len(rounds) * turn // turns for turn in range(turns + 1)]
    return [rounds[begin:end] for begin, end in itertools.pairwise(bounds)]


def _serve(llm: Any, prompts: list[int], outputs: list[int]) -> None:
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    draw = random.Random(len(prompts))
    llm.generate(
        [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(length)]} for length in prompts],
        [SamplingParams(max_tokens=length, ignore_eos=True, temperature=0.0) for length in outputs],
        use_tqdm=False,
    )


def render_fit(fit: Fit) -> str:
    """Returns the section of a scenario."""
    cost = fit.cost
    sizes = {to_camel(name): getattr(cost.model, name) for name in SIZES}
    seconds = {to_camel(name): value for name, value in cost.coefficients._asdict().items() if value}
    fitted = {**sizes, "graphSizes": list(cost.model.graph_sizes), **seconds, "source": cost.source}
    section = yaml.safe_dump({"cost": {"fitted": fitted}}, sort_keys=False, default_flow_style=None, width=1000)
    return f"{section}Fitted on {fit.steps} steps."


def build_fit_document(fit: Fit, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit, the versions and every step."""
    environment = read_environment()
    cost = {**asdict(fit.cost), "coefficients": fit.cost.coefficients._asdict()}
    return {"fit": {**asdict(fit), "cost": cost}, "environment": environment, "steps": steps}
