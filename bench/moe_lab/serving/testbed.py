"""Both sides of the comparison: starts them, and says where they are reached.

A's engines are started first, and beside them B by `moeserving up`, as a user starts it; A's router follows when both
serve. They end in the reverse order. Logs stay in the checkout's `.cache/bench-serving`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moe_agent.vllm.version import is_cpu_build
from moe_operator.api import load_resource
from moe_operator.local import machine
from moe_operator.local.folder import Folder
from moe_operator.local.model import check_model
from moe_operator.local.record import load_record
from moe_operator.local.start import find_site
from moe_operator.plan import plan_local
from moe_tools.comparison import Policy
from moe_tools.deployment import DeploymentPlan, free_port, plan_deployment, served, wait_ready
from moe_tools.progress_printer import ProgressPrinter

from moe_lab.serving.measurement import Side
from moe_lab.serving.processes import running, starting, wait_until_serving
from moe_lab.serving.stock import Program, StockRouter, check_comparable, check_piece, plan_engines, plan_router

PLACE = "bench-serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingTestbed:
    """Both sides while they run, the URL of one engine of A (for calls that vllm-router lacks), and A's programs."""

    stock: Side
    ours: Side
    engine_url: str
    programs: tuple[Program, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TestbedPlan:
    """Both sides before they are started: B's deployment, A's engines and A's router."""

    place: DeploymentPlan
    engines: tuple[Program, ...]
    rival: StockRouter


def plan_testbed(manifest: Path | None, rival: StockRouter, piece_s: float) -> TestbedPlan:
    """Reads the resource and plans A's engines from it.

    Raises:
        InvalidInput: the resource is invalid, cannot be compared or has no model, or the pieces are too long.
    """
    place = plan_deployment(manifest, PLACE)
    resource = load_resource(place.manifest)
    check_comparable(resource, rival)
    check_piece(resource, piece_s)
    check_model(resource)
    site = find_site(resource, _folder(place))
    agents = plan_local(resource, site).agents
    engines = plan_engines(
        agents, python=sys.executable, inherited=os.environ, cpus=site.cpus, cpu_build=is_cpu_build()
    )
    return TestbedPlan(place=place, engines=engines, rival=rival)


@contextlib.contextmanager
def running_testbed(plan: TestbedPlan, say: ProgressPrinter) -> Iterator[ServingTestbed]:
    """Starts both sides, yields them when they serve, and stops them, however the block ends.

    The gateway's and the router's ports are chosen as late as can be: within the minute that engines take to start,
    another program may take one.

    Raises:
        DoesNotServe: a process of A does not come up.
        InvalidInput: `moeserving up` fails.
    """
    logs = _folder(plan.place).root / "stock"
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        say(f"starting {len(plan.engines)} stock engines; their logs are in {logs}")
        engines = stack.enter_context(starting(plan.engines, logs))
        place = replace(plan.place, port=free_port())
        stack.enter_context(served(place, say, wait_ready))
        wait_until_serving(engines)
        processes, programs = [engine.process.pid for engine in engines], [*plan.engines]
        if plan.rival.program is not None:
            port, metrics_port = machine.find_free_ports(2)
            router = plan_router(plan.rival, plan.engines, port=port, metrics_port=metrics_port, inherited=os.environ)
            processes += stack.enter_context(running([router], logs))
            programs.append(router)
        say(f"{plan.rival}: serving at {programs[-1].url}")
        yield ServingTestbed(
            stock=Side(policy=name_stock(plan.rival), url=programs[-1].url, processes=tuple(processes)),
            ours=Side(policy=OURS, url=place.url, processes=_find_processes(place)),
            engine_url=plan.engines[0].url,
            programs=tuple(programs),
        )


OURS = Policy(label="MoEServing as the resource has it", brief="MoEServing")


def name_stock(rival: StockRouter) -> Policy:
    """Policy of A, as the table names it."""
    return Policy(label=str(rival), brief="stock vLLM")


def _find_processes(place: DeploymentPlan) -> tuple[int, ...]:
    """Process id of the supervisor, the parent of all others of B."""
    record = load_record(_folder(place))
    return (record.supervisor.pid,) if record and record.supervisor else ()


def _folder(place: DeploymentPlan) -> Folder:
    assert place.deployment.state_dir is not None
    return Folder(root=place.deployment.state_dir, name=place.deployment.name)
