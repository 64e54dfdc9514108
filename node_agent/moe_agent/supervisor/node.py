"""Which node of a replica this is: from the configuration and what a LeaderWorkerSet sets in each pod. Pure.

Used by `moe_agent.app` for the engine's arguments, its shared-memory records and its supervisor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_contract.addresses import loopback
from moe_contract.agent_config import EngineConfig
from moe_contract.input_errors import InputError, InvalidInput

INDEX_VARIABLE = "LWS_WORKER_INDEX"
LEADER_VARIABLE = "LWS_LEADER_ADDRESS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of one replica.

    Attributes:
        index: its number; 0 is the leader, whose engine alone has an HTTP server.
        leader: host name or address of the leader.
        ranks: the data-parallel ranks whose schedulers run here; none on a node that lends its devices to the ranks of
            another one.
    """

    index: int
    leader: str
    ranks: range

    @property
    def headless(self) -> bool:
        """No HTTP server of an engine runs here."""
        return self.index > 0


def build_node(engine: EngineConfig, environment: Mapping[str, str]) -> Node:
    """This node.

    Raises:
        InvalidInput: the shape does not spread evenly over the nodes, or the environment does not say which node it is.
    """
    if engine.nodes == 1:
        return Node(index=0, leader=loopback(), ranks=range(engine.data_parallel))
    check_shape(engine)
    index, leader = _read_index(engine.nodes, environment), environment.get(LEADER_VARIABLE, "")
    if not leader:
        raise InvalidInput(
            [InputError("engine.nodes", f"{LEADER_VARIABLE} must name the leader of {engine.nodes} nodes")]
        )
    return Node(index=index, leader=leader, ranks=_ranks_of(engine, index))


def check_shape(engine: EngineConfig) -> None:
    """Whether each node gets as many ranks as the others, or one rank as much of each node."""
    if engine.data_parallel == 1:
        if engine.tensor_parallel % engine.nodes:
            message = f"tensor_parallel {engine.tensor_parallel} does not spread evenly over {engine.nodes} nodes"
            raise InvalidInput([InputError("engine.tensor_parallel", message)])
    elif engine.data_parallel % engine.nodes:
        message = f"{engine.data_parallel} ranks do not spread evenly over {engine.nodes} nodes"
        raise InvalidInput([InputError("engine.data_parallel", message)])


def _read_index(nodes: int, environment: Mapping[str, str]) -> int:
    text = environment.get(INDEX_VARIABLE, "")
    if text.isascii() and text.isdecimal() and int(text) < nodes:
        return int(text)
    message = f"{INDEX_VARIABLE} must be this node's number, 0 to {nodes - 1}, got {text!r}"
    raise InvalidInput([InputError("engine.nodes", message)])


def _ranks_of(engine: EngineConfig, index: int) -> range:
    if engine.data_parallel == 1:
        return range(1 if index == 0 else 0)
    each = engine.data_parallel // engine.nodes
    return range(index * each, (index + 1) * each)
