"""Pods of these tests, as the API server shows them."""

import json
from collections.abc import Mapping
from typing import Any

from moe_contract.agent_state import AgentState, read_agent_state
from moe_contract.gateway_state import GatewayState, read_gateway_state
from moe_operator.autoscale.signal import States
from moe_operator.plan.names import Names

Document = dict[str, Any]
NAMES = Names("tiny")


def pod(
    name: str = "tiny-engine-a",
    component: str = "engine",
    *,
    ready: bool = True,
    revision: str = "stable",
    ending: bool = False,
    phase: str = "Running",
    **labels: str,
) -> Document:
    """A pod of the resource `tiny`, with an address."""
    own = NAMES.labels(component, revision if component == "engine" else None)
    port = {"name": "agent", "containerPort": 8080} if component == "engine" else {"name": "admin", "containerPort": 1}
    metadata: Document = {"name": name, "namespace": "ns", "labels": own | labels}
    if ending:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    return {
        "metadata": metadata,
        "spec": {"containers": [{"name": component, "image": "registry.test/it:1", "ports": [port]}]},
        "status": {"phase": phase, "podIP": "10.0.0.7", "conditions": [condition]},
    }


def agent(phase: str = "ready", **values: Any) -> AgentState:
    """The state of an agent, read from its JSON."""
    rank = {
        "rank": 0, "age_s": 0.0, "step": 1, "running": 3, "waiting": 1, "waiting_prefill_tokens": 9,
        "running_prefill_tokens": 4, "decode_tokens": 2, "kv_usage": 0.5, "preemptions": 0, "computed_tokens": 1000,
        "step_time": None, "expert_balance": 1.0, "expert_pressure": 1.0,
    }  # fmt: skip
    state = {"phase": phase, "engine": {"restarts": 0, "last_exit": ""}, "ranks": [rank], "config": {}}
    return read_agent_state(json.dumps(state | values).encode())


def gateway(**values: Any) -> GatewayState:
    """The state of a gateway, read from its JSON."""
    state = {
        "held": 0, "held_since_s": None, "in_flight": 2, "wait_s": 0.25, "ttft_s": 0.5, "arrivals_per_s": 2.0,
        "config": {},
    }  # fmt: skip
    return read_gateway_state(json.dumps(state | values).encode())


def states(by_pod: Mapping[str, AgentState | GatewayState]) -> States:
    """The states of agents and gateways by pod."""
    return States(
        engines={name: state for name, state in by_pod.items() if isinstance(state, AgentState)},
        gateways={name: state for name, state in by_pod.items() if isinstance(state, GatewayState)},
    )
