"""The progress bar of a tiny model in the making."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from moe_tools.tiny.training import Progress as Report


@contextmanager
def shown_progress(*, enabled: bool) -> Iterator[Report]:
    """A bar on standard error; nothing is shown unless `enabled`."""
    columns = (TextColumn("tiny model: {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda stage, done: bar.update(task, description=stage, completed=done)
