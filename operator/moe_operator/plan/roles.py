"""Prefill and decode apart: which workloads hold the engines, how each takes part, what the gateway may do. Pure.

With the mode `auto` all engines are in one workload. With fixed numbers each role has a Deployment of its own, whose
pods carry the role as a label; the Service of the stable engines selects both, so that gateways find them as before.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moe_contract.kv_transfer import Disaggregation, KvTransferConfig
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.autoscaling import RoleRange
from moe_operator.api.resource import MoEServing
from moe_operator.api.roles import RoleMode
from moe_operator.plan.names import Names
from moe_operator.plan.replicas import Count, Place, Scaled, count_replicas, own_replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleWorkload:
    """The engines of one role.

    Attributes:
        role: their role.
        name: of their Deployment.
        count: how many there are.
    """

    role: EngineRole
    name: str
    count: Count


def plan_role_workloads(
    resource: MoEServing,
    names: Names,
    scaled: Mapping[Place, Scaled],
    first_replicas: int | None,
    current: Mapping[EngineRole, int],
) -> tuple[RoleWorkload, ...]:
    """Returns the Deployments of the roles; none where roles are not fixed.

    Args:
        resource: the resource.
        names: of its children.
        scaled: workloads whose number of replicas another manager set last.
        first_replicas: engines in all for now, while those of another workload still serve; None where none do.
        current: engines of each role as the autoscaler or the live objects have them; empty without either.
    """
    planned = role_numbers(resource, current)
    present = None if first_replicas is None else share_replicas(planned, first_replicas)
    found = []
    for role, number in planned.items():
        name = names.of_role(role)
        is_own = resource.spec.autoscaling is not None
        count = own_replicas(number) if is_own else count_replicas(("Deployment", name), number, scaled)
        if present is not None:
            count = Count(replicas=number, spec={"replicas": present[role]}, annotations=count.annotations)
        found.append(RoleWorkload(role=role, name=name, count=count))
    return tuple(found)


def fixed_numbers(resource: MoEServing) -> dict[EngineRole, int]:
    """Returns the engines of each role, prefill first; empty where roles are not fixed."""
    roles = resource.spec.engine.roles
    if not roles.is_fixed:
        return {}
    return {EngineRole.PREFILL: roles.prefill or 0, EngineRole.DECODE: roles.decode or 0}


def role_numbers(resource: MoEServing, current: Mapping[EngineRole, int]) -> dict[EngineRole, int]:
    """Returns the engines of each role: the resource's numbers, or under autoscaling the present ones in their range.

    Args:
        resource: the resource.
        current: engines of each role as the autoscaler or the live objects have them.
    """
    section = resource.spec.autoscaling
    ranges = None if section is None else section.roles
    numbers = fixed_numbers(resource)
    if ranges is None:
        return numbers
    limits: dict[EngineRole, RoleRange] = {EngineRole.PREFILL: ranges.prefill, EngineRole.DECODE: ranges.decode}
    return {
        role: min(limits[role].max_replicas, max(limits[role].min_replicas, current.get(role, number)))
        for role, number in numbers.items()
    }


def share_replicas(planned: Mapping[EngineRole, int], total: int) -> dict[EngineRole, int]:
    """Returns the number of each role among `total` engines: the next goes to the role that lacks the greatest part."""
    present = dict.fromkeys(planned, 0)
    for _ in range(min(total, sum(planned.values()))):
        behind = min(
            (role for role in planned if present[role] < planned[role]), key=lambda role: present[role] / planned[role]
        )
        present[behind] += 1
    return present


def roles_of_engines(resource: MoEServing) -> Iterable[EngineRole]:
    """Returns the role of each engine, in the order of their numbers."""
    numbers = fixed_numbers(resource) or {EngineRole.UNIFIED: resource.spec.engine.count}
    return [role for role, number in numbers.items() for _ in range(number)]


def build_transfer(resource: MoEServing, role: EngineRole, port: int) -> KvTransferConfig | None:
    """Returns how an engine takes part; None where none does.

    Args:
        resource: the resource.
        role: of the engine.
        port: side channel of its first data-parallel rank.
    """
    return KvTransferConfig(role=role, port=port) if resource.spec.engine.roles.apart else None


def build_disaggregation(resource: MoEServing) -> Disaggregation | None:
    """Returns what the gateway may do; None where each request has one engine."""
    roles = resource.spec.engine.roles
    return Disaggregation(moves_roles=roles.mode is RoleMode.AUTO) if roles.apart else None
