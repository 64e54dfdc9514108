"""Whether vLLM can balance the experts of a model: its class declares vLLM's interface `MixtureOfExperts`.

vLLM switches its balancer on for any model, and one whose class lacks the interface dies at its first request. So the
engine's first process asks before it makes the configuration, and leaves the balancer off where that would happen.
Where there are GPUs the class is imported in a process of its own, as vLLM does it, since the import may claim a
device.

The note in the run folder lives as long as the agent: where only the loaded model shows that it cannot be balanced, the
rank that loaded it writes the note and ends, and the agent starts the engine again, without the balancer.

    python -m moe_agent.vllm.balanceable MODULE CLASS
"""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe_agent.experts.obstacle import note_obstacle, read_obstacle
from moe_agent.vllm.version import find_version, is_cpu_build, replace_attribute

_INTERFACE = "MixtureOfExperts"
_IMPORT_TIMEOUT_S = 600.0


def balance_where_possible(run_dir: Path) -> None:
    """Makes vLLM leave its balancer off, in this process, for models that it cannot balance, and note why."""
    from vllm.config.parallel import EPLBConfig
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_model_config

    def create_and_judge(self: EngineArgs) -> Any:
        # vLLM makes the configuration of parallel ranks after that of the model, from the same arguments.
        config = create(self)
        if self.enable_eplb and not read_obstacle(run_dir):
            note_obstacle(run_dir, find_obstacle(config))
        if read_obstacle(run_dir):
            self.enable_eplb, self.eplb_config = False, EPLBConfig()
        return config

    replace_attribute(EngineArgs, "create_model_config", create_and_judge)


def find_obstacle(config: Any) -> str:
    """Returns why vLLM cannot balance the experts of a model, by its `ModelConfig`; empty where it can.

    Of a multi-modal model the part for language decides. Its class does not name that part, so it counts as one that
    can until it is loaded, as does a class that vLLM's registry does not have.
    """
    registry = config.registry
    # A model that classifies runs through the class of the one that generates.
    registered = registry.models.get(registry._normalize_arch(config.architecture, config))
    if config.is_multimodal_model or registered is None or _can_balance(registered):
        return ""
    return describe_obstacle(config.architecture)


def describe_obstacle(architecture: str) -> str:
    """Returns the sentence for a model whose experts cannot be balanced."""
    return f"vLLM {find_version()} cannot balance the experts of {architecture}"


def _can_balance(registered: Any) -> bool:
    """Returns whether a class of vLLM's registry, imported or not, declares the interface."""
    if is_cpu_build() or not hasattr(registered, "module_name"):
        return declares_interface(registered.load_model_cls())
    return ask_in_process(registered.module_name, registered.class_name)


def declares_interface(model: type) -> bool:
    """Returns whether a model's class, or one that it inherits from, declares that its experts can be balanced."""
    return any(base.__name__ == _INTERFACE for base in model.__mro__)


def ask_in_process(module: str, name: str) -> bool:
    """Returns whether the class declares the interface.

    Raises:
        RuntimeError: the class cannot be imported.
    """
    command = [sys.executable, "-m", "moe_agent.vllm.balanceable", module, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, check=False)
    answer = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or answer not in ("True", "False"):
        raise RuntimeError(f"cannot import the model's class {module}.{name}: {''.join(done.stderr.splitlines()[-1:])}")
    return answer == "True"


if __name__ == "__main__":
    print(declares_interface(getattr(importlib.import_module(sys.argv[1]), sys.argv[2])))
