"""The MoEServing resource, `moeserving.dev/v1alpha1`: the one place of its fields, defaults, units and ranges.

The CRD and the reference table are generated from these models; the command line and the operator parse with them (see
`parse.py`). Each section has a module of its own. Every field reaches the agents, the gateway or vLLM.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from moe_operator.api.autoscaling import Autoscaling
from moe_operator.api.engine import Engine
from moe_operator.api.gateway import Gateway
from moe_operator.api.labels import CommonMetadata
from moe_operator.api.model import Model
from moe_operator.api.network import NetworkPolicySection
from moe_operator.api.object_names import LabelValue, Namespace, ServiceName, check_annotations, check_label_keys
from moe_operator.api.pods import Disruption, Metrics
from moe_operator.api.scheduling import Scheduling
from moe_operator.api.section import Flag, Rule, Section
from moe_operator.api.status import Status

API_VERSION = "moeserving.dev/v1alpha1"
KIND = "MoEServing"


class Spec(Section):
    """Desired state of a deployment."""

    model: Model
    engine: Engine = Engine()
    scheduling: Scheduling = Scheduling()
    gateway: Gateway = Gateway()
    autoscaling: Autoscaling | None = None
    metrics: Metrics = Metrics()
    network_policy: NetworkPolicySection = NetworkPolicySection()
    common_metadata: CommonMetadata = CommonMetadata()
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
        Rule(
            field="model.cache.accessMode",
            message="a replica of several nodes needs a cache that all of them can mount: ReadWriteMany",
            cel="self.engine.parallelism.nodes == 1 || !has(self.model.cache) || "
            "self.model.cache.accessMode == 'ReadWriteMany' || "
            "!has(self.model.cache.size) && !has(self.model.cache.claim)",
            holds=lambda spec: spec.engine.parallelism.nodes == 1 or not spec.model.keeps_one_node,
        ),
        Rule(
            field="autoscaling",
            message="fixed roles are scaled by autoscaling.roles, a range for each role, and no other engines are",
            cel="!has(self.autoscaling) || has(self.autoscaling.roles) == (self.engine.roles.mode == 'fixed')",
            holds=lambda spec: (
                spec.autoscaling is None or (spec.autoscaling.roles is not None) is spec.engine.roles.is_fixed
            ),
        ),
    )


class Metadata(Section):
    """The part of Kubernetes' object metadata that a person writes."""

    name: ServiceName = Field(
        description="Name of the deployment: lower-case letters, digits and hyphens, a letter first, at most 63."
    )
    namespace: Namespace | None = Field(
        default=None, description="Kubernetes namespace; without meaning on one machine."
    )
    labels: Annotated[dict[str, LabelValue], AfterValidator(check_label_keys)] = Field(
        default={}, description="Kubernetes labels."
    )
    annotations: Annotated[dict[str, str], AfterValidator(check_annotations)] = Field(
        default={}, description="Kubernetes annotations."
    )


class MoEServing(Section):
    """A Mixture-of-Experts model, served by vLLM engines behind one gateway."""

    api_version: Literal["moeserving.dev/v1alpha1"] = Field(description="Version of this form.")
    kind: Literal["MoEServing"] = Field(description="Kind of the object.")
    metadata: Metadata
    spec: Spec
    status: Status | None = None
