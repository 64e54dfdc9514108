"""`moeserving calibrate`: the step time of a real engine on this machine, as a cost model for scenarios.

The engine runs in this process, with our scheduler watched (`recording`). It serves prompts of all lengths at all
degrees of concurrency, and then open loops, in whose steps prompts meet answers as they do in use; what its steps
carried and took is fitted, and the fit is checked on steps not fitted on.
"""

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from moe_agent.pages import RUN_DIR_VARIABLE, Control, ControlPageWriter
from moe_scheduling.problems import InvalidInput, Problem
from moe_scheduling.request import RequestSettings
from rich.console import Console
from rich.progress import track

from moe_bench.calibration.fitting import Fit, fit_cost
from moe_bench.calibration.validate import Agreement, agrees, render_agreement, serve_open, validate
from moe_bench.modelless import foreign_warnings
from moe_bench.replay_command import write_json
from moe_bench.report import read_environment

RECORDER = "moe_bench.calibration.recording.RecordingScheduler"
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
SHORTEST_PROMPT = 16
MEAN_OUTPUT = 24
KV_CACHE_BYTES = 2**30
# Less than the longest prompt: prompts are cut into pieces, and others wait for their turn.
STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured: rounds of requests, and requests under each order to check the simulator with; 0: none."""

    rounds: int = 36
    validate_requests: int = 0


def run_calibrate(model: Path, effort: Effort, max_model_len: int, seed: int, json_out: Path | None) -> bool:
    """The whole command; False when the simulator was checked and does not agree."""
    if not (model / "config.json").is_file():
        raise InvalidInput([Problem(str(model), "is no model's folder; make one: moeserving model tiny DIR")])
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUN_DIR_VARIABLE] = folder
        with ControlPageWriter(Path(folder), Control(version=1, request=RequestSettings())) as control:
            return _calibrate(
                _load(model, max_model_len), control, console, model, effort, max_model_len, seed, json_out
            )


def _calibrate(
    llm: Any, control: Any, console: Console, model: Path, effort: Effort, max_model_len: int, seed: int,
    json_out: Path | None,
) -> bool:  # fmt: skip
    for prompts, outputs in track(list(_rounds(effort.rounds, max_model_len, seed)), "serving", console=console):
        _serve(llm, prompts, outputs)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    source = f"measured: {model.name} on this machine, {read_environment()['system']}"
    serve_open(llm, control, fit_cost(scheduler.measured, source, seed).cost, seed + 1)
    measured = list(scheduler.measured)
    fit = fit_cost(measured, source, seed)
    console.print(render_fit(fit), highlight=False, soft_wrap=True)
    document = build_fit_document(fit, [asdict(step) for step in measured])
    rows: tuple[Agreement, ...] = ()
    if effort.validate_requests:
        rows = validate(llm, control, fit.cost, effort.validate_requests, seed)
        console.print(render_agreement(rows))
        document["validation"] = [asdict(row) for row in rows]
    if json_out is not None:
        write_json(json_out, document)
    return agrees(rows)


def _load(model: Path, max_model_len: int) -> Any:
    # In this process, so that the scheduler can be read; set before vLLM reads it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with foreign_warnings():
        from vllm import LLM

        return LLM(
            model=str(model),
            scheduler_cls=RECORDER,
            max_model_len=max_model_len,
            max_num_seqs=max(CONCURRENCIES),
            max_num_batched_tokens=STEP_TOKENS,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )


def _rounds(rounds: int, max_model_len: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Lengths of prompts and answers; each round has as many requests as are in flight at once."""
    draw = random.Random(seed)
    longest = max_model_len * 3 // 4
    for number in range(rounds):
        count = CONCURRENCIES[number % len(CONCURRENCIES)]
        prompts = [round(SHORTEST_PROMPT * (longest / SHORTEST_PROMPT) ** draw.random()) for _ in range(count)]
        yield prompts, [1 + round(draw.expovariate(1 / MEAN_OUTPUT)) % (max_model_len // 8) for _ in range(count)]


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
    """The section of a scenario, and how good it is."""
    cost = fit.cost
    section = {
        "cost": {
            "linear": {
                "baseS": cost.base_s,
                "prefillS": cost.prefill_s,
                "decodeS": cost.decode_s,
                "contextS": cost.context_s,
                "pairS": cost.pair_s,
                "source": cost.source,
            }
        }
    }
    return (
        f"{yaml.safe_dump(section, sort_keys=False)}"
        f"Fitted on {fit.steps} steps. On {fit.held_out} held-out steps: error {fit.error_median:.1%} (median), "
        f"{fit.error_p90:.1%} (p90), sum {fit.bias - 1:+.1%}."
    )


def build_fit_document(fit: Fit, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit, the versions and every step."""
    environment = read_environment()
    return {"fit": {**asdict(fit), "cost": fit.cost._asdict()}, "environment": environment, "steps": steps}
