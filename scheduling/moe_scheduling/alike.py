"""The step-time line that all engines which are alike are reckoned by: the middle one of theirs.

A line is fitted to the last `LINE_MEMORY_STEPS` steps of one engine, so it has in it what that engine was given: long
prompts cost more for each token, and steps that are all full say little of a step's base. Engines of the same make so
tell lines that differ, and a choice that compares each by its own prefers one to another for what it did before. By
what an engine is lastingly slower than the others, its correction says (`correction.py`), which is learnt from the
times to the first token themselves. The gateway's dispatcher gives the shared line to the books a few times a second
(`TargetBooks.share`).

Invariants: the shared line is one of the lines; their order does not matter but among equals.
"""

from collections.abc import Sequence

from moe_scheduling.pace import STEP_PREFILL_TOKENS
from moe_scheduling.signals import StepTime

# By what a full step may take longer or shorter than that of another engine which still counts as alike. Lines of the
# same engine were up to 1.8 apart in virtual time, and one that is 2.5 times as slow is still served best by its
# correction; what is farther apart is another machine, or a fit that went wrong.
ALIKE = 4.0


def share_line(lines: Sequence[StepTime]) -> StepTime | None:
    """The line with the middle time of a full step, the faster of two; None without a line.

    O(lines * log(lines)).
    """
    return sorted(lines, key=full_step_s)[(len(lines) - 1) // 2] if lines else None


def is_alike(one: StepTime, other: StepTime) -> bool:
    """Whether a full step of the one takes at most `ALIKE` times as long as one of the other, and the other way."""
    one_s, other_s = full_step_s(one), full_step_s(other)
    return one_s <= ALIKE * other_s and other_s <= ALIKE * one_s


def full_step_s(line: StepTime) -> float:
    """Seconds of a step that is full of prefill."""
    return line.base_s + line.prefill_s * STEP_PREFILL_TOKENS
