"""The closed sets of an expert group: what became of a decision, and what the watchdog can find."""

from enum import StrEnum


class Outcome(StrEnum):
    """What became of a decision."""

    MOVED = "moved"
    STAYED = "stayed"
    DRY_RUN = "dryRun"
    ROLLED_BACK = "rolledBack"
    APPLIED = "applied"
    FAILED = "failed"


class ProblemKind(StrEnum):
    """What the watchdog can find."""

    NO_DECISION = "no_decision"
    SLOW_MOVE = "slow_move"
    VERSION_SKEW = "version_skew"
    BACKOFF = "backoff"
