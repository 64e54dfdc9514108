"""The published state of an expert group: written by the first rank in the engine, read by the agent.

Three steps: the engine's thread takes a `Publication`, which copies what later changes and builds nothing; the thread
beside it makes a `moe_contract.experts_state.ExpertsState` and writes `experts.npz` in the run folder; the agent makes
the answer to `GET /v1/experts`. The file has the state in its brief form as JSON, and the large tables as they lie in
memory, because text of the load of a large model would take the interpreter from the engine's own thread for a tenth
of a second. Ages are those of the writing, with the machine's monotonic clock beside them; the reader adds the time
since.
"""

import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from moe_contract.experts_state import (
    AffinityPart,
    BalancePart,
    Decision,
    ExpertsState,
    HotExpertPart,
    LoadPart,
    PlacementPart,
    ProblemPart,
    TotalsPart,
)
from moe_scheduling.expert.decision import Balance, StepSizes

from moe_agent.experts.bookkeeping import DecisionEntry, MoveTotals, ProblemKind
from moe_agent.experts.controller import Controller
from moe_agent.experts.directive import GroupShape, replace_file
from moe_agent.experts.heat import build_heat
from moe_agent.experts.load import Floats, Slots
from moe_agent.experts.planning import MeasuredCosts

HOTTEST = 10
# Decimals of a value; more make the answer larger and have no meaning.
_DECIMALS = 6
# Entries of the file.
_STATE, _WRITTEN_S, _PLACEMENT, _LOAD, _CANDIDATE = "state", "written_s", "placement", "load", "candidate"
# Fields that the brief form lacks.
_TABLES: Any = {
    "placement": {"physical_to_logical"},
    "load": {"tokens"},
    "decisions": {"__all__": {"physical_to_logical"}},
    "heat": True,
}

Document = dict[str, Any]


# --- the writer, in the engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """All that is published at one moment; nothing of the controller changes it later.

    Attributes:
        written_s: the moment, on the monotonic clock.
        mode: the mode in force.
        shape: sizes of the group.
        step: number of the engine's step.
        version: version of the placement.
        directive: newest directive that was carried out.
        placement: [layer, slot], a copy.
        load_steps: weighted steps of the window.
        load: [source, layer, expert], tokens a step.
        sizes: how often steps have which size; None before the first.
        balance: of the ranks under that load.
        costs: as measured so far.
        decisions: the newest first.
        totals: sums since the start.
        affinity: None until it was recorded on request.
        problems: each with a sentence.
    """

    written_s: float
    mode: str
    shape: GroupShape
    step: int
    version: int
    directive: int
    placement: Slots
    load_steps: float
    load: Floats
    sizes: StepSizes | None
    balance: Balance
    costs: MeasuredCosts
    decisions: tuple[DecisionEntry, ...]
    totals: MoveTotals
    affinity: AffinityPart | None
    problems: list[tuple[ProblemKind, str]]


def take_publication(controller: Controller, now_s: float) -> Publication:
    """Returns the state as of `now_s` (monotonic clock); called in the engine's thread, so it only copies."""
    return Publication(
        written_s=now_s,
        mode=controller.settings.mode.value,
        shape=controller.shape,
        step=controller.step,
        version=controller.version,
        directive=controller.pending.settled,
        placement=controller.placement.copy(),
        load_steps=controller.window.steps,
        load=controller.window.tokens_a_step(),
        sizes=controller.sizes.sizes,
        balance=controller.balance,
        costs=controller.costs,
        decisions=tuple(controller.bookkeeping.rows),
        totals=controller.bookkeeping.totals.copy(),
        affinity=controller.affinity,
        problems=controller.problems(),
    )


def _sizes(sizes: StepSizes | None) -> tuple[tuple[float, float], ...] | None:
    return None if sizes is None else tuple(zip(sizes.tokens, sizes.parts, strict=True))


def build_state(taken: Publication) -> ExpertsState:
    """Returns the brief form, without the tables. Unvalidated: its readers validate, and the engine spends no time."""
    shape, totals = taken.shape, taken.totals
    return ExpertsState.model_construct(
        mode=taken.mode,
        ranks=shape.ranks,
        nodes=shape.nodes,
        layers=shape.layers,
        experts=shape.experts,
        slots_per_rank=shape.slots_per_rank,
        step=taken.step,
        placement=PlacementPart.model_construct(version=taken.version, directive=taken.directive),
        load=LoadPart.model_construct(
            steps=taken.load_steps, hottest=list_hottest(taken.load), sizes=_sizes(taken.sizes)
        ),
        balance=_balance(taken.balance),
        remote_fraction=float(taken.balance.remote_fraction),
        costs=dict(asdict(taken.costs)),
        decisions=tuple(_decision(row, taken.written_s) for row in taken.decisions),
        totals=TotalsPart.model_construct(
            moves=totals.moves,
            decisions=dict(totals.decisions),
            stayed=dict(totals.stayed),
            lost_s=totals.lost_s,
            won_s=totals.won_s,
        ),
        affinity=taken.affinity,
        problems=tuple(ProblemPart.model_construct(kind=kind.value, message=text) for kind, text in taken.problems),
    )


def _balance(balance: Balance) -> BalancePart:
    return BalancePart.model_construct(
        mean=float(balance.mean),
        worst=float(balance.worst),
        by_layer=tuple(np.round(balance.by_layer, _DECIMALS).tolist()),
        by_rank=tuple(np.round(balance.by_rank, _DECIMALS).tolist()),
    )


