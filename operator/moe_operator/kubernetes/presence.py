"""What one operator does now: it leads, stands by, or cannot serve and says why. For `/readyz` and the metrics."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """Part that an operator has among those of the cluster."""

    STARTS = "starts"
    LEADS = "leads"
    STANDS_BY = "standsBy"
    RIVALLED = "rivalled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Presence:
    """One operator as it is now.

    Attributes:
        role: its part.
        rivals: other releases that serve the same namespaces, in words.
        unreadable: kind and namespace (empty: all) of what it cannot read.
    """

    role: Role = Role.STARTS
    rivals: tuple[str, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether it leads, or would when the operator that leads in its place goes."""
        return self.role in (Role.LEADS, Role.STANDS_BY)

    def document(self) -> dict[str, Any]:
        """Returns the body of the answer of `/readyz`."""
        unreadable = [{"kind": kind, "namespace": namespace} for kind, namespace in self.unreadable]
        return {"role": self.role.value, "rivals": [*self.rivals], "unreadable": unreadable}
