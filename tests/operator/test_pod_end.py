"""How pods end: gateways have time to notice, and running streams have the time of the drain."""

import pytest
from moe_operator.api.resource import MoEServing
from moe_operator.api.units import duration_s
from moe_operator.plan.names import Names
from moe_operator.plan.pods import Defaults, build_engine_template, build_gateway_template

NAMES = Names("tiny")
# Until kube-proxy and gateways have taken a pod out that is about to end: the kubelet's word to the API server, the
# EndpointSlice controller's batching, and the watch, each well below a second on a cluster that is not overloaded.
NOTICED_S = 2


@pytest.fixture(params=["10s", "10m"])
def resource(request):
    spec = {"model": {"uri": "hf://org/tiny"}, "engine": {"drainTimeout": request.param}}
    head = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return MoEServing.model_validate(head | {"spec": spec})


@pytest.mark.parametrize("component", ["engine", "gateway"])
def test_a_pod_serves_on_until_its_end_is_known_and_then_has_the_time_of_the_drain(resource, component):
    if component == "gateway":
        template = build_gateway_template(resource, NAMES, Defaults())
    else:
        template = build_engine_template(resource, NAMES, Defaults(), "stable", "digest")
    (container,) = template["spec"]["containers"]
    notice_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert notice_s >= NOTICED_S
    drain_s = duration_s(resource.spec.engine.drain_timeout)
    assert template["spec"]["terminationGracePeriodSeconds"] > notice_s + drain_s


def test_a_gateway_that_drains_is_not_ready_and_lives(resource):
    """Readiness and life are different routes, so that nobody restarts what only ends its streams."""
    (container,) = build_gateway_template(resource, NAMES, Defaults())["spec"]["containers"]
    probes = {name: container[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")}
    assert probes == {"readinessProbe": "/readyz", "livenessProbe": "/healthz"}