def _decision(row: DecisionEntry, now_s: float) -> Decision:
    return Decision.model_construct(
        number=row.number,
        step=row.step,
        age_s=now_s - row.made_s,
        outcome=row.outcome.value,
        reason=row.reason,
        moves=row.moves,
        predicted_gain_s=row.predicted_gain_s,
        measured_gain_s=row.measured_gain_s,
        cost_s=row.cost_s,
        balance_before=row.balance_before,
        balance_after=row.balance_after,
        seconds=row.seconds,
    )


def list_hottest(tokens: Floats) -> tuple[HotExpertPart, ...]:
    """Returns the experts with the most tokens a step over all sources, the hottest first; none without tokens."""
    total = tokens.sum(axis=0)
    order = np.argsort(-total, axis=None, kind="stable")[:HOTTEST]
    places = zip(*np.unravel_index(order, total.shape), strict=True)
    rows = ((int(layer), int(expert), float(total[layer, expert])) for layer, expert in places)
    return tuple(
        HotExpertPart.model_construct(layer=layer, expert=expert, tokens=tokens_a_step)
        for layer, expert, tokens_a_step in rows
        if tokens_a_step > 0.0
    )


def write_document(run_dir: Path, taken: Publication) -> None:
    """Replaces the published document of a run folder."""
    state = build_state(taken).model_dump_json(exclude=_TABLES).encode()
    arrays: dict[str, Any] = {
        _STATE: np.frombuffer(state, np.uint8),
        _WRITTEN_S: np.float64(taken.written_s),
        _PLACEMENT: taken.placement,
        _LOAD: taken.load.astype(np.float32),
    }
    # The newest decision alone keeps its placement.
    if taken.decisions and taken.decisions[0].placement is not None:
        arrays[_CANDIDATE] = taken.decisions[0].placement
    content = io.BytesIO()
    np.savez(content, **arrays)
    replace_file(experts_path(run_dir), content.getvalue())


# --- the reader, in the agent


def experts_path(run_dir: Path) -> Path:
    """Returns the path of the published document of a run folder."""
    return run_dir / "experts.npz"


class PublishedExperts:
    """Reader of the published document. It is parsed once for each publication, its tables when they are asked for."""

    def __init__(self, run_dir: Path) -> None:
        self._path = experts_path(run_dir)
        self._stamp: tuple[int, int] | None = None
        self._brief: Document = {}
        self._whole: Document | None = None
        self._heat: Document | None = None
        self._written_s = 0.0

    def forget(self) -> None:
        """Removes the file after its writer has ended."""
        self._path.unlink(missing_ok=True)
        self._stamp = self._whole = self._heat = None
        self._brief = {}

    def read(self, now_s: float, *, short: bool = False) -> Document | None:
        """Returns the document as of `now_s` (monotonic clock); None while there is none.

        Args:
            now_s: the present time.
            short: without what grows with the model: the placements, and the load of each expert.
        """
        try:
            with self._path.open("rb") as file:
                self._refresh(file)
                if not short and self._whole is None:
                    file.seek(0)
                    self._whole = _read_tables(file, self._brief)
        except FileNotFoundError:
            return None
        document = self._brief if short else self._whole
        return None if document is None else as_of(document, now_s - self._written_s)

    def read_heat(self, now_s: float) -> Document | None:
        """Returns the brief form with the load as bytes, `heat`; None while there is no document."""
        try:
            with self._path.open("rb") as file:
                self._refresh(file)
                if self._heat is None:
                    file.seek(0)
                    self._heat = _read_heat(file, self._brief)
        except FileNotFoundError:
            return None
        return as_of(self._brief, now_s - self._written_s) | self._heat

    def _refresh(self, file: Any) -> None:
        """Reads the brief form of an open document that is not the one read before."""
        found = os.fstat(file.fileno())
        stamp = found.st_ino, found.st_mtime_ns
        if stamp != self._stamp:
            self._brief, self._written_s = _read_state(file)
            self._whole = self._heat = None
            self._stamp = stamp


def _read_state(file: Any) -> tuple[Document, float]:
    """Returns the brief form, and the monotonic clock when it was written."""
    with np.load(file, allow_pickle=False) as archive:
        brief: Document = json.loads(archive[_STATE].tobytes())
        return brief, float(archive[_WRITTEN_S])


def _read_heat(file: Any, brief: Document) -> Document:
    """Returns the load as bytes, `heat`; None in it where nothing was counted."""
    with np.load(file, allow_pickle=False) as archive:
        heat = build_heat(archive[_LOAD].astype(np.float64), archive[_PLACEMENT], brief["ranks"])
    return {"heat": None if heat is None or not brief["load"]["steps"] else heat.model_dump()}


def _read_tables(file: Any, brief: Document) -> Document:
    """Returns the whole document: the brief form with its tables as lists."""
    with np.load(file, allow_pickle=False) as archive:
        whole = brief | {
            "placement": brief["placement"] | {"physical_to_logical": _plain(archive[_PLACEMENT])},
            "load": brief["load"] | {"tokens": _plain(archive[_LOAD])},
        }
        if _CANDIDATE in archive:
            newest, *older = brief["decisions"]
            whole["decisions"] = [newest | {"physical_to_logical": _plain(archive[_CANDIDATE])}, *older]
    return whole


def _plain(table: Any) -> Any:
    return (np.round(table.astype(np.float64), _DECIMALS) if table.dtype.kind == "f" else table).tolist()


def as_of(document: Document, since_s: float) -> Document:
    """Returns the document with the ages of its decisions increased by the seconds since it was written."""
    older_s = max(0.0, since_s)
    return document | {"decisions": [row | {"age_s": row["age_s"] + older_s} for row in document["decisions"]]}


def shape_of(document: Document) -> GroupShape:
    """Returns the sizes of the group that published a document."""
    return GroupShape(**{name: document[name] for name in ("ranks", "nodes", "layers", "experts", "slots_per_rank")})
