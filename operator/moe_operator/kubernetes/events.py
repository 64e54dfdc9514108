"""Events about a resource, which `kubectl describe` shows."""

import secrets
from datetime import UTC, datetime
from typing import Any

from moe_operator.api.resource import API_VERSION, KIND

Document = dict[str, Any]
# Characters of a message; the API server takes 1,024.
MOST = 1000


def build_event(resource: Document, reason: str, message: str, kind: str) -> Document:
    """An event about a resource now; `kind` is `Normal` or `Warning`."""
    metadata, now = resource["metadata"], datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{metadata['name']}.{secrets.token_hex(8)}", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "uid": metadata["uid"],
        },
        "reason": reason,
        "message": message[:MOST],
        "type": kind,
        "source": {"component": "moeserving-operator"},
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
