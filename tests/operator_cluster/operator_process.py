"""`moeserving operator` as a process beside the cluster."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from cluster_api import free_ports

TIMEOUT_S = 60.0


class OperatorProcess:
    """One operator; its output goes to a file."""

    def __init__(self, kubeconfig: Path, log: Path, *options: str, own_namespace: str = "default") -> None:
        self.log, self.liveness_port, self.metrics_port = log, *free_ports(2)
        command = [
            *(sys.executable, "-m", "moe_operator.cli", "operator", "--lease-duration", "3"),
            *("--liveness-port", str(self.liveness_port), "--metrics-port", str(self.metrics_port), *options),
        ]
        environment = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "MOESERVING_OPERATOR_NAMESPACE": own_namespace,
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def pid(self) -> int:
        return self._process.pid

    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """As a machine that fails."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """As kubelet does; its status."""
        if self.lives():
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=TIMEOUT_S)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def leads(self) -> bool:
        return " leads\n" in self.text()

    def metrics(self) -> dict[str, float]:
        """Its samples by name with labels."""
        address = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=5) as answer:
            rows = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (row.rsplit(" ", 1) for row in rows if not row.startswith("#"))}

    def writes(self) -> float:
        """Calls to the API server that change a resource or its children."""
        changing = re.compile(r'api_calls_total\{kind="(?!Lease)\w+",verb="(apply|patch|create|update|delete)"\}')
        return sum(value for name, value in self.metrics().items() if changing.search(name))


def eventually(holds: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Waits until a condition holds; fails after the timeout."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)
