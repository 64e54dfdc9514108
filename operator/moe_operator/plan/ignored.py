"""Fields that are set and mean nothing where they are: they are named, and all goes on. Pure.

What means something only in a cluster has no effect on one machine; the placement of experts has none without experts
that are spread.
"""

from moe_operator.api.resource import MoEServing

_ONLY_IN_A_CLUSTER = (
    ("model", "tokenSecret"),
    ("model", "cache", "size"),
    ("model", "cache", "claim"),
    ("engine", "image"),
    ("engine", "canary"),
    ("engine", "podTemplate"),
    ("engine", "resources", "memory"),
    ("engine", "roles", "overrides", "prefill", "podTemplate"),
    ("engine", "roles", "overrides", "prefill", "resources", "memory"),
    ("engine", "roles", "overrides", "decode", "podTemplate"),
    ("engine", "roles", "overrides", "decode", "resources", "memory"),
    ("gateway", "replicas"),
    ("gateway", "autoscaling"),
    ("gateway", "image"),
    ("gateway", "service"),
    ("gateway", "podTemplate"),
    ("gateway", "inferencePool"),
    ("autoscaling",),
    ("networkPolicy",),
    ("commonMetadata",),
    ("disruption",),
    ("paused",),
)


def find_ignored(resource: MoEServing) -> list[str]:
    """Paths of the fields that are set, other than to their default, and have no effect on one machine."""
    spec = resource.model_dump(mode="json", by_alias=True, exclude_defaults=True).get("spec", {})
    return [".".join(("spec", *path)) for path in _ONLY_IN_A_CLUSTER if _is_set(spec, path)]


def find_idle(resource: MoEServing) -> list[str]:
    """Paths of the settings of experts that are set, other than to their default, where no experts are spread."""
    if resource.spec.engine.parallelism.expert:
        return []
    spec = resource.model_dump(mode="json", by_alias=True, exclude_defaults=True).get("spec", {})
    return [f"spec.scheduling.expert.{name}" for name in spec.get("scheduling", {}).get("expert", {})]


def _is_set(document: object, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(document, dict) or name not in document:
            return False
        document = document[name]
    return True
