"""What a long command says while it works: one line a step, with the time since its beginning."""

import time

from rich.console import Console


class ProgressPrinter:
    """Prints to standard output. Not a logger: these lines are for a user at the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        """Prints one line with the seconds since the start."""
        self.console.print(
            f"{time.monotonic() - self._started:5.0f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )
