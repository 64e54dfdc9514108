"""Section `spec.engine`: how many engines run, on what, and with which arguments of vLLM."""

from enum import StrEnum
from typing import Annotated, ClassVar

from moe_scheduling.engine.disaggregation import EngineRole
from pydantic import Field

from moe_operator.api.kv_offload import KvOffload
from moe_operator.api.pods import Canary, Image, PodTemplate, Update
from moe_operator.api.replica import CONNECTOR_RULE_CEL, ENV_RULE, Argument, EnvValue, Resources, configures_transfer
from moe_operator.api.roles import Roles
from moe_operator.api.section import Count, Flag, Rule, Section
from moe_operator.api.units import DurationBetween

# Memory of a pod: that of all engines, and that of a role for itself.
_MEMORIES = (
    ("self.resources.memory", ()),
    ("self.roles.overrides.prefill.resources.memory", ("self.roles.overrides",)),
    ("self.roles.overrides.decode.resources.memory", ("self.roles.overrides",)),
)


def _fits_cel(row: tuple[str, tuple[str, ...]]) -> str:
    memory, sections = row
    absent = " || ".join(f"!has({path})" for path in (*sections, memory))
    return f"({absent} || quantity(string(self.kvOffload.cpu)).isLessThan(quantity(string({memory}))))"


class Runtime(StrEnum):
    """Which build of vLLM runs."""

    VLLM = "vllm"
    VLLM_CPU = "vllm-cpu"


class Parallelism(Section):
    """The shape of one replica."""

    tensor: Annotated[Count, Field(ge=1, le=64)] = Field(
        default=1, description="Ranks over which each layer is split (tensor parallelism)."
    )
    data: Annotated[Count, Field(ge=1, le=512)] = Field(
        default=1,
        description="Data-parallel ranks, each with its own queue and KV cache; the gateway chooses among them. "
        "A replica takes `tensor` times `data` GPUs.",
    )
    expert: Flag = Field(
        default=False, description="Spread the experts over all ranks of the replica instead of splitting each of them."
    )
    nodes: Annotated[Count, Field(ge=1, le=64)] = Field(
        default=1,
        description="Nodes over which one replica is spread, the same number of ranks on each. Above 1 only in a "
        "cluster, where a LeaderWorkerSet makes the pods.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="expert",
            message="expert parallelism needs more than one rank: tensor or data above 1",
            cel="!self.expert || self.tensor * self.data > 1",
            holds=lambda shape: not shape.expert or shape.ranks > 1,
        ),
        Rule(
            field="nodes",
            message="the data-parallel ranks, or else the tensor-parallel ones, must divide by the nodes",
            cel="self.nodes == 1 || self.data % self.nodes == 0 || self.data == 1 && self.tensor % self.nodes == 0",
            holds=lambda shape: (
                shape.nodes == 1
                or shape.data % shape.nodes == 0
                or (shape.data == 1 and shape.tensor % shape.nodes == 0)
            ),
        ),
    )

    @property
    def ranks(self) -> int:
        """Ranks of one replica, each a process with a GPU of its own where there are GPUs."""
        return self.tensor * self.data


