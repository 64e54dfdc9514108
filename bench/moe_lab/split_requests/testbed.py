"""The processes of a run: engines with fixed roles as the plan of a resource has them, and a gateway, on this machine.

Of the prefill engines the first is reached through an `Interceptor`, the others as a gateway reaches any engine.
"""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from moe_agent.supervisor import launcher
from moe_contract.agent_config import AgentConfig
from moe_contract.agent_state import READY
from moe_contract.gateway_config import GatewayConfig
from moe_operator.api import MoEServing, parse_resource
from moe_operator.local import machine
from moe_operator.plan import LocalSite, plan_local, ports_needed
from moe_scheduling.engine.disaggregation import EngineRole

from moe_lab.soak.answers import MODEL
from moe_lab.soak.processes import DidNotStart, Launched, free_ports
from moe_lab.split_requests.interceptor import Interceptor

START_TIMEOUT_S = 1200.0
ASK_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
_POLL_S = 0.2
# Blocks of 128 tokens are few enough that freed ones are soon used again: about eight prompts fill an engine.
KV_CACHE = "48Mi"
_ARGUMENTS = ["--max-model-len=4096", "--dtype=float32", "--enforce-eager", "--max-num-seqs=16"]
_CORE = "EngineCore"


def build_resource(model: Path, roles: dict[str, Any]) -> MoEServing:
    """The resource: engines of the tiny model on the CPU with these `engine.roles`."""
    engine: dict[str, Any] = {
        "runtime": "vllm-cpu",
        "resources": {"kvCacheMemory": KV_CACHE},
        "args": _ARGUMENTS,
        "env": {"OMP_NUM_THREADS": "1"},
        "drainTimeout": "20s",
        "roles": roles,
    }
    return parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": MODEL},
            "spec": {"model": {"uri": f"file://{model.absolute()}", "name": MODEL}, "engine": engine},
        }
    )


@dataclass(slots=True, kw_only=True)
class SplitEngine:
    """One engine with its agent.

    Attributes:
        config: of its agent.
        launched: its agent.
    """

    config: AgentConfig
    launched: Launched

    @property
    def name(self) -> str:
        """Its name in the gateway."""
        return str(self.config.name)

    @property
    def decodes(self) -> bool:
        """Whether it has the role `decode`."""
        transfer = self.config.engine.kv_transfer
        return transfer is not None and transfer.role is EngineRole.DECODE

    @property
    def url(self) -> str:
        """Address of vLLM's HTTP server on this machine."""
        return f"http://127.0.0.1:{self.config.engine.port}"

    def find_cores(self) -> list[psutil.Process]:
        """The processes that compute; none while the engine starts."""
        return [process for process, words in self._below() if _CORE in words]

    def kill(self) -> None:
        """Kills the agent and all below it."""
        below = [process for process, _ in self._below()]
        self.launched.kill()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=10)

    def _below(self) -> list[tuple[psutil.Process, str]]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess, DidNotStart):
            if not self.launched.is_running:
                return []
            for process in self.launched.find_program().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    words = f"{process.name()} {' '.join(process.cmdline())}"
                    if process.status() != psutil.STATUS_ZOMBIE and launcher.__file__ not in words:
                        found.append((process, words))
        return found

    async def read_state(self, session: aiohttp.ClientSession) -> Any | None:
        """The state of its agent; None where that does not answer."""
        return await fetch_json(session, f"http://127.0.0.1:{self.config.listen.port}/v1/state")


@dataclass(slots=True, kw_only=True)
class SplitTestbed:
    """What runs.

    Attributes:
        engines: all of them.
        interceptor: before the first prefill engine.
        url: of the gateway.
        admin_url: of its state.
        session: for states.
        gateway: its process.
    """

    engines: list[SplitEngine]
    interceptor: Interceptor
    url: str
    admin_url: str
    session: aiohttp.ClientSession
    gateway: Launched

    def of_role(self, *, decodes: bool) -> list[SplitEngine]:
        """The engines of a role."""
        return [engine for engine in self.engines if engine.decodes is decodes]

    async def read_gateway(self) -> Any | None:
        """The state of the gateway; None where it does not answer."""
        return await fetch_json(self.session, f"{self.admin_url}/v1/state")

    async def wait_until_accepting(self) -> None:
        """Waits until all engines are ready, say with whom they exchange blocks, and get requests of the gateway.

        Raises:
            DidNotStart: they do not in time.
        """
        until_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < until_s:
            state = await self.read_gateway()
            rows = [] if state is None else state["engines"]
            agents = [await engine.read_state(self.session) for engine in self.engines]
            are_ready = all(agent is not None and agent["phase"] == READY for agent in agents)
            are_used = len(rows) == len(self.engines) and all(row["accepting"] and row["role"] for row in rows)
            if are_ready and are_used:
                return
            await asyncio.sleep(_POLL_S)
        raise DidNotStart(f"not all engines serve after {START_TIMEOUT_S:g} s: {await self.read_gateway()}")


