"""HorizontalPodAutoscalers of others that scale the engines which the operator itself scales.

Both would write the same numbers in turn. The operator goes on with its own, and says whose is to be deleted.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from moe_contract.api_server import FORBIDDEN, NOT_FOUND, ApiError

from moe_operator.api.autoscaling import AutoscalingMode
from moe_operator.api.reasons import Reason
from moe_operator.api.resource import KIND, MoEServing
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import AUTOSCALER, DEPLOYMENT, LEADER_WORKER_SET
from moe_operator.plan.names import Names
from moe_operator.plan.roles import fixed_numbers

Document = dict[str, Any]
# A person makes or deletes one seldom.
AGE_S = 30.0

log = logging.getLogger("moeserving.operator")


class OtherAutoscalers:
    """Looks for autoscalers in the namespaces of resources whose engines the operator scales.

    Args:
        api: lists the autoscalers of a namespace.
        clock: monotonic seconds.
    """

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._listed: dict[str, tuple[float, Sequence[Document]]] = {}
        # Namespaces whose refusal is in the log.
        self._refused: set[str] = set()

    async def judge(self, namespace: str, resource: MoEServing, outcome: Outcome) -> Outcome:
        """Returns what the autoscaler decided, limited by an autoscaler that writes the same numbers, if there is one.

        Raises:
            ApiError: the call failed otherwise than by a lack of rights.
        """
        if not scaled_targets(resource):
            return outcome
        rivals = [*find_rivals(resource, await self._list(namespace))]
        return replace(outcome, limited=(Reason.OTHER_AUTOSCALER, "; ".join(rivals))) if rivals else outcome

    def forget(self, namespace: str) -> None:
        """Has the autoscalers of a namespace listed again."""
        self._listed.pop(namespace, None)

    async def _list(self, namespace: str) -> Sequence[Document]:
        listed_s, found = self._listed.get(namespace, (-AGE_S, ()))
        if self._clock() - listed_s < AGE_S:
            return found
        try:
            found = await self._api.select(AUTOSCALER, namespace)
        except ApiError as error:
            if error.status not in (FORBIDDEN, NOT_FOUND):
                raise
            if namespace not in self._refused:
                log.warning("autoscalers of others in %s: %s", namespace, error.message)
            self._refused.add(namespace)
            found = ()
        else:
            self._refused.discard(namespace)
        self._listed[namespace] = (self._clock(), found)
        return found


def scaled_targets(resource: MoEServing) -> frozenset[tuple[str, str]]:
    """Returns kind and name of what the operator scales by the load; empty where others may scale."""
    section, names = resource.spec.autoscaling, Names(resource.metadata.name)
    if section is None or section.mode is AutoscalingMode.EXTERNAL:
        return frozenset()
    itself = (KIND, resource.metadata.name)
    if roles := fixed_numbers(resource):
        return frozenset({itself, *((DEPLOYMENT.name, names.of_role(role)) for role in roles)})
    return frozenset({itself, (DEPLOYMENT.name, names.engine), (LEADER_WORKER_SET.name, names.engine)})


def find_rivals(resource: MoEServing, autoscalers: Sequence[Document]) -> Iterator[str]:
    """Yields for each autoscaler with such a target what it does and what to do about it, by name. Pure."""
    targets = scaled_targets(resource)
    for document in sorted(autoscalers, key=lambda row: str(row["metadata"]["name"])):
        target = document.get("spec", {}).get("scaleTargetRef", {})
        if (target.get("kind"), target.get("name")) in targets:
            what = f"HorizontalPodAutoscaler {document['metadata']['name']}"
            yield (
                f"{what} scales {target['kind']} {target['name']} too, and both write the same number; "
                "delete it, or the ScaledObject that made it, or take spec.autoscaling away"
            )
