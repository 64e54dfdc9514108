"""`make demo`: from nothing to a comparison of our scheduling with vLLM's own order, on this machine.

1. A small Mixture-of-Experts model is made, or found.
2. Two engines and the gateway are started from the sample resource, and answer a question.
3. The same requests are served under both policies, in alternating pairs, as `moeserving compare` does.
4. The table, or where it shows no difference a second one in virtual time beside it (`demo_report`).

The load is where the order of requests matters: half of the prompts are long, and each piece is a peak that brings
requests faster than the engines complete them. The deployment is taken down at the end, however the end comes.
"""

import logging
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from moe_tools.compare_command import ComparisonEffort, measure_pairs
from moe_tools.comparison import PiecePair, compare_metrics
from moe_tools.demo_report import Verdict, judge, render_conclusion, render_measured, render_modelled, render_next_steps
from moe_tools.deployment import DeploymentPlan, plan_deployment, served, stopped_by_signals, wait_ready
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay_command import Source, check_source, read_source
from moe_tools.server import ServedModel, call_json, discover_model, run_async
from moe_tools.streaming import ServerAddress
from moe_tools.tiny import ensure_tiny_model, read_report
from moe_tools.tiny.report import render_report

FOLDER = "demo"
QUESTION = "What does os.path.join do?"
ANSWER_TOKENS = 60
SHAPE = "twoEnd"
SHAPE_ANSWER_TOKENS = 16
REQUESTS = 2000
MEASURE_UNTIL_S = 200.0
"""No pair begins later than this after the start, so that the demo ends within 5 minutes."""
CONTEXT_TOKENS = 4096


def run_demo(*, trace: Path | None, manifest: Path | None, effort: ComparisonEffort, seed: int) -> None:
    """Runs the demo. A stage that fails ends it, after the deployment is down.

    Raises:
        InvalidInput: the manifest or the trace is unusable, or the deployment does not start.
    """
    effort = replace(effort, until_s=time.monotonic() + MEASURE_UNTIL_S)
    say = ProgressPrinter()
    plan = plan_deployment(manifest, FOLDER)
    source = choose_source(trace, seed)
    check_source(source)
    if manifest is None:
        make_model(plan.checkout / ".cache" / "models" / "tiny", say)
    pairs = measure(plan, source, effort, say)
    show(pairs, source, effort, say)


def choose_source(trace: Path | None, seed: int) -> Source:
    """The trace, or requests of which half have long prompts, with short answers: prompts wait for prompts."""
    if trace:
        return Source(trace=trace, seed=seed)
    return Source(shape=SHAPE, answer_tokens=SHAPE_ANSWER_TOKENS, limit=REQUESTS, seed=seed)


def make_model(directory: Path, say: ProgressPrinter) -> None:
    """Makes the tiny model, or finds it, and prints the figures of its training."""
    say("model: a Mixture-of-Experts model of 9 M parameters, trained here in about a minute, or found from before")
    ensure_tiny_model(directory)
    for line in render_report(read_report(directory) or {}).splitlines():
        say(f"  {line}")


def measure(
    plan: DeploymentPlan, source: Source, effort: ComparisonEffort, say: ProgressPrinter
) -> tuple[PiecePair, ...]:
    """Serves, asks a question, and measures the pairs."""
    with stopped_by_signals(), served(plan, say, wait_ready):
        say(f"asking: {QUESTION}")
        say(f"answer: {run_async(ask(plan.url, QUESTION))}")
        say(f"requests: {source.trace or 'half of the prompts short, half long; short answers'}")
        pairs, _ = run_async(measure_pairs(plan.deployment, plan.url, None, source, effort, say))
    return pairs


def show(pairs: tuple[PiecePair, ...], source: Source, effort: ComparisonEffort, say: ProgressPrinter) -> None:
    """Prints the table with a verdict, and the modelled comparison where the measured one has none."""
    measured = compare_metrics(pairs)
    verdict = judge(measured)
    if verdict is Verdict.UNCLEAR:
        say("no difference is shown on this machine; the same comparison in virtual time, without its noise:")
        modelled = compare_metrics(model(source, effort))
        say.console.print(render_modelled(measured, modelled, pairs))
        lines = render_conclusion(verdict, measured, modelled)
    else:
        say.console.print(render_measured(measured, pairs))
        lines = render_conclusion(verdict, measured)
    print_lines(say.console, [*lines, "", *render_next_steps()])


def model(source: Source, effort: ComparisonEffort) -> tuple[PiecePair, ...]:
    """The pairs in virtual time, from the same source with the same effort."""
    from moe_tools.simulator.simulation import load_vllm
    from moe_tools.virtual_comparison import VirtualEngines, model_pairs

    logging.disable(logging.WARNING)
    try:
        requests = read_source(source, ServedModel(name="", max_tokens=CONTEXT_TOKENS)).requests
        return model_pairs(requests, effort, source.seed, VirtualEngines(), load_vllm())
    finally:
        logging.disable(logging.NOTSET)


def print_lines(console: Console, lines: list[str]) -> None:
    """Prints each line without markup, broken between words where it is longer than the terminal."""
    for line in lines:
        console.print(line, highlight=False, markup=False)


async def ask(url: str, question: str) -> str:
    """Asks one chat question; returns the answer's text in one line."""
    endpoint = ServerAddress.parse(url)
    served_model = await discover_model(endpoint)
    body = {
        "model": served_model.name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": ANSWER_TOKENS,
        "min_tokens": ANSWER_TOKENS // 4,
        "temperature": 0.5,
        "seed": 1,
    }
    answer = await call_json(endpoint, "POST", "/v1/chat/completions", body)
    return " ".join(str(answer["choices"][0]["message"]["content"]).split())
