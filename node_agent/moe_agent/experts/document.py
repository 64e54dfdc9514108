"""The published document of an expert group: written by the first rank in the engine, read by the agent.

`experts.npz` in the run folder has the document as JSON and its large arrays as they lie in memory, because text of the
load of a large model would take the interpreter from the engine's own thread for a tenth of a second. The agent makes
JSON of it when it is asked (`GET /v1/experts`). Ages are those of the writing, with the machine's monotonic clock
beside them (`written_s`); the reader adds the time since.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moe_agent.experts.bookkeeping import DecisionEntry
from moe_agent.experts.controller import Controller
from moe_agent.experts.directive import GroupShape, replace_file
from moe_agent.experts.load import Floats

HOTTEST = 10
# Decimals of a value; more make the answer larger and have no meaning.
_DECIMALS = 6
_HEAD = "document"

Document = dict[str, Any]


# --- the writer, in the engine


def build_document(controller: Controller, now_s: float) -> Document:
    """Returns the document as of `now_s` (monotonic clock), with copies of the arrays; it formats nothing."""
    shape, balance, bookkeeping = controller.shape, controller.balance, controller.bookkeeping
    return {
        "written_s": now_s,
        "mode": controller.settings.mode.value,
        **asdict(shape),
        "step": controller.step,
        "placement": {
            "version": controller.version,
            "directive": controller.pending.settled,
            "physical_to_logical": controller.placement.copy(),
        },
        "load": {"steps": controller.window.steps, "tokens": controller.window.tokens_a_step()},
        "balance": {
            "mean": balance.mean,
            "worst": balance.worst,
            "by_layer": balance.by_layer,
            "by_rank": balance.by_rank,
        },
        "remote_fraction": balance.remote_fraction,
        "costs": asdict(controller.costs),
        "decisions": [_decision(row, now_s) for row in bookkeeping.rows],
        "totals": {
            "moves": bookkeeping.totals.moves,
            "decisions": dict(bookkeeping.totals.decisions),
            "stayed": dict(bookkeeping.totals.stayed),
            "lost_s": bookkeeping.totals.lost_s,
            "won_s": bookkeeping.totals.won_s,
        },
        "affinity": controller.affinity,
        "problems": [{"kind": kind.value, "message": message} for kind, message in controller.problems()],
    }


def _decision(row: DecisionEntry, now_s: float) -> Document:
    shown: Document = {
        "number": row.number,
        "step": row.step,
        "age_s": now_s - row.made_s,
        "outcome": row.outcome.value,
        "reason": row.reason,
        "moves": row.moves,
        "predicted_gain_s": row.predicted_gain_s,
        "measured_gain_s": row.measured_gain_s,
        "cost_s": row.cost_s,
        "balance_before": row.balance_before,
        "balance_after": row.balance_after,
        "seconds": row.seconds,
    }
    return shown if row.placement is None else shown | {"physical_to_logical": row.placement}


def list_hottest(tokens: Floats) -> list[Document]:
    """Returns the experts with the most tokens a step over all sources, the hottest first; none without tokens."""
    total = tokens.sum(axis=0)
    order = np.argsort(-total, axis=None, kind="stable")[:HOTTEST]
    places = zip(*np.unravel_index(order, total.shape), strict=True)
    rows = [{"layer": int(at), "expert": int(of), "tokens": float(total[at, of])} for at, of in places]
    return [row for row in rows if row["tokens"] > 0.0]


def write_document(run_dir: Path, document: Document) -> None:
    """Replaces the published document of a run folder."""
    document = document | {"load": document["load"] | {"hottest": list_hottest(document["load"]["tokens"])}}
    arrays: dict[str, Any] = {}
    head = json.dumps(_without_arrays(document, "", arrays)).encode()
    content = io.BytesIO()
    arrays[_HEAD] = np.frombuffer(head, np.uint8)
    np.savez(content, **arrays)
    replace_file(experts_path(run_dir), content.getvalue())


def _without_arrays(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    """Returns the value with each table replaced by a reference, and adds the table to `arrays`."""
    if isinstance(value, dict):
        return {key: _without_arrays(inner, f"{path}.{key}", arrays) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_arrays(inner, f"{path}.{number}", arrays) for number, inner in enumerate(value)]
    if not isinstance(value, np.ndarray):
        return value
    if value.ndim == 1:
        return np.round(value, _DECIMALS).tolist()
    arrays[path] = value.astype(np.float32) if value.dtype == np.float64 else value
    return {"array": path}


# --- the reader, in the agent


def experts_path(run_dir: Path) -> Path:
    """Returns the path of the published document of a run folder."""
    return run_dir / "experts.npz"


class PublishedExperts:
    """Reader of the published document. It is parsed once for each publication, its tables when they are asked for."""

    def __init__(self, run_dir: Path) -> None:
        self._path = experts_path(run_dir)
        self._stamp: tuple[int, int] | None = None
        self._head: Document | None = None
        self._whole: Document | None = None

    def forget(self) -> None:
        """Removes the file after its writer has ended."""
        self._path.unlink(missing_ok=True)
        self._stamp = self._head = self._whole = None

    def read(self, now_s: float, *, short: bool = False) -> Document | None:
        """Returns the document as of `now_s` (monotonic clock); None while there is none.

        Args:
            now_s: the present time.
            short: without what grows with the model: the placements, and the load of each expert.
        """
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = found.st_ino, found.st_mtime_ns
                if stamp != self._stamp:
                    self._head, self._whole, self._stamp = _read_head(file), None, stamp
                if not short and self._whole is None:
                    file.seek(0)
                    self._whole = _with_arrays(self._head, np.load(file, allow_pickle=False))
        except FileNotFoundError:
            return None
        document = _with_arrays(self._head, None) if short else self._whole
        return None if document is None else as_of(document, now_s)


def _read_head(file: Any) -> Document:
    with np.load(file, allow_pickle=False) as archive:
        head: Document = json.loads(archive[_HEAD].tobytes())
    return head


def _with_arrays(value: Any, arrays: Mapping[str, Any] | None) -> Any:
    """Returns the value with each reference replaced by its table as lists, or left out where `arrays` is None."""
    if isinstance(value, list):
        return [_with_arrays(row, arrays) for row in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"array"}:
        assert arrays is not None
        return _plain(arrays[value["array"]])
    if arrays is None:
        value = {key: inner for key, inner in value.items() if not _is_reference(inner)}
    return {key: _with_arrays(inner, arrays) for key, inner in value.items()}


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"array"}


def _plain(table: Any) -> Any:
    return (np.round(table.astype(np.float64), _DECIMALS) if table.dtype.kind == "f" else table).tolist()


def as_of(parsed: Document, now_s: float) -> Document:
    """Returns the document with its ages increased to `now_s` and without the time of its writing."""
    since_s = max(0.0, now_s - parsed["written_s"])
    decisions = [row | {"age_s": row["age_s"] + since_s} for row in parsed["decisions"]]
    return {name: value for name, value in parsed.items() if name != "written_s"} | {"decisions": decisions}


def shape_of(document: Document) -> GroupShape:
    """Returns the sizes of the group that published a document."""
    return GroupShape(**{name: document[name] for name in ("ranks", "nodes", "layers", "experts", "slots_per_rank")})
