"""The result of one check."""

from dataclasses import dataclass
from enum import StrEnum


class CheckState(StrEnum):
    """How a check ended: a note is worth knowing and keeps nothing from working, a problem is to be solved."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report.

    Attributes:
        name: the thing that was looked at.
        state: how the check ended.
        finding: the fact, in a line.
        advice: what to do; empty where there is nothing to do.
    """

    name: str
    state: CheckState
    finding: str
    advice: str = ""


def ok(name: str, finding: str) -> Check:
    """A check that found everything as it should be."""
    return Check(name=name, state=CheckState.OK, finding=finding)


def note(name: str, finding: str, advice: str = "") -> Check:
    """A check that found something worth knowing."""
    return Check(name=name, state=CheckState.NOTE, finding=finding, advice=advice)


def problem(name: str, finding: str, advice: str) -> Check:
    """A check that found something to be solved, and how."""
    return Check(name=name, state=CheckState.PROBLEM, finding=finding, advice=advice)


def has_problem(checks: list[Check]) -> bool:
    """Whether anything is to be solved."""
    return any(check.state is CheckState.PROBLEM for check in checks)
