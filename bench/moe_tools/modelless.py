"""What it takes to make a vLLM scheduler without a model: a configuration that names one, and a KV cache of one group.

Used by `virtual_engine` (one scheduler, step by step) and by the simulator (many, in virtual time). Importing this
module imports neither vllm nor torch.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 16
LONGEST_CONTEXT = 1_048_576
_MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": LONGEST_CONTEXT,
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
}


def write_model(folder: Path) -> None:
    """Writes the configuration of a model that is never loaded."""
    (folder / "config.json").write_text(json.dumps(_MODEL))


def make_config(folder: Path, **arguments: Any) -> Any:
    """vLLM's configuration of an engine for the model in the folder; takes seconds."""
    with foreign_warnings():
        from vllm.engine.arg_utils import EngineArgs

        return EngineArgs(
            model=str(folder), skip_tokenizer_init=True, block_size=BLOCK_TOKENS, enforce_eager=True, **arguments
        ).create_engine_config()


def build_scheduler(factory: Callable[..., Any], config: Any, kv_blocks: int, *, log_stats: bool) -> Any:
    """A scheduler by this factory, which takes what vLLM gives its scheduler's class."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = kv_blocks
    return factory(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=kv_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_TOKENS,
        log_stats=log_stats,
    )


@contextmanager
def foreign_warnings() -> Iterator[None]:
    """Torch and vLLM warn of their own deprecations when they are loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
