"""Scale-in of engines over several nodes: the groups that have to go end their streams before the set is made smaller.

A LeaderWorkerSet takes the groups with the highest numbers, whatever they carry. So their agents are asked to drain
(`POST /v1/drain`), and the set keeps its size until the engines have ended, for `engine.drainTimeout` at most: that is
the agents' own limit. A group whose agent does not answer is not waited for; its drain comes with the end of its pod.

A drained engine does not come back. When more are wanted again meanwhile, the drained groups go first, and are then
made anew. What was begun stands in an annotation of the set, so that the next operator goes on from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.groups import read_groups
from moe_operator.kubernetes.peers import Peer, drain
from moe_operator.plan import Observed
from moe_operator.plan.names import SCALE_IN
from moe_operator.plan.pod_status import is_live

Document = dict[str, Any]
_DRAINED = ("draining", "stopped")


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


def begun_goal(live: Mapping[str, Any] | None) -> int | None:
    """The number of groups that should stay, by the annotation of a set whose scale-in goes on; None without one."""
    text = ((live or {}).get("metadata", {}).get("annotations") or {}).get(SCALE_IN, "")
    return int(text) if text.isdecimal() else None


def plan_scale_in(
    name: str, wanted: int, present: int, begun: int | None, phases: Mapping[int, str | None]
) -> ScaleIn | None:
    """Returns the scale-in that goes on; None where the set can have the wanted number at once.

    Args:
        name: of the set.
        wanted: groups that there should be.
        present: groups that the set has.
        begun: groups that should stay by a scale-in that was begun; None without one.
        phases: of the agents of the leaders that live, by the number of their group; None for one without an answer.
    """
    goal = wanted
    if begun is not None:
        # What was drained cannot serve again: it goes, also when it is wanted again by now.
        spoiled = [index for index, phase in phases.items() if begun <= index < wanted and phase in _DRAINED]
        goal = min([wanted, *spoiled])
    leaving = {index: phase for index, phase in phases.items() if index >= goal}
    is_ending = begun is not None and any(phase in _DRAINED for phase in leaving.values())
    if goal >= present and not is_ending:
        return None
    ask = tuple(sorted(index for index, phase in leaving.items() if phase is not None and phase not in _DRAINED))
    working = [index for index, phase in leaving.items() if phase is not None and phase != "stopped"]
    # It never grows while groups go.
    replicas = min(present, max([goal, *(index + 1 for index in working)]))
    return ScaleIn(name=name, goal=goal, replicas=replicas, ask=ask, working=len(working), leaving=max(len(leaving), 1))


def read_phases(name: str, pods: Sequence[Document], states: States, nodes: int) -> dict[int, str | None]:
    """The phases of the agents of a set's leaders that live, by the number of their group."""
    found: dict[int, str | None] = {}
    for group in read_groups(pods, nodes):
        if group.workload == name and group.leader is not None and is_live(group.leader):
            state = states.engines.get(group.leader["metadata"]["name"])
            found[group.index] = None if state is None else state.phase
    return found


async def drain_groups(
    session: aiohttp.ClientSession,
    live: Document,
    wanted: int,
    pods: Sequence[Document],
    peers: Sequence[Peer],
    states: States,
    tokens: Sequence[str],
) -> ScaleIn | None:
    """Asks the groups that have to go to drain; returns the scale-in as it is then, None where none goes on.

    Args:
        session: for the calls.
        live: the LeaderWorkerSet.
        wanted: groups that there should be.
        pods: of the resource.
        peers: the pods that can be asked.
        states: of their agents.
        tokens: control tokens in force, the newest first.
    """
    name, present = live["metadata"]["name"], int(live["spec"].get("replicas", 1))
    size = int(live["spec"]["leaderWorkerTemplate"].get("size", 1))
    phases = read_phases(name, pods, states, size)
    by_pod = {peer.pod: peer for peer in peers}
    scale_in = plan_scale_in(name, wanted, present, begun_goal(live), phases)
    while scale_in is not None and scale_in.ask:
        for index in scale_in.ask:
            peer = by_pod.get(f"{name}-{index}")
            # One that cannot be asked is not waited for.
            is_asked = peer is not None and not await drain(session, peer, tokens)
            phases[index] = "draining" if is_asked else None
        scale_in = plan_scale_in(name, wanted, present, scale_in.goal, phases)
    return scale_in


def with_scale_in(observed: Observed, scale_in: ScaleIn | None) -> Observed:
    """Returns what is observed with the number of groups for now."""
    return observed if scale_in is None else replace(observed, scale_in=(scale_in.replicas, scale_in.goal))
