"""`moeserving replay`: where the requests come from, the run with its progress bar, the table and the JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moe_tools.prompts import PromptMaker
from moe_tools.replay import FailedRequest, Load, ReplayResult, RequestResult, replay
from moe_tools.report import build_document, render_summary, summarise
from moe_tools.server import ServedModel, discover_model, fetch_token_pool, run_async
from moe_tools.shapes import ShapeSettings, build_shape, parse_shape
from moe_tools.streaming import ServerAddress
from moe_tools.traces import Fitted, TraceRequest, cut_piece, fit_lengths, read_trace, scale_lengths, speed_up

DEFAULT_MAX_TOKENS = 4096
SHAPE_REQUESTS = 200
MEDIAN_ANSWER_TOKENS = 48
LONGEST_ANSWER_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A trace file, or a shape where `trace` is None, and how its requests are changed.

    `answer_tokens` is the median length of a generated answer; the longest is 11 times that, 512 at most.
    """

    trace: Path | None = None
    trace_format: str | None = None
    shape: str = "random"
    rate: float = 2.0
    speed: float = 1.0
    limit: int | None = None
    seed: int = 0
    scale: float = 1.0
    max_tokens: int | None = None
    answer_tokens: int = MEDIAN_ANSWER_TOKENS

    @property
    def title(self) -> str:
        """Title of the table of a replay."""
        return self.name if self.trace else f"{self.name}, {self.rate:g} requests/s"

    @property
    def name(self) -> str:
        """The trace's file, or the shape."""
        return self.trace.name if self.trace else f"shape {self.shape}"


def read_source(source: Source, served: ServedModel) -> Fitted:
    """The requests, cut to what the model takes."""
    limit_tokens = source.max_tokens or served.max_tokens
    if source.trace:
        read = cut_piece(read_trace(source.trace, source.trace_format), 0, source.limit)
    else:
        read = _generate(source, limit_tokens or DEFAULT_MAX_TOKENS)
    return fit_lengths(scale_lengths(speed_up(read, source.speed), source.scale), limit_tokens)


def check_source(source: Source) -> None:
    """Reads the source once, before a server is asked.

    Raises:
        InvalidInput: the file or the shape is unusable.
    """
    read_source(source, ServedModel(name="", max_tokens=None))


async def prepare_load(url: str, model: str | None, seed: int, key: str = "") -> tuple[Load, ServedModel]:
    """Asks the server for its model and for the tokens of some text."""
    endpoint = ServerAddress.parse(url, key)
    served = await discover_model(endpoint, model)
    pool = await fetch_token_pool(endpoint, served.name)
    return Load(endpoint=endpoint, model=served.name, prompts=PromptMaker(pool, seed & 0xFFFFFFFF)), served


def run_replay(url: str, model: str | None, source: Source, label: str, json_out: Path | None, key: str = "") -> bool:
    """The whole command; True when any request failed."""
    console = Console()
    check_source(source)
    load, served = run_async(prepare_load(url, model, source.seed, key))
    fitted = read_source(source, served)
    console.print(f"{source.title}: {fitted}")
    run = run_async(replay_shown(fitted.requests, load, console))
    summary = summarise(run)
    console.print(render_summary(summary, f"{label or source.title} on {served.name}"))
    settings = {"url": url, "model": served.name, "label": label, "cut": fitted.cut, **asdict(source)}
    if json_out:
        write_json(json_out, build_document(run, summary, settings))
    _show_failures(run, console)
    return bool(run.failed)


async def replay_shown(requests: Sequence[TraceRequest], load: Load, console: Console) -> ReplayResult:
    """A replay with its progress bar, drawn at most twice a second."""
    columns = (
        TextColumn("answered"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(),
    )
    failed = 0
    with Progress(*columns, console=console, refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("", total=len(requests), failed="")

        def count(outcome: RequestResult) -> None:
            nonlocal failed
            failed += isinstance(outcome, FailedRequest)
            bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")

        return await replay(requests, load, count)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document as indented JSON.

    Raises:
        InvalidInput: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, indent=1, default=str) + "\n", "utf-8")
    except OSError as error:
        raise InvalidInput([InputError(str(path), f"cannot be written: {error.strerror}")]) from None


def _generate(source: Source, limit_tokens: int) -> tuple[TraceRequest, ...]:
    output = max(1, min(LONGEST_ANSWER_TOKENS, 11 * source.answer_tokens, limit_tokens // 4))
    settings = ShapeSettings(
        rate=source.rate,
        count=source.limit or SHAPE_REQUESTS,
        seed=source.seed & 0xFFFFFFFF,
        longest_tokens=max(1, min(3072, limit_tokens - output)),
        shortest_tokens=1 if limit_tokens < 64 else 16,
        median_output_tokens=max(1, min(source.answer_tokens, output)),
        longest_output_tokens=output,
    )
    return build_shape(parse_shape(source.shape), settings)


def _show_failures(run: ReplayResult, console: Console) -> None:
    seen: dict[str, FailedRequest] = {}
    for failure in run.failed:
        seen.setdefault(failure.kind, failure)
    for kind, failure in seen.items():
        console.print(f"first {kind}: request {failure.index}: {failure.detail}", markup=False, highlight=False)
