"""Configuration of the node agent: its file, the settings file laid over it, and the body of its control route.

The operator's plan writes the file, `moeserving agent` loads it, and `PUT /v1/config` changes the settings.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from moe_scheduling.expert.settings import ExpertSettings
from moe_scheduling.request.order import RequestSettings
from pydantic import Field

from moe_contract.addresses import LOOPBACK
from moe_contract.documents import parse_document, parse_model, read_file, read_optional_file
from moe_contract.input_errors import InputError, InvalidInput
from moe_contract.kv_transfer import KvTransferConfig
from moe_contract.sections import Listen, Port, Seconds, Section


class EngineConfig(Section):
    """One vLLM server, as the agent starts it.

    Attributes:
        host: address that vLLM listens on; `::` is all addresses of IPv4 and IPv6.
        port: its port, the same over restarts.
        model: folder, id on the hub, or `s3://` address.
        served_name: name of the model that clients use.
        revision: branch, tag or commit on the hub; None: the default branch.
        data_parallel: data-parallel ranks.
        tensor_parallel: tensor-parallel ranks of each.
        expert_parallel: spread the experts over all ranks.
        redundant_experts: slots of an expert group beyond one for each expert; the sum must divide by its ranks.
        nodes: nodes over which the replica is spread; this node's number is `LWS_WORKER_INDEX`, the leader's address
            `LWS_LEADER_ADDRESS`.
        args: further arguments of vLLM; the last of an option given twice wins.
        env: environment variables of the engine; they win over all others.
        startup_timeout_s: time to load the model, after which an engine that is not ready is restarted.
        liveness_timeout_s: time without an answer after which the engine is restarted.
        drain_timeout_s: time that running streams have to end when the engine stops.
        guarded: answer the deployment's own gateways alone (`peer_tokens.py`).
        kv_transfer: exchange KV blocks with other engines; None: it takes no part.
        kv_offload_bytes: memory of the host for the KV blocks of one data-parallel rank; None: nothing is offloaded.
    """

    host: str = LOOPBACK
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
    guarded: bool = False
    kv_transfer: KvTransferConfig | None = None
    kv_offload_bytes: Annotated[int, Field(ge=1)] | None = None

    @property
    def has_expert_group(self) -> bool:
        """Whether experts are spread over several ranks, so that they can be moved."""
        return self.expert_parallel and self.data_parallel * self.tensor_parallel > 1


class AgentSettings(Section):
    """The settings that can change while an engine runs.

    Attributes:
        request: order of the waiting queue.
        expert: placement of experts; without effect where there is no expert group.
    """

    request: RequestSettings = RequestSettings()
    expert: ExpertSettings = ExpertSettings()


class AgentConfig(Section):
    """The agent's configuration file.

    Attributes:
        name: of the engine; None is the pod's, from `MOESERVING_POD_NAME`, else the machine's host name.
        run_dir: folder for shared-memory records and the engine's log `engine.log`; made if absent.
        listen: address of the agent's HTTP server.
        token_file: control tokens, one a line.
        settings_file: a JSON object `{"request": {...}, "expert": {...}}`, laid over this file at the start when it
            exists.
        engine: the engine.
        request: settings at the start.
        expert: settings at the start.
    """

    name: str | None = None
    run_dir: Path
    listen: Listen
    token_file: Path
    settings_file: Path | None = None
    engine: EngineConfig
    request: RequestSettings = RequestSettings()
    expert: ExpertSettings = ExpertSettings()

    @property
    def settings(self) -> AgentSettings:
        """The settings at the start."""
        return AgentSettings(request=self.request, expert=self.expert)


def load_agent_config(path: Path) -> AgentConfig:
    """Reads the agent's file, and lays the settings file over it.

    Raises:
        InvalidInput: one of them cannot be read or is not valid.
    """
    config = parse_model(AgentConfig, parse_document(read_file(path, "file")))
    if config.settings_file is None:
        return config
    text = read_optional_file(config.settings_file, "settings_file")
    if text is None:
        return config
    try:
        settings = parse_agent_settings(parse_document(text), config.settings)
    except InvalidInput as error:
        rows = [InputError("settings_file", f"{config.settings_file}: {row}") for row in error.errors]
        raise InvalidInput(rows) from None
    return config.model_copy(update={"request": settings.request, "expert": settings.expert})


def parse_agent_settings(document: object, current: AgentSettings) -> AgentSettings:
    """The settings that a control body or a settings file asks for; an absent field keeps its current value.

    Raises:
        InvalidInput: the document is not valid; no part takes effect.
    """
    if isinstance(document, dict):
        document = dict(document)
        for name, kept in (("request", asdict(current.request)), ("expert", asdict(current.expert))):
            change = document.get(name, {})
            document[name] = kept | change if isinstance(change, dict) else change
    return parse_model(AgentSettings, document)
