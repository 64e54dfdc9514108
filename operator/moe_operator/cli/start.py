"""How far the engines of a deployment are on their way to readiness, in one line. Pure."""

import re
from collections.abc import Mapping


def describe_start(deployment: str, phases: Mapping[str, str], elapsed_s: float) -> tuple[str, str]:
    """The line, and what of it changes with a phase and not with its numbers.

    Args:
        deployment: its name.
        phases: how far each engine is, by its name.
        elapsed_s: since the start.
    """
    said = join_phases(deployment, phases)
    return f"{deployment}: {elapsed_s:.0f} s: {said}", re.sub(r"[\d.,]+", "", said)


def join_phases(deployment: str, phases: Mapping[str, str]) -> str:
    """`engine-0 ready, engine-1 compiling`, and `2 engines: compiling` where all are at the same point."""
    different = set(phases.values())
    if len(phases) > 1 and len(different) == 1:
        return f"{len(phases)} engines: {different.pop()}"
    return ", ".join(f"{name.removeprefix(f'{deployment}-')} {phase}" for name, phase in phases.items())
