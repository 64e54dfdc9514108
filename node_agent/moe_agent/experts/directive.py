"""Directives: what a person asks of an expert group, as one JSON file in the run folder that the agent replaces whole.

The agent writes the file and puts its version into the control record; the group's first rank then reads it. A
directive is checked against the group's published shape when it arrives over HTTP, and again by the first rank.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from moe_contract.documents import parse_model
from moe_contract.input_errors import InputError, InvalidInput
from pydantic import BaseModel, ConfigDict, StrictInt

Rows = tuple[tuple[int, ...], ...]


class DirectiveAction(StrEnum):
    """Kinds of directive.

    `apply` moves to a given placement, `plan` decides now, `rollback` goes back to the placement before the last move,
    `affinity` records the inter-layer affinity for a while.
    """

    APPLY = "apply"
    PLAN = "plan"
    ROLLBACK = "rollback"
    AFFINITY = "affinity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """One directive. `physical_to_logical[layer][slot]` is the placement of an `apply`, else None."""

    version: int
    action: DirectiveAction
    physical_to_logical: Rows | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShape:
    """Sizes of an expert group; `ranks * slots_per_rank` slots hold `experts` logical experts in each layer."""

    ranks: int
    nodes: int
    layers: int
    experts: int
    slots_per_rank: int

    @property
    def slots(self) -> int:
        """Number of slots of a layer, over all ranks."""
        return self.ranks * self.slots_per_rank


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    action: DirectiveAction
    physical_to_logical: tuple[tuple[StrictInt, ...], ...] | None = None


def parse_directive(document: object, version: int, shape: GroupShape) -> Directive:
    """Returns the directive in a request body or a file.

    Raises:
        InvalidInput: an unknown action, or a placement that the group cannot have.
    """
    body = parse_model(_Body, document)
    rows = body.physical_to_logical
    if body.action is DirectiveAction.APPLY:
        errors = [_error("required for apply")] if rows is None else list_placement_errors(rows, shape)
    else:
        errors = [] if rows is None else [_error(f"only apply takes it, not {body.action.value}")]
    if errors:
        raise InvalidInput(errors)
    return Directive(version=version, action=body.action, physical_to_logical=rows)


def list_placement_errors(rows: Sequence[Sequence[int]], shape: GroupShape) -> list[InputError]:
    """Returns why a group of this shape cannot have the placement; empty where it can."""
    if len(rows) != shape.layers:
        return [_error(f"{shape.layers} layers are needed, got {len(rows)}")]
    errors = [_row_error(layer, row, shape) for layer, row in enumerate(rows)]
    return [error for error in errors if error is not None]


def _row_error(layer: int, row: Sequence[int], shape: GroupShape) -> InputError | None:
    path = f"[{layer}]"
    if len(row) != shape.slots:
        return _error(f"{shape.slots} slots are needed, got {len(row)}", path)
    if stray := [expert for expert in row if not 0 <= expert < shape.experts]:
        return _error(f"no expert {stray[0]}; known: 0 to {shape.experts - 1}", path)
    if absent := sorted(set(range(shape.experts)).difference(row)):
        return _error(f"expert {absent[0]} has no slot", path)
    return None


def _error(message: str, at: str = "") -> InputError:
    return InputError(f"physical_to_logical{at}", message)


def directive_path(run_dir: Path) -> Path:
    """Returns the path of the newest directive in a run folder."""
    return run_dir / "experts-directive.json"


def write_directive(run_dir: Path, directive: Directive) -> None:
    """Replaces the directive file of a run folder."""
    document = {name: value for name, value in asdict(directive).items() if value is not None}
    replace_file(directive_path(run_dir), json.dumps(document).encode())


def read_directive(run_dir: Path, shape: GroupShape) -> Directive:
    """Returns the directive in the file of a run folder.

    Raises:
        InvalidInput: there is none, or the group cannot follow it.
    """
    try:
        document: dict[str, Any] = json.loads(directive_path(run_dir).read_bytes())
        version = int(document.pop("version"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput([InputError("", f"no directive can be read: {error}")]) from None
    return parse_directive(document, version, shape)


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: readers see the old content or the new, never a part."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    os.replace(fresh, path)


class PendingDirective:
    """Directives received and not completed; the controller owns it. A newer `apply` or `rollback` replaces an older
    one.

    Attributes:
        received: version of the newest directive received.
        settled: version of the newest directive completed, whatever its result.
        plan_wanted: whether a decision was asked for that has not begun.
        change: the `apply` or `rollback` that has not begun.
    """

    def __init__(self) -> None:
        self.received = self.settled = 0
        self.plan_wanted = False
        self.change: Directive | None = None

    @property
    def waits(self) -> bool:
        """Whether something asked for has not begun."""
        return self.plan_wanted or self.change is not None

    def add(self, directive: Directive) -> None:
        """Adds a directive that waits until the controller begins it."""
        if directive.action is DirectiveAction.PLAN:
            self.plan_wanted = True
        elif directive.action is not DirectiveAction.AFFINITY:
            self.change = directive

    def take_change(self) -> Directive | None:
        """Returns the `apply` or `rollback` that waits, and removes it."""
        directive, self.change = self.change, None
        return directive

    def skip(self, version: int) -> None:
        """Marks directives up to this version as completed: they are older than the group."""
        self.received = self.settled = version

    def clear(self) -> None:
        """Drops the pending change and the pending plan."""
        self.change, self.plan_wanted = None, False

    def settle(self) -> bool:
        """Marks all received directives as completed unless something waits; returns whether that changed anything."""
        if self.waits or self.settled == self.received:
            return False
        self.settled = self.received
        return True
