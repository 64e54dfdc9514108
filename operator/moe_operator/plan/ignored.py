"""Fields that are set and mean nothing where they are: they are named, and all goes on. Pure.

What means something only in a cluster has no effect on one machine; the placement of experts has none without experts
that are spread.
"""

from collections.abc import Iterator, Mapping

from moe_contract.engine_process import engine_grace_s, gateway_grace_s
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s
from moe_operator.plan.role_override import role_template

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


def find_nulls(resource: MoEServing) -> list[str]:
    """Paths of the nulls in pod templates, which a client-side `kubectl apply` leaves out."""
    engine, gateway = resource.spec.engine, resource.spec.gateway
    templates = {"spec.engine.podTemplate": engine.pod_template, "spec.gateway.podTemplate": gateway.pod_template}
    for role in (EngineRole.PREFILL, EngineRole.DECODE):
        template, path = role_template(resource, role)
        templates[path] = template
    return [f"{path}{place}" for path, template in templates.items() for place in _nulls(template)]


def find_short_graces(resource: MoEServing) -> list[tuple[str, str]]:
    """Pod templates whose grace period cuts streams before `engine.drainTimeout` is over: path and text."""
    drain_s = duration_s(resource.spec.engine.drain_timeout)
    rows = [
        ("spec.engine.podTemplate", resource.spec.engine.pod_template, engine_grace_s(drain_s)),
        ("spec.gateway.podTemplate", resource.spec.gateway.pod_template, gateway_grace_s(drain_s)),
    ]
    for role in (EngineRole.PREFILL, EngineRole.DECODE):
        template, path = role_template(resource, role)
        rows.append((path, template, engine_grace_s(drain_s)))
    found = {}
    for path, template, needed_s in rows:
        given_s = (template.get("spec") or {}).get("terminationGracePeriodSeconds")
        if isinstance(given_s, int) and given_s < needed_s:
            text = f"{given_s} s are less than engine.drainTimeout and its margin, {needed_s} s: streams may be cut"
            found[f"{path}.spec.terminationGracePeriodSeconds"] = text
    return [*found.items()]


def _nulls(value: object) -> Iterator[str]:
    if value is None:
        yield ""
    elif isinstance(value, Mapping):
        yield from (f".{name}{rest}" for name, part in value.items() for rest in _nulls(part))
    elif isinstance(value, list | tuple):
        yield from (f"[{index}]{rest}" for index, part in enumerate(value) for rest in _nulls(part))


def _is_set(document: object, path: tuple[str, ...]) -> bool:
    for name in path:
        if not isinstance(document, dict) or name not in document:
            return False
        document = document[name]
    return True
