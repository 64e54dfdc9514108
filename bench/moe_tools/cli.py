"""The commands that `moeserving` gains from this package: `model tiny`, `replay`, `compare`, `demo`, `simulate`,
`calibrate`, `plan --advise`.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from moe_tools.user_errors import report_user_errors

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
model_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(model_app, name="model")

Url = Annotated[str, typer.Option("--url", help="Server or gateway, such as http://127.0.0.1:8000.")]
Model = Annotated[str | None, typer.Option("--model", help="Name served; found by itself when there is one.")]
Trace = Annotated[Path | None, typer.Option("--trace", help="Trace file; without it a shape is generated.")]
Format = Annotated[str | None, typer.Option("--format", help="azure, mooncake or jsonl; else by the first line.")]
ShapeName = Annotated[str, typer.Option("--shape", help="random, central, descending, twoEnd or average.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of prompts, shapes and pieces.")]
Scale = Annotated[float, typer.Option("--scale-lengths", help="Factor on prompt and answer lengths.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Longest prompt with its answer; else what the server says it takes."),
]
AnswerTokens = Annotated[int, typer.Option("--answer-tokens", min=1, help="Median answer of a generated shape.")]
InFlight = Annotated[
    int,
    typer.Option("--in-flight", min=1, help="Requests of the closed loop that finds the capacity; a GPU wants more."),
]
ApiKeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="File with the server's key; else OPENAI_API_KEY, if it is set.")
]
JsonOut = Annotated[Path | None, typer.Option("--json", help="Write figures, raw rows and versions here.")]


@model_app.callback()
def models() -> None:
    """Models made on this machine."""


@model_app.command("tiny")
@report_user_errors
def model_tiny(
    directory: Annotated[Path, typer.Argument(help="Folder of the model; made if absent.")],
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps; 0 leaves the weights random.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order of text.")] = None,
) -> None:
    """Train a small Mixture-of-Experts model, unless it is there."""
    from moe_tools.tiny import TinySettings, ensure_tiny_model, read_report
    from moe_tools.tiny.report import render_report

    chosen = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    path = ensure_tiny_model(directory, settings=TinySettings(**chosen))
    typer.echo(f"{path}\n{render_report(read_report(path) or {})}")


@model_app.command("skeleton")
@report_user_errors
def model_skeleton(
    directory: Annotated[Path, typer.Argument(help="Folder of the model: a new one, or an empty one.")],
    like: Annotated[str, typer.Option("--like", help="Model whose shape it has: qwen3-30b-a3b.")] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option("--layers", min=1, help="Layers; else as many as it has.")] = None,
) -> None:
    """Make a model without weights, for `--load-format=dummy`.

    A configuration and a tokenizer.
    """
    from moe_tools.skeleton import make_skeleton

    typer.echo(make_skeleton(directory, like, layers))


@app.command("replay")
@report_user_errors
def replay_command(
    url: Url,
    model: Model = None,
    trace: Trace = None,
    trace_format: Format = None,
    shape: ShapeName = "random",
    rate: Annotated[float, typer.Option("--rate", help="Arrivals a second of a generated shape.")] = 2.0,
    speed: Annotated[float, typer.Option("--speed", help="How many times faster than the trace.")] = 1.0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N requests.")] = None,
    seed: Seed = 0,
    scale: Scale = 1.0,
    max_tokens: MaxTokens = None,
    answer_tokens: AnswerTokens = 48,
    label: Annotated[str, typer.Option("--policy-label", help="Name of the measured policy, for table and JSON.")] = "",
    api_key_file: ApiKeyFile = None,
    json_out: JsonOut = None,
) -> None:
    """Send a trace's requests at their own times, whatever the answers do, and report what users got."""
    from moe_tools.api_key import read_api_key
    from moe_tools.replay_command import Source, run_replay

    source = Source(
        trace=trace, trace_format=trace_format, shape=shape, rate=rate, speed=speed, limit=limit, seed=seed,
        scale=scale, max_tokens=max_tokens, answer_tokens=answer_tokens,
    )  # fmt: skip
    if run_replay(url, model, source, label, json_out, read_api_key(api_key_file)):
        raise typer.Exit(1)


@app.command("compare")
@report_user_errors
def compare_command(
    name: Annotated[str, typer.Argument(help="Name of the running deployment.")],
    url: Url,
    model: Model = None,
    trace: Trace = None,
    trace_format: Format = None,
    shape: ShapeName = "random",
    pairs: Annotated[int, typer.Option(min=1, help="Pieces of the trace, each under both policies.")] = 4,
    piece_s: Annotated[float, typer.Option("--piece-s", min=1, help="Seconds of arrivals in a piece.")] = 15.0,
    load: Annotated[float, typer.Option("--load", min=0.05, max=2, help="Arrivals as a share of the capacity.")] = 0.9,
    rate: Annotated[float | None, typer.Option("--rate", help="Arrivals a second, instead of a measured load.")] = None,
    in_flight: InFlight = 32,
    seed: Seed = 0,
    scale: Scale = 1.0,
    max_tokens: MaxTokens = None,
    answer_tokens: AnswerTokens = 48,
    state_dir: Annotated[Path | None, typer.Option("--state-dir", help="State folder of the deployment.")] = None,
    api_key_file: ApiKeyFile = None,
    json_out: JsonOut = None,
) -> None:
    """Compare our scheduling with vLLM's own order and round robin on a running deployment, in alternating pairs."""
    from moe_tools.api_key import read_api_key
    from moe_tools.compare_command import ComparisonEffort, run_compare
    from moe_tools.deployment import Deployment
    from moe_tools.replay_command import Source

    source = Source(
        trace=trace, trace_format=trace_format, shape=shape, seed=seed, scale=scale, max_tokens=max_tokens,
        answer_tokens=answer_tokens,
    )  # fmt: skip
    effort = ComparisonEffort(pairs=pairs, piece_s=piece_s, load=load, rate=rate, in_flight=in_flight)
    key = read_api_key(api_key_file)
    run_compare(Deployment(name=name, state_dir=state_dir), url, model, source, effort, json_out, key)


