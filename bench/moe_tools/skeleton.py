"""A model's shape without its weights, made by `moeserving model skeleton DIR`: vLLM draws weights at random.

What engines, orders and steps cost depends on shapes, not on what a model says: with `--load-format=dummy` a GPU can be
measured without a download of 60 GB. Its router spreads tokens as random weights do, so nothing follows from it about
the balance of experts. The tokenizer is trained here on text of this machine and filled up to the model's vocabulary.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from moe_contract.input_errors import InputError, InvalidInput, unknown_choice

from moe_tools.tiny.corpus import Corpus, read_corpus
from moe_tools.tiny.tokens import dress_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINED_TOKENS = 4096
DEFAULT_SHAPE = "qwen3-30b-a3b"
# Of Qwen/Qwen3-30B-A3B's config.json.
_QWEN3_30B_A3B: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "vocab_size": 151_936,
    }
)
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType({DEFAULT_SHAPE: _QWEN3_30B_A3B})


def make_skeleton(directory: Path, shape: str, layers: int | None, corpus: Corpus | None = None) -> Path:
    """Writes the configuration and a tokenizer.

    Args:
        directory: a new folder, or an empty one.
        shape: one of `SHAPES`.
        layers: fewer or more layers than the model has; None leaves them.
        corpus: text that the tokenizer is trained on; else this machine's own.

    Raises:
        InvalidInput: no such shape, or the folder holds something or cannot be made.
    """
    if shape not in SHAPES:
        raise InvalidInput([unknown_choice("--like", shape, SHAPES)])
    config = dict(SHAPES[shape]) | ({"num_hidden_layers": layers} if layers else {})
    directory = directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise InvalidInput([InputError(str(directory), "is not empty; name a new folder")])
        texts = [exchange.answer for exchange in (corpus or read_corpus()).exchanges]
        filled = fill_vocabulary(train_tokenizer(texts, TRAINED_TOKENS), config["vocab_size"])
        tokenizer = dress_tokenizer(filled, config["max_position_embeddings"])
        tokenizer.save_pretrained(directory)
        config["eos_token_id"] = tokenizer.eos_token_id
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    except OSError as error:
        message = f"cannot make the model here: {error.strerror or error}"
        raise InvalidInput([InputError(str(directory), message)]) from None
    return directory


def fill_vocabulary(tokenizer: "Tokenizer", entries: int) -> "Tokenizer":
    """Gives each id that random weights may answer with a text, `<id>`; no text is cut into such tokens."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    vocabulary |= {f"<{number}>": number for number in range(len(vocabulary), entries)}
    return Tokenizer.from_str(json.dumps(document))
