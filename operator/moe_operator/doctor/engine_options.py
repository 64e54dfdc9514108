"""Whether the supported versions of vLLM know the options that resources give their engines. Pure but for one file.

The file is written by `python -m moe_agent.vllm.options` from vLLM's own parser; a test compares both.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from moe_contract.api_server import Document

from moe_operator.doctor.check import Check, note, ok, problem

_FILE = Path(__file__).with_name("vllm_options.json")
_CHECK = "vLLM options"


@cache
def known_options() -> Mapping[str, Sequence[str]]:
    """The versions of vLLM that have a long option, by its name."""
    found: dict[str, list[str]] = json.loads(_FILE.read_text("utf-8"))
    return found


def check_options(servings: Sequence[Document]) -> list[Check]:
    """A check for each option that not all supported versions know; one for all others together."""
    checks, count = [], 0
    for serving in servings:
        engine = serving.get("spec", {}).get("engine") or {}
        for path, name in find_options(engine, "engine"):
            count += 1
            where = f"{serving['metadata']['name']}: {path}"
            if (check := check_option(where, name, own_image=bool(engine.get("image")))) is not None:
                checks.append(check)
    if count > len(checks):
        checks.append(ok(_CHECK, f"{count - len(checks)} in the resources here are known to vLLM {_join(_releases())}"))
    return checks


def find_options(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The long options within all `args` below a section, each with the path of its list."""
    if not isinstance(value, Mapping):
        return
    for name, inner in value.items():
        if name == "args" and isinstance(inner, list):
            yield from ((f"{path}.args", str(row)) for row in inner if str(row).startswith("--"))
        else:
            yield from find_options(inner, f"{path}.{name}")


def check_option(where: str, text: str, *, own_image: bool) -> Check | None:
    """A check of one option as it was written; None where each supported version knows it.

    Args:
        where: resource and path.
        text: `--name`, `--name=value`, `--name.key`; vLLM takes `_` for `-`, and the begin of one name alone.
        own_image: whether the engines have an image of their own, whose vLLM may know more.
    """
    name = text.split("=", 1)[0].split(".", 1)[0].replace("_", "-")
    known, releases = known_options(), _releases()
    have = [release for release in releases if _is_known(name, release)]
    if have == releases:
        return None
    if have:
        advice = f"run the engines on vLLM {_join(have)}, or take it out"
        return note(_CHECK, f"{where}: vLLM {_join(have)} alone knows {name}", advice)
    near = difflib.get_close_matches(name, known, n=2)
    advice = (f"did you mean {' or '.join(near)}? " if near else "") + "vLLM ends at its start with an unknown option"
    finding = f"{where}: vLLM {_join(releases)} do not know {name}"
    return (
        note(_CHECK, f"{finding}; that of engine.image may", advice) if own_image else problem(_CHECK, finding, advice)
    )


def _is_known(name: str, release: str) -> bool:
    known = known_options()
    if release in known.get(name, ()):
        return True
    return len([each for each, have in known.items() if release in have and each.startswith(name)]) == 1


def _releases() -> list[str]:
    return sorted({release for have in known_options().values() for release in have})


def _join(words: Sequence[str]) -> str:
    return " and ".join(words)
