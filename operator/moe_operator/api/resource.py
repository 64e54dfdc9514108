"""The MoEServing resource, `moeserving.dev/v1alpha1`: the one place of its fields, defaults, units and ranges.

The CRD and the reference table are generated from these models; the command line and the operator parse with them (see
`parse.py`). Every field reaches the agents, the gateway or vLLM.
"""

import re
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from moe_contract.tenancy import DEFAULT_HEADER, HEADER_PATTERN, check_tenant_header
from pydantic import AfterValidator, Field, Strict

from moe_operator.api.autoscaling import Autoscaling
from moe_operator.api.pods import (
    Canary,
    Disruption,
    GatewayService,
    Image,
    Metrics,
    Name,
    PodTemplate,
    SecretKey,
    Update,
)
from moe_operator.api.scheduling import Scheduling
from moe_operator.api.section import Rule, Section
from moe_operator.api.status import Status
from moe_operator.api.units import DurationBetween, QuantityBetween

API_VERSION = "moeserving.dev/v1alpha1"
KIND = "MoEServing"
URI_SCHEMES = ("file", "hf", "pvc", "s3")

Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]


# What the claim of a volume was made with, Kubernetes does not change.
IMMUTABLE = Field(
    json_schema_extra={"x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "cannot change"}]}
)

_URI_PATTERN = f"^({'|'.join(URI_SCHEMES)})://[^\\x00-\\x1f]+$"


def _check_uri(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in URI_SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(URI_SCHEMES)}")
    if not re.fullmatch(_URI_PATTERN, uri):
        raise ValueError(f"a URI such as hf://org/name, file:///folder or s3://bucket/folder is needed, got {uri!r}")
    return uri


class AccessMode(StrEnum):
    """From where a volume can be written."""

    READ_WRITE_MANY = "ReadWriteMany"
    READ_WRITE_ONCE = "ReadWriteOnce"


class Cache(Section):
    """Where downloads from the hub are kept. Absent: the hub's own default folder. Only with `hf://`."""

    path: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=1024)] = Field(
        description="Absolute folder for downloads from the hub. It is passed on as HF_HUB_CACHE."
    )
    size: Annotated[str, QuantityBetween("1Mi", "100Ti", "200Gi")] | None = Field(
        default=None,
        description="Size of a PersistentVolumeClaim that the operator makes for it and all engines share. Only in a "
        "cluster; it can grow where the storage class allows it.",
    )
    storage_class: Annotated[Name, IMMUTABLE] | None = Field(
        default=None, description="Storage class of that claim. Absent: the cluster's default. It cannot change."
    )
    access_mode: Annotated[AccessMode, IMMUTABLE] = Field(
        default=AccessMode.READ_WRITE_MANY,
        description="Access mode of that claim; `ReadWriteOnce` keeps all engines on one node. It cannot change.",
    )
    claim: Name | None = Field(
        default=None, description="A PersistentVolumeClaim that exists already, instead. Only in a cluster."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="claim",
            message="either a claim that exists or the size of a new one",
            cel="!has(self.claim) || !has(self.size)",
            holds=lambda cache: cache.claim is None or cache.size is None,
        ),
        Rule(
            field="storageClass",
            message="a storage class needs the size of the new claim",
            cel="!has(self.storageClass) || has(self.size)",
            holds=lambda cache: cache.storage_class is None or cache.size is not None,
        ),
    )


class Model(Section):
    """What is served."""

    uri: Annotated[
        str, Field(max_length=1024, json_schema_extra={"pattern": _URI_PATTERN}), AfterValidator(_check_uri)
    ] = Field(
        description="Where the weights are: `hf://org/name` on the hub, `file:///folder` on this machine (a relative "
        "`file://folder` is resolved against the folder of the YAML file; in a cluster a folder in the container), "
        "`pvc://claim/folder` on a PersistentVolumeClaim (only in a cluster), or `s3://bucket/folder`, which vLLM "
        "streams with the package runai-model-streamer."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=253)] | None = Field(
        default=None, description="Name that clients put into `model`. Absent: the last part of the URI."
    )
    revision: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. Absent: the hub's default branch. Only with `hf://`.",
    )
    token_secret: SecretKey | None = None
    cache: Cache | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="revision",
            message="a revision needs a uri that starts with hf://",
            cel="!has(self.revision) || self.uri.startsWith('hf://')",
            holds=lambda model: model.revision is None or model.uri.startswith("hf://"),
        ),
        Rule(
            field="cache",
            message="a cache needs a uri that starts with hf://",
            cel="!has(self.cache) || self.uri.startsWith('hf://')",
            holds=lambda model: model.cache is None or model.uri.startswith("hf://"),
        ),
        Rule(
            field="tokenSecret",
            message="a token needs a uri that starts with hf://",
            cel="!has(self.tokenSecret) || self.uri.startsWith('hf://')",
            holds=lambda model: model.token_secret is None or model.uri.startswith("hf://"),
        ),
    )

    @property
    def served_name(self) -> str:
        """Name that clients use."""
        return self.name or self.uri.rstrip("/").rsplit("/", 1)[-1]


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
# takes the last, so one of these in `args` would make the engine differ from what the rest of the deployment believes.
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
    "-ep": "spec.engine.parallelism.expert",
    "--enable-eplb": "spec.engine.parallelism.expert",
    "--no-enable-eplb": "spec.engine.parallelism.expert",
    "--eplb-config": "spec.scheduling.expert",
    "--kv-cache-memory-bytes": "spec.engine.resources.kvCacheMemory",
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
ENV_NAME_PATTERN = "^[A-Za-z_][A-Za-z0-9_]*$"
OWNED_ENV = "MOESERVING_RUN_DIR"


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
        "begin with. 0 only in a cluster.",
    )
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
    )


