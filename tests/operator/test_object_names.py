"""Names, keys and values of labels that no object of Kubernetes can have are refused by their path."""

from typing import Any

import pytest
from moe_contract.input_errors import InvalidInput
from moe_operator.api import parse_resource
from moe_operator.api.object_names import annotation_key_problem, is_object_name, key_problem, value_problem
from moe_operator.plan import Defaults, Observed, plan_cluster

Document = dict[str, Any]
KEY = "a key is up to 63 letters, digits, '.', '_' and '-', after a domain and '/' where it has one"
NAME = "the name of an object is small letters, digits, '-' and '.'"
LONG = "x" * 64


def problems(metadata: Document | None = None, **spec: Any) -> list[str]:
    """What is said of a resource with this metadata and these sections."""
    document = {
        "apiVersion": "moeserving.dev/v1alpha1",
        "kind": "MoEServing",
        "metadata": {"name": "tiny"} | (metadata or {}),
        "spec": {"model": {"uri": "hf://org/a"}} | spec,
    }
    try:
        plan_cluster(parse_resource(document), "ns", Observed(tokens=("t",)), Defaults())
    except InvalidInput as error:
        return [str(row) for row in error.errors]
    return []


def peer(**selector: Any) -> Document:
    return {"networkPolicy": {"allowFrom": [{"podSelector": selector}]}}


def block(**fields: Any) -> Document:
    return {"networkPolicy": {"allowFrom": [{"ipBlock": fields}]}}


def template(**metadata: Any) -> Document:
    return {"engine": {"podTemplate": {"metadata": metadata}}}


def model(**fields: Any) -> Document:
    return {"model": {"uri": "hf://org/a"} | fields}


