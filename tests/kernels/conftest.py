"""Where a kernel runs in these tests: by Triton's interpreter on the CPU, and natively too where a GPU is."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A device, and a kernel as it can be launched on its tensors."""

    device: str

    def launchable(self, kernel: Any) -> Any:
        return kernel if self.device == "cuda" else InterpretedFunction(kernel.fn)


@pytest.fixture(scope="session", params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def machine(request) -> Machine:
    return Machine(device=request.param)
