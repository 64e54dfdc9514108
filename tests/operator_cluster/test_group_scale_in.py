"""Scale-in of engines over several nodes: the groups that go end their streams first, and the set gets smaller then."""

import base64
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web
from cluster_api import ApiCluster
from fresh_operator import fetch
from group_world import SET, World, is_complete, world
from moe_contract.routes import DRAIN, STATE
from moe_operator.kubernetes import reconciler
from moe_operator.kubernetes.group_scale_in import GroupChanges, GroupDrains
from moe_operator.kubernetes.kinds import LEADER_WORKER_SET, SECRET
from moe_operator.kubernetes.peers import find_peers
from moe_operator.kubernetes.store import Store
from serving_documents import serving

Document = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Agents:
    """The agents of engines, and the gateways, at the pods' loopback addresses; `phases` is by the uid of the pod."""

    world: World
    phases: dict[str, str] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    refuses: bool = False
    port: int = 0

    async def pod(self, request: web.Request) -> Document:
        assert request.transport is not None
        address = request.transport.get_extra_info("sockname")[0]
        pods = (await self.world.namespace.pods()).values()
        return next(pod for pod in pods if pod.get("status", {}).get("podIP") == address)

    async def get_state(self, request: web.Request) -> web.Response:
        metadata = (await self.pod(request))["metadata"]
        phase = self.phases.get(metadata["uid"], "ready")
        pod = {"name": metadata["name"], "uid": metadata["uid"]}
        # A gateway's answer, too: it has engines to send to.
        state = {"phase": phase, "accepting": phase == "ready", "engine": {"restarts": 0}, "ranks": [], "held": 0}
        return web.json_response(state | {"config": {}, "pod": pod})

    async def post_drain(self, request: web.Request) -> web.Response:
        if self.refuses:
            return web.json_response({"errors": []}, status=404)
        uid = (await self.pod(request))["metadata"]["uid"]
        self.tokens.append(request.headers["Authorization"])
        self.phases[uid] = "draining"
        return web.json_response({"phase": "draining", "accepting": False}, status=202)

    async def drained(self) -> list[str]:
        """The pods whose agents drain or have."""
        return sorted(
            n for n, pod in (await self.world.namespace.pods()).items() if pod["metadata"]["uid"] in self.phases
        )

    def stop_all(self) -> None:
        """The streams of all engines that drain end."""
        self.phases = dict.fromkeys(self.phases, "stopped")

    async def stop(self, name: str) -> None:
        """The streams of an engine end."""
        uid = (await self.world.namespace.pods())[name]["metadata"]["uid"]
        assert self.phases[uid] == "draining"
        self.phases[uid] = "stopped"


@contextlib.asynccontextmanager
async def with_agents(made: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agents]:
    agents = Agents(world=made)
    app = web.Application()
    app.router.add_get(STATE, agents.get_state)
    app.router.add_post(DRAIN, agents.post_drain)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with socket.create_server(("0.0.0.0", 0)) as listener:
        agents.port = listener.getsockname()[1]
        await web.SockSite(runner, listener).start()

        def peers(pods: Any) -> list[Any]:
            return [replace(one, url=f"{one.url.rpartition(':')[0]}:{agents.port}") for one in find_peers(pods)]

        monkeypatch.setattr(reconciler, "find_peers", peers)
        try:
            yield agents
        finally:
            await runner.cleanup()


async def replicas(made: World) -> int:
    return int((await fetch(made.operator, LEADER_WORKER_SET, made.key, SET))["spec"]["replicas"])


def scale(made: World, cluster: ApiCluster, count: int) -> None:
    """As `kubectl scale` or an autoscaler does that points to the set itself."""
    patch = json.dumps({"spec": {"replicas": count}})
    kind = f"{LEADER_WORKER_SET.plural}.{LEADER_WORKER_SET.group}"
    cluster.kubectl("patch", kind, SET, "-n", made.namespace.name, "--type=merge", "-p", patch)


async def leaders(made: World) -> list[str]:
    return sorted(name for name in await made.namespace.pods() if name.startswith(SET) and name.count("-") == 2)


async def test_groups_that_go_end_their_streams_before_the_set_gets_smaller(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=3) as made, with_agents(made, monkeypatch) as agents:
        await made.change(engine={"replicas": 1})
        await made.rounds(4)
        assert await agents.drained() == ["tiny-engine-1", "tiny-engine-2"]
        assert await replicas(made) == 3, "none goes while it has streams"
        assert (await made.status())["desiredReplicas"] == 1
        assert await made.verdict("Progressing") == ("True", "Updating")
        token = (await fetch(made.operator, SECRET, made.key, "tiny-control"))["data"]["token"]
        bearer = f"Bearer {base64.b64decode(token).decode().strip()}"
        assert agents.tokens == [bearer, bearer], "each is asked once"
        await agents.stop("tiny-engine-2")
        await made.rounds(2)
        assert await leaders(made) == ["tiny-engine-0", "tiny-engine-1"]
        await agents.stop("tiny-engine-1")
        await made.until(is_complete, "it is scaled in")
        assert await leaders(made) == ["tiny-engine-0"]
        live = await fetch(made.operator, LEADER_WORKER_SET, made.key, SET)
        assert "moeserving.dev/scale-in" not in live["metadata"]["annotations"]


