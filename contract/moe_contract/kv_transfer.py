"""KV blocks that travel between engines: the parts of the three documents that say how.

The agent's configuration says whether its engine takes part (`KvTransferConfig`), the agent's state what its engine can
(`KvTransferState`), and the gateway's configuration whether requests may be split (`Disaggregation`).
"""

from dataclasses import dataclass
from typing import Annotated

from moe_scheduling.engine.disaggregation import EngineRole
from pydantic import Field

from moe_contract.sections import Port, Seconds, Section


class KvTransferConfig(Section):
    """An engine whose KV blocks travel by vLLM's NixlConnector, which pulls them.

    Attributes:
        role: of the engine; `unified`: it computes prompts, decodes, or does both.
        port: side channel of the first data-parallel rank; rank r listens on `port + r`.
        lease_s: how long an engine holds the blocks of a computed prompt for the one that decodes.
    """

    role: EngineRole = EngineRole.UNIFIED
    port: Port
    lease_s: Annotated[Seconds, Field(ge=5)] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransferState:
    """What an engine can do with KV blocks of others.

    Attributes:
        role: of the engine, as configured.
        lease_s: how long it holds the blocks of a computed prompt (seconds).
        peers: equal for engines that can exchange blocks: version of vLLM, model, types and shapes; empty: not known
            yet, so it takes no part.
        token_bytes: bytes of one token in the KV cache, over all layers; 0: not known.
        bytes_per_s: measured rate of the transfers to this engine; 0: none yet.
        transfers: transfers to this engine since its start.
        failed: failed ones of them.
    """

    role: EngineRole = EngineRole.UNIFIED
    lease_s: float = 30.0
    peers: str = ""
    token_bytes: float = 0.0
    bytes_per_s: float = 0.0
    transfers: int = 0
    failed: int = 0


class Disaggregation(Section):
    """Requests whose prompt one engine computes and whose answer another decodes.

    Attributes:
        moves_roles: whether the gateway moves the roles of unified engines with the load; else each engine keeps the
            role that its agent says.
    """

    moves_roles: bool = True
