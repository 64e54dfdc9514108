"""Backoff of a process that ended. Pure."""

import signal
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Times of the supervisor.

    Attributes:
        first_backoff_s: pause before the first restart; each further failure in a row doubles it.
        last_backoff_s: longest pause.
        steady_s: uptime after which the next failure counts as a first one again.
        end_grace_s: time beyond the drain time for a process to end before it is killed.
        force_stop_s: both of these after a forced stop.
        look_every_s: time between two looks at whether the gateway accepts requests.
    """

    first_backoff_s: float = 0.5
    last_backoff_s: float = 30.0
    steady_s: float = 60.0
    end_grace_s: float = 20.0
    force_stop_s: float = 2.0
    look_every_s: float = 1.0


def next_failures(failures: int, lived_s: float, rules: Rules) -> int:
    """Failures in a row, the one now included, of a process that had `failures` before."""
    return 1 if lived_s >= rules.steady_s else failures + 1


def backoff_s(failures: int, rules: Rules) -> float:
    """Pause after that many failures in a row."""
    return min(rules.last_backoff_s, rules.first_backoff_s * 2.0 ** min(failures - 1, 30))


def describe_exit(status: int) -> str:
    """`killed by SIGKILL`, `exit status 2`."""
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    return f"killed by signal {-status}"
