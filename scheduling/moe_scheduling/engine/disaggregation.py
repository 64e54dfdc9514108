"""Values of prefill/decode disaggregation: roles of engines, the transfer of KV blocks, and the objective.

Read by `pair_choice.py` for each request and by `fleet/roles.py` for the roles. With disaggregation one engine computes
the prompt of a request, its KV blocks travel, and another engine decodes.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from moe_scheduling.settings import check_settings, setting

# vLLM schedules a step while the one before it runs. So a request waits for half of the running step until its blocks
# are asked for; when they are there, for half of the next one and for the one that is scheduled already, and takes part
# in the one after that.
STEPS_TO_FIRST_TOKEN = 3.0


class EngineRole(StrEnum):
    """The part of a request that an engine is preferred for."""

    UNIFIED = "unified"
    PREFILL = "prefill"
    DECODE = "decode"

    # Enum's own hash is a function in Python; this one is called for each request.
    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """Transfer of KV blocks from one engine to another.

    Attributes:
        token_bytes: bytes of one token in the KV cache, over all layers.
        bytes_per_s: measured rate of the link between two engines.
        fixed_s: seconds of a transfer of any size: the second request, descriptors, the notice of its end.
        handshake_s: seconds of the first contact of a pair of engines.

    Raises:
        ValueError: a value is negative or not finite, or the rate is 0.
    """

    token_bytes: float
    bytes_per_s: float
    fixed_s: float = 0.003
    handshake_s: float = 0.2

    def __post_init__(self) -> None:
        for name in ("token_bytes", "bytes_per_s", "fixed_s", "handshake_s"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite")
        if not self.bytes_per_s:
            raise ValueError("bytes_per_s must be greater than 0")

    def transfer_s(self, tokens: int, *, met: bool) -> float:
        """Returns the seconds until `tokens` tokens have arrived; `met`: the two engines have had contact before."""
        if tokens <= 0:
            return self.fixed_s
        return self.fixed_s + tokens * self.token_bytes / self.bytes_per_s + (0.0 if met else self.handshake_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTargets:
    """Objective of the choice: bounds, or an exchange of TTFT for the time between tokens.

    Without bounds the sum of the seconds that a request waits for its first token and `answer_weight` times the seconds
    that answers take longer, its own and those of the requests beside it, is least. A weight of 1 makes that the sum of
    the times to the last token.

    Only pairs are chosen whose first token is predicted within `1 + ttft_growth` times the TTFT of the soonest whole
    request, where there is one: what later requests wait behind a prompt is not in the sum. For engines with the role
    `PREFILL` the time until the prompt is computed counts instead of TTFT.

    Attributes:
        ttft_s: bound of the time to the first token (seconds); None: no bound.
        inter_token_s: bound of the time between two tokens while prompts are computed (seconds); None: no bound.
        answer_weight: seconds of TTFT that one second more of an answer is worth.
        ttft_growth: part by which the TTFT of a pair may exceed that of the soonest whole request.

    Raises:
        ValueError: a bound is not greater than 0 and finite, or another value is negative or not finite.
    """

    ttft_s: float | None = setting(
        None,
        "Bound of the time to the first token. A request goes where it is kept, at the least cost for all others.",
        above=0,
    )
    inter_token_s: float | None = setting(
        None,
        "Bound of the time between two tokens of an answer while prompts are computed. A request goes where it is "
        "kept for all answers, and of those to the least time to the first token; engines under `sjf` cut prompts so "
        "that their steps keep it.",
        above=0,
    )
    answer_weight: float = 1.0
    ttft_growth: float = 0.5

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("answer_weight", "ttft_growth"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite")

    @property
    def is_bounded(self) -> bool:
        """Whether TTFT or the time between tokens has a bound."""
        return self.ttft_s is not None or self.inter_token_s is not None
