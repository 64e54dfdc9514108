"""Settings of agents and gateways: what their files say beside pods of another release, and what those that run get."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.agent_config import AgentSettings, parse_agent_settings
from moe_contract.agent_state import read_agent_state
from moe_contract.gateway_config import GatewaySettings, parse_gateway_settings
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.peers import Peer, build_change, differs
from moe_operator.plan.written_settings import as_json, build_body, differs_from
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.engine.disaggregation import LatencyTargets
from moe_scheduling.request.order import RequestSettings
from test_roles import plan, resource

# The fields of release 0.1, whose pods refuse any other one.
REQUEST = frozenset(
    {"ageing_horizon_s", "ageing_rate", "cut_prefills", "defer_scheduling", "fairness_horizon_s", "kv_growth_blocks"}
    | {"output_weight", "policy", "priority_step_s", "yield_prefills"}
)
DISPATCH = frozenset({"policy", "saturation_s", "stale_after_s", "stickiness_s"})
BOUNDS = st.none() | st.sampled_from([0.02, 0.5])


def files_of(targets: dict[str, str] | None) -> dict[str, Any]:
    scheduling = {} if targets is None else {"scheduling": {"engine": {"targets": targets}}}
    planned = plan(resource(**scheduling)).objects
    data = next(entry["data"] for entry in planned if entry["kind"] == "ConfigMap")
    return {name: json.loads(data[name]) for name in ("request.json", "gateway.json")}


@pytest.mark.parametrize("targets", [None, {}])
def test_pods_of_the_release_before_can_read_the_files_of_a_resource_without_bounds(targets) -> None:
    files = files_of(targets)
    assert set(files["request.json"]["request"]) == set(files["gateway.json"]["request"]) == REQUEST
    assert set(files["gateway.json"]["dispatch"]) == DISPATCH


def test_the_files_say_the_bounds_of_a_resource_and_no_other_field_of_the_targets() -> None:
    files = files_of({"interToken": "20ms"})
    assert files["request.json"]["request"]["inter_token_s"] == 0.02
    assert files["gateway.json"]["dispatch"]["targets"] == {"inter_token_s": 0.02}


@given(BOUNDS, BOUNDS, BOUNDS, BOUNDS)
def test_a_running_gateway_has_the_wanted_bounds_after_the_body(ttft_s, inter_s, old_ttft_s, old_inter_s) -> None:
    def settings(ttft: float | None, inter: float | None) -> GatewaySettings:
        targets = LatencyTargets(ttft_s=ttft, inter_token_s=inter)
        return GatewaySettings(
            dispatch=EngineSettings(targets=targets),
            request=RequestSettings(inter_token_s=inter),
            engines=(),
            groups=(),
        )

    current, aim = settings(old_ttft_s, old_inter_s), settings(ttft_s, inter_s)
    wanted = {"request": as_json(aim.request), "dispatch": as_json(aim.dispatch), "groups": []}
    assert differs_from(wanted, current.document()) is (current != aim)
    taken = parse_gateway_settings(build_body(wanted, current.document()), current)
    assert taken == aim
    assert not differs_from(wanted, taken.document())


def test_removing_a_bound_reaches_running_agents() -> None:
    wanted = {"request": as_json(RequestSettings())}
    agent = Peer(pod="a", url="", component="engine", revision="")
    bounded = RequestSettings(inter_token_s=0.02)
    states = States(engines={"a": state_of(asdict(bounded))})
    assert differs(wanted, agent, states)
    taken = parse_agent_settings(build_change(wanted, agent, states), AgentSettings(request=bounded))
    assert taken.request == RequestSettings()


def test_an_agent_of_the_release_before_gets_no_field_that_it_does_not_know() -> None:
    agent = Peer(pod="a", url="", component="engine", revision="")
    older = {name: value for name, value in asdict(RequestSettings()).items() if name in REQUEST}
    states = States(engines={"a": state_of(older)})
    assert not differs({"request": as_json(RequestSettings())}, agent, states)
    other = {"request": as_json(RequestSettings(ageing_rate=7.0))}
    assert differs(other, agent, states)
    assert build_change(other, agent, states) == other
    assert set(other["request"]) == REQUEST


def test_a_bound_is_removed_too_where_the_settings_in_force_cannot_be_read() -> None:
    wanted = {"request": as_json(RequestSettings()), "dispatch": as_json(EngineSettings())}
    body = build_body(wanted, {})
    assert body["request"]["inter_token_s"] is None
    assert body["dispatch"]["targets"] == {}


def state_of(request: dict[str, Any]) -> Any:
    document = {"phase": "ready", "accepting": True, "engine": {"pid": None, "restarts": 0}, "ranks": []}
    return read_agent_state(json.dumps(document | {"config": {"request": request}}, default=str).encode())
