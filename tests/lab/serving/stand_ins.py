"""Programs in the place of vLLM and of vllm-router, and results made by hand."""

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil
from moe_lab.serving import testbed
from moe_lab.serving.measurement import CpuUsage, ServingResult
from moe_lab.serving.stock import Program, StockRouter
from moe_operator.local.machine import find_free_ports
from moe_tools.comparison import PiecePair, Policy, Sides

from tests.tools.test_comparison import run_of

SERVER = """
import http.server, os, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"data": []}'
        self.send_response(200); self.send_header("content-length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
print("up as", os.getpid(), flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""
ROUTER = """#!{python}
import sys
del sys.argv[1 : sys.argv.index("--port") + 1]
"""
SIDES = Sides(stock=Policy(label="stock", brief="stock vLLM"), ours=Policy(label="ours", brief="MoEServing"))


RIVAL = StockRouter(program=Path("vllm-router"), policy="round_robin")
DIRECTLY = StockRouter(program=None, policy="round_robin")


def plan_of(manifest: Path) -> testbed.TestbedPlan:
    return testbed.plan_testbed(manifest, RIVAL, 10.0)


def free_port() -> int:
    return find_free_ports(1)[0]


def program(name: str, *, port: int | None = None, code: str = SERVER) -> Program:
    port = port or free_port()
    return Program(
        name=name,
        command=(sys.executable, "-c", code, str(port)),
        environment=dict(os.environ),
        url=f"http://127.0.0.1:{port}",
    )


def measured_of(*pairs: tuple[float, float], idle_s: float = 0.0) -> ServingResult:
    return ServingResult(
        pairs=tuple(PiecePair(stock=run_of(a, a), ours=run_of(b, b)) for a, b in pairs),
        rate=2.0,
        capacities=(2.2, 2.4),
        work=(CpuUsage(label="stock", wall_s=10.0, busy_cpu_s=15.0, idle_cpu_s=idle_s),),
    )


def launchers_left() -> list[psutil.Process]:
    """The launchers of programs among this process's descendants; one that has ended and was not reaped is none."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "launcher" in " ".join(child.cmdline()):
                found.append(child)
    return found


def is_stopped(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def until(condition) -> None:
    give_up_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
