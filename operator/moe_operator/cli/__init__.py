"""The command `moeserving`."""

import sys


def main() -> None:
    """Entry point of the command `moeserving`."""
    try:
        from moe_operator.cli.command import app
    except ModuleNotFoundError as error:
        sys.exit(f"moeserving: the package {error.name} is missing: pip install 'moeserving[operator]'")
    app(prog_name="moeserving")
