"""The commands that `moeserving` gains from this package: `model tiny`.

Nothing heavy is imported before a command runs.
"""

from pathlib import Path
from typing import Annotated

import typer

from moe_bench.complaints import told_plainly

app = typer.Typer(no_args_is_help=True)
model_app = typer.Typer(no_args_is_help=True, help="Models made on this machine.")
app.add_typer(model_app, name="model")


@model_app.callback()
def models() -> None:
    """Models made on this machine."""


@model_app.command("tiny")
@told_plainly
def model_tiny(
    directory: Annotated[Path, typer.Argument(help="Folder of the model; made if absent.")],
    steps: Annotated[int | None, typer.Option(min=0, help="Training steps; 0 leaves the weights random.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and order of text.")] = None,
) -> None:
    """Make a small trained Mixture-of-Experts model, or find the one made before."""
    from moe_bench.tiny import TinySettings, ensure_tiny_model, read_report
    from moe_bench.tiny.report import render_report

    chosen = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
    path = ensure_tiny_model(directory, settings=TinySettings(**chosen))
    typer.echo(f"{path}\n{render_report(read_report(path) or {})}")
