"""`moeserving --version`: the versions of this package, of the vLLM beside it, and of Python."""

import platform
from collections.abc import Callable
from importlib.metadata import version

import typer
from moe_contract.input_errors import InvalidInput

from moe_operator.doctor.installed_vllm import find_describe


def show_version(wanted: bool) -> None:
    """Prints the versions and ends, where the option was given."""
    if wanted:
        typer.echo("\n".join(describe_versions(find_describe())))
        raise typer.Exit


def describe_versions(describe: Callable[[], str] | None) -> list[str]:
    """Returns a line for each version.

    Args:
        describe: names the installed vLLM or raises `InvalidInput`; None where the agent is missing.
    """
    return [f"moeserving {version('moeserving')}", _describe_vllm(describe), f"Python {platform.python_version()}"]


def _describe_vllm(describe: Callable[[], str] | None) -> str:
    if describe is None:
        return "vLLM: the part that runs it is not installed"
    try:
        return describe()
    except InvalidInput as error:
        return "; ".join(row.message for row in error.errors)
