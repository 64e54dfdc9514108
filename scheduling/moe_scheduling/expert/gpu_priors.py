"""What expert work takes on a GPU before anything was measured there.

Fitted to the fused-kernel tables of vLLM 0.24 in ai-dynamo/aiconfigurator (commit 095f58a5, Apache-2.0), balanced load
over 1 to 128 ranks, with the form of `layer_time.py` and a term for what no placement changes: Qwen3-30B-A3B,
Qwen3-235B-A22B and Mixtral-8x7B in bfloat16 (median error 3 to 8 %), Qwen3 and DeepSeek-V3 in fp8 with scales by block
(1 to 5 %). The rates of these models differ by up to a third; here they are rounded. Other GPUs and formats have no
prior: their costs are those that the engine measures.
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
    """Bytes and floating-point operations a second, and the tokens of a tile computed in vain."""

    bytes_s: float
    flop_s: float
    pad_tokens: float


_RATES = {
    ("H100", 2): _Rates(3.0e12, 8.0e14, 160.0),
    ("H100", 1): _Rates(2.8e12, 5.0e14, 80.0),
    ("H200", 2): _Rates(4.3e12, 9.0e14, 140.0),
    ("H200", 1): _Rates(4.0e12, 5.5e14, 75.0),
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
    return WorkCosts(
        token_s=_FLOP * expert_bytes / parameter_bytes / rates.flop_s,
        expert_s=expert_bytes / rates.bytes_s,
        pad_tokens=rates.pad_tokens,
    )
