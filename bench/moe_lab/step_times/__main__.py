"""`python -m moe_lab.step_times fit|errors`: presets of the simulator's step times from published measurements."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice
from moe_tools.calibration.preset_errors import COMPOSED, render_error_table
from moe_tools.calibration.preset_errors import TABLE as ERRORS
from moe_tools.calibration.step_errors import ErrorRow, render_errors, summarize
from moe_tools.calibration.step_fit import predict
from moe_tools.report import read_environment
from moe_tools.simulator import fitted_presets
from moe_tools.simulator.fitted_presets import FITTED_PRESETS, FittedPreset, render_presets
from moe_tools.user_errors import report_user_errors
from rich.console import Console

from moe_lab.step_times.evaluation import cross_errors, fit_preset, group_runs, preset_errors
from moe_lab.step_times.kernels import compose_preset, list_engines
from moe_lab.step_times.records import read_records

STEPS = "engine_steps_b300_vllm0.20.csv.gz"
_WIDTH = 180
_TABLE = Path(fitted_presets.__file__).with_name(fitted_presets.TABLE)
app = typer.Typer(no_args_is_help=True)
Steps = Annotated[Path, typer.Argument(help=f"Table of measured steps, or a folder with {STEPS}.")]


@app.callback()
def step_times() -> None:
    """Step times of measured engines: docs/simulator.md."""


@app.command("fit")
@report_user_errors
def fit_command(
    data: Steps,
    out: Annotated[Path, typer.Option(help="Table of presets to write; the repository's own without.")] = _TABLE,
) -> None:
    """Fit a preset to all steps of each engine, with a folder also to steps composed of kernels; write the table."""
    fitted: dict[str, FittedPreset] = {}
    for name, measured in group_runs(read_records(_file(data))).items():
        fitted[name] = fit_preset(measured)
        typer.echo(f"{name}: {fitted[name].measurements} measurements")
    for engine in list_engines() if data.is_dir() else ():
        fitted[engine.preset], steps = compose_preset(engine, data)
        preset = fitted[engine.preset]
        rows = summarize(steps, [predict(preset.model, preset.coefficients, step) for step in steps])
        errors = ", ".join(f"{row.kind} {row.median:.1%} (p90 {row.p90:.1%})" for row in rows)
        typer.echo(f"{engine.preset}: {len(steps)} composed steps; error of the fit: {errors}")
    out.write_text(render_presets(dict(sorted(fitted.items()))), "utf-8")


@app.command("errors")
@report_user_errors
def errors_command(
    data: Steps,
    preset: Annotated[str | None, typer.Option(help="Only this preset's runs.")] = None,
    as_committed: Annotated[
        bool, typer.Option("--as-committed", help="Compare the committed presets, for other steps than theirs.")
    ] = False,
    whole_graphs: Annotated[
        bool, typer.Option("--whole-graphs", help="Hold out all batch sizes of a captured CUDA graph together.")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write rows and versions here.")] = None,
    csv_out: Annotated[
        Path | None, typer.Option("--csv", help=f"Write the package's {ERRORS}, with composed steps too.")
    ] = None,
) -> None:
    """Print errors on steps that were not fitted on: each run, or each shape of steps, held out in turn."""
    if csv_out is not None and (not data.is_dir() or preset is not None or as_committed or whole_graphs):
        raise InvalidInput([InputError("--csv", "takes the folder of all tables, and no choice of steps")])
    runs = group_runs(read_records(_file(data)))
    if preset is not None and preset not in runs:
        raise InvalidInput([unknown_choice("--preset", preset, runs)])
    rows = {}
    for name, measured in runs.items():
        if preset is not None and name != preset:
            continue
        if not as_committed:
            rows[f"{name}, {measured.held_out} held out"] = cross_errors(measured, whole_graphs=whole_graphs)
        elif name in FITTED_PRESETS:
            rows[name] = preset_errors(measured, FITTED_PRESETS[name])
        else:
            raise InvalidInput([unknown_choice("run", name, FITTED_PRESETS)])
    Console(width=_WIDTH).print(render_errors(rows, "Relative error of modelled step times"))
    if json_out is not None:
        document = {name: [asdict(row) for row in of_name] for name, of_name in rows.items()}
        json_out.write_text(json.dumps({"environment": read_environment(), "errors": document}) + "\n", "utf-8")
    if csv_out is not None:
        pairs = zip(runs.items(), rows.values(), strict=True)
        found = {(name, f"held-out {run.held_out}"): of_name for (name, run), of_name in pairs}
        found |= {(name, COMPOSED): of_name for name, of_name in _composed_errors(data).items()}
        csv_out.write_text(render_error_table(found), "utf-8")


def _composed_errors(data: Path) -> dict[str, tuple[ErrorRow, ...]]:
    """Errors of the fits to composed steps, on these very steps."""
    rows = {}
    for engine in list_engines():
        preset, steps = compose_preset(engine, data)
        rows[engine.preset] = summarize(steps, [predict(preset.model, preset.coefficients, step) for step in steps])
    return rows


def _file(data: Path) -> Path:
    path = data / STEPS if data.is_dir() else data
    if not path.is_file():
        raise InvalidInput([InputError(str(path), "no such file")])
    return path


if __name__ == "__main__":
    app()
