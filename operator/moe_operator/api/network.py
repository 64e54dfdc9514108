"""Section `spec.networkPolicy`: who may reach the pods of engines and gateways. Only in a cluster."""

from enum import StrEnum
from ipaddress import ip_network
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from moe_operator.api.object_names import LABEL_KEYS_RULE, LabelKey, LabelValue, check_label_keys
from moe_operator.api.section import Count, Flag, Rule, Section


class SelectorOperator(StrEnum):
    """How a label's value is compared."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


class LabelRequirement(Section):
    """A condition on one label."""

    key: LabelKey = Field(description="Key of the label.")
    operator: SelectorOperator = Field(description="How its value is compared.")
    values: Annotated[tuple[LabelValue, ...], Field(max_length=32)] = Field(
        default=(), description="Values for `In` and `NotIn`."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="values",
            message="values are needed for In and NotIn, and go with these alone",
            cel="(self.operator in ['In', 'NotIn']) == (has(self.values) && self.values.size() > 0)",
            holds=lambda row: (row.operator in (SelectorOperator.IN, SelectorOperator.NOT_IN)) == bool(row.values),
        ),
    )


class LabelSelector(Section):
    """Conditions on labels, all of which must hold; without any everything is selected."""

    match_labels: Annotated[
        dict[str, LabelValue],
        Field(
            max_length=32,
            json_schema_extra={"x-kubernetes-validations": [LABEL_KEYS_RULE]},
        ),
        AfterValidator(check_label_keys),
    ] = Field(default={}, description="Labels and the values that they must have.")
    match_expressions: Annotated[tuple[LabelRequirement, ...], Field(max_length=16)] = Field(
        default=(), description="Further conditions."
    )


def _check_cidr(text: str) -> str:
    try:
        ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"a range such as 10.0.0.0/8 or fd00::/8 is needed, got {text!r:.80}") from None
    return text


Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$", max_length=49), AfterValidator(_check_cidr)]


def _is_within(part: str, whole: str) -> bool:
    inner, outer = ip_network(part, strict=False), ip_network(whole, strict=False)
    is_smaller = inner.version == outer.version and inner.prefixlen > outer.prefixlen
    return is_smaller and inner.supernet(new_prefix=outer.prefixlen) == outer


class IpBlock(Section):
    """A range of IP addresses."""

    cidr: Cidr = Field(description="The range, of IPv4 or IPv6.")
    excepted: Annotated[tuple[Cidr, ...], Field(max_length=32)] = Field(
        default=(), alias="except", description="Ranges within it that are left out."
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="except",
            message="each range that is left out has to lie in the range of cidr, and to be smaller",
            cel="!has(self.except) || self.except.all(part, isCIDR(part) && isCIDR(self.cidr) && "
            "cidr(self.cidr).containsCIDR(cidr(part)) && "
            "cidr(part).prefixLength() > cidr(self.cidr).prefixLength())",
            holds=lambda block: all(_is_within(part, block.cidr) for part in block.excepted),
        ),
    )


class NetworkPeer(Section):
    """Who may come in, as in a Kubernetes NetworkPolicy: pods by labels, of this namespace or others, or addresses."""

    pod_selector: LabelSelector | None = Field(
        default=None, description="Pods by labels; of the resource's namespace unless `namespaceSelector` is there."
    )
    namespace_selector: LabelSelector | None = Field(default=None, description="Namespaces by labels; `{}` is all.")
    ip_block: IpBlock | None = Field(default=None, description="Addresses instead.")

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            field="podSelector",
            message="a podSelector, a namespaceSelector or both are needed, or an ipBlock alone",
            cel="has(self.ipBlock) != (has(self.podSelector) || has(self.namespaceSelector))",
            holds=lambda peer: (
                (peer.ip_block is not None) != (peer.pod_selector is not None or peer.namespace_selector is not None)
            ),
        ),
    )

    def document(self) -> dict[str, Any]:
        """The peer as a NetworkPolicy has it; an empty selector stays."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)


Peers = Annotated[tuple[NetworkPeer, ...], Field(max_length=32)]


class NetworkPolicySection(Section):
    """Who may reach the pods of engines and gateways. Only in a cluster.

    By default vLLM's port is open to gateways alone, the agent's and the gateway's admin port also to the operator and
    to scrapers, the gateway's port for clients to everyone.
    """

    enabled: Flag = Field(
        default=True,
        description="Make NetworkPolicies. False: none, for a cluster whose administrators write their own.",
    )
    allow_from: Peers = Field(
        default=(), description="Who else may reach every port of engines and gateways, as in a NetworkPolicy's `from`."
    )
    metrics_from: Peers | None = Field(
        default=None,
        description="Who may scrape metrics. Absent: pods with the label `app.kubernetes.io/name: prometheus` in any "
        "namespace, where `metrics.serviceMonitor` is true.",
    )
    mesh_port: Annotated[Count, Field(ge=1, le=65535)] | None = Field(
        default=None,
        description="Port of a service mesh's tunnel into the pods, 15008 with Istio's ambient mode. Who may reach a "
        "pod at one port may reach it there, and then the mesh's own policies say which ports are behind it. Absent: "
        "no such port.",
    )
