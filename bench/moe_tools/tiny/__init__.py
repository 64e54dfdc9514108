"""A small trained Mixture-of-Experts model for machines without a GPU, made by `moeserving model tiny DIR`.

The model is real in every way but size: a `Qwen3MoeForCausalLM` with a router that training has shaped, its own
byte-level BPE tokenizer and a chat template, saved as safetensors the way a hub model is. torch and transformers are
imported only when a model has to be made.
"""

from moe_tools.tiny.settings import TinySettings, read_report
from moe_tools.tiny.store import ensure_tiny_model

__all__ = ["TinySettings", "ensure_tiny_model", "read_report"]