class Engine(Section):
    """The engines: replicas of one vLLM server."""

    runtime: Runtime = Field(
        default=Runtime.VLLM, description="Build of vLLM: `vllm` computes on GPUs, `vllm-cpu` on the CPU."
    )
    image: Image | None = Field(
        default=None, description="Image of the engine. Absent: the operator's for the runtime. Only in a cluster."
    )
    replicas: Annotated[Count, Field(ge=0, le=256)] = Field(
        default=1,
        description="Number of engines behind the gateway. With `autoscaling` in the mode `internal` the number to "
        "begin with. With fixed `roles` leave it out. 0 only in a cluster.",
    )
    roles: Roles = Roles()
    parallelism: Parallelism = Parallelism()
    resources: Resources = Resources()
    kv_offload: KvOffload | None = None
    args: Annotated[tuple[Argument, ...], Field(max_length=128)] = Field(
        default=(),
        description="Further arguments of vLLM's server, each a string, such as `--max-model-len=4096`. They win over "
        "the deployment's own.",
    )
    env: Annotated[dict[str, EnvValue], Field(max_length=128)] = Field(
        default={}, description="Environment variables of the engine. They win over the deployment's own."
    )
    startup_timeout: Annotated[str, DurationBetween("1s")] = Field(
        default="30m", description="Time for loading the model, after which an engine that is not ready is restarted."
    )
    liveness_timeout: Annotated[str, DurationBetween("1s")] = Field(
        default="1m", description="Time without an answer after which an engine counts as dead and is restarted."
    )
    drain_timeout: Annotated[str, DurationBetween("1s")] = Field(
        default="2m", description="Time that running streams have to end when an engine stops."
    )
    update: Update = Field(
        default=Update.SURGE,
        description="How a cluster replaces engines: `surge` starts a new one before an old one goes, `inPlace` first "
        "lets an old one go, for when there is no GPU to spare.",
    )
    canary: Canary | None = None
    pod_template: PodTemplate = Field(
        default={},
        description="Merged into the engines' pods (strategic merge, lists by name; the container is `engine`): node "
        "selectors, tolerations, volumes, runtime class, priority class, side cars. Only in a cluster.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="resources.cpu",
            message="CPUs are set for the runtime vllm-cpu alone",
            cel="self.runtime == 'vllm-cpu' || !has(self.resources.cpu)",
            holds=lambda engine: engine.runtime is Runtime.VLLM_CPU or engine.resources.cpu is None,
        ),
        Rule(
            field="roles.overrides",
            message="CPUs are set for the runtime vllm-cpu alone",
            cel="self.runtime == 'vllm-cpu' || !has(self.roles.overrides) || "
            "!has(self.roles.overrides.prefill.resources.cpu) && !has(self.roles.overrides.decode.resources.cpu)",
            holds=lambda engine: (
                engine.runtime is Runtime.VLLM_CPU
                or {engine.roles.override(role).resources.cpu for role in EngineRole} == {None}
            ),
        ),
        ENV_RULE,
        Rule(
            field="replicas",
            message="with fixed roles the engines are roles.prefill and roles.decode together; leave replicas out",
            cel="self.roles.mode != 'fixed' || self.replicas == 1 || !has(self.roles.prefill) || "
            "!has(self.roles.decode) || self.replicas == self.roles.prefill + self.roles.decode",
            holds=lambda engine: not engine.roles.is_fixed or engine.replicas in (1, engine.count),
        ),
        Rule(
            field="parallelism.nodes",
            message="an engine of several nodes takes part in no transfer yet; set roles.mode to unified or nodes to 1",
            cel="self.roles.mode == 'unified' || self.parallelism.nodes == 1",
            holds=lambda engine: not engine.roles.apart or engine.parallelism.nodes == 1,
        ),
        Rule(
            field="args",
            message="an own KV connector (--kv-transfer-config, --kv-offloading-*) is no argument beside roles or "
            "kvOffload; take it away, or kvOffload and set roles.mode to unified",
            cel=f"self.roles.mode == 'unified' && !has(self.kvOffload) || {CONNECTOR_RULE_CEL}",
            holds=lambda engine: (
                not (engine.roles.apart or engine.kv_offload is not None) or not configures_transfer(engine.args)
            ),
        ),
        Rule(
            field="kvOffload",
            message="vLLM offloads KV blocks of GPUs alone; set runtime to vllm or take kvOffload away",
            cel="self.runtime == 'vllm' || !has(self.kvOffload)",
            holds=lambda engine: engine.runtime is Runtime.VLLM or engine.kv_offload is None,
        ),
        Rule(
            field="kvOffload",
            message="offloaded blocks of a rank lie on one node; the data-parallel ranks must divide by the nodes",
            cel="!has(self.kvOffload) || self.parallelism.data % self.parallelism.nodes == 0",
            holds=lambda engine: engine.kv_offload is None or engine.parallelism.data % engine.parallelism.nodes == 0,
        ),
        Rule(
            field="kvOffload.cpu",
            message="it is a part of resources.memory, of each role's too, and has to be less",
            cel="!has(self.kvOffload) || " + " && ".join(map(_fits_cel, _MEMORIES)),
            holds=lambda engine: (
                engine.kv_offload is None
                or engine.kv_offload.fits(
                    (engine.resources.memory, *(engine.roles.override(role).resources.memory for role in EngineRole))
                )
            ),
        ),
    )

    @property
    def count(self) -> int:
        """Engines that the resource asks for, of all roles together."""
        return (self.roles.prefill or 0) + (self.roles.decode or 0) if self.roles.is_fixed else self.replicas
