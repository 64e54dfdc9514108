"""Agents and gateways of a resource over HTTP: what they say, and settings for those that run."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from moe_operator.experts.document import ExpertsDocument, read_experts
from moe_operator.plan.names import COMPONENT, REVISION

Document = dict[str, Any]
TIMEOUT = aiohttp.ClientTimeout(total=5.0, sock_connect=1.0)
# A change is answered once every rank has taken it, which takes a step of the engine.
CHANGE_TIMEOUT = aiohttp.ClientTimeout(total=10.0, sock_connect=1.0)
AGENT_PORT, ADMIN_PORT = "agent", "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A pod that can be asked.

    Attributes:
        pod: its name.
        url: of its agent, or of its gateway's admin port.
        component: `engine` or `gateway`.
        revision: of an engine; empty for a gateway.
    """

    pod: str
    url: str
    component: str
    revision: str


def find_peers(pods: Iterable[Document]) -> list[Peer]:
    """The pods that have an address and are not on their way out."""
    peers = []
    for pod in pods:
        address, labels = pod.get("status", {}).get("podIP"), pod["metadata"].get("labels", {})
        component = labels.get(COMPONENT)
        port = _port(pod, AGENT_PORT if component == "engine" else ADMIN_PORT)
        if not address or port is None or "deletionTimestamp" in pod["metadata"]:
            continue
        host = f"[{address}]" if ":" in address else address
        peers.append(
            Peer(
                pod=pod["metadata"]["name"],
                url=f"http://{host}:{port}",
                component=component,
                revision=labels.get(REVISION, ""),
            )
        )
    return peers


def _port(pod: Document, name: str) -> int | None:
    for container in pod["spec"]["containers"]:
        for port in container.get("ports", []):
            if port.get("name") == name:
                return int(port["containerPort"])
    return None


async def fetch_states(session: aiohttp.ClientSession, peers: Sequence[Peer]) -> dict[str, Document]:
    """The state of each peer that answers, by pod."""
    answers = await asyncio.gather(*(_fetch(session, f"{peer.url}/v1/state") for peer in peers))
    return {peer.pod: answer for peer, answer in zip(peers, answers, strict=True) if answer is not None}


async def fetch_experts(session: aiohttp.ClientSession, peers: Sequence[Peer]) -> dict[str, ExpertsDocument]:
    """What each engine says of its experts, in brief, by pod; those without an expert group are left out."""
    engines = [peer for peer in peers if peer.component == "engine"]
    answers = await asyncio.gather(*(_fetch(session, f"{peer.url}/v1/experts?brief=1") for peer in engines))
    read = ((peer.pod, read_experts(answer)) for peer, answer in zip(engines, answers, strict=True))
    return {pod: document for pod, document in read if document is not None}


async def _fetch(session: aiohttp.ClientSession, url: str) -> Document | None:
    try:
        async with session.get(url, timeout=TIMEOUT) as answer:
            if answer.status != 200:
                return None
            document = await answer.json()
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError):
        return None
    return document if isinstance(document, dict) else None


async def put_settings(
    session: aiohttp.ClientSession, peer: Peer, settings: Mapping[str, Any], tokens: Sequence[str]
) -> str:
    """Gives a running peer other settings; empty when it took them, else why not.

    While a token is being replaced a peer may know only the old one yet.
    """
    told = "no control token"
    for token in tokens:
        headers = {"Authorization": f"Bearer {token}"}
        try:
            async with session.put(
                f"{peer.url}/v1/config", json=dict(settings), headers=headers, timeout=CHANGE_TIMEOUT
            ) as answer:
                if answer.status == 200:
                    return ""
                told = f"status {answer.status}: {(await answer.text())[:200]}"
                if answer.status != 401:
                    return told
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return repr(error)
    return told


def differs(wanted: Mapping[str, Any], state: Document) -> bool:
    """Whether the settings in force in a peer are not the wanted ones."""
    in_force = state.get("config", {})
    return any(in_force.get(name) != value for name, value in wanted.items())
