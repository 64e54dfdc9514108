"""A replica over several nodes: which ranks a node runs, and which arguments vLLM gets."""

import itertools
import socket
from typing import Any

import pytest
from moe_agent.supervisor.engine_command import build_command
from moe_agent.supervisor.node import Node, build_node
from moe_contract.addresses import ANY, LOOPBACK, LOOPBACK_IPV6, is_bindable
from moe_contract.agent_config import EngineConfig
from moe_contract.input_errors import InvalidInput

LEADER = "deep-0.deep.models"


def engine(**changed: Any) -> EngineConfig:
    return EngineConfig.model_validate({"port": 8000, "model": "m", "served_name": "tiny", "nodes": 2} | changed)


def environment(index: object, leader: str | None = LEADER) -> dict[str, str]:
    named = {} if leader is None else {"LWS_LEADER_ADDRESS": leader}
    return named if index is None else named | {"LWS_WORKER_INDEX": str(index)}


def pairs(arguments: list[str]) -> dict[str, str]:
    return dict(itertools.pairwise(arguments))


@pytest.mark.parametrize(
    ("shape", "index", "ranks"),
    [
        ({"nodes": 1, "data_parallel": 4}, 0, range(4)),
        ({"data_parallel": 4}, 0, range(2)),
        ({"data_parallel": 4}, 1, range(2, 4)),
        ({"nodes": 4, "data_parallel": 16, "tensor_parallel": 2}, 3, range(12, 16)),
        ({"tensor_parallel": 16}, 0, range(1)),
        ({"tensor_parallel": 16}, 1, range(0)),
    ],
)
def test_each_node_has_its_ranks(shape, index, ranks):
    node = build_node(engine(**shape), environment(index))
    assert (node.index, node.ranks, node.headless) == (index, ranks, index > 0)


def test_one_node_asks_nothing_of_the_environment():
    assert build_node(engine(nodes=1), {}) == Node(index=0, leader="127.0.0.1", ranks=range(1))


def test_the_leader_of_several_ranks_serves_and_waits_for_the_others():
    config = engine(data_parallel=4)
    command = build_command(config, build_node(config, environment(0)), cpu_build=False)
    found = pairs(command)
    assert command[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert (found["--data-parallel-size"], found["--data-parallel-size-local"]) == ("4", "2")
    assert (found["--data-parallel-address"], found["--data-parallel-rpc-port"]) == (LEADER, "13345")
    assert (found["--host"], found["--port"]) == ("127.0.0.1", "8000")
    assert not {"--headless", "--data-parallel-start-rank", "--nnodes"} & set(command)


def test_a_further_node_has_no_server_and_its_ranks_follow_the_leaders():
    config = engine(nodes=4, data_parallel=8)
    command = build_command(config, build_node(config, environment(3)), cpu_build=False)
    found = pairs(command)
    assert command[:3] == ["-m", "moe_agent.vllm.headless", "--headless"]
    assert (found["--data-parallel-size"], found["--data-parallel-size-local"]) == ("8", "2")
    assert (found["--data-parallel-start-rank"], found["--data-parallel-address"]) == ("6", LEADER)
    assert found["--scheduler-cls"].endswith("OrderedScheduler")
    assert not {"--host", "--port", "--middleware"} & set(command)


@pytest.mark.parametrize("index", [0, 1])
def test_one_rank_over_several_nodes_is_configured_by_their_number_and_master(index):
    config = engine(tensor_parallel=16)
    command = build_command(config, build_node(config, environment(index)), cpu_build=False)
    found = pairs(command)
    assert (found["--nnodes"], found["--node-rank"], found["--master-addr"]) == ("2", str(index), LEADER)
    assert found["--distributed-executor-backend"] == "mp"
    assert ("--headless" in command) is (index == 1)
    assert "--data-parallel-size-local" not in command


@pytest.mark.parametrize(
    ("shape", "variables", "problem"),
    [
        ({"data_parallel": 3}, environment(0), "engine.data_parallel: 3 ranks do not spread evenly over 2 nodes"),
        ({"nodes": 4, "data_parallel": 2}, environment(0), "engine.data_parallel: 2 ranks do not spread"),
        ({"tensor_parallel": 3}, environment(0), "engine.tensor_parallel: tensor_parallel 3 does not spread evenly"),
        ({}, environment(0), "engine.tensor_parallel: tensor_parallel 1 does not spread"),
        ({"data_parallel": 2}, {}, "engine.nodes: LWS_WORKER_INDEX must be this node's number, 0 to 1, got ''"),
        ({"data_parallel": 2}, environment(2), "engine.nodes: LWS_WORKER_INDEX must be this node's number, 0 to 1"),
        ({"data_parallel": 2}, environment("-1"), "engine.nodes: LWS_WORKER_INDEX must be"),
        ({"data_parallel": 2}, environment("²"), "engine.nodes: LWS_WORKER_INDEX must be"),
        (
            {"data_parallel": 2},
            environment(1, None),
            "engine.nodes: LWS_LEADER_ADDRESS must name the leader of 2 nodes",
        ),
    ],
)
def test_a_shape_or_an_environment_that_does_not_fit_is_reported(shape, variables, problem):
    with pytest.raises(InvalidInput) as refused:
        build_node(engine(**shape), variables)
    assert str(refused.value).startswith(problem)


@pytest.mark.skipif(not is_bindable(LOOPBACK_IPV6), reason="this machine has no IPv6 on loopback")
@pytest.mark.parametrize(
    ("host", "reached"), [(ANY, {LOOPBACK, LOOPBACK_IPV6}), (LOOPBACK_IPV6, {LOOPBACK_IPV6}), (LOOPBACK, {LOOPBACK})]
)
def test_vllms_own_socket_takes_the_families_of_the_agents_address(virtual_engines, host, reached):
    from vllm.entrypoints.launchers.launcher import create_server_socket

    with create_server_socket((host, 0), reuse_port=False) as server:
        server.listen()
        port = server.getsockname()[1]
        assert {known for known in (LOOPBACK, LOOPBACK_IPV6) if connects(known, port)} == reached


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("shape", [{"data_parallel": 4}, {"tensor_parallel": 2}])
def test_vllm_understands_the_arguments_of_each_node(virtual_engines, shape, index):
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    config = engine(**shape)
    command = build_command(config, build_node(config, environment(index)), cpu_build=False)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[2:])
    assert parsed.headless is (index == 1)
    assert (parsed.master_addr == LEADER) is ("tensor_parallel" in shape)
    assert (parsed.data_parallel_address == LEADER) is ("data_parallel" in shape)
