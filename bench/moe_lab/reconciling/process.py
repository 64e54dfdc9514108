"""`moeserving operator` as a process, and what its metrics say."""

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import aiohttp
import psutil

START_TIMEOUT_S = 120.0
# On a machine that is busy with other work an operator would lose its lead by the default.
LEASE_S = 60
_SAMPLE = re.compile(r"moeserving_operator_(\w+?)(?:_total)?(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_PORT = re.compile(r"https?://(?:127\.0\.0\.1|localhost|\[::1\]):(\d+)")
_READS = ("get", "list", "dry run")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorMetrics:
    """The operator's counters at one moment.

    Attributes:
        calls: to the API server since the start, by verb and kind.
        passes: that ended, by outcome.
        buckets: number of passes by the upper bound of their seconds, cumulative.
        queue: resources that wait for a worker.
    """

    calls: Mapping[tuple[str, str], float]
    passes: Mapping[str, float]
    buckets: Mapping[float, float]
    queue: float

    @property
    def writes(self) -> float:
        """Calls that change something, the Lease aside."""
        return sum(count for (verb, kind), count in self.calls.items() if verb not in _READS and kind != "Lease")

    @property
    def ended(self) -> float:
        """Number of passes that ended, whatever their outcome."""
        return sum(self.passes.values())


def parse_metrics(text: str) -> OperatorMetrics:
    """The counters out of Prometheus' text format."""
    calls: dict[tuple[str, str], float] = {}
    passes: dict[str, float] = {}
    buckets: dict[float, float] = {}
    queue = 0.0
    for line in text.splitlines():
        if (match := _SAMPLE.fullmatch(line)) is None:
            continue
        labels, value = dict(_LABEL.findall(match[2] or "")), float(match[3])
        match match[1]:
            case "api_calls":
                calls[labels["verb"], labels["kind"]] = value
            case "reconciles":
                passes[labels["outcome"]] = value
            case "reconcile_seconds_bucket":
                buckets[float(labels["le"])] = value
            case "queue":
                queue = value
    return OperatorMetrics(calls=calls, passes=passes, buckets=buckets, queue=queue)


def quantile_s(before: Mapping[float, float], after: Mapping[float, float], quantile: float) -> float:
    """A quantile of the passes between two moments, linear within its bucket; nan without a pass.

    Source: Prometheus' `histogram_quantile`.
    """
    counts = {bound: after[bound] - before.get(bound, 0.0) for bound in sorted(after)}
    rank = quantile * counts[float("inf")]
    if not rank:
        return float("nan")
    low_s, below = 0.0, 0.0
    for bound_s, count in counts.items():
        if count >= rank:
            if bound_s == float("inf"):
                break
            return low_s + (bound_s - low_s) * (rank - below) / (count - below)
        low_s, below = bound_s, count
    return low_s


class OperatorProcess:
    """One operator. `async with` starts it, waits until it leads, and ends it."""

    def __init__(self, kubeconfig: Path, log: Path, identity: str, python: Path = Path(sys.executable)) -> None:
        self._kubeconfig, self._log, self._identity, self._python = kubeconfig, log, identity, python

    async def __aenter__(self) -> "OperatorProcess":
        liveness_port, self._metrics_port = _free_ports(2)
        command = [
            *(str(self._python), "-m", "moe_operator.cli", "operator", "--identity", self._identity),
            *("--liveness-port", str(liveness_port), "--metrics-port", str(self._metrics_port)),
            *("--lease-duration", str(LEASE_S)),
        ]
        environment = os.environ | {"KUBECONFIG": str(self._kubeconfig), "MOESERVING_OPERATOR_NAMESPACE": "default"}
        with self._log.open("ab") as output:
            self._process = _start(command, environment, output)
        self._session = aiohttp.ClientSession()
        await self._wait_for_the_lead()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._process.terminate()
        self._process.wait()

    async def _wait_for_the_lead(self) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while f"{self._identity} leads" not in self._log.read_text("utf-8", errors="replace"):
            if self._process.poll() is not None or time.monotonic() > give_up_s:
                raise RuntimeError(f"the operator does not lead within {START_TIMEOUT_S:.0f} s: {self._last_line()}")
            await asyncio.sleep(0.02)

    async def metrics(self) -> OperatorMetrics:
        """The counters that it serves at /metrics.

        Raises:
            RuntimeError: it does not answer.
        """
        try:
            async with self._session.get(f"http://127.0.0.1:{self._metrics_port}/metrics") as answer:
                return parse_metrics(await answer.text())
        except aiohttp.ClientError:
            raise RuntimeError(f"the operator has ended: {self._last_line()}") from None

    def _last_line(self) -> str:
        return self._log.read_text("utf-8", errors="replace").rstrip().rpartition("\n")[2]

    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory of the process, and the part that it shares with no other, in bytes."""
        memory = psutil.Process(self._process.pid).memory_full_info()
        return int(memory.rss), int(memory.uss)

    def cpu_s(self) -> float:
        """CPU seconds since it started."""
        return cpu_s([self._process.pid])


def cpu_s(processes: Iterable[int]) -> float:
    """CPU seconds of processes since each of them started."""
    times = [psutil.Process(pid).cpu_times() for pid in processes]
    return float(sum(row.user + row.system for row in times))


def find_servers(kubeconfig: Path) -> dict[str, int]:
    """Process ids of the API server that a kubeconfig names and of its etcd, as far as they run on this machine."""
    text = kubeconfig.read_text("utf-8", errors="replace")
    found = {"API server": _listener(_PORT.search(text))}
    if (pid := found["API server"]) is not None:
        found["etcd"] = _listener(_PORT.search(" ".join(psutil.Process(pid).cmdline()).partition("--etcd-servers")[2]))
    return {name: pid for name, pid in found.items() if pid is not None}


def _listener(address: re.Match[str] | None) -> int | None:
    if address is None:
        return None
    for row in psutil.net_connections("tcp"):
        if row.status == psutil.CONN_LISTEN and row.laddr[1:] == (int(address[1]),):
            return int(row.pid) if row.pid else None
    return None


def _start(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
