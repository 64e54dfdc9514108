"""The namespaces of the resources: which uid they have, and whether one is being deleted."""

import logging
from typing import Any

from moe_contract.api_server import FORBIDDEN, ApiError

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import NAMESPACE

Document = dict[str, Any]

log = logging.getLogger("moeserving.operator")


class Namespaces:
    """Reads namespaces one by one, where the operator may.

    Args:
        api: for the reads.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._uids: dict[str, str | None] = {}

    async def fetch_uid(self, name: str) -> str | None:
        """Returns the uid of a namespace, read once; None where the operator may not read it.

        Raises:
            ApiError: the call failed otherwise.
        """
        if name not in self._uids:
            found = await self._fetch(name)
            self._uids[name] = None if found is None else str(found["metadata"]["uid"])
        return self._uids[name]

    def forget(self, name: str) -> None:
        """Has the uid read again: a namespace of this name may be another by now."""
        self._uids.pop(name, None)

    async def fetch_is_ending(self, name: str) -> bool:
        """Returns whether a namespace is being deleted, as far as the operator may know.

        Raises:
            ApiError: the call failed otherwise than by a lack of rights.
        """
        found = await self._fetch(name)
        return found is not None and "deletionTimestamp" in found["metadata"]

    async def _fetch(self, name: str) -> Document | None:
        try:
            return await self._api.get(NAMESPACE, "", name)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            log.warning("namespace %s: %s", name, error.message)
            return None
