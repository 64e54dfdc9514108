"""The model's folder on this machine: checked before an engine needs a minute to fail on it."""

import json
from pathlib import Path
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api import MoEServing

# How models of the hub name the number of experts that tokens are routed to, in a layer.
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


def check_model(resource: MoEServing) -> None:
    """Refuses a model that is not there, and experts that cannot be spread evenly.

    Raises:
        InvalidInput: the folder is no model, or vLLM will not start with it.
    """
    scheme, _, path = resource.spec.model.uri.partition("://")
    if scheme != "file":
        return
    if not Path(path).is_dir():
        message = f"no such folder: {path}; `moeserving model tiny {path}` makes a small model there"
        raise InvalidInput([InputError("spec.model.uri", message)])
    if not (Path(path) / "config.json").is_file():
        raise InvalidInput([InputError("spec.model.uri", f"the folder {path} holds no model: it has no config.json")])
    if error := find_uneven(resource, read_experts(Path(path) / "config.json")):
        raise InvalidInput([error])


def read_experts(path: Path) -> int | None:
    """Routed experts of a layer; None where the file does not say."""
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return _find_count(config) or _find_count(config.get("text_config") if isinstance(config, dict) else None)


def _find_count(config: Any) -> int | None:
    if not isinstance(config, dict):
        return None
    return next((config[name] for name in _COUNTS if isinstance(config.get(name), int) and config[name] > 0), None)


def find_uneven(resource: MoEServing, experts: int | None) -> InputError | None:
    """What vLLM refuses: experts and copies that do not divide by the ranks of an expert group. Pure."""
    shape, copies = resource.spec.engine.parallelism, resource.spec.scheduling.expert.redundant_experts
    if not shape.expert or experts is None or (experts + copies) % shape.ranks == 0:
        return None
    fitting = copies + -(experts + copies) % shape.ranks
    message = f"{experts} experts and {copies} copies do not divide by {shape.ranks} ranks; {fitting} copies do"
    return InputError("spec.scheduling.expert.redundantExperts", message)
