"""Wrong input becomes lines on standard error and exit status 2: the decorator of every command here."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from moe_contract.input_errors import InvalidInput

P = ParamSpec("P")
R = TypeVar("R")


def report_user_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Prints the problems of an `InvalidInput`, one a line, instead of a traceback."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except InvalidInput as error:
            for row in error.errors:
                typer.echo(str(row), err=True)
            raise typer.Exit(2) from error

    guarded.__signature__ = inspect.signature(command)  # type: ignore[attr-defined]
    return guarded
