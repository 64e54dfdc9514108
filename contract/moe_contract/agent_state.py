"""The state of a node agent, `GET /v1/state`: what its engine does, and the settings in force.

The agent writes one JSON object with `write_agent_state`, or with `?watch=1` one line for each change. The operator and
the command line read it with `read_agent_state`, the gateway, which reads one at each engine step, with
`read_engine_state`: the same without the settings, which costs a third less. During a rolling upgrade both sides may
differ in version: a reader skips unknown fields and uses the defaults of absent ones.
"""

from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar

import orjson
from moe_scheduling.expert.settings import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal
from pydantic import Field, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from moe_contract.kv_transfer import KvTransferState
from moe_contract.pod_identity import NO_POD, PodIdentity

READY = "ready"


class RankTrouble(StrEnum):
    """Why a data-parallel rank keeps its group from going on.

    `ENDED`: its process is gone. `SUSPENDED`: its process, or a worker below, is stopped (SIGSTOP). `BEHIND`: it has
    not begun the step in which the other ranks wait for it. `SILENT`: it has requests and makes no step.
    """

    ENDED = "ended"
    SUSPENDED = "suspended"
    BEHIND = "behind"
    SILENT = "silent"

    @property
    def is_certain(self) -> bool:
        """Whether a request that is sent there now gets no answer; a silent rank may be amid a very long step."""
        return self in (RankTrouble.ENDED, RankTrouble.SUSPENDED)

    @property
    def words(self) -> str:
        """The trouble in words that follow the name of the rank."""
        return _WORDS[self]


_WORDS = {
    RankTrouble.ENDED: "its process has ended",
    RankTrouble.SUSPENDED: "its process is suspended",
    RankTrouble.BEHIND: "the other ranks wait for it in their next step",
    RankTrouble.SILENT: "it has requests and makes no step",
}


