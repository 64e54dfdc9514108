"""The agent as a process: builds its parts, serves until a signal asks for the end, and leaves no engine behind."""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address

from aiohttp import web
from moe_contract.agent_config import AgentConfig
from moe_contract.control_tokens import ControlTokens
from moe_contract.engine_process import engine_environment
from moe_contract.input_errors import InputError, InvalidInput

from moe_agent.api.server import AgentServer
from moe_agent.experts.document import PublishedExperts
from moe_agent.shared_memory.control_record import SettingsPublisher
from moe_agent.shared_memory.expert_record import remove_expert_records
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.supervisor.engine_command import build_command
from moe_agent.supervisor.node import Node, build_node
from moe_agent.supervisor.supervisor import Supervisor
from moe_agent.vllm.version import is_cpu_build

log = logging.getLogger(__name__)

_STREAM_END_S = 2.0
NUMA_LIBRARY = "libnuma.so.1"


async def run_agent(config: AgentConfig) -> None:
    """Runs one engine until a signal asks for the end: the first drains the engine, the second kills it.

    Raises:
        InvalidInput: a file or address that the configuration names cannot be used.
    """
    tokens = ControlTokens(config.token_file)
    node = with_own_address(build_node(config.engine, os.environ))
    prepare_run_dir(config)
    changed = asyncio.Event()
    ranks = RankRecords(config.run_dir, node.ranks)
    control = SettingsPublisher(config.run_dir, config.request, config.expert, ranks, changed.set)
    experts = PublishedExperts(config.run_dir) if config.engine.has_expert_group and not node.headless else None

    def remove_records() -> None:
        ranks.remove()
        remove_expert_records(config.run_dir, node.ranks)
        if experts is not None:
            experts.forget()

    supervisor = build_supervisor(config, node, remove_records, changed.set, ranks.unstepped_s)
    server = AgentServer(config, tokens, supervisor, ranks, control, experts, changed)
    runner = web.AppRunner(server.build_app(), access_log=None, shutdown_timeout=_STREAM_END_S)
    await runner.setup()
    try:
        await listen(runner, config)
        leave = handle_signals(supervisor)
        await supervisor.run()
        # An engine that was drained over HTTP leaves an agent that still says so.
        await leave.wait()
    finally:
        server.end_streams()
        await runner.cleanup()


def prepare_run_dir(config: AgentConfig) -> None:
    """Makes the folder of the records and the log; raises `InvalidInput` when that cannot be done."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput([InputError("run_dir", f"cannot make {config.run_dir}: {error.strerror}")]) from None


def with_own_address(node: Node) -> Node:
    """The node with its own address in place of the leader's name, where it is the leader.

    vLLM listens there, and ZeroMQ does not resolve a name to listen on. Raises `InvalidInput` when the machine's name
    has no address.
    """
    if node.headless or is_address(node.leader):
        return node
    try:
        return replace(node, leader=socket.gethostbyname(socket.gethostname()))
    except OSError as error:
        message = f"the leader's own name {socket.gethostname()!r} has no address: {error.strerror}"
        raise InvalidInput([InputError("engine.nodes", message)]) from None


def is_address(text: str) -> bool:
    """Whether `text` is an IP address rather than a host name."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def build_supervisor(
    config: AgentConfig,
    node: Node,
    remove_records: Callable[[], None],
    on_change: Callable[[], None],
    unstepped_s: Callable[[float], float] = lambda now_s: 0.0,
) -> Supervisor:
    """The supervisor of vLLM on this node.

    Args:
        config: the agent's configuration.
        node: this node.
        remove_records: removes the records of an engine; called when none lives.
        on_change: called after each change of the phase and each start of a process.
        unstepped_s: for how long the engine has made no step though it has requests.
    """
    cpu_build = is_cpu_build()
    if cpu_build:
        check_library(NUMA_LIBRARY)
    environment = engine_environment(config, os.environ, cpu_build=cpu_build, cpus=len(os.sched_getaffinity(0)))
    return Supervisor(
        config.engine,
        [sys.executable, *build_command(config.engine, node, cpu_build=cpu_build, expert=config.expert)],
        environment,
        config.run_dir / "engine.log",
        headless=node.headless,
        unstepped_s=unstepped_s,
        on_restart=remove_records,
        on_change=on_change,
    )


def check_library(name: str) -> None:
    """Raises `InvalidInput` when a shared library is missing.

    Without libnuma vLLM's kernels fail to load, and vLLM then reports something else.
    """
    try:
        ctypes.CDLL(name)
    except OSError:
        message = f"vLLM on the CPU needs {name}, which this machine lacks; on Debian: apt-get install libnuma1"
        raise InvalidInput([InputError("engine", message)]) from None


async def listen(runner: web.AppRunner, config: AgentConfig) -> None:
    """Opens the agent's own port; raises `InvalidInput` when it is taken or not allowed."""
    try:
        await web.TCPSite(runner, config.listen.host, config.listen.port).start()
    except OSError as error:
        address = f"{config.listen.host}:{config.listen.port}"
        reason = os.strerror(error.errno or 0).lower()
        raise InvalidInput([InputError("listen", f"cannot listen on {address}: {reason}")]) from None
    log.info("agent %s listens on %s:%d", config.name or socket.gethostname(), config.listen.host, config.listen.port)


def handle_signals(supervisor: Supervisor) -> asyncio.Event:
    """The first SIGTERM or SIGINT drains and sets the event, each further one kills the engine."""
    leave = asyncio.Event()

    def on_signal() -> None:
        if leave.is_set():
            supervisor.request_kill()
        leave.set()
        supervisor.request_drain()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return leave
