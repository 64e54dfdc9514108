"""What the first rank of an expert group publishes, as the agent serves it: `experts.json` in the run folder.

The file's ages are those of its writing, with the machine's monotonic clock beside them (`written_s`); the reader adds
the time since. It is parsed once for each time that it is replaced.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_agent.experts.directive import GroupShape

Document = dict[str, Any]


def experts_path(run_dir: Path) -> Path:
    """Where the group's first rank publishes."""
    return run_dir / "experts.json"


class PublishedExperts:
    """Reader of the file; None while there is none."""

    def __init__(self, run_dir: Path) -> None:
        self._path = experts_path(run_dir)
        self._stamp: tuple[int, int] | None = None
        self._parsed: Document | None = None

    def forget(self) -> None:
        """Removes the file: its writer is gone."""
        self._path.unlink(missing_ok=True)
        self._stamp = self._parsed = None

    def read(self, now_s: float) -> Document | None:
        """The document as of now (monotonic)."""
        try:
            found = self._path.stat()
            if (stamp := (found.st_ino, found.st_mtime_ns)) != self._stamp:
                self._parsed, self._stamp = json.loads(self._path.read_bytes()), stamp
        except FileNotFoundError:
            return None
        return None if self._parsed is None else as_of(self._parsed, now_s)


def as_of(parsed: Document, now_s: float) -> Document:
    """The document with its ages moved on to `now_s`."""
    since_s = max(0.0, now_s - parsed["written_s"])
    decisions = [row | {"age_s": row["age_s"] + since_s} for row in parsed["decisions"]]
    return {name: value for name, value in parsed.items() if name != "written_s"} | {"decisions": decisions}


def brief(document: Document) -> Document:
    """Without what grows with the model: the placements, and the load of each expert."""
    # The load first: what is left to walk through is small.
    load = {name: value for name, value in document["load"].items() if name != "tokens"}
    short: Document = _without(document | {"load": load}, "physical_to_logical")
    return short


def _without(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(inner, name) for key, inner in value.items() if key != name}
    return [_without(row, name) for row in value] if isinstance(value, list) else value


def shape_of(document: Document) -> GroupShape:
    """Sizes of the group that published."""
    return GroupShape(**{name: document[name] for name in ("ranks", "nodes", "layers", "experts", "slots_per_rank")})
