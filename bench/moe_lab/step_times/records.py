"""Reads a table of measured engine steps, and returns measurements for a fit.

The table is that of `engine_steps_b300_vllm0.20.csv.gz` (ai-dynamo/aiconfigurator, commit abbac647): a line for each
step of rank 0 of an engine. It is read so:

- Engines without data parallelism schedule asynchronously: the time of launching a prompt's step is counted in the step
  before it, and chunks of a prompt in each other. So a prompt's steps are one measurement, with what the
  decode step before them took beyond the median of its batch; decode steps before a prompt are left out.
- Engines with data parallelism, and DeepSeek-V4's, count each step by itself; a prompt's chunks count as one here too.
  Other ranks are not in the table: decode steps are taken as equal on all ranks; a prompt alone on rank 0 as alone in
  the group; several prompts as on all ranks.
- DeepSeek-V4 compresses each 128 tokens: known for steps of one request alone (`compressions`), not for others.
"""

import csv
import gzip
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path
from statistics import median
from typing import TextIO

from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.calibration.step_fit import StepMeasurement
from moe_tools.simulator.costs import COMPRESSED_TOKENS, Work
from moe_tools.simulator.step_time import StepModel

# Shapes of prompts in each doubling of the tokens.
_SHAPES_TO_DOUBLE = 4
# Weight of prompts beside answers where other ranks may have longer ones, which the table does not show.
_UNKNOWN_RANKS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One step of rank 0: its work and its latency.

    Attributes:
        run: name of the run.
        counter: number of the step.
        prefill_tokens: of all prompts in the step.
        prefill_requests: how many prompts.
        prefill_context: tokens of these prompts that were computed before.
        decode_requests: requests that decode.
        decode_context: tokens that they attend to.
        seconds: latency.
    """

    run: str
    counter: int
    prefill_tokens: int
    prefill_requests: int
    prefill_context: int
    decode_requests: int
    decode_context: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEngine:
    """Model and parallelism that the name of a run tells.

    Attributes:
        preset: name of the preset.
        model: what decides its terms.
        tensor_ranks: GPUs that share attention and dense layers.
        launches_ahead: whether a prompt's time is partly counted in the step before it.
        compresses: whether the model compresses pieces of the context.
    """

    preset: str
    model: StepModel
    tensor_ranks: int
    launches_ahead: bool
    compresses: bool


# Experts of a layer and of a token: Qwen/Qwen3.6-35B-A3B and deepseek-ai/DeepSeek-V4-Flash, config.json.
_MODELS = {"qwen36": ("qwen3.6-35b-a3b", 256, 8), "dsv4_flash": ("deepseek-v4-flash", 256, 6)}


def engine_of(run: str) -> MeasuredEngine | None:
    """Returns the engine of a run by its name, such as `qwen36_moe_.../tp2_ep2`; None for other names."""
    sizes = re.findall(r"tp(\d+)_ep(\d+)", run)
    known = next((value for key, value in _MODELS.items() if run.startswith(key)), None)
    if known is None or not sizes:
        return None
    name, experts, top_k = known
    tensor, expert = map(int, sizes[-1])
    ranks = max(1, expert // tensor)
    return MeasuredEngine(
        preset=f"b300-{name}-tp{tensor}-ep{expert}" + (f"-dp{ranks}" if ranks > 1 else ""),
        model=StepModel(experts=experts, top_k=top_k, expert_ranks=expert, ranks=ranks),
        tensor_ranks=tensor,
        launches_ahead=ranks == 1 and name.startswith("qwen"),
        compresses=name.startswith("deepseek-v4"),
    )


def read_records(path: Path) -> dict[str, list[StepRecord]]:
    """Returns the steps of each run, in their order.

    Raises:
        InvalidInput: the file cannot be read, or has other columns.
    """
    runs: dict[str, list[StepRecord]] = defaultdict(list)
    try:
        with _open(path) as file:
            for row in csv.DictReader(file):
                runs[row["run"]].append(_record(row))
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput([InputError(str(path), f"no table of measured steps: {error!r}")]) from None
    if not runs:
        raise InvalidInput([InputError(str(path), "has no steps")])
    return dict(runs)


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _record(row: Mapping[str, str]) -> StepRecord:
    return StepRecord(
        run=row["run"],
        counter=int(row["counter"]),
        prefill_tokens=int(row["prefill_tokens"]),
        prefill_requests=int(row["prefill_reqs"]),
        prefill_context=int(row["prefill_kv_tokens"]),
        decode_requests=int(row["decode_reqs"]),
        decode_context=int(row["decode_kv_tokens"]),
        seconds=float(row["latency_ms"]) * 1e-3,
    )


def measurements_of(engine: MeasuredEngine, records: Sequence[StepRecord]) -> list[StepMeasurement]:
    """Returns the measurements of one run; prompts weigh as much as decode steps, which are 60 times as many."""
    decodes = list(_decode_measurements(engine, records))
    prompts = list(_prompt_measurements(engine, records))
    weight = len(decodes) / len(prompts) if prompts and decodes else 1.0
    return decodes + [replace(row, weight=weight * row.weight) for row in prompts]


def _decode_measurements(engine: MeasuredEngine, records: Sequence[StepRecord]) -> Iterator[StepMeasurement]:
    for record, after in zip(records, [*records[1:], None], strict=True):
        is_decode = record.prefill_tokens == 0 and record.decode_requests > 0
        if is_decode and not (engine.launches_ahead and after is not None and after.prefill_tokens > 0):
            works = _works(engine, record, alone=False)
            yield StepMeasurement(steps=(works,), seconds=record.seconds, shape=f"decode {record.decode_requests}")


def _prompt_measurements(engine: MeasuredEngine, records: Sequence[StepRecord]) -> Iterator[StepMeasurement]:
    usual = _usual_decode_s(records)
    for begin, burst in _bursts(records):
        several = any(record.prefill_requests > 1 for record in burst)
        parts = _parts(burst, together=engine.launches_ahead)
        for number, part in enumerate(parts):
            seconds = sum(record.seconds for record in part)
            if number == 0 and begin > 0 and engine.launches_ahead:
                before = records[begin - 1]
                if before.counter == part[0].counter - 1:
                    seconds += max(0.0, before.seconds - usual.get(before.decode_requests, before.seconds))
            tokens = sum(record.prefill_tokens for record in part)
            yield StepMeasurement(
                steps=tuple(_works(engine, record, alone=not several) for record in part),
                seconds=seconds,
                weight=_UNKNOWN_RANKS if engine.model.ranks > 1 and part[0].decode_requests else 1.0,
                shape=f"prompt of about {2 ** (round(_SHAPES_TO_DOUBLE * log2(tokens)) / _SHAPES_TO_DOUBLE):.0f}",
            )


def _usual_decode_s(records: Sequence[StepRecord]) -> dict[int, float]:
    """Returns the median time of decode steps by their batch."""
    times: dict[int, list[float]] = defaultdict(list)
    for record in records:
        if record.prefill_tokens == 0 and record.decode_requests:
            times[record.decode_requests].append(record.seconds)
    return {batch: median(values) for batch, values in times.items()}


def _bursts(records: Sequence[StepRecord]) -> Iterator[tuple[int, list[StepRecord]]]:
    """Yields the place and the steps of each unbroken row of steps with prompt tokens."""
    burst: list[StepRecord] = []
    for number, record in enumerate(records):
        if burst and (record.prefill_tokens == 0 or record.counter != burst[-1].counter + 1):
            yield number - len(burst), burst
            burst = []
        if record.prefill_tokens:
            burst.append(record)
    if burst:
        yield len(records) - len(burst), burst


def _parts(burst: list[StepRecord], *, together: bool) -> list[list[StepRecord]]:
    """Returns the steps of each prompt, where each step has one prompt; else the burst, or its single steps."""
    is_mixed = any(record.decode_requests for record in burst)
    if any(record.prefill_requests > 1 for record in burst) or (together and is_mixed):
        return [burst] if together else [[record] for record in burst]
    parts: list[list[StepRecord]] = []
    for record in burst:
        if record.prefill_context == 0 or not parts:
            parts.append([])
        parts[-1].append(record)
    return parts


def _works(engine: MeasuredEngine, record: StepRecord, *, alone: bool) -> tuple[Work, ...]:
    """Returns the work of all ranks, as far as rank 0 tells it."""
    mean_tokens = record.prefill_tokens / max(1, record.prefill_requests)
    pairs = mean_tokens * (record.prefill_tokens / 2 + record.prefill_context) if record.prefill_tokens else 0.0
    ends_piece = record.decode_requests == 1 and (record.decode_context + 1) % COMPRESSED_TOKENS == 0
    decoding = Work(
        decode_requests=record.decode_requests,
        context_tokens=record.decode_context,
        compressions=int(engine.compresses and ends_piece),
    )
    own = decoding._replace(prefill_tokens=record.prefill_tokens, prefill_pairs=int(pairs))
    return (own,) + ((decoding if alone else own),) * (engine.model.ranks - 1)
