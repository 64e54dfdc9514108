"""Parts of the resource about pods: what a cluster adds to an engine or a gateway. One machine leaves them alone."""

from enum import StrEnum
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, Strict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from moe_operator.api.labels import ObjectMetadata
from moe_operator.api.object_names import ClassName, Name
from moe_operator.api.pod_template import METADATA_PARTS, find_mistakes
from moe_operator.api.section import Rule, Section
from moe_operator.api.units import CountOrPercent

Count = Annotated[int, Strict()]
Image = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$", max_length=1024)]


def _check_template(template: dict[str, Any]) -> dict[str, Any]:
    """The template without parts that are null, which mean nothing.

    Raises:
        ValidationError: one row for each problem.
    """
    if problems := [*find_mistakes(template)]:
        raise ValidationError.from_exception_data("podTemplate", [_details(*problem) for problem in problems])
    return {name: part for name, part in template.items() if part is not None}


def _details(place: tuple[str | int, ...], message: str) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError("value_error", "{error}", {"error": message}), loc=place, input=None
    )


PodTemplate = Annotated[
    dict[str, Any],
    Field(
        json_schema_extra={
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
            "properties": {
                "metadata": {
                    "type": "object",
                    "description": "Labels and annotations of the pods.",
                    "properties": {
                        part: {
                            "type": "object",
                            "description": f"Further {part} of the pods; the operator's own win.",
                            "additionalProperties": {"type": "string"},
                        }
                        for part in METADATA_PARTS
                    },
                },
                "spec": {
                    "type": "object",
                    "description": "Part of a PodSpec, as Kubernetes has it.",
                    "x-kubernetes-preserve-unknown-fields": True,
                },
            },
        }
    ),
    AfterValidator(_check_template),
]


class SecretKey(Section):
    """A key of a Secret in the resource's namespace. Only in a cluster; on one machine set the variable itself."""

    name: Name = Field(description="Name of the Secret.")
    key: Annotated[str, Field(pattern=r"^[.]?[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=253)] = Field(
        default="token", description="Key in the Secret."
    )


class ServiceType(StrEnum):
    """How clients reach the gateway's Service."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


class IpFamilyPolicy(StrEnum):
    """Address families of a Service."""

    SINGLE_STACK = "SingleStack"
    PREFER_DUAL_STACK = "PreferDualStack"
    REQUIRE_DUAL_STACK = "RequireDualStack"


class GatewayService(ObjectMetadata):
    """The Service of the gateway. Only in a cluster."""

    type: ServiceType = Field(default=ServiceType.CLUSTER_IP, description="Type of the Service.")
    port: Annotated[Count, Field(ge=1, le=65535)] = Field(default=80, description="Port of the Service.")
    load_balancer_class: ClassName | None = Field(
        default=None,
        description="Class of the load balancer, such as `service.k8s.aws/nlb`. Absent: the cluster's default. Only "
        "with the type `LoadBalancer`; Kubernetes does not let it change.",
    )
    ip_family_policy: IpFamilyPolicy | None = Field(
        default=None,
        description="Address families of the Service. Absent: IPv4 and IPv6 where the cluster has both; with the type "
        "`LoadBalancer` the cluster's first, for not every load balancer has two.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="loadBalancerClass",
            message="a class needs the type LoadBalancer",
            cel="self.type == 'LoadBalancer' || !has(self.loadBalancerClass)",
            holds=lambda service: service.type is ServiceType.LOAD_BALANCER or service.load_balancer_class is None,
        ),
    )


class Update(StrEnum):
    """How engines are replaced when a field changes that only a start can change."""

    SURGE = "surge"
    IN_PLACE = "inPlace"


class Canary(Section):
    """Two revisions side by side: a change of the engines makes new ones beside the old. Only in a cluster.

    Set `weight` to 100 or take the section away to let the new revision replace the old.
    """

    weight: Annotated[Count, Field(ge=0, le=100)] = Field(
        description="Part of the requests for the new revision (percent)."
    )
    replicas: Annotated[Count, Field(ge=1, le=256)] = Field(
        default=1, description="Engines of the new revision; with fixed roles of each role."
    )


class Disruption(Section):
    """What a drain of a node may take away at a time. Only in a cluster."""

    max_unavailable: Annotated[str, CountOrPercent(3)] = Field(
        default="1",
        description="Engines, and gateways, that may be away at a time: a number or a percentage such as `25%`.",
    )


class Prometheus(Section):
    """A Prometheus that scrapes this deployment."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=1024)] = Field(
        description="Its address; autoscaling then reads its signals there."
    )


class Metrics(ObjectMetadata):
    """Where metrics go; labels and annotations are those of the monitors. Only in a cluster."""

    service_monitor: Annotated[bool, Strict()] = Field(
        default=True,
        description="Make monitors of engines and gateway where the cluster has those kinds (Prometheus operator).",
    )
    prometheus: Prometheus | None = None
