"""The agent as a process: builds its parts, serves until a signal asks for the end, and leaves no engine behind."""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from moe_contract.addresses import authority, bind_socket, present_host
from moe_contract.agent_config import AgentConfig
from moe_contract.control_tokens import ControlTokens
from moe_contract.engine_process import engine_environment
from moe_contract.input_errors import InputError, InvalidInput

from moe_agent.api.server import AgentServer
from moe_agent.experts.document import PublishedExperts
from moe_agent.experts.obstacle import forget_obstacle
from moe_agent.shared_memory.control_record import SettingsPublisher
from moe_agent.shared_memory.expert_record import remove_expert_records
from moe_agent.shared_memory.rank_record import RankRecords
from moe_agent.shared_memory.transfer_record import TransferRecords
from moe_agent.shared_memory.turn_record import TurnRecords
from moe_agent.supervisor.engine_command import build_command
from moe_agent.supervisor.kv_transfer import find_missing_connector, with_transfer_environment
from moe_agent.supervisor.leader import Leader
from moe_agent.supervisor.node import Node, build_node
from moe_agent.supervisor.own_pod import with_name, with_own_address
from moe_agent.supervisor.rank_watch import RankRules, RankWatch
from moe_agent.supervisor.start_phases import find_model_cache
from moe_agent.supervisor.supervisor import EngineSupervisor, explain_os_error
from moe_agent.vllm.version import check_runs_here, is_cpu_build

log = logging.getLogger(__name__)

_STREAM_END_S = 2.0
NUMA_LIBRARY = "libnuma.so.1"


async def run_agent(config: AgentConfig) -> None:
    """Runs one engine until a signal asks for the end: the first drains the engine, the second kills it.

    Raises:
        InvalidInput: a file or address that the configuration names cannot be used.
    """
    tokens = ControlTokens(config.token_file)
    config = with_present_host(with_name(config, os.environ))
    node = with_own_address(build_node(config.engine, os.environ), os.environ)
    prepare_run_dir(config)
    changed = asyncio.Event()
    ranks = RankRecords(config.run_dir, node.ranks)
    control = SettingsPublisher(config.run_dir, config.request, config.expert, ranks, changed.set)
    forget_obstacle(config.run_dir)
    experts = PublishedExperts(config.run_dir) if config.engine.has_expert_group and not node.headless else None
    transfer = config.engine.kv_transfer
    transfers = None if transfer is None else TransferRecords(config.run_dir, node.ranks, transfer)

    def remove_records() -> None:
        ranks.remove()
        remove_expert_records(config.run_dir, node.ranks)
        if experts is not None:
            experts.forget()
        if transfers is not None:
            transfers.remove()

    leader = Leader(node.leader, config.listen.port) if node.headless else None
    # The ranks of a node without a server are not judged here: whether they are paused, their leader alone knows.
    rules = RankRules() if config.engine.nodes == 1 else RankRules(behind_s=math.inf)
    watch = None if node.headless else RankWatch(ranks, TurnRecords(config.run_dir, node.ranks), rules)
    supervisor = build_supervisor(config, node, remove_records, changed.set, ranks.unstepped_s, leader, watch)
    server = AgentServer(config, tokens, supervisor, ranks, control, experts, changed, transfers)
    runner = web.AppRunner(server.build_app(), access_log=None, shutdown_timeout=_STREAM_END_S)
    await runner.setup()
    try:
        await listen(runner, config)
        leave = handle_signals(supervisor)
        async with leader_known(leader):
            await supervisor.run_until(leave)
    finally:
        server.end_streams()
        await runner.cleanup()


@contextlib.asynccontextmanager
async def leader_known(leader: Leader | None) -> AsyncIterator[None]:
    """Looks for the leader's address while the block runs."""
    finding = asyncio.create_task(leader.find() if leader is not None else asyncio.sleep(0))
    try:
        yield
    finally:
        finding.cancel()
        await asyncio.gather(finding, return_exceptions=True)


def prepare_run_dir(config: AgentConfig) -> None:
    """Makes the folder of the records and the log; raises `InvalidInput` when that cannot be done."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput([InputError("run_dir", f"cannot make {config.run_dir}: {error.strerror}")]) from None


def with_present_host(config: AgentConfig) -> AgentConfig:
    """The configuration with an address for the engine that this machine has: `::` needs IPv6."""
    host = present_host(config.engine.host)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"host": host})})


def build_supervisor(
    config: AgentConfig,
    node: Node,
    remove_records: Callable[[], None],
    on_change: Callable[[], None],
    unstepped_s: Callable[[float], float] = lambda now_s: 0.0,
    leader: Leader | None = None,
    rank_watch: RankWatch | None = None,
) -> EngineSupervisor:
    """The supervisor of vLLM on this node.

    Args:
        config: the agent's configuration.
        node: this node.
        remove_records: removes the records of an engine; called when none lives.
        on_change: called after each change of the phase and each start of a process.
        unstepped_s: for how long the engine has made no step though it has requests.
        leader: the leader of the replica; None on the leader itself, and where a replica has one node.
        rank_watch: of the ranks of this node; None where they are not watched.
    """
    check_runs_here()
    cpu_build = is_cpu_build()
    if cpu_build:
        check_library(NUMA_LIBRARY)
    environment = engine_environment(config, os.environ, cpu_build=cpu_build, cpus=len(os.sched_getaffinity(0)))
    environment = with_transfer_environment(environment, config.engine, os.environ, cpu_build=cpu_build)
    return EngineSupervisor(
        config.engine,
        [sys.executable, *build_command(config.engine, node, cpu_build=cpu_build, expert=config.expert)],
        environment,
        config.run_dir / "engine.log",
        headless=node.headless,
        leader_end=None if leader is None else leader.wait_for_end,
        unstepped_s=unstepped_s,
        rank_watch=rank_watch,
        model_cache=find_model_cache(config.engine.model, environment),
        obstacle=find_missing_connector(config.engine),
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
    address = authority(config.listen.host, config.listen.port)
    try:
        await web.SockSite(runner, bind_socket(config.listen.host, config.listen.port)).start()
    except OSError as error:
        reason = explain_os_error(error)
        raise InvalidInput([InputError("listen", f"cannot listen on {address}: {reason}")]) from None
    log.info("agent %s listens on %s", config.name, address)


def handle_signals(supervisor: EngineSupervisor) -> asyncio.Event:
    """The first SIGTERM or SIGINT drains and sets the event, each further one kills the engine."""
    leave = asyncio.Event()

    def on_signal() -> None:
        if leave.is_set():
            supervisor.request_kill()
        leave.set()
        supervisor.request_end()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return leave
