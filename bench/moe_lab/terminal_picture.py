"""A command's terminal output as an SVG: the pictures of the README.

    python -m moe_lab.terminal_picture docs/status.svg -- moeserving status tiny

The command runs for real, with colours and a fixed width; the picture shows its output under the command's own line.
The SVG is text, with the fonts of the machine that shows it: rich's reference to a font in the network is left out.
"""

import io
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

COLUMNS = 100
_FROM_THE_NETWORK = re.compile(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", re.DOTALL)
_FORMAT = _FROM_THE_NETWORK.sub("", CONSOLE_SVG_FORMAT).replace("Fira Code,", "DejaVu Sans Mono, Menlo, Consolas,")


def run_in_colour(command: Sequence[str], columns: int) -> str:
    """Standard output of the command, as in a terminal of this width.

    Raises:
        subprocess.CalledProcessError: it ends with another status than 0.
    """
    environment = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(columns), "TERM": "xterm-256color"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def render_svg(output: str, title: str, columns: int) -> str:
    """The output, with its ANSI colours, in the frame of a terminal. Pure: equal output gives an equal picture."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(output.rstrip()))
    lines = (line.rstrip() for line in console.export_svg(title=title, code_format=_FORMAT, unique_id="p").splitlines())
    return "\n".join(lines) + "\n"


def main(
    picture: Annotated[Path, typer.Argument(help="SVG file to write.")],
    command: Annotated[list[str], typer.Argument(help="The command, after `--`.")],
    title: Annotated[str | None, typer.Option("--title", help="Title of the window; else the command.")] = None,
    columns: Annotated[int, typer.Option("--columns", min=40, help="Width of the terminal.")] = COLUMNS,
) -> None:
    """Run a command and write a picture of its output."""
    shown = title or " ".join([Path(command[0]).name, *command[1:]])
    picture.write_text(render_svg(run_in_colour(command, columns), shown, columns), "utf-8")


if __name__ == "__main__":
    typer.run(main)