async def test_groups_that_are_wanted_again_while_they_drain_are_made_anew(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made, with_agents(made, monkeypatch) as agents:
        before = (await made.namespace.pods())["tiny-engine-1"]["metadata"]["uid"]
        await made.change(engine={"replicas": 1})
        await made.rounds(2)
        await made.change(engine={"replicas": 2})
        await made.rounds(2)
        assert (await made.namespace.pods())["tiny-engine-1"]["metadata"]["uid"] == before, "its streams go on"
        await agents.stop("tiny-engine-1")
        await made.until(is_complete, "two engines serve")
        assert await leaders(made) == ["tiny-engine-0", "tiny-engine-1"]
        assert (await made.namespace.pods())["tiny-engine-1"]["metadata"]["uid"] != before


async def test_groups_that_cannot_be_asked_are_not_waited_for(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made, with_agents(made, monkeypatch) as agents:
        agents.refuses = True
        await made.change(engine={"replicas": 1})
        await made.until(is_complete, "it is scaled in")
        assert await leaders(made) == ["tiny-engine-0"]


async def test_a_resource_that_is_not_valid_drains_nothing(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=3) as made, with_agents(made, monkeypatch) as agents:
        uri = serving()["spec"]["model"]["uri"]
        await made.change(engine={"replicas": 1}, model={"uri": "file://relative/path"})
        await made.rounds(3)
        assert await made.verdict("Degraded") == ("True", "InvalidSpec")
        assert await agents.drained() == []
        await made.change(engine={"replicas": 3}, model={"uri": uri})
        await made.until(is_complete, "it is mended")
        assert await leaders(made) == ["tiny-engine-0", "tiny-engine-1", "tiny-engine-2"]


async def test_groups_that_drained_without_a_word_in_the_set_are_made_anew(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made, with_agents(made, monkeypatch) as agents:
        before = await made.namespace.pods()
        agents.phases[before["tiny-engine-0"]["metadata"]["uid"]] = "draining"
        await made.rounds(2)
        assert await made.verdict("Progressing") == ("True", "Updating")
        agents.stop_all()
        await made.round()
        await made.until(is_complete, "both serve")
        after = await made.namespace.pods()
        assert after["tiny-engine-0"]["metadata"]["uid"] != before["tiny-engine-0"]["metadata"]["uid"]
        assert after["tiny-engine-1"]["metadata"]["uid"] == before["tiny-engine-1"]["metadata"]["uid"]


async def test_a_set_that_another_manager_has_scaled_is_scaled_in_to_the_resources_new_number(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=2) as made, with_agents(made, monkeypatch) as agents:
        scale(made, serving_cluster, 3)
        await made.round()
        await made.until(is_complete, "3 serve")
        await made.change(engine={"replicas": 1})
        await made.rounds(4)
        assert (await replicas(made), await agents.drained()) == (3, ["tiny-engine-1", "tiny-engine-2"])
        agents.stop_all()
        await made.until(is_complete, "it is scaled in")
        assert await leaders(made) == ["tiny-engine-0"]
        scale(made, serving_cluster, 2)
        await made.round()
        await made.until(is_complete, "2 serve")
        assert await leaders(made) == ["tiny-engine-0", "tiny-engine-1"], "a later number of the other one counts"


async def test_groups_that_another_manager_wants_again_while_they_drain_are_made_anew(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=3) as made, with_agents(made, monkeypatch) as agents:
        await made.change(engine={"replicas": 1})
        await made.rounds(2)
        assert await agents.drained() == ["tiny-engine-1", "tiny-engine-2"]
        scale(made, serving_cluster, 4)
        await made.round()
        agents.stop_all()
        await made.round()
        await made.until(is_complete, "4 serve")
        assert (await replicas(made), await agents.drained()) == (4, [])


async def test_a_rollout_and_a_scale_in_at_once_come_to_an_end(
    serving_cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(serving_cluster, namespace, replicas=3) as made, with_agents(made, monkeypatch) as agents:
        await made.change(engine={"replicas": 1, "args": ["--seed=2"]})

        def holds(status: Document) -> bool:
            agents.stop_all()
            return is_complete(status)

        await made.round()
        await made.until(holds, "the new revision serves")
        assert (await leaders(made), await agents.drained()) == (["tiny-engine-0"], [])


async def test_a_leader_that_has_come_meanwhile_is_not_taken_for_the_one_that_has_drained(
    serving_cluster: ApiCluster, namespace: str
) -> None:
    async with world(serving_cluster, namespace, replicas=1) as made:
        leader = (await made.namespace.pods())["tiny-engine-0"]
        earlier = leader | {"metadata": leader["metadata"] | {"uid": "00000000-0000-0000-0000-000000000000"}}
        drains = GroupDrains(made.operator.api, Store())
        await drains.carry_out(made.key, GroupChanges(leaders={0: earlier}, ended=(0,)), [], [])
        assert "deletionTimestamp" not in (await made.namespace.pods())["tiny-engine-0"]["metadata"]
        await drains.carry_out(made.key, GroupChanges(leaders={0: leader}, ended=(0,)), [], [])
        found = (await made.namespace.pods()).get("tiny-engine-0")
        assert found is None or "deletionTimestamp" in found["metadata"]
