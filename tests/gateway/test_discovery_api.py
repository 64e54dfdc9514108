"""Discovery against a real API server, with the rights that the plan gives to gateways and no others."""

import asyncio
import json
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from cluster_api import ApiCluster
from cluster_binaries import locate
from moe_operator.plan.access import build_access
from moe_operator.plan.names import Names

from tests.gateway.fake_api import engine_slice
from tests.gateway.messages import OK, post, prompt
from tests.gateway.waiting import until

NAMES = Names("tiny")


@pytest.fixture
def host() -> str:
    """An address of this machine: the API takes no endpoint on loopback."""
    rows = [row for interface in psutil.net_if_addrs().values() for row in interface]
    return next(row.address for row in rows if row.family is socket.AF_INET and not row.address.startswith("127."))


@pytest.fixture
def kubeconfig(api_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of the gateways' own ServiceAccount, with its Role of the plan, as `KUBECONFIG`."""
    for row in build_access(NAMES):
        api_cluster.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(row))
    path = api_cluster.service_account_kubeconfig(namespace, NAMES.gateway)
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path


@pytest.fixture
def kubectl(api_cluster: ApiCluster, namespace: str):
    """kubectl in the test's namespace, beside the event loop."""

    async def run(*arguments: str, given: object = None) -> str:
        stdin = None if given is None else json.dumps(given)
        return await asyncio.to_thread(api_cluster.kubectl, *arguments, "-n", namespace, stdin=stdin)

    return run


@pytest.fixture
async def discover(serve, kubeconfig, namespace):
    """Starts a gateway that finds its engines in the test's namespace, and waits until it knows which there are."""
    groups = [{"service": NAMES.engine}]
    served = await serve(ready=False, discovery={"namespace": namespace, "groups": groups})
    await until(lambda: served.gateway.ready, "an answer of the API server")
    return served


async def test_changes_are_in_force_within_a_second_by_the_rights_of_the_plan(make_engine, host, kubectl, discover):
    one, two = await make_engine(host=host), await make_engine(host=host)

    async def apply(engine, **conditions):
        await kubectl("apply", "-f", "-", given=engine_slice(engine, NAMES.engine, **conditions))

    await apply(one, ready=True)
    await discover.takes(one)
    await apply(two, ready=False)
    await until(lambda: len(discover.gateway.dispatcher.engines) == 2)
    await discover.takes(one)
    await apply(two, ready=True)
    await discover.takes(one, two)
    await apply(one, ready=False, serving=True, terminating=True)
    await discover.takes(two)
    assert (await discover.ask(post(prompt()))).json == OK
    assert (len(one.requests), len(two.requests)) == (0, 1)
    await kubectl("delete", "endpointslice", f"slice-{one.name}", f"slice-{two.name}")
    await until(lambda: not discover.gateway.dispatcher.engines)


async def test_an_api_server_that_restarts_takes_no_engine_away_and_is_followed_again(
    make_engine, host, kubectl, api_cluster, discover
):
    one, two = await make_engine(host=host), await make_engine(host=host)
    await kubectl("apply", "-f", "-", given=engine_slice(one, NAMES.engine, ready=True))
    await discover.takes(one)
    await asyncio.to_thread(api_cluster.stop_api_server, kill=True)
    assert (await discover.ask(post(prompt()))).json == OK
    assert discover.gateway.ready
    # In this thread, because processes of the cluster end with the thread that started them.
    api_cluster.start_api_server()
    assert discover.accepting == {one.name}
    await kubectl("apply", "-f", "-", given=engine_slice(two, NAMES.engine, ready=True))
    await until(lambda: discover.accepting == {one.name, two.name})
    await kubectl("delete", "endpointslice", f"slice-{one.name}")
    await discover.takes(two)


@pytest.mark.parametrize(
    ("verb", "resource", "elsewhere", "allowed"),
    [
        ("list", "endpointslices", False, True),
        ("watch", "endpointslices", False, True),
        ("get", "endpointslices", False, False),
        ("list", "endpointslices", True, False),
        ("update", "endpointslices", False, False),
        ("get", "secrets", False, False),
        ("list", "pods", False, False),
        ("get", "moeservings", False, False),
    ],
)
def test_a_gateway_may_read_the_endpoints_of_its_namespace_and_nothing_else(
    kubeconfig, namespace, verb, resource, elsewhere, allowed
):
    where = "default" if elsewhere else namespace
    command = [locate("kubectl"), "--kubeconfig", kubeconfig, "auth", "can-i", verb, resource, "-n", where]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ("yes" if allowed else "no"), done.stderr
