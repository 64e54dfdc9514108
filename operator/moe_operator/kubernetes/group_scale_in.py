"""Scale-in of engines over several nodes: the groups that have to go end their streams before the set is made smaller.

A LeaderWorkerSet takes the groups with the highest numbers, whatever they carry. So their agents are asked to drain
(`POST /v1/drain`), and the set keeps its size until the engines have ended, for `engine.drainTimeout` at most: that is
the agents' own limit. A group whose agent does not answer is not waited for; its drain comes with the end of its pod.

A pass plans first, applies the plan, and asks last: a resource that is not valid or is refused drains nothing. The
number that should stay is in an annotation of the set before the first agent is asked.

A drained engine does not serve again. A group that stays and has drained, whoever asked it to, is made anew: once its
engine has ended, its leader is deleted, and the controller makes the group again.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_contract.api_server import CONFLICT, ApiError

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.groups import read_groups
from moe_operator.kubernetes.kinds import LEADER_WORKER_SET, POD
from moe_operator.kubernetes.peers import Peer, drain
from moe_operator.kubernetes.store import Key, Store
from moe_operator.plan import Observed
from moe_operator.plan.names import SCALE_IN
from moe_operator.plan.pod_status import is_live
from moe_operator.plan.replicas import Count

Document = dict[str, Any]
_DRAINING, _STOPPED = "draining", "stopped"
_DRAINED = (_DRAINING, _STOPPED)
# Agents that are asked at a time.
MOST_CALLS = 16

log = logging.getLogger("moeserving.operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleIn:
    """A scale-in that goes on.

    Attributes:
        name: of the set.
        goal: groups that stay.
        replicas: groups that the set has for now.
        ask: numbers of the groups to be drained.
        working: how many of those that go still end their streams.
        leaving: how many groups go.
    """

    name: str
    goal: int
    replicas: int
    ask: tuple[int, ...]
    working: int
    leaving: int

    @property
    def text(self) -> str:
        """How far it is, for people."""
        if not self.working:
            return f"{self.name}: {self.leaving} groups go"
        return f"{self.name}: {self.working} of the {self.leaving} groups that go still end their streams"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChanges:
    """The changes of a set's groups that a pass makes.

    Attributes:
        scale_in: that goes on; None without one.
        leaders: of the groups, by number.
        drained: numbers of the groups that stay and have drained: they are made anew.
        ended: those of them whose engines have ended.
    """

    scale_in: ScaleIn | None = None
    leaders: Mapping[int, Document]
    drained: tuple[int, ...] = ()
    ended: tuple[int, ...] = ()

    @property
    def texts(self) -> list[str]:
        """How far they are, for people."""
        texts = [] if self.scale_in is None else [self.scale_in.text]
        names = ", ".join(self.leaders[index]["metadata"]["name"] for index in self.drained)
        return [*texts, f"{names}: drained, made anew once the streams have ended"] if names else texts


def begun_goal(live: Mapping[str, Any] | None) -> int | None:
    """The number of groups that should stay, by the annotation of a set whose scale-in goes on; None without one."""
    text = ((live or {}).get("metadata", {}).get("annotations") or {}).get(SCALE_IN, "")
    return int(text) if text.isdecimal() else None


def plan_scale_in(name: str, goal: int, present: int, phases: Mapping[int, str | None]) -> ScaleIn | None:
    """Returns the scale-in that goes on; None where the set can have the wanted number at once.

    Args:
        name: of the set.
        goal: groups that there should be.
        present: groups that the set has; what lies above is its controller's, for the time of a rollout.
        phases: of the agents of the leaders that live, by the number of their group; None for one without an answer.
    """
    if goal >= present:
        return None
    leaving = {index: phase for index, phase in phases.items() if goal <= index < present}
    ask = tuple(sorted(index for index, phase in leaving.items() if phase is not None and phase not in _DRAINED))
    working = [index for index, phase in leaving.items() if phase is not None and phase != _STOPPED]
    replicas = max([goal, *(index + 1 for index in working)])
    return ScaleIn(name=name, goal=goal, replicas=replicas, ask=ask, working=len(working), leaving=max(len(leaving), 1))


def read_leaders(name: str, pods: Sequence[Document], nodes: int) -> dict[int, Document]:
    """The leaders of a set's groups that live, by the number of their group."""
    groups = (group for group in read_groups(pods, nodes) if group.workload == name)
    return {group.index: group.leader for group in groups if group.leader is not None and is_live(group.leader)}


