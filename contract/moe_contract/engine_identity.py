"""Which engines compute the same tokens from the same tokens: their identity, a digest of their configuration. Pure.

The agent reports the identity of its engine, and the gateway lets a stream go on only at an engine with the same one.
"""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256

from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import KV_CACHE_OPTION

# Options that size an engine and change no token. Any other one is part of the identity.
_SIZES = frozenset({KV_CACHE_OPTION, "--max-num-seqs", "--max-num-batched-tokens", "--gpu-memory-utilization"})


def identify_engine(engine: EngineConfig) -> str:
    """Equal for engines that serve the same model with the same arguments; the content of a folder is not read."""
    parts = [engine.model, engine.revision, list(_identifying(engine.args))]
    return sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _identifying(args: Sequence[str]) -> Iterator[str]:
    """The arguments without the options that only size the engine, and without their values."""
    is_value_of_size = False
    for arg in args:
        name, sign, _ = arg.partition("=")
        if name.startswith("--") and name.replace("_", "-") in _SIZES:
            is_value_of_size = not sign
        elif is_value_of_size and not arg.startswith("-"):
            is_value_of_size = False
        else:
            is_value_of_size = False
            yield arg