async def fetch_json(session: aiohttp.ClientSession, url: str) -> Any | None:
    """A document; None where nobody answers."""
    try:
        async with session.get(url, timeout=ASK_TIMEOUT) as answer:
            return await answer.json()
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None


def plan_processes(resource: MoEServing, folder: Path) -> tuple[list[AgentConfig], GatewayConfig]:
    """The configurations of the agents and of the gateway, and the file of the token."""
    token = folder / "token"
    token.write_text("roles\n", "utf-8")
    site = LocalSite(
        state_dir=folder,
        token_file=token,
        ports=tuple(free_ports(ports_needed(resource))),
        cpus=machine.count_cpus(),
        memory_bytes=machine.memory_bytes(),
    )
    plan = plan_local(resource, site)
    return list(plan.agents), plan.gateway


def launch_agent(config: AgentConfig, folder: Path) -> SplitEngine:
    """Starts an agent, which starts its engine; that takes half a minute."""
    path = folder / f"{config.name}.json"
    path.write_text(config.model_dump_json(), "utf-8")
    launched = Launched([sys.executable, "-m", "moe_agent", "--config", str(path)], folder / f"{config.name}.log")
    launched.start()
    return SplitEngine(config=config, launched=launched)


@contextlib.asynccontextmanager
async def running(model: Path, folder: Path, *, prefill: int, decode: int) -> AsyncIterator[SplitTestbed]:
    """Starts everything and waits until it serves; ends everything after the block.

    Args:
        model: folder of the tiny model.
        folder: for configurations and logs.
        prefill: engines that compute prompts.
        decode: engines that decode.

    Raises:
        DidNotStart: something does not serve.
    """
    agents, gateway = plan_processes(
        build_resource(model, {"mode": "fixed", "prefill": prefill, "decode": decode}), folder
    )
    assert gateway.listen is not None
    assert gateway.admin is not None
    interceptor, (port,) = Interceptor(agents[0].engine.port), free_ports(1)
    async with contextlib.AsyncExitStack() as stack:
        engines = []
        for config in agents:
            engines.append(launch_agent(config, folder))
            stack.callback(engines[-1].kill)
        await stack.enter_async_context(interceptor.serving(port))
        launched = _launch_gateway(gateway, port, folder)
        stack.callback(launched.kill)
        testbed = SplitTestbed(
            engines=engines,
            interceptor=interceptor,
            url=f"http://127.0.0.1:{gateway.listen.port}",
            admin_url=f"http://127.0.0.1:{gateway.admin.port}",
            session=await stack.enter_async_context(aiohttp.ClientSession()),
            gateway=launched,
        )
        await testbed.wait_until_accepting()
        yield testbed


def _launch_gateway(config: GatewayConfig, port: int, folder: Path) -> Launched:
    """The gateway, for which the first engine is at another port."""
    first, *others = config.engines
    through = first.model_copy(update={"url": f"http://127.0.0.1:{port}"})
    path = folder / "gateway.json"
    path.write_text(config.model_copy(update={"engines": (through, *others)}).model_dump_json(), "utf-8")
    launched = Launched([sys.executable, "-m", "moe_gateway", "--config", str(path)], folder / "gateway.log")
    launched.start()
    return launched


@contextlib.asynccontextmanager
async def plain_engine(model: Path, folder: Path) -> AsyncIterator[SplitEngine]:
    """One engine that exchanges no blocks, with the same arguments.

    Raises:
        DidNotStart: it does not serve.
    """
    (config, *_), _ = plan_processes(build_resource(model, {"mode": "unified"}), folder)
    engine = launch_agent(config, folder)
    try:
        async with aiohttp.ClientSession() as session:
            until_s = time.monotonic() + START_TIMEOUT_S
            while (state := await engine.read_state(session)) is None or state["phase"] != READY:
                if time.monotonic() > until_s or not engine.launched.is_running:
                    raise DidNotStart(f"the plain engine does not serve; its log ends with {engine.launched.log_end()}")
                await asyncio.sleep(_POLL_S)
        yield engine
    finally:
        engine.kill()
