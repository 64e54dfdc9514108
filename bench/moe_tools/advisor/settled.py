"""The roles that a fleet settles at: `plan_roles`, carried out again and again on the load of a warm-up run.

Roles move once a minute at most, and a simulated run lasts for seconds. So `auto` begins with the roles that it would
have after some minutes of the same kind of load.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.role_latency import RoleObservation, ServerLoad
from moe_scheduling.fleet.roles import RoleHistory, RoleSettings, SetRole, plan_roles

from moe_tools.advisor.fleet import FleetLoad, FleetShape, build_fleet
from moe_tools.simulator.pair_router import PairGateway
from moe_tools.simulator.simulation import load_vllm, simulate

# Seconds between two decisions: more than every interval of the settings.
_STEP_S = 10_000.0


def settle(shape: FleetShape, load: FleetLoad) -> FleetShape:
    """Returns the shape with the roles that it settles at under a load; without pairs a shape stays as it is.

    Args:
        shape: whose roles move.
        load: of the warm-up.
    """
    gateways: list[PairGateway] = []
    simulation = build_fleet(replace(shape, moves=False), load)
    make = simulation.dispatch
    if not callable(make):
        return shape

    def kept(*arguments: object) -> PairGateway:
        gateway = make(*arguments)  # type: ignore[arg-type]
        assert isinstance(gateway, PairGateway)
        gateways.append(gateway)
        return gateway

    simulate(replace(simulation, dispatch=kept), load_vllm())
    observed = gateways[0].observe_load(max(row.arrival_s for row in load.trace))
    # The last answers to end are the longest, and the mean is of those that ended last.
    observed = replace(observed, answer_tokens=fmean(row.output_tokens for row in load.trace))
    return replace(shape, begin=settled_prefill(observed, RoleSettings(ttft_growth=load.targets.ttft_growth)))


def settled_prefill(observed: RoleObservation, settings: RoleSettings) -> int:
    """Returns the number of prefill engines at which no role changes any more; that seen last where they do not settle.

    Args:
        observed: the load, whose servers are unified.
        settings: of the roles.
    """
    history, servers = RoleHistory(), list(observed.servers)
    waiting = False
    for number in range(4 * len(servers)):
        now_s = number * _STEP_S
        load = replace(observed, observed_s=now_s, servers=servers, measured_s=None)
        decision, history = plan_roles(load, settings, history, now_s)
        if isinstance(decision, SetRole):
            servers, waiting = _changed(servers, decision), False
        elif waiting:
            break
        else:
            # The first call only begins the time for which a gain has to last.
            waiting = True
    return sum(server.role is EngineRole.PREFILL for server in servers)


def _changed(servers: Sequence[ServerLoad], decision: SetRole) -> list[ServerLoad]:
    return [replace(row, role=decision.role) if row.name == decision.server else row for row in servers]
