"""Fields that engines of a fixed role have for themselves (`engine.roles.overrides`), laid over those of all. Pure."""

from collections.abc import Iterator

from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.pods import PodTemplate
from moe_operator.api.resource import MoEServing


def at_role(resource: MoEServing, role: EngineRole) -> MoEServing:
    """Returns the resource as engines of a role have it: resources, arguments and environment are those of the role.

    The pod template stays that of all engines: the one of the role is merged after it (`role_template`).
    """
    engine = resource.spec.engine
    override = engine.roles.override(role)
    changed = {name: value for name, value in override.resources if value is not None}
    update = {
        "resources": engine.resources.model_copy(update=changed),
        "args": (*engine.args, *override.args),
        "env": {**engine.env, **override.env},
    }
    spec = resource.spec.model_copy(update={"engine": engine.model_copy(update=update)})
    return resource.model_copy(update={"spec": spec})


def role_template(resource: MoEServing, role: EngineRole) -> tuple[PodTemplate, str]:
    """Returns the pod template of a role, and its path in the resource."""
    path = f"spec.engine.roles.overrides.{role.value}.podTemplate"
    return resource.spec.engine.roles.override(role).pod_template, path


def all_templates(resource: MoEServing) -> Iterator[PodTemplate]:
    """Yields each pod template that engines of the resource may have merged into their pods."""
    yield resource.spec.engine.pod_template
    for role in (EngineRole.PREFILL, EngineRole.DECODE):
        yield role_template(resource, role)[0]


def has_templates(resource: MoEServing) -> bool:
    """Whether the user has written a part of any of the resource's pods."""
    return any(all_templates(resource)) or bool(resource.spec.gateway.pod_template)


def all_arguments(resource: MoEServing) -> tuple[str, ...]:
    """Returns the arguments of all engines, and then those of each role."""
    engine = resource.spec.engine
    own = [engine.roles.override(role).args for role in (EngineRole.PREFILL, EngineRole.DECODE)]
    return (*engine.args, *own[0], *own[1])
