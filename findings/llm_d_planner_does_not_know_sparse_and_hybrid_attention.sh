#!/usr/bin/env bash
# llm-d-planner 0.3.3 (llm-d's capacity planner): KV cache of today's MoE models up to 26 times too large.
#
# Its README promises GPU memory "for any HuggingFace model", with the KV cache "for MHA/GQA/MQA/MLA". But:
# - MLA is recognised by two names of architectures, those of DeepSeek V2 and V3. DeepSeek-V3.2 and GLM-5 keep the same
#   compressed KV cache (and 132 bytes a token and layer for their sparse indexer); for the planner they keep keys and values of
#   all heads.
# - Every layer counts. Of Qwen3-Next and Qwen3.5 three layers of four are linear attention, whose state does not grow.
# - The number of experts is looked for beside `text_config`, not in it: of Qwen3.5 each GPU holds 0 of them.
# Nothing warns. The longest context, the concurrent requests and the number of GPUs follow from these figures.
#
# Who is hurt: whoever buys or reserves GPUs by it: a context that fits one node is said not to fit at all.
# What follows: for these families read "GPU KV cache size" in the log of a started vLLM.
# Seen on 2026-11-30, Python 3.11, transformers 5.23.0. Configurations are the defaults of transformers' classes, which are those of
# the named models, in bfloat16; read from folders, as the planner does. What is needed follows from their own fields.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check llm-d-planner==0.3.3 transformers==5.23.0 huggingface-hub==2.4.0
cat >"$folder/run.py" <<'PY'
import sys
from pathlib import Path

from planner.capacity_planner import KVCacheDetail, experts_per_ep_group, get_model_config_from_hf
from transformers import AutoConfig, PreTrainedConfig

MODELS = {
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "DeepSeek-V3.2": ("deepseek_v32", "DeepseekV32ForCausalLM"),
    "GLM-5": ("glm_moe_dsa", "GlmMoeDsaForCausalLM"),
    "Qwen3-Next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "Qwen3.5-35B-A3B": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
}
BYTES, INDEX_SCALE_BYTES = 2, 4


def needed(config: PreTrainedConfig) -> int:
    """Bytes of KV cache that a token needs, in bfloat16; the keys of a sparse indexer are 8 bits wide, with a scale."""
    text = config.get_text_config()
    if hasattr(text, "kv_lora_rank"):
        index = text.index_head_dim + INDEX_SCALE_BYTES if hasattr(text, "index_head_dim") else 0
        return text.num_hidden_layers * ((text.kv_lora_rank + text.qk_rope_head_dim) * BYTES + index)
    return text.layer_types.count("full_attention") * 2 * text.num_key_value_heads * text.head_dim * BYTES


for name, (kind, architecture) in MODELS.items():
    folder = Path(sys.argv[1]) / kind
    AutoConfig.for_model(kind, architectures=[architecture], dtype="bfloat16").save_pretrained(folder)
    config = get_model_config_from_hf(str(folder))
    planned, right = KVCacheDetail(str(folder), config).per_token_memory_bytes, needed(config)
    text = config.get_text_config()
    experts = (getattr(text, "n_routed_experts", None) or text.num_experts) // 8
    told = f"experts on 1 of 8 GPUs {experts_per_ep_group(config, tp=8):g}, in truth {experts}"
    print(f"{name}: {planned} bytes a token, needed {right} ({planned / right:.1f} times); {told}")
PY
seen=$("$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder" 2>"$folder/log") || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "DeepSeek-V3: 70272 bytes a token, needed 70272 (1.0 times); experts on 1 of 8 GPUs 32, in truth 32
DeepSeek-V3.2: 1998848 bytes a token, needed 78324 (25.5 times); experts on 1 of 8 GPUs 32, in truth 32
GLM-5: 1277952 bytes a token, needed 100152 (12.8 times); experts on 1 of 8 GPUs 32, in truth 32
Qwen3-Next: 98304 bytes a token, needed 24576 (4.0 times); experts on 1 of 8 GPUs 64, in truth 64
Qwen3.5-35B-A3B: 81920 bytes a token, needed 20480 (4.0 times); experts on 1 of 8 GPUs 0, in truth 32" ] || { echo "behaves otherwise now" >&2; exit 1; }
if grep -iq 'attention\|KV cache' "$folder/log"; then echo "a warning says so now" >&2; exit 1; fi
# Output seen:
# DeepSeek-V3: 70272 bytes a token, needed 70272 (1.0 times); experts on 1 of 8 GPUs 32, in truth 32
# DeepSeek-V3.2: 1998848 bytes a token, needed 78324 (25.5 times); experts on 1 of 8 GPUs 32, in truth 32
# GLM-5: 1277952 bytes a token, needed 100152 (12.8 times); experts on 1 of 8 GPUs 32, in truth 32
# Qwen3-Next: 98304 bytes a token, needed 24576 (4.0 times); experts on 1 of 8 GPUs 64, in truth 64
# Qwen3.5-35B-A3B: 81920 bytes a token, needed 20480 (4.0 times); experts on 1 of 8 GPUs 0, in truth 32
