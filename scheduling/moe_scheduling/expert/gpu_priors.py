"""What expert work takes on a GPU before anything was measured there.

Fitted to the fused-kernel tables of vLLM 0.24 in ai-dynamo/aiconfigurator (commit 095f58a5, Apache-2.0), balanced load
over 1 to 128 ranks: Qwen3-30B-A3B and Qwen3-235B-A22B in bfloat16 (median error 3 to 4 %, p90 10 to 15 %), Qwen3 in fp8
with scales by block (2 to 5 %). In these tables time rises by a constant for each expert that is read and one for each
token, beside what no placement changes; so `pad_tokens` is as many tokens as are computed while an expert is read. The
rates are rounded; those of fp8 differ by a factor of two between the models. Other GPUs and formats have no prior:
their costs are those that the engine measures.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkCosts:
    """Costs of expert work as `ExpertCosts` has them.

    Attributes:
        token_s: seconds to compute one token of one expert.
        expert_s: seconds to read the weights of one expert; 0: not known.
        pad_tokens: tokens by which an expert's last tile is computed in vain.
    """

    token_s: float
    expert_s: float = 0.0
    pad_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class _Rates:
    """Bytes that are read, and floating-point operations, a second."""

    bytes_s: float
    flop_s: float


_RATES = {
    ("H100", 2): _Rates(3.1e12, 1.15e15),
    ("H100", 1): _Rates(2.9e12, 5.0e14),
    ("H200", 2): _Rates(4.5e12, 1.1e15),
    ("H200", 1): _Rates(4.1e12, 5.0e14),
}
# A multiplication and an addition for each parameter.
_FLOP = 2


def work_prior(gpu: str, expert_bytes: int, parameter_bytes: int) -> WorkCosts | None:
    """Returns the assumed costs of expert work; None where no table has that GPU and format.

    Args:
        gpu: its name as the driver gives it, such as `NVIDIA H200`.
        expert_bytes: weights of one expert in one layer.
        parameter_bytes: bytes of one parameter.
    """
    words = gpu.upper().split()
    rates = next((rates for (name, size), rates in _RATES.items() if name in words and size == parameter_bytes), None)
    if rates is None:
        return None
    token_s, expert_s = _FLOP * expert_bytes / parameter_bytes / rates.flop_s, expert_bytes / rates.bytes_s
    return WorkCosts(token_s=token_s, expert_s=expert_s, pad_tokens=expert_s / token_s)
