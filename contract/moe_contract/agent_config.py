"""Configuration of the node agent: the file that the plan writes, and the body that its control route takes."""

from pathlib import Path
from typing import Annotated

from moe_scheduling.expert.decision import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Section):
    """Where the agent's own HTTP server listens."""

    host: str = "127.0.0.1"
    port: Port


class EngineConfig(_Section):
    """One vLLM server, as the agent starts it.

    Attributes:
        redundant_experts: slots of an expert group beyond one for each expert; the sum must divide by its ranks.
    """

    host: str = "127.0.0.1"
    port: Port
    model: str
    served_name: str
    revision: str | None = None
    data_parallel: Annotated[int, Field(ge=1)] = 1
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    expert_parallel: bool = False
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    nodes: Annotated[int, Field(ge=1)] = 1
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    startup_timeout_s: Seconds = 1800.0
    liveness_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 120.0

    @property
    def has_expert_group(self) -> bool:
        """Whether experts are spread over several ranks, so that they can be moved."""
        return self.expert_parallel and self.data_parallel * self.tensor_parallel > 1


class AgentConfig(_Section):
    """The whole file.

    Attributes:
        name: of the engine; None is the machine's host name, which in a cluster is the pod's.
        settings_file: a JSON object `{"request": {...}, "expert": {...}}`, laid over this file at the start when it
            exists.
    """

    name: str | None = None
    run_dir: Path
    listen: Listen
    token_file: Path
    settings_file: Path | None = None
    engine: EngineConfig
    request: RequestSettings = RequestSettings()
    expert: ExpertSettings = ExpertSettings()
