"""Where the raw results of the experiments lie: the option of each command that reads or writes them."""

from pathlib import Path
from typing import Annotated

import typer

RawResults = Annotated[Path, typer.Option("--raw", help="File of raw results, one JSON line for each run.")]
RAW_RESULTS = Path(".cache/experiments/runs.jsonl")
