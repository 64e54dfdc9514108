"""The plan for one machine: which agents and which gateway should run for a resource, each with its configuration.

Pure: the machine is an argument, and nothing is started or read. `moeserving up` writes the plan to files.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_contract.addresses import LOOPBACK, http_url
from moe_contract.agent_config import AgentConfig
from moe_contract.gateway_config import EngineAddress, GatewayConfig
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.sections import Listen
from moe_scheduling.engine.disaggregation import EngineRole

from moe_operator.api.engine import Runtime
from moe_operator.api.resource import MoEServing
from moe_operator.api.scheduling import engine_settings, expert_settings, request_settings
from moe_operator.api.units import quantity_value, render_bytes
from moe_operator.plan.engine import Share, build_engine, kv_cache_bytes
from moe_operator.plan.gateway import build_auth, build_continuation, build_cors, build_limits, build_tls, build_tracing
from moe_operator.plan.kv_offload import check_machine_memory
from moe_operator.plan.role_override import at_role
from moe_operator.plan.roles import build_disaggregation, build_transfer, roles_of_engines


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSite:
    """The machine, as far as a plan depends on it.

    Attributes:
        state_dir: folder of this deployment; each agent gets a folder in it.
        token_file: file with the control token.
        ports: free ports, at least `ports_needed`: gateway, its admin server, then agent and engine of each replica;
            where engines exchange KV blocks, then the first of as many free ports as each has data-parallel ranks.
        cpus: CPUs that the deployment may use.
        memory_bytes: memory of the machine.
        gpus: names of the GPUs as CUDA_VISIBLE_DEVICES takes them; empty on a machine without.
        host: address that all processes listen on.
        secrets_dir: folder that has a folder of files for each Secret; None: there is none.
    """

    state_dir: Path
    token_file: Path
    ports: tuple[int, ...]
    cpus: int
    memory_bytes: int
    gpus: tuple[str, ...] = ()
    host: str = LOOPBACK
    secrets_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """Configurations of the processes of a deployment on one machine: its agents and its gateway."""

    agents: tuple[AgentConfig, ...]
    gateway: GatewayConfig


def ports_needed(resource: MoEServing) -> int:
    """Number of free ports that a plan takes; the first, the gateway's, is not used when the resource names one."""
    return 2 + (3 if resource.spec.engine.roles.apart else 2) * resource.spec.engine.count


def plan_local(resource: MoEServing, site: LocalSite) -> LocalPlan:
    """The plan.

    Raises:
        InvalidInput: the machine does not have what the resource asks for.
        ValueError: the site has fewer ports than `ports_needed`.
    """
    if len(site.ports) < ports_needed(resource):
        raise ValueError(f"{ports_needed(resource)} ports are needed, got {len(site.ports)}")
    if problems := [*_check_model(resource), *_check_machine(resource, site), *_check_secrets(resource, site)]:
        raise InvalidInput(problems)
    agents = tuple(_build_agent(resource, site, *row) for row in enumerate(roles_of_engines(resource)))
    return LocalPlan(agents=agents, gateway=_build_gateway(resource, site, agents))


def _check_model(resource: MoEServing) -> Iterator[InputError]:
    scheme, _, path = resource.spec.model.uri.partition("://")
    if scheme == "file" and not path.startswith("/"):
        yield InputError("spec.model.uri", f"an absolute folder is needed here, got {resource.spec.model.uri!r}")
    if scheme == "pvc":
        yield InputError("spec.model.uri", "pvc:// is only for a cluster; on one machine name the folder with file://")


def _check_secrets(resource: MoEServing, site: LocalSite) -> Iterator[InputError]:
    if site.secrets_dir is not None:
        return
    auth, tls = resource.spec.gateway.auth, resource.spec.gateway.tls
    advice = "on one machine name the folder that has them: moeserving up --secrets DIR, or MOESERVING_SECRETS"
    if auth is not None and auth.secrets:
        yield InputError("spec.gateway.auth.secrets", advice)
    if tls is not None:
        yield InputError("spec.gateway.tls.secretName", advice)


