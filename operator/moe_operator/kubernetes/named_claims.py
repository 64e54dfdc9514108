"""Which of the claims that engines mount one node alone can mount, by the claims themselves.

A claim that exists is a user's own: `model.cache.claim`, a `pvc://` model, a volume of a `podTemplate`. Its access
modes never change, so they are read once; a claim that is missing is looked for again with each pass.

Some volumes (NFS, a folder of a node) let several nodes mount a claim whatever its modes say. So engines that mount one
and may already be on several nodes stay as they are: only a workload that is made anew keeps to one node.
"""

import logging
from collections.abc import Iterable
from typing import Any

from moe_contract.api_server import FORBIDDEN, ApiError

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import CLAIM
from moe_operator.plan.names import COMPONENT, Names
from moe_operator.plan.one_node import is_on_one_node
from moe_operator.plan.pod_status import ENGINE, label_of
from moe_operator.plan.references import find_references

Document = dict[str, Any]
_ON_SEVERAL_NODES = frozenset({"ReadWriteMany", "ReadOnlyMany"})

log = logging.getLogger("moeserving.operator")


class NamedClaims:
    """Reads claims one by one, where the operator may.

    Args:
        api: for the reads.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._modes: dict[tuple[str, str], frozenset[str]] = {}

    async def find_one_node(
        self, namespace: str, name: str, objects: Iterable[Document], workloads: Iterable[Document] = ()
    ) -> frozenset[str]:
        """Returns the names of the claims in planned objects that one node alone can mount.

        Args:
            namespace: of the resource.
            name: of the resource, whose own claim is what the plan says.
            objects: of the plan.
            workloads: of the resource, as they are.

        Raises:
            ApiError: a call failed otherwise than by a lack of rights.
        """
        named = {claim for kind, claim in find_references(objects) if kind == CLAIM.name} - {Names(name).cache}
        named -= _find_spread(workloads, Names(name))
        modes = {claim: await self._fetch(namespace, claim) for claim in sorted(named)}
        return frozenset(claim for claim, found in modes.items() if found and not found & _ON_SEVERAL_NODES)

    def forget(self, namespace: str) -> None:
        """Has the claims of a namespace read again: one of these names may be another by now."""
        self._modes = {place: modes for place, modes in self._modes.items() if place[0] != namespace}

    async def _fetch(self, namespace: str, claim: str) -> frozenset[str]:
        if (found := self._modes.get((namespace, claim))) is not None:
            return found
        try:
            live = await self._api.get(CLAIM, namespace, claim)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            log.warning("claim %s/%s: %s", namespace, claim, error.message)
            return frozenset()
        if live is None:
            return frozenset()
        self._modes[namespace, claim] = modes = frozenset(live.get("spec", {}).get("accessModes") or ())
        return modes


def _find_spread(workloads: Iterable[Document], names: Names) -> set[str]:
    """Claims that engines mount which may be on several nodes."""
    found = set[str]()
    for live in workloads:
        spec = live.get("spec", {})
        template = spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("leaderTemplate")
        if template is None or label_of(live, COMPONENT) != ENGINE or is_on_one_node(template, names.labels("engine")):
            continue
        found |= {claim for kind, claim in find_references([live]) if kind == CLAIM.name}
    return found
