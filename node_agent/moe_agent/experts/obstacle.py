"""Why the experts of an engine cannot be balanced: a note in the run folder, by the engine for its agent."""

from pathlib import Path

_NOTE = "experts_not_balanced"


def note_obstacle(run_dir: Path, obstacle: str) -> None:
    """Writes why; an empty text is none."""
    if obstacle:
        (run_dir / _NOTE).write_text(obstacle, encoding="utf-8")


def read_obstacle(run_dir: Path) -> str:
    """Returns why; empty where nothing is known that prevents it."""
    try:
        return (run_dir / _NOTE).read_text(encoding="utf-8")
    except OSError:
        return ""


def forget_obstacle(run_dir: Path) -> None:
    """Removes the note of an earlier agent, whose model may have been another one."""
    (run_dir / _NOTE).unlink(missing_ok=True)
