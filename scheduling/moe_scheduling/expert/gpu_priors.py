"""What expert work takes on a GPU before anything was measured there.

Slopes of the fused-kernel tables of vLLM 0.24 in ai-dynamo/aiconfigurator (commit 095f58a5, Apache-2.0), balanced load
over 1 to 128 ranks of H100 and H200 as SXM modules: Qwen3-30B-A3B and Qwen3-235B-A22B in bfloat16, Qwen3 in fp8 with
scales by block. In these tables time rises by a constant for each expert that is read and one for each token, beside
what no placement changes. The slopes are rounded. Other GPUs and formats, and modules on PCIe, NVL cards and slices of
a GPU (MIG), have no prior: their costs are those that the engine measures.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkCosts:
    """Costs of expert work as `ExpertCosts` has them.

    Attributes:
        token_s: seconds to compute one token of one expert.
        expert_s: seconds for one expert more that got a token; 0: not known.
    """

    token_s: float
    expert_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Slopes:
    """By how much work time rises by a second: bytes of weights, and floating-point operations.

    They are slopes of a fit, not rates of the hardware: part of the time of tokens lies in what no placement changes,
    so the operations exceed the dense peak in bfloat16 (0.99e15).
    """

    weight_bytes: float
    operations: float


# By the type of the weights' elements as torch names it.
_SLOPES = {
    ("H100", "bfloat16"): _Slopes(3.1e12, 1.15e15),
    ("H100", "float8_e4m3fn"): _Slopes(2.9e12, 5.0e14),
    ("H200", "bfloat16"): _Slopes(4.5e12, 1.1e15),
    ("H200", "float8_e4m3fn"): _Slopes(4.1e12, 5.0e14),
}
_ELEMENT_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1}
# Words of the names of cards that are slower than the modules of the tables.
_OTHER_CARDS = frozenset({"PCIE", "NVL", "MIG"})
# A multiplication and an addition for each parameter.
_OPERATIONS = 2


def work_prior(gpu: str, expert_bytes: int, element_type: str) -> WorkCosts | None:
    """Returns the assumed costs of expert work; None where no table has that GPU and format.

    Args:
        gpu: its name as the driver gives it, such as `NVIDIA H200`.
        expert_bytes: weights of one expert in one layer.
        element_type: of the weights, as torch names it, such as `bfloat16`; packed ones (`uint8`) are in no table.
    """
    words = set(gpu.upper().split())
    if words & _OTHER_CARDS:
        return None
    found = (slopes for (name, kind), slopes in _SLOPES.items() if name in words and kind == element_type)
    slopes = next(found, None)
    if slopes is None:
        return None
    parameters = expert_bytes / _ELEMENT_BYTES[element_type]
    return WorkCosts(token_s=_OPERATIONS * parameters / slopes.operations, expert_s=expert_bytes / slopes.weight_bytes)
