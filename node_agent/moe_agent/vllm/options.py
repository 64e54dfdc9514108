"""The options of vLLM's server, as its own parser has them.

`python -m moe_agent.vllm.options FILE` writes those of the installed vLLM into the file by which `moeserving doctor`
knows the options of each supported version without a vLLM: a JSON object of the long options, each with the versions
that have it.
"""

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType

from moe_agent.vllm.version import SUPPORTED, find_version, minor_of

# Where the parser is made, vLLM 0.33 and 0.32.
_MODULES = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")


def list_options() -> list[str]:
    """The long options of the installed vLLM's server.

    Raises:
        ModuleNotFoundError: its parser is elsewhere.
    """
    empty = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser()
    parser = _find_module().make_arg_parser(empty)
    return sorted(
        {text for action in parser._actions for text in action.option_strings if text.startswith("--")} - {"--help"}
    )


def _find_module() -> ModuleType:
    for name in _MODULES[:-1]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return importlib.import_module(_MODULES[-1])


def main() -> None:
    """Writes the options of the installed vLLM into a file, beside those of other versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    path, release = parser.parse_args().file, minor_of(find_version())
    known: dict[str, list[str]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    have = {name: {each for each in releases if each in SUPPORTED} - {release} for name, releases in known.items()}
    for name in list_options():
        have.setdefault(name, set()).add(release)
    rows = {name: sorted(releases) for name, releases in sorted(have.items()) if releases}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(releases)}" for name, releases in rows.items())
    path.write_text(f"{{\n{lines}\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
