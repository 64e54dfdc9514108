"""What `moeserving doctor` finds within a cluster by its pods, and of the options of engines."""

from typing import Any

import pytest
from moe_contract.api_server import ApiError, Document
from moe_operator.doctor.check import CheckState
from moe_operator.doctor.engine_options import check_options
from moe_operator.doctor.within import check_dns, check_images, check_prometheus
from test_doctor import FORBIDDEN, NOTE, OK, PROBLEM, condition, found, resource, running


def over(name: str, **changes: Any) -> Document:
    """A pod that was evicted and is still an object."""
    pod = running(name, ready=False, **changes)
    return pod | {"status": pod["status"] | {"phase": "Failed", "reason": "Evicted"}}


@pytest.mark.parametrize(
    ("pods", "state", "words"),
    [
        ([running("a"), running("b")], OK, "1 were pulled by nodes for 2 pods"),
        ([running("a"), running("b", waiting="ImagePullBackOff")], PROBLEM, "it:1 (ImagePullBackOff of b)"),
        ([running("a"), over("b", waiting="ImagePullBackOff")], OK, "1 were pulled by nodes for 1 pods"),
        ([running("a", waiting="ContainerCreating")], NOTE, "not known"),
        ([], NOTE, "no pod of ours has pulled one yet"),
        (FORBIDDEN, NOTE, "not known"),
    ],
)
def test_images_that_nodes_pulled(pods: list[Document] | ApiError, state: CheckState, words: str) -> None:
    found(check_images(pods), state, words)


@pytest.mark.parametrize(
    ("pods", "state", "words"),
    [
        ([running("a"), running("b")], OK, "2 of 2 pods are ready"),
        ([running("a"), running("b", ready=False)], NOTE, "1 of 2"),
        ([running("a"), over("b")], OK, "1 of 1 pods are ready"),
        ([over("b")], NOTE, "there are no pods of the usual one"),
        ([running("a", ready=False)], PROBLEM, "0 of 1"),
        ([], NOTE, "there are no pods of the usual one"),
        (FORBIDDEN, NOTE, "not known"),
    ],
)
def test_the_dns_of_the_cluster(pods: list[Document] | ApiError, state: CheckState, words: str) -> None:
    found(check_dns(pods), state, words)


@pytest.mark.parametrize(
    ("status", "message", "spec", "state", "words"),
    [
        ("False", "", {"autoscaling": {}}, OK, "the operator reads http://prometheus"),
        ("True", "the signals of Prometheus are missing", {"autoscaling": {}}, PROBLEM, "Prometheus are missing"),
        ("True", "more engines than maxReplicas", {"autoscaling": {}}, OK, "the operator reads"),
        ("False", "", {}, NOTE, "nothing reads"),
        ("False", "", {"autoscaling": {"mode": "external"}}, NOTE, "nothing reads"),
    ],
)
def test_a_prometheus_is_judged_by_whether_the_operator_reads_it(
    status: str, message: str, spec: Document, state: CheckState, words: str
) -> None:
    limited = condition("AutoscalingLimited", status, "NoSignal", message)
    row = resource(conditions=[limited], metrics={"prometheus": {"url": "http://prometheus:9090"}}, **spec)
    (check,) = check_prometheus([row])
    found(check, state, words)
    assert check_prometheus([resource()]) == []


OWN_IMAGE = {"image": "registry.test/own:1"}


@pytest.mark.parametrize(
    ("arguments", "changes", "state", "words"),
    [
        (["--max-model-len", "4096", "--max_num_seqs=8", "-tp", "2"], {}, OK, "2 in the resources here are known"),
        (["--compilation-config.level=3"], {}, OK, "1 in the resources"),
        (["--max-model-l=5"], {}, OK, "1 in the resources"),
        (["--max-model-length"], {}, PROBLEM, "tiny: engine.args: vLLM 0.32 and 0.33 do not know --max-model-length"),
        (["--max-model-length"], OWN_IMAGE, NOTE, "that of engine.image may"),
        (["--disable-mfu-metrics"], {}, NOTE, "vLLM 0.33 alone knows --disable-mfu-metrics"),
    ],
)
def test_the_options_of_engines_are_those_of_the_supported_versions(
    arguments: list[str], changes: Document, state: CheckState, words: str
) -> None:
    (check,) = check_options([resource(engine={"args": arguments} | changes)])
    found(check, state, words)
    assert ("did you mean --max-model-len" in check.advice) == ("--max-model-length" in arguments)


def test_options_of_roles_are_looked_at_too_and_resources_without_any_have_no_line() -> None:
    overrides = {"decode": {"args": ["--nonsense", "1"]}}
    checks = check_options([resource(engine={"args": ["--seed=1"], "roles": {"overrides": overrides}})])
    assert [check.state for check in checks] == [PROBLEM, OK]
    assert "engine.roles.overrides.decode.args" in checks[0].finding
    assert checks[1].finding.startswith("1 in the resources here")
    assert check_options([resource()]) == []
