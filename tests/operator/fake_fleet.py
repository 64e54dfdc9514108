"""A deployment as `up` leaves it, with fakes of its agents and its gateway as real processes, here and as a cluster."""

import base64
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_operator.api import parse_resource
from moe_operator.cli.command import app
from moe_operator.local.folder import Folder
from moe_operator.local.record import Record, identify, load_record, save_record
from moe_operator.local.start import Programs, build_record, find_site, write_files
from moe_operator.plan import plan_local
from typer.testing import CliRunner

FAKE = str(Path(__file__).with_name("fake_peer.py"))
TIMEOUT_S = 60.0

# A kubectl of the namespace `ns`: its words and options; what follows answers them.
KUBECTL_HEAD = """#!{python} -u
import json, sys, time
words, options = [], {{}}
given = iter(sys.argv[1:])
for word in given:
    if word.startswith("--"):
        options[word] = next(given)
    else:
        words.append(word)
if options.get("--namespace") != "ns":
    sys.exit("Error from server (Forbidden): not there")
"""
KUBECTL = (
    KUBECTL_HEAD
    + """
if words[:2] == ["get", "pods"]:
    component = options["--selector"].rpartition("=")[2]
    print(json.dumps({{"items": {pods}[component]}}))
elif words[:2] == ["get", "pod"]:
    print(json.dumps({pods}["engine"][0]))
elif words[:2] == ["get", "secret"]:
    print(json.dumps({{"data": {{"token": "{token}"}}}}))
else:
    print("Forwarding from 127.0.0.1:" + {ports}[words[1].removeprefix("pod/")] + " -> 8080")
    time.sleep(600)
"""
)


def run(*arguments: str, code: int = 0) -> str:
    """What a command says."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.output


class Fleet:
    """A deployment `a` with this process for its supervisor."""

    def __init__(self, root: Path, *, replicas: int, parallelism: dict[str, Any] | None = None) -> None:
        engine = {"runtime": "vllm-cpu", "replicas": replicas, "resources": {"kvCacheMemory": "1Mi"}}
        engine |= {} if parallelism is None else {"parallelism": parallelism}
        header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "a"}}
        resource = parse_resource({**header, "spec": {"model": {"uri": "hf://org/a"}, "engine": engine}})
        self.folder = Folder(root=root, name="a")
        self.folder.make()
        site = find_site(resource, self.folder)
        plan = plan_local(resource, site)
        write_files(resource, self.folder, plan)
        programs = Programs(agent=(sys.executable, FAKE, "agent"), gateway=(sys.executable, FAKE, "gateway"))
        record = build_record(resource, self.folder, site, plan, programs)
        save_record(self.folder, replace(record, supervisor=identify(os.getpid())))
        self.processes = [subprocess.Popen(row.command, stdout=subprocess.DEVNULL) for row in record.processes]
        for row in record.processes:
            wait_for(f"{row.url}/v1/state")
        self.local = ("--state-dir", str(root))

    def record(self) -> Record:
        record = load_record(self.folder)
        assert record is not None
        return record

    def switch(self, process: str, name: str) -> Path:
        """The file that switches a fake."""
        return self.folder.path / f"{process}.json.{name}"

    def make_kubectl(self, folder: Path) -> None:
        """A kubectl that knows the same agents and gateway as pods of the namespace `ns`."""
        record = self.record()
        engines = {f"pod-{index}": row.url.rpartition(":")[2] for index, row in enumerate(record.agents)}
        gateways = {"way-0": record.gateway.url.rpartition(":")[2]}
        pods = {"engine": [pod(name) for name in engines], "gateway": [pod(name) for name in gateways]}
        token = base64.b64encode(self.folder.token.read_bytes()).decode()
        script = folder / "kubectl"
        script.write_text(KUBECTL.format(python=sys.executable, pods=pods, token=token, ports=engines | gateways))
        script.chmod(0o755)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def pod(name: str) -> dict[str, Any]:
    """A pod that runs."""
    ports = [{"name": "engine", "containerPort": 8000}, {"name": "agent", "containerPort": 8080}]
    container = {"name": "engine", "ports": ports}
    metadata = {"name": name, "labels": {"app.kubernetes.io/instance": "a"}}
    return {"metadata": metadata, "spec": {"containers": [container]}, "status": {"phase": "Running"}}


def wait_for(url: str) -> None:
    give_up_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up_s:
        with suppress(OSError), urllib.request.urlopen(url, timeout=TIMEOUT_S):
            return
        time.sleep(0.05)
    raise AssertionError(f"{url} gives no answer within {TIMEOUT_S:g} s")