def _check_machine(resource: MoEServing, site: LocalSite) -> Iterator[InputError]:
    engine = resource.spec.engine
    ranks = engine.count * engine.parallelism.ranks
    each = [at_role(resource, role) for role in roles_of_engines(resource)]
    if engine.count == 0:
        yield InputError("spec.engine.replicas", "at least 1 is needed on one machine")
        return
    if engine.parallelism.nodes > 1:
        yield InputError("spec.engine.parallelism.nodes", "more than one node is only for a cluster")
    if engine.runtime is Runtime.VLLM:
        if ranks > len(site.gpus):
            has = f"{len(site.gpus)}" if site.gpus else "0; the runtime vllm-cpu needs none"
            needs = f"{engine.count} x {engine.parallelism.ranks} GPUs"
            yield InputError("spec.engine", f"needs {needs}, the machine has {has}")
        yield from check_machine_memory(resource, site.memory_bytes)
        return
    cpus = [row.spec.engine.resources.cpu for row in each]
    if sum(quantity_value(cpu) for cpu in cpus if cpu is not None) > site.cpus:
        needs = _sum_up(cpu for cpu in cpus if cpu is not None)
        yield InputError("spec.engine.resources.cpu", f"needs {needs} CPUs, the machine has {site.cpus}")
    kv_bytes = [kv_cache_bytes(row, site.memory_bytes, ranks) or 0 for row in each]
    if sum(kv_bytes) * engine.parallelism.ranks > site.memory_bytes:
        needs = _sum_up(map(render_bytes, kv_bytes), engine.parallelism.ranks)
        has = f"{site.memory_bytes / 2**30:.1f}Gi"
        yield InputError("spec.engine.resources.kvCacheMemory", f"needs {needs}, the machine has {has}")


def _sum_up(rows: Iterable[str], times: int = 1) -> str:
    """Returns the needs of engines together, such as `2 x 4Gi + 1 x 8Gi`."""
    return " + ".join(f"{count * times} x {text}" for text, count in Counter(rows).items())


def _share(resource: MoEServing, site: LocalSite, index: int) -> Share:
    engine = resource.spec.engine
    ranks = engine.parallelism.ranks
    kv_bytes = kv_cache_bytes(resource, site.memory_bytes, engine.count * ranks)
    if engine.runtime is Runtime.VLLM:
        return Share(kv_cache_bytes=kv_bytes, gpus=site.gpus[index * ranks : (index + 1) * ranks])
    cpus = site.cpus // engine.count if engine.resources.cpu is None else int(quantity_value(engine.resources.cpu))
    return Share(threads=max(1, cpus // ranks), kv_cache_bytes=kv_bytes)


def _build_agent(resource: MoEServing, site: LocalSite, index: int, role: EngineRole) -> AgentConfig:
    name = f"{resource.metadata.name}-engine-{index}"
    agent_port, engine_port = site.ports[2 + 2 * index : 4 + 2 * index]
    transfer = None
    if resource.spec.engine.roles.apart:
        transfer = build_transfer(resource, role, site.ports[2 + 2 * resource.spec.engine.count + index])
    resource = at_role(resource, role)
    share = _share(resource, site, index)
    return AgentConfig(
        name=name,
        run_dir=site.state_dir / name,
        listen=Listen(host=site.host, port=agent_port),
        token_file=site.token_file,
        engine=build_engine(resource, host=site.host, port=engine_port, share=share, transfer=transfer),
        request=request_settings(resource.spec.scheduling.request, resource.spec.scheduling.engine),
        expert=expert_settings(resource.spec.scheduling.expert),
    )


def _build_gateway(resource: MoEServing, site: LocalSite, agents: tuple[AgentConfig, ...]) -> GatewayConfig:
    def folder_of(name: str) -> Path:
        return (site.secrets_dir or site.state_dir) / name

    return GatewayConfig(
        listen=Listen(host=site.host, port=resource.spec.gateway.port or site.ports[0]),
        admin=Listen(host=site.host, port=site.ports[1]),
        token_file=site.token_file,
        engines=tuple(_build_address(agent) for agent in agents),
        dispatch=engine_settings(resource.spec.scheduling.engine),
        request=request_settings(resource.spec.scheduling.request, resource.spec.scheduling.engine),
        limits=build_limits(resource),
        cors=build_cors(resource),
        tracing=build_tracing(resource),
        continuation=build_continuation(resource),
        tenant_header=resource.spec.gateway.tenant_header,
        auth=build_auth(resource, folder_of),
        tls=build_tls(resource, folder_of),
        disaggregation=build_disaggregation(resource),
        ui=resource.spec.gateway.ui.enabled,
    )


def _build_address(agent: AgentConfig) -> EngineAddress:
    return EngineAddress(
        name=agent.name,
        url=http_url(agent.engine.host, agent.engine.port),
        agent_url=http_url(agent.listen.host, agent.listen.port),
        ranks=agent.engine.data_parallel,
    )