FROM = "spec.networkPolicy.allowFrom[0]"
REFUSED: list[tuple[Document, str]] = [
    ({"metadata": {"labels": {"a b": "c"}}}, f"metadata.labels: {KEY}, got 'a b'"),
    ({"metadata": {"labels": {"a/b/c": "d"}}}, f"metadata.labels: {KEY}"),
    ({"metadata": {"labels": {"a": "b c"}}}, "metadata.labels.a: a value of a label is"),
    ({"metadata": {"labels": {"a": LONG}}}, "metadata.labels.a: at most 63 characters are taken"),
    ({"metadata": {"annotations": {"a b": "c"}}}, f"metadata.annotations: {KEY}"),
    ({"metadata": {"annotations": {"a": "b" * 300_000}}}, "metadata.annotations: at most 262144 bytes of annotations"),
    ({"metadata": {"namespace": "My_NS"}}, "metadata.namespace: the name of a namespace is up to 63 small letters"),
    ({"metadata": {"namespace": "a.b"}}, "metadata.namespace: the name of a namespace"),
    ({"metadata": {"name": "a.b"}}, "metadata.name: a name is up to 63 small letters"),
    (template(labels={"a b": "c"}), f"spec.engine.podTemplate.metadata.labels.a b: {KEY}"),
    (template(labels={"a": "b c"}), "spec.engine.podTemplate.metadata.labels.a: a value of a label"),
    (template(annotations={"": "c"}), f"spec.engine.podTemplate.metadata.annotations.'': {KEY}"),
    ({"commonMetadata": {"labels": {"a..b/c": "d"}}}, f"spec.commonMetadata.labels: {KEY}"),
    ({"commonMetadata": {"annotations": {"a-.b/c": "d"}}}, f"spec.commonMetadata.annotations: {KEY}"),
    (
        {"commonMetadata": {"annotations": {f"k{index}": "中" * 4096 for index in range(32)}}},
        "spec.commonMetadata.annotations: annotations of 393302 bytes are more than the 262144",
    ),
    (
        {"engine": {"env": {f"K{index}": "x" * 4096 for index in range(100)}}},
        "spec.engine: env, args and the annotations of podTemplate take",
    ),
    (peer(matchLabels={"a b": "c"}), f"{FROM}.podSelector.matchLabels: {KEY}"),
    (peer(matchLabels={"a": "b c"}), f"{FROM}.podSelector.matchLabels.a: a value of a label"),
    (
        peer(matchExpressions=[{"key": "a b", "operator": "Exists"}]),
        f"{FROM}.podSelector.matchExpressions[0].key: {KEY}",
    ),
    (
        peer(matchExpressions=[{"key": "a", "operator": "In"}]),
        f"{FROM}.podSelector.matchExpressions[0].values: values are needed for In and NotIn, and go with these alone",
    ),
    (
        peer(matchExpressions=[{"key": "a", "operator": "Exists", "values": ["b"]}]),
        f"{FROM}.podSelector.matchExpressions[0].values: values are needed",
    ),
    (block(cidr="10.0.0.0/8", **{"except": ["11.0.0.0/16"]}), f"{FROM}.ipBlock.except: each range that is left out"),
    (block(cidr="10.0.0.0/8", **{"except": ["10.0.0.0/8"]}), f"{FROM}.ipBlock.except: each range that is left out"),
    (block(cidr="10.0.0.0/8", **{"except": ["fd00::/64"]}), f"{FROM}.ipBlock.except: each range that is left out"),
    (model(tokenSecret={"name": "a..b"}), f"spec.model.tokenSecret.name: {NAME}"),
    (model(tokenSecret={"name": "a", "key": ".."}), "spec.model.tokenSecret.key: "),
    (model(cache={"path": "/c", "claim": "a-.b"}), f"spec.model.cache.claim: {NAME}"),
    (model(cache={"path": "/c", "size": "1Gi", "storageClass": "a..b"}), f"spec.model.cache.storageClass: {NAME}"),
    (model(uri="pvc://A_b/x"), "spec.model.uri: the name of a claim is needed, such as pvc://models/qwen3, got 'A_b'"),
    (
        {"engine": {"resources": {"gpuResource": "gpu"}}},
        "spec.engine.resources.gpuResource: a domain, '/' and up to 63",
    ),
    ({"engine": {"resources": {"gpuResource": "a..b/gpu"}}}, "spec.engine.resources.gpuResource: a domain"),
    (
        {"gateway": {"service": {"type": "LoadBalancer", "loadBalancerClass": "a..b/c"}}},
        "spec.gateway.service.loadBalancerClass: a class is up to 63 letters",
    ),
]
TAKEN: list[Document] = [
    {
        "metadata": {
            "labels": {"a.b/C_d": "", "x": "1.0-A"},
            "annotations": {"Example.COM/Note": "any text, {of} any kind"},
        }
    },
    {"metadata": {"namespace": ""}},
    template(labels={"a": "", "$patch": "replace"}, annotations={"A.b/C": "x y"}),
    {"commonMetadata": {"annotations": {f"k{index}": "x" * 4096 for index in range(32)}}},
    peer(matchLabels={"a.b/c": ""}, matchExpressions=[{"key": "a", "operator": "NotIn", "values": ["b", ""]}]),
    block(cidr="10.0.0.0/8", **{"except": ["10.1.0.0/16", "10.255.255.255/32"]}),
    block(cidr="fd00::/8", **{"except": ["fd00:1::/32"]}),
    model(cache={"path": "/c", "size": "1Gi", "storageClass": "fast.ssd-1"}),
]


@pytest.mark.parametrize(("change", "wanted"), REFUSED, ids=lambda part: part[:60] if isinstance(part, str) else "")
def test_what_no_object_can_have_is_named_by_its_path(change: Document, wanted: str) -> None:
    (found,) = problems(**change)
    assert found.startswith(wanted)


@pytest.mark.parametrize("change", TAKEN, ids=str)
def test_what_an_object_can_have_is_taken(change: Document) -> None:
    assert problems(**change) == []


def test_lengths_are_those_of_kubernetes() -> None:
    domain = ".".join(["d" * 63] * 3 + ["d" * 61])
    assert len(domain) == 253
    assert is_object_name(domain)
    assert not is_object_name(f"{domain}d")
    assert key_problem(f"{domain}/{'x' * 63}") == ""
    assert key_problem(f"{domain}d/x")
    assert key_problem(f"a/{LONG}")
    assert value_problem("x" * 63) == ""
    assert value_problem(LONG)
    assert annotation_key_problem("A.B/x") == ""
    assert key_problem("A.B/x")