class GatewayLimits(Section):
    """What one client may cost."""

    max_body: Annotated[str, QuantityBetween("1Ki", "1Gi", "32Mi")] = Field(
        default="32Mi", description="Largest body of a request (bytes); a larger one is refused with status 413."
    )
    header_timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="10s", description="Time for the head of a request to arrive."
    )
    body_timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="30s", description="Time for the body of a request to arrive."
    )
    connect_timeout: Annotated[str, DurationBetween("10ms")] = Field(
        default="2s", description="Time for a connection to an engine to open."
    )
    idle_timeout: Annotated[str, DurationBetween("1s")] = Field(
        default="5m",
        description="Longest silence of an engine or client within a request; a stream's length has no bound.",
    )


class GatewayHold(Section):
    """The queue of requests that wait in the gateway while all engines are saturated or none accepts."""

    requests: Annotated[Count, Field(ge=0, le=1_000_000)] = Field(
        default=1000, description="Most requests held (requests); one more is refused with status 429."
    )
    timeout: Annotated[str, DurationBetween("100ms")] = Field(
        default="1m", description="Longest time that a request is held before it is refused."
    )


class Gateway(Section):
    """The way in for clients."""

    port: Annotated[Count, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port for clients on one machine. Absent: a free one is chosen and shown. A cluster has `service`.",
    )
    replicas: Annotated[Count, Field(ge=1, le=64)] = Field(
        default=1, description="Number of gateways, which share the load. One machine has one."
    )
    image: Image | None = Field(
        default=None, description="Image of the gateway. Absent: the operator's. Only in a cluster."
    )
    service: GatewayService = GatewayService()
    pod_template: PodTemplate = Field(
        default={},
        description="Merged into the gateways' pods (strategic merge; the container is `gateway`). Only in a cluster.",
    )
    tenant_header: Annotated[str, Field(pattern=HEADER_PATTERN), AfterValidator(check_tenant_header)] = Field(
        default=DEFAULT_HEADER,
        description="Header, in lower case, that names the tenant of a request, for `fairnessHorizon`; whoever stands "
        "before the gateway should set it. Not one that the gateway writes itself, such as `host` and `x-request-id`. "
        "Empty: all requests are of one tenant.",
    )
    limits: GatewayLimits = GatewayLimits()
    hold: GatewayHold = GatewayHold()


class Spec(Section):
    """What should run."""

    model: Model
    engine: Engine = Engine()
    scheduling: Scheduling = Scheduling()
    gateway: Gateway = Gateway()
    autoscaling: Autoscaling | None = None
    metrics: Metrics = Metrics()
    disruption: Disruption = Disruption()
    paused: Flag = Field(
        default=False, description="The operator leaves everything as it is. One machine takes no notice."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="scheduling.expert.redundantExperts",
            message="copies of experts need engine.parallelism.expert",
            cel="self.scheduling.expert.redundantExperts == 0 || self.engine.parallelism.expert",
            holds=lambda spec: spec.scheduling.expert.redundant_experts == 0 or spec.engine.parallelism.expert,
        ),
    )


class Metadata(Section):
    """The part of Kubernetes' object metadata that a person writes."""

    name: Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$", max_length=63)] = Field(
        description="Name of the deployment: lower-case letters, digits and hyphens, a letter first, at most 63."
    )
    namespace: str | None = Field(default=None, description="Kubernetes namespace; without meaning on one machine.")
    labels: dict[str, str] = Field(default={}, description="Kubernetes labels.")
    annotations: dict[str, str] = Field(default={}, description="Kubernetes annotations.")


class MoEServing(Section):
    """A Mixture-of-Experts model, served by vLLM engines behind one gateway."""

    api_version: Literal["moeserving.dev/v1alpha1"] = Field(description="Version of this form.")
    kind: Literal["MoEServing"] = Field(description="Kind of the object.")
    metadata: Metadata
    spec: Spec
    status: Status | None = None
