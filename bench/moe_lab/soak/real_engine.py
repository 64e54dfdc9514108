"""The real engine of a soak: vLLM on the CPU with the tiny model, run by the node agent."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from moe_tools.tiny import ensure_tiny_model

from moe_lab.soak.answers import MODEL
from moe_lab.soak.processes import Launched, free_ports

_CORE = "EngineCore"


class RealEngine:
    """One engine with its agent.

    Args:
        folder: for its configuration, logs and run-time files; `token` is there.
        model: folder of the tiny model, which is made where it is not there.
    """

    name = "vllm"

    def __init__(self, folder: Path, model: Path) -> None:
        self.port, self.agent_port = free_ports(2)
        document = {
            "name": self.name,
            "run_dir": str(folder / "vllm"),
            "listen": {"port": self.agent_port},
            "token_file": str(folder / "token"),
            "engine": {
                "port": self.port,
                "model": str(ensure_tiny_model(model)),
                "served_name": MODEL,
                "args": ["--max-model-len=2048", "--dtype=float32", "--enforce-eager", "--max-num-seqs=32"],
                "env": {"OMP_NUM_THREADS": "1"},
                "drain_timeout_s": 20,
            },
        }
        path = folder / "agent.json"
        path.write_text(json.dumps(document), "utf-8")
        self._launched = Launched([sys.executable, "-m", "moe_agent", "--config", str(path)], folder / "agent.log")

    @property
    def address(self) -> dict[str, Any]:
        """Its row in a gateway's configuration."""
        urls = {"url": f"http://127.0.0.1:{self.port}", "agent_url": f"http://127.0.0.1:{self.agent_port}"}
        return {"name": self.name, **urls}

    @property
    def launched(self) -> Launched:
        """The launcher of the agent."""
        return self._launched

    def find_cores(self) -> list[psutil.Process]:
        """The processes that compute; none while the engine starts."""
        return [each for each in self._below() if _CORE in each.name() or _CORE in " ".join(each.cmdline())]

    def find_servers(self) -> list[psutil.Process]:
        """All processes of the engine but those that compute."""
        cores = self.find_cores()
        return [each for each in self._below() if each not in cores]

    def _below(self) -> Iterator[psutil.Process]:
        for each in self._launched.find_program().children(recursive=True):
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                yield each
