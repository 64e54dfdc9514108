#!/usr/bin/env bash
# inference-perf 0.7.0: streams of `anthropic_messages` have no time to first token and none between tokens.
#
# The tool notes when each `content_block_delta` came. Before its report it counts the tokens of each chunk anew, to give
# several tokens of one chunk their times (`correct_streamed_response_metrics`), and looks for their text in `choices`
# alone. Anthropic's events have none, so it replaces the times that it had by an empty list. The report counts all
# requests as successes, and `time_to_first_token`, `time_per_output_token` and `inter_token_latency` are null.
#
# What follows: take the times of such streams from the server, or from another tool (aiperf has them).
# Seen on 2026-11-30, Python 3.12 (which the tool needs; PYTHON312 names another one).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON312:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'inference-perf==0.7.0'
cat >"$folder/run.py" <<'PY'
import json
from types import SimpleNamespace

from inference_perf.apis import StreamedResponseMetrics
from inference_perf.reportgen.base import compute_request_latency_metrics, correct_streamed_response_metrics

times = [1.0, 1.5, 2.0]
chunks = {
    "OpenAI's": {"choices": [{"index": 0, "delta": {"content": "word"}}]},
    "Anthropic's": {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word"}},
}
tokenizer = SimpleNamespace(count_tokens=lambda text, add_special_tokens=True: 1)
for name, chunk in chunks.items():
    metrics = StreamedResponseMetrics(
        response_chunks=[json.dumps(chunk)] * 3, chunk_times=times, output_tokens=3, output_token_times=list(times)
    )
    request = SimpleNamespace(start_time=0.0, end_time=3.0, info=SimpleNamespace(response_metrics=metrics, input_tokens=1))
    correct_streamed_response_metrics(request, tokenizer)
    latency = compute_request_latency_metrics(request)
    print(f"{name} stream: time to first token {latency['time_to_first_token']}, times {metrics.output_token_times}")
PY
seen=$("$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "OpenAI's stream: time to first token 1.0, times [1.0, 1.5, 2.0]
Anthropic's stream: time to first token None, times []" ]
# Output seen:
# OpenAI's stream: time to first token 1.0, times [1.0, 1.5, 2.0]
# Anthropic's stream: time to first token None, times []
