"""The agent's state document, built from the supervisor, the ranks' records and the settings in force. Pure."""

from moe_contract.agent_state import AgentSettingsInForce, AgentState, EngineProcess, RankReport
from moe_contract.kv_transfer import KvTransferState
from moe_contract.pod_identity import PodIdentity

from moe_agent.shared_memory.control_record import Control
from moe_agent.shared_memory.rank_record import RankState
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase


def build_state(
    name: str,
    model: str,
    supervisor: EngineSupervisor,
    control: Control,
    ranks: dict[int, RankState],
    now_s: float,
    pod: PodIdentity,
    identity: str = "",
    not_balanced: str = "",
    kv_transfer: KvTransferState | None = None,
) -> AgentState:
    """The answer of `GET /v1/state`.

    Args:
        name: of the engine.
        model: name that clients use.
        supervisor: of the engine's process.
        control: settings in force.
        ranks: newest records, by rank.
        now_s: the monotonic clock of the machine.
        pod: the pod that answers.
        identity: of the engine.
        not_balanced: why its experts cannot be balanced.
        kv_transfer: its transfers of KV blocks; None where it takes no part.
    """
    ready = supervisor.phase is Phase.READY
    return AgentState(
        name=name,
        phase=supervisor.phase.value,
        accepting=supervisor.accepting,
        engine=EngineProcess(
            url=supervisor.url,
            model=model,
            pid=supervisor.pid,
            restarts=supervisor.restarts,
            last_exit=supervisor.last_exit,
            max_model_len=supervisor.max_model_len,
            identity=identity,
            not_balanced=not_balanced,
        ),
        config=AgentSettingsInForce(version=control.version, request=control.request, expert=control.expert),
        ranks=tuple(
            RankReport.of(rank, signal_age_s(state, ready, now_s), state.signal, str(supervisor.troubles.get(rank, "")))
            for rank, state in sorted(ranks.items())
        ),
        pod=pod,
        kv_transfer=kv_transfer,
        start=supervisor.start,
    )


def signal_age_s(state: RankState, ready: bool, now_s: float) -> float:
    """Age of a rank's record. An idle rank makes no steps, so its record stays valid while its engine is ready."""
    return 0.0 if ready and state.idle else max(0.0, now_s - state.written_s)