def none_if_invalid(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """The validated value, or None: settings of a newer version must not make the rest unreadable."""
    try:
        return validate(value)
    except ValidationError:
        return None


T = TypeVar("T")
Lenient = Annotated[T | None, WrapValidator(none_if_invalid)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcess:
    """The engine that the agent runs.

    Attributes:
        url: of vLLM's HTTP server.
        model: name of the model that clients use.
        pid: of the newest process; None while none runs.
        restarts: restarts after a failure since the agent started.
        last_exit: how the last process ended; empty before the first end.
        max_model_len: longest sequence of the model in tokens; None until the engine is ready.
        identity: equal for engines that serve the same model with the same arguments; empty where it is not known.
        not_balanced: why vLLM cannot balance the experts of this model; empty where it can.
    """

    url: str = ""
    model: str | None = None
    pid: int | None = None
    restarts: int = 0
    last_exit: str = ""
    max_model_len: int | None = None
    identity: str = ""
    not_balanced: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProgress:
    """How far the start of an engine is.

    Attributes:
        phase: in words that change with the phase and not with its numbers, such as `loading weights`.
        progress: how far the phase is, such as `3 of 8 files`; empty where it has no measure.
        age_s: seconds since the phase began, at most a billion.
    """

    phase: str
    progress: str = ""
    age_s: Annotated[float, Field(ge=0.0, le=1e9)] = 0.0

    @property
    def words(self) -> str:
        """The phase and how far it is, in one text."""
        return f"{self.phase} {self.progress}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettingsInForce:
    """The settings that the ranks order by.

    Attributes:
        version: rises by one at each change, starting at 1.
        request: order of the waiting queue; None where this version cannot read it.
        expert: placement of experts; None where this version cannot read it.
    """

    version: int = 0
    request: Lenient[RequestSettings] = None
    expert: Lenient[ExpertSettings] = None

    def document(self) -> dict[str, Any]:
        """The settings in the form of a control body; a section that could not be read is absent."""
        sections = (("request", self.request), ("expert", self.expert))
        return {name: asdict(settings) for name, settings in sections if settings is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport(EngineSignal):
    """The newest signal of one data-parallel rank: an `EngineSignal` with three more fields.

    Attributes:
        rank: number of the rank.
        age_s: seconds between the signal's writing and this answer; 0 for an idle rank of an engine that is ready.
        trouble: a `RankTrouble`, or one of a newer agent; empty while the rank goes on.
    """

    rank: int
    age_s: float = 0.0
    trouble: str = ""

    @classmethod
    def of(cls, rank: int, age_s: float, signal: EngineSignal, trouble: str = "") -> Self:
        """The report of a signal."""
        values = {name: getattr(signal, name) for name in _SIGNAL_FIELDS}
        return cls(rank=rank, age_s=age_s, trouble=trouble, **values)

    @property
    def trouble_words(self) -> str:
        """The trouble in words that follow the name of the rank; empty while it goes on."""
        return RankTrouble(self.trouble).words if self.trouble in set(RankTrouble) else self.trouble

    @property
    def signal(self) -> EngineSignal:
        """The signal without rank and age."""
        return EngineSignal(**{name: getattr(self, name) for name in _SIGNAL_FIELDS})


_SIGNAL_FIELDS = tuple(field.name for field in fields(EngineSignal))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """The part of the answer that changes with the engine's steps.

    Attributes:
        phase: `starting`, `ready`, `draining`, `stopped` or `backoff`.
        accepting: whether the engine takes new requests.
        engine: the process.
        ranks: one row for each rank whose record can be read, by number.
        kv_transfer: what the engine can do with KV blocks of others; None: it takes no part.
        start: how far its start is; None while it does not start.
    """

    phase: str
    accepting: bool = False
    engine: EngineProcess = EngineProcess()
    ranks: tuple[RankReport, ...] = ()
    kv_transfer: KvTransferState | None = None
    start: Lenient[StartProgress] = None

    @property
    def ready(self) -> bool:
        """Whether the engine has loaded its model and serves."""
        return self.phase == READY

    @property
    def troubled_ranks(self) -> tuple[RankReport, ...]:
        """The ranks that keep the others of their group from going on."""
        return tuple(rank for rank in self.ranks if rank.trouble)

    @property
    def computed_tokens(self) -> int:
        """Prompt and output tokens that all ranks computed since the engine's start."""
        return sum(rank.computed_tokens for rank in self.ranks)

    @property
    def kv_usage(self) -> float:
        """Used part of the KV blocks of the fullest rank, 0 to 1; 0 without a rank."""
        return max((rank.kv_usage for rank in self.ranks), default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentState(EngineState):
    """The whole answer.

    Attributes:
        name: of the engine.
        config: the settings in force.
        pod: the pod that answers; empty outside of a cluster.
    """

    name: str = ""
    config: AgentSettingsInForce = AgentSettingsInForce()
    pod: PodIdentity = NO_POD

    @property
    def notable(self) -> tuple[object, ...]:
        """What matters at once when it changes; the rest is numbers, which change with the load."""
        troubles = tuple((rank.rank, rank.trouble) for rank in self.troubled_ranks)
        return self.phase, self.accepting, self.engine, self.config, self.pod, troubles

    @property
    def request_policy(self) -> str | None:
        """Name of the order of the waiting queue; None where it is not known."""
        return None if self.config.request is None else self.config.request.policy.value


_READER = TypeAdapter(AgentState)
_ENGINE_READER = TypeAdapter(EngineState)


def write_agent_state(state: AgentState) -> bytes:
    """The state as one line of JSON, newline included."""
    return orjson.dumps(state, option=orjson.OPT_APPEND_NEWLINE)


def read_agent_state(text: bytes) -> AgentState:
    """The state in a JSON text.

    Raises:
        ValueError: it is no JSON, lacks a required field, or a field has another type.
    """
    return _READER.validate_json(text)


def read_engine_state(text: bytes) -> EngineState:
    """The state in a JSON text, without name and settings.

    Raises:
        ValueError: as `read_agent_state`.
    """
    return _ENGINE_READER.validate_json(text)
