"""What one engine may use and its arguments: fields of `spec.engine`, which engines of a fixed role may override."""

import re
from collections.abc import Iterable
from typing import Annotated, ClassVar

from moe_contract.engine_process import KV_CACHE_OPTION, KV_TRANSFER_OPTION, RUN_DIR_VARIABLE
from pydantic import AfterValidator, Field

from moe_operator.api.object_names import ResourceName
from moe_operator.api.pods import PodTemplate
from moe_operator.api.section import Rule, Section
from moe_operator.api.units import QuantityBetween

Cpu = Annotated[str, QuantityBetween("100m", "1k", "2 or 500m")]
Memory = Annotated[str, QuantityBetween("64Mi", "100Ti", "64Gi")]
SharedMemory = Annotated[str, QuantityBetween("64Mi", "1Ti", "8Gi")]
KvCacheMemory = Annotated[str, QuantityBetween("1Mi", "1Ti", "4Gi")]
EnvValue = Annotated[str, Field(pattern=r"^[^\x00]*$", max_length=4096)]


class Resources(Section):
    """What one replica may use."""

    cpu: Cpu | None = Field(
        default=None,
        description="CPUs of one replica: the OpenMP threads of all its ranks together, rounded down, at least one "
        "each. Absent: the machine's CPUs divided by the replicas; in a cluster as many threads as the container may "
        "use CPUs, and no request. Only with the runtime `vllm-cpu`.",
    )
    memory: Memory | None = Field(
        default=None,
        description="Memory of one pod of a replica, as request and limit (bytes). Absent: neither. Only in a cluster.",
    )
    gpu_resource: ResourceName = Field(
        default="nvidia.com/gpu",
        description="Name by which the cluster knows a GPU; with `vllm` each rank asks for one. Only in a cluster.",
    )
    shared_memory: SharedMemory = Field(
        default="8Gi", description="Most memory that /dev/shm of a pod may take (bytes). Only in a cluster."
    )
    kv_cache_memory: KvCacheMemory | None = Field(
        default=None,
        description="Memory of the KV cache of one rank (bytes). Absent: with `vllm` what vLLM finds free on the GPU, "
        "with `vllm-cpu` a quarter of the machine's memory divided by all ranks of all replicas, in a cluster a "
        "quarter of `memory` divided by the ranks of the pod, or 1 GiB where that is absent.",
    )


class RoleResources(Section):
    """What one engine of a role may use, where that differs from `engine.resources`."""

    cpu: Cpu | None = Field(default=None, description="As `engine.resources.cpu`. Absent: the same.")
    memory: Memory | None = Field(default=None, description="As `engine.resources.memory`. Absent: the same.")
    gpu_resource: ResourceName | None = Field(
        default=None, description="As `engine.resources.gpuResource`, for GPUs of another kind. Absent: the same."
    )
    shared_memory: SharedMemory | None = Field(
        default=None, description="As `engine.resources.sharedMemory`. Absent: the same."
    )
    kv_cache_memory: KvCacheMemory | None = Field(
        default=None, description="As `engine.resources.kvCacheMemory`. Absent: the same."
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
ENV_RULE = Rule(
    field="env",
    message=f"a variable's name is letters, digits and underscores, not a digit first, and not {OWNED_ENV}",
    cel=f"self.env.all(name, name.matches('{ENV_NAME_PATTERN}') && name != '{OWNED_ENV}')",
    holds=lambda engine: all(re.match(ENV_NAME_PATTERN, name) and name != OWNED_ENV for name in engine.env),
)
CONNECTOR_RULE_CEL = f"!self.args.exists(text, text.replace('_', '-').matches('^({'|'.join(_CONNECTOR_OPTIONS)})'))"


def configures_transfer(args: Iterable[str]) -> bool:
    """Whether one of the arguments sets a KV connector of its own."""
    return any(argument.replace("_", "-").startswith(_CONNECTOR_OPTIONS) for argument in args)


class RoleOverride(Section):
    """The fields of `engine` that engines of one fixed role have for themselves; they are laid over those of all."""

    resources: RoleResources = RoleResources()
    args: Annotated[tuple[Argument, ...], Field(max_length=32)] = Field(
        default=(),
        description="Arguments of vLLM's server after those of `engine.args`; of an option given twice these count.",
    )
    env: Annotated[dict[str, EnvValue], Field(max_length=32)] = Field(
        default={}, description="Environment variables beside and over those of `engine.env`."
    )
    pod_template: PodTemplate = Field(
        default={}, description="Merged into the pods of the role, after `engine.podTemplate`. Only in a cluster."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        ENV_RULE,
        Rule(
            field="args",
            message="an own KV connector (--kv-transfer-config, --kv-offloading-*) is no argument beside roles",
            cel=CONNECTOR_RULE_CEL,
            holds=lambda override: not configures_transfer(override.args),
        ),
    )


class RoleOverrides(Section):
    """Resources and arguments of their own for the engines of fixed roles."""

    prefill: RoleOverride = RoleOverride()
    decode: RoleOverride = RoleOverride()