@app.command("demo")
@report_user_errors
def demo_command(
    trace: Annotated[
        Path | None, typer.Option("--trace", envvar="MOESERVING_TRACE", help="Trace file; else a generated shape.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option("-f", help="The resource to serve.")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pieces of the requests, each under both policies.")] = 8,
    piece_s: Annotated[float, typer.Option("--piece-s", min=1, help="Seconds of arrivals in a piece.")] = 6.0,
    load: Annotated[float, typer.Option("--load", min=0.05, max=2, help="Arrivals as a share of the capacity.")] = 1.4,
    seed: Seed = 0,
) -> None:
    """Make a small model, serve it on two engines, chat, and compare our scheduling with vLLM's own order."""
    from moe_agent.vllm.version import check_runs_here

    from moe_tools.compare_command import ComparisonEffort
    from moe_tools.demo import run_demo

    check_runs_here()
    run_demo(
        trace=trace, manifest=manifest, effort=ComparisonEffort(pairs=pairs, piece_s=piece_s, load=load), seed=seed
    )


@app.command("calibrate")
@report_user_errors
def calibrate_command(
    model: Annotated[Path, typer.Argument(help="Folder of the model, such as one that `model tiny` made.")],
    rounds: Annotated[int, typer.Option("--rounds", min=6, help="Rounds of requests.")] = 36,
    max_model_len: Annotated[int, typer.Option("--max-model-len", min=64, help="Longest prompt and answer.")] = 4096,
    validate: Annotated[
        int, typer.Option("--validate", min=0, help="Requests under each order to check the simulator with.")
    ] = 0,
    engine_args: Annotated[
        str,
        typer.Option("--engine-args", help='More of vLLM\'s arguments, JSON, such as \'{"load_format": "dummy"}\'.'),
    ] = "{}",
    seed: Seed = 0,
    json_out: JsonOut = None,
) -> None:
    """Fit the step time of a real engine on this machine, for scenarios; check the simulator against it."""
    from moe_agent.vllm.version import check_runs_here

    from moe_tools.calibration.calibrate import CalibratedEngine, CalibrationEffort, read_arguments, run_calibrate

    check_runs_here()
    engine = CalibratedEngine(model=model, max_model_len=max_model_len, arguments=read_arguments(engine_args))
    if not run_calibrate(engine, CalibrationEffort(rounds=rounds, validate_requests=validate), seed, json_out):
        raise typer.Exit(1)


@app.command("simulate")
@report_user_errors
def simulate_command(
    scenario: Annotated[Path, typer.Option("-f", help="The scenario, see docs/simulator.md.")],
    json_out: JsonOut = None,
) -> None:
    """Serve a trace on real vLLM schedulers in virtual time, without a model."""
    from moe_agent.vllm.version import check_runs_here

    from moe_tools.simulator.command import run_simulate

    check_runs_here()
    run_simulate(scenario, json_out)


@app.command("advise", hidden=True)
@report_user_errors
def advise_command(
    file: Annotated[Path, typer.Option("-f", help="The resource.")],
    trace: Trace = None,
    trace_format: Format = None,
    shape: ShapeName = "random",
    rate: Annotated[float | None, typer.Option("--rate", help="Requests a second.")] = None,
    requests: Annotated[int, typer.Option("--requests", help="Requests that each shape serves.")] = 300,
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", min=1, help="Median answer.")] = 64,
    cost: Annotated[str | None, typer.Option("--cost", help="Preset of step times.")] = None,
    ttft: Annotated[float | None, typer.Option("--ttft", help="Bound of TTFT (s).")] = None,
    inter_token: Annotated[
        float | None, typer.Option("--inter-token", help="Bound of the time between tokens (s).")
    ] = None,
    seed: Seed = 0,
    output: Annotated[str, typer.Option("--output", help="table or json.")] = "table",
) -> None:
    """Simulate the shapes that fit a resource's GPUs: `moeserving plan --advise`."""
    from moe_agent.vllm.version import check_runs_here

    from moe_tools.advisor.advise import AdviceRequest, run_advise

    check_runs_here()
    asked = AdviceRequest(
        file=file, trace=trace, trace_format=trace_format, shape=shape, rate=rate, requests=requests,
        answer_tokens=answer_tokens, seed=seed, cost=cost, ttft_s=ttft, inter_token_s=inter_token,
    )  # fmt: skip
    run_advise(asked, output)