def plan_group_changes(
    live: Document, count: Count, pods: Sequence[Document], states: States, asked: Mapping[str, bool]
) -> GroupChanges:
    """Returns the changes of the groups of a LeaderWorkerSet.

    Args:
        live: the set.
        count: the number of groups that there should be.
        pods: of the resource.
        states: of their agents.
        asked: uids of the leaders that were asked to drain, each with whether it does; their states may be older.
    """
    name, present = live["metadata"]["name"], int(live["spec"].get("replicas", 1))
    leaders = read_leaders(name, pods, int(live["spec"]["leaderWorkerTemplate"].get("size", 1)))
    phases = {index: _phase(leader, states, asked) for index, leader in leaders.items()}
    # A number that another manager sets is in force already.
    is_ours = "replicas" in count.spec
    staying = {index: phase for index, phase in phases.items() if index < min(count.replicas, present)}
    return GroupChanges(
        scale_in=plan_scale_in(name, count.replicas, present, phases) if is_ours else None,
        leaders=leaders,
        drained=tuple(index for index, phase in staying.items() if phase in _DRAINED),
        ended=tuple(index for index, phase in staying.items() if phase == _STOPPED),
    )


def _phase(leader: Document, states: States, asked: Mapping[str, bool]) -> str | None:
    state = states.engines.get(leader["metadata"]["name"])
    phase = None if state is None else str(state.phase)
    takes = asked.get(leader["metadata"].get("uid", ""))
    if phase is None or phase in _DRAINED or takes is None:
        return phase
    # One that did not take it is not waited for.
    return _DRAINING if takes else None


def with_scale_in(observed: Observed, changes: GroupChanges | None) -> Observed:
    """Returns what is observed with the number of groups for now."""
    scale_in = None if changes is None else changes.scale_in
    return observed if scale_in is None else replace(observed, scale_in=(scale_in.replicas, scale_in.goal))


class GroupDrains:
    """Drains the groups that have to go, and has those that stay and were drained made anew.

    Args:
        api: for every change, and for the lead, without which no agent is asked.
        store: the cluster as it was last seen.
    """

    def __init__(self, api: Api, store: Store) -> None:
        self._api, self._store = api, store
        # Leaders that were asked, by uid, and whether they drain: the newest state may be older than that.
        self._asked: dict[Key, dict[str, bool]] = {}

    def forget(self, key: Key) -> None:
        """Drops which groups of a resource were asked."""
        self._asked.pop(key, None)

    def plan(self, key: Key, live: Document, count: Count, pods: Sequence[Document], states: States) -> GroupChanges:
        """Returns the changes of the groups of a LeaderWorkerSet; nothing is changed yet."""
        changes = plan_group_changes(live, count, pods, states, self._asked.get(key, {}))
        if changes.scale_in is None and not changes.drained:
            self.forget(key)
        return changes

    async def carry_out(
        self, key: Key, changes: GroupChanges | None, peers: Sequence[Peer], tokens: Sequence[str]
    ) -> None:
        """Asks the groups that go to drain, where the set says that they go, and deletes leaders that have drained.

        Raises:
            NotLeading: another operator leads.
            ApiError: a leader could not be deleted.
        """
        if changes is None:
            return
        if changes.scale_in is not None:
            live = self._store.get(key, LEADER_WORKER_SET, changes.scale_in.name)
            if begun_goal(live) == changes.scale_in.goal:
                leaders = [changes.leaders[index] for index in changes.scale_in.ask]
                await self._drain(key, leaders, peers, tokens)
        for index in changes.ended:
            await self._end(changes.leaders[index])

    async def _drain(self, key: Key, leaders: Sequence[Document], peers: Sequence[Peer], tokens: Sequence[str]) -> None:
        by_uid, room = {peer.uid: peer for peer in peers}, asyncio.Semaphore(MOST_CALLS)
        asked = self._asked.setdefault(key, {})

        async def ask(name: str, uid: str) -> None:
            peer = by_uid.get(uid)
            async with room:
                self._api.check_lead("drain")
                problem = "it has no address" if peer is None else await drain(peer, tokens)
                asked[uid] = not problem
            if problem:
                log.warning("%s: the group of leader %s is not waited for: %s", key, name, problem)

        calls = (ask(leader["metadata"]["name"], leader["metadata"]["uid"]) for leader in leaders)
        for answer in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def _end(self, leader: Document) -> None:
        """Deletes a leader, unless another pod of its name has come meanwhile."""
        log.info("%s: has drained and is wanted; its group is made anew", leader["metadata"]["name"])
        try:
            await self._api.delete(POD, leader, same_uid=True)
        except ApiError as error:
            if error.status != CONFLICT:
                raise
