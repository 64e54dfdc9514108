"""Service accounts of engines and gateways, and what the gateway may read. Pure."""

from typing import Any

from moe_operator.plan.names import Names

Object = dict[str, Any]
RBAC = "rbac.authorization.k8s.io"


def build_access(names: Names) -> list[Object]:
    """Engines may nothing and get no token; gateways read the EndpointSlices of their namespace."""
    gateway = names.gateway
    return [
        _build_account(names.engine, automount=False),
        _build_account(gateway, automount=True),
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "Role",
            "metadata": {"name": gateway},
            "rules": [
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": ["list", "watch"],
                }
            ],
        },
        {
            "apiVersion": f"{RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": gateway},
            "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": gateway},
            "subjects": [{"kind": "ServiceAccount", "name": gateway}],
        },
    ]


def _build_account(name: str, *, automount: bool) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": name},
        "automountServiceAccountToken": automount,
    }
