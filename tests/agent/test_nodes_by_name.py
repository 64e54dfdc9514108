"""Leader and worker of a replica as real agents that find each other by real names: those of a cluster's DNS.

Each agent runs where `/etc/resolv.conf` is a pod's (a mount namespace of its own, which needs root on Linux); a small
DNS server stands for the cluster's. The names are those that LeaderWorkerSet v0.10 hands out (`LWS_LEADER_ADDRESS`).
"""

import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

AGENT = Path(__file__).with_name("agent_in_group.py")
LEADER = "tiny-engine-0.tiny-engine-0.models"
DOMAIN = ".svc.cluster.local"
A, NAME_ERROR = 1, 3

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0,
    reason="a mount namespace of one's own needs root on Linux",
)


class Dns(threading.Thread):
    """Answers questions for IPv4 addresses from `records`; what is not there does not exist."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.records: dict[str, str] = {}
        self.asked: set[str] = set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, client = self._socket.recvfrom(512)
                self._socket.sendto(self.answer(question), client)

    def answer(self, message: bytes) -> bytes:
        labels, place = [], 12
        while length := message[place]:
            labels.append(message[place + 1 : place + 1 + length].decode())
            place += length + 1
        (kind,) = struct.unpack_from(">H", message, place + 1)
        question, name = message[12 : place + 5], ".".join(labels)
        self.asked.add(name)
        address = self.records.get(name)
        rows = b""
        if address is not None and kind == A:
            rows = struct.pack(">HHHIH", 0xC00C, A, 1, 0, 4) + socket.inet_aton(address)
        flags = 0x8580 | (NAME_ERROR if address is None else 0)
        return message[:2] + struct.pack(">HHHHH", flags, 1, 1 if rows else 0, 0, 0) + question + rows

    def close(self) -> None:
        self._socket.close()


def loopback() -> str:
    """An address of this machine that hardly anyone uses."""
    return f"127.{random.randint(64, 250)}.{random.randint(1, 250)}.{random.randint(1, 250)}"


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Group:
    """A leader and a worker, each at an address of its own, with one port for both agents."""

    def __init__(self, folder: Path, dns: str) -> None:
        self.folder, self.leader, self.worker = folder, loopback(), loopback()
        self.port = free_port(self.leader)
        self.agents: list[subprocess.Popen[bytes]] = []
        (folder / "token").write_text("secret")
        (folder / "resolv.conf").write_text(f"nameserver {dns}\nsearch models{DOMAIN} {DOMAIN[1:]}\noptions ndots:5\n")

    def start(self, index: int) -> subprocess.Popen[bytes]:
        address = self.worker if index else self.leader
        engine = {"model": "m", "served_name": "tiny", "data_parallel": 2, "nodes": 2, "drain_timeout_s": 60.0}
        config = {
            "run_dir": str(self.folder / f"run-{index}"),
            "listen": {"host": address, "port": self.port},
            "token_file": str(self.folder / "token"),
            "engine": engine | {"port": free_port("127.0.0.1")},
        }
        path = self.folder / f"agent-{index}.json"
        path.write_text(json.dumps(config))
        script = 'mount --bind "$1" /etc/resolv.conf && shift && exec "$@"'
        own = {"LWS_LEADER_ADDRESS": LEADER, "LWS_WORKER_INDEX": str(index), "LWS_GROUP_SIZE": "2"}
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(self.folder / "resolv.conf")]
        with (self.folder / f"agent-{index}.log").open("wb") as log:
            agent = subprocess.Popen(
                [*command, sys.executable, str(AGENT), str(path), str(self.folder)],
                env={**os.environ, **own},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.agents.append(agent)
        return agent

    def phase(self, index: int) -> str:
        address = self.worker if index else self.leader
        try:
            with urllib.request.urlopen(f"http://{address}:{self.port}/v1/state", timeout=10) as answer:
                return str(json.load(answer)["phase"])
        except (OSError, urllib.error.URLError):
            return ""

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("agent-*.log")))

    def until(self, holds: Callable[[], Any], what: str) -> None:
        deadline_s = time.monotonic() + 60.0
        while not holds():
            assert time.monotonic() < deadline_s, f"never: {what}\n{self.logs()}"
            time.sleep(0.02)


@pytest.fixture
def dns() -> Iterator[tuple[Dns, str]]:
    address = loopback()
    server = Dns(address)
    server.start()
    yield server, address
    server.close()


@pytest.fixture
def group(tmp_path: Path, dns: tuple[Dns, str]) -> Iterator[Group]:
    made = Group(tmp_path, dns[1])
    yield made
    for agent in made.agents:
        if agent.poll() is None:
            agent.kill()
        agent.wait()


def test_leader_and_worker_meet_by_name_and_the_worker_outlasts_the_leader(group: Group, dns: tuple[Dns, str]) -> None:
    server, _ = dns
    worker, leader = group.start(1), group.start(0)
    group.until(lambda: LEADER + DOMAIN in server.asked, "the worker asks for its leader")
    assert not (group.folder / "found").exists(), "the name has no address before the leader's pod has"
    server.records[LEADER + DOMAIN] = group.leader
    group.until((group.folder / "found").exists, "the worker's engine finds the leader")
    assert (group.folder / "found").read_text() == group.leader
    group.until(lambda: f"the leader {LEADER} is at {group.leader}" in group.logs(), "the worker's agent finds it too")
    group.until(lambda: (group.phase(0), group.phase(1)) == ("ready", "ready"), "both are ready")
    # Both end at the same moment, and the Service with the leader's name goes at once.
    server.records.clear()
    for agent in (worker, leader):
        agent.send_signal(signal.SIGTERM)
    group.until(lambda: (group.phase(0), group.phase(1)) == ("draining", "draining"), "both drain")
    assert worker.poll() is None
    assert "waits for the leader at" in group.logs()
    (group.folder / "drained").touch()
    assert leader.wait(60) == 0
    assert worker.wait(60) == 0
