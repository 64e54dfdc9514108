"""A person's word to an expert group: one JSON file in the run folder, replaced whole by the agent.

The agent writes it and names its version in the control page; the group's first rank reads it then. What comes in over
HTTP is checked here against the group's published shape, and by the first rank once more when it reads the file.
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
    """What is asked for."""

    APPLY = "apply"
    PLAN = "plan"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """One directive; `physical_to_logical[layer][slot]` is the placement of an `apply`, else None."""

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
        return self.ranks * self.slots_per_rank


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    action: DirectiveAction
    physical_to_logical: tuple[tuple[StrictInt, ...], ...] | None = None


def parse_directive(document: object, version: int, shape: GroupShape) -> Directive:
    """The directive that a body or a file asks for.

    Raises:
        InvalidInput: an unknown action, or a placement that the group cannot have.
    """
    body = parse_model(_Body, document)
    rows = body.physical_to_logical
    if body.action is DirectiveAction.APPLY:
        problems = [_problem("required for apply")] if rows is None else list_placement_problems(rows, shape)
    else:
        problems = [] if rows is None else [_problem(f"only apply takes it, not {body.action.value}")]
    if problems:
        raise InvalidInput(problems)
    return Directive(version=version, action=body.action, physical_to_logical=rows)


def list_placement_problems(rows: Sequence[Sequence[int]], shape: GroupShape) -> list[InputError]:
    """Why a group of this shape cannot have the placement; empty when it can."""
    if len(rows) != shape.layers:
        return [_problem(f"{shape.layers} layers are needed, got {len(rows)}")]
    problems = [_row_problem(layer, row, shape) for layer, row in enumerate(rows)]
    return [problem for problem in problems if problem is not None]


def _row_problem(layer: int, row: Sequence[int], shape: GroupShape) -> InputError | None:
    path = f"[{layer}]"
    if len(row) != shape.slots:
        return _problem(f"{shape.slots} slots are needed, got {len(row)}", path)
    if stray := [expert for expert in row if not 0 <= expert < shape.experts]:
        return _problem(f"no expert {stray[0]}; known: 0 to {shape.experts - 1}", path)
    if absent := sorted(set(range(shape.experts)).difference(row)):
        return _problem(f"expert {absent[0]} has no slot", path)
    return None


def _problem(message: str, at: str = "") -> InputError:
    return InputError(f"physical_to_logical{at}", message)


def directive_path(run_dir: Path) -> Path:
    """Where the newest directive lies."""
    return run_dir / "experts-directive.json"


def write_directive(run_dir: Path, directive: Directive) -> None:
    """Replaces the file whole."""
    document = {name: value for name, value in asdict(directive).items() if value is not None}
    replace_file(directive_path(run_dir), json.dumps(document).encode())


def read_directive(run_dir: Path, shape: GroupShape) -> Directive:
    """The directive in the file.

    Raises:
        InvalidInput: there is none, or none that the group can follow.
    """
    try:
        document: dict[str, Any] = json.loads(directive_path(run_dir).read_bytes())
        version = int(document.pop("version"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput([InputError("", f"no directive can be read: {error}")]) from None
    return parse_directive(document, version, shape)


def replace_file(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, never a part."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    os.replace(fresh, path)
