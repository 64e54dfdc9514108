"""Both sides, standing: what is started, in which order, and where it is reached.

A's engines, and beside them B by `moeserving up`, as a user starts it; A's router when both serve. It is the first to
go, then B, then A's engines. Logs stay in the checkout's `.cache/bench-serving`.
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
from moe_tools.demo import Scene, free_port, served, set_scene, wait_ready
from moe_tools.progress_printer import ProgressPrinter

from moe_lab.serving.measurement import Side
from moe_lab.serving.processes import running, starting, wait_until_serving
from moe_lab.serving.stock import Program, Rival, check_comparable, check_piece, plan_engines, plan_router

PLACE = "bench-serving"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """Both sides, an engine of A to ask for what vllm-router need not offer, and what A runs."""

    stock: Side
    ours: Side
    engine_url: str
    programs: tuple[Program, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is to be started."""

    scene: Scene
    engines: tuple[Program, ...]
    rival: Rival


def plan_stage(manifest: Path | None, rival: Rival, piece_s: float) -> Stage:
    """Reads the resource and plans A's engines from it.

    Raises:
        InvalidInput: the resource is none, cannot be compared or has no model there, or the pieces are too long.
    """
    scene = set_scene(manifest, PLACE)
    resource = load_resource(scene.manifest)
    check_comparable(resource, rival)
    check_piece(resource, piece_s)
    check_model(resource)
    site = find_site(resource, _folder(scene))
    agents = plan_local(resource, site).agents
    engines = plan_engines(
        agents, python=sys.executable, inherited=os.environ, cpus=site.cpus, cpu_build=is_cpu_build()
    )
    return Stage(scene=scene, engines=engines, rival=rival)


@contextlib.contextmanager
def standing(stage: Stage, say: ProgressPrinter) -> Iterator[Bed]:
    """Starts both sides and gives them when they serve; ends them, however the block ends.

    The gateway's and the router's ports are chosen as late as can be: within the minute that engines take to start,
    another program may take one.

    Raises:
        DoesNotServe: a process of A does not come up.
        InvalidInput: `moeserving up` fails.
    """
    logs = _folder(stage.scene).root / "stock"
    logs.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        say(f"starting {len(stage.engines)} stock engines; their logs are in {logs}")
        engines = stack.enter_context(starting(stage.engines, logs))
        scene = replace(stage.scene, port=free_port())
        stack.enter_context(served(scene, say, wait_ready))
        wait_until_serving(engines)
        processes, programs = [engine.process.pid for engine in engines], [*stage.engines]
        if stage.rival.program is not None:
            port, metrics_port = machine.find_free_ports(2)
            router = plan_router(stage.rival, stage.engines, port=port, metrics_port=metrics_port, inherited=os.environ)
            processes += stack.enter_context(running([router], logs))
            programs.append(router)
        say(f"{stage.rival}: serving at {programs[-1].url}")
        yield Bed(
            stock=Side(policy=name_stock(stage.rival), url=programs[-1].url, processes=tuple(processes)),
            ours=Side(policy=OURS, url=scene.url, processes=_find_processes(scene)),
            engine_url=stage.engines[0].url,
            programs=tuple(programs),
        )


OURS = Policy(label="MoEServing as the resource has it", brief="MoEServing")


def name_stock(rival: Rival) -> Policy:
    """A, for the table."""
    return Policy(label=str(rival), brief="stock vLLM")


def _find_processes(scene: Scene) -> tuple[int, ...]:
    """The supervisor, whose children all others are."""
    record = load_record(_folder(scene))
    return (record.supervisor.pid,) if record and record.supervisor else ()


def _folder(scene: Scene) -> Folder:
    assert scene.deployment.state_dir is not None
    return Folder(root=scene.deployment.state_dir, name=scene.deployment.name)
