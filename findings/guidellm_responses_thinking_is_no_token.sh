#!/usr/bin/env bash
# guidellm 0.8.1 (the vLLM project's load generator): with `/v1/responses` a thinking model of vLLM gets a time to first token
# that includes all of its thinking, and a time between tokens close to none.
#
# guidellm says that thinking counts for the time to first token, and has a metric of its own for the first token of the answer
# (`time_to_first_output_token_ms`). Of the events of the Responses API it knows `response.reasoning_summary_text.delta`, with which
# OpenAI summarises; vLLM 0.32 and 0.33 send the thinking itself, as `response.reasoning_text.delta`. These events are passed over. Then
# the whole number of tokens, thinking included, is spread over the few events of the answer. Nothing fails, nothing warns. With
# `/v1/chat/completions` the same model has the right figures.
#
# Who is hurt: who compares models, engines or the two APIs by it: of 40 tokens of thinking and 4 of answer at one each
# 50 ms, the first token comes 40 times too late, and the others 15 times too fast.
# What follows: measure thinking models by `/v1/chat/completions`, or take the times from the server.
# Seen on 2026-11-30, Python 3.11. The engine below listens on loopback and sends the events that vLLM sends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Without its dependencies, which are a whole torch: the HTTP backend needs these alone.
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'httpx[http2]==0.28.1' aiohttp==3.14.5 culsans==0.10.0 jinja2==3.1.6 loguru==0.7.3 \
  more-itertools==11.2.1 msgpack==1.2.4 numpy==2.4.6 pydantic==2.14.4 pydantic-settings==2.16.3 pyyaml==6.0.4 rich==15.0.0 websockets==17.4 click==8.4.0
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps guidellm==0.8.1
cat >"$folder/run.py" <<'PY'
import asyncio
import json
from collections.abc import Iterator

from aiohttp import web
from guidellm.backends.openai.http import OpenAIHTTPBackend
from guidellm.schemas import GenerationRequest, RequestInfo
from guidellm.schemas.backends.openai_http import OpenAIHTTPBackendArgs

THOUGHTS, WORDS, PAUSE_S = 40, 4, 0.05
TOKENS = THOUGHTS + WORDS


def chat() -> Iterator[dict]:
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "demo"}
    for delta in [{"reasoning": "hm "}] * THOUGHTS + [{"content": "yes "}] * WORDS:
        yield chunk | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    yield chunk | {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": TOKENS, "total_tokens": TOKENS + 1}}


def response() -> Iterator[dict]:
    head = {"id": "x", "object": "response", "status": "in_progress"}
    yield {"type": "response.created", "response": head}
    for kind, text, count in (("reasoning_text", "hm ", THOUGHTS), ("output_text", "yes ", WORDS)):
        for _ in range(count):
            yield {"type": f"response.{kind}.delta", "item_id": kind, "output_index": 0, "content_index": 0, "delta": text}
    usage = {"input_tokens": 1, "output_tokens": TOKENS, "total_tokens": TOKENS + 1}
    yield {"type": "response.completed", "response": head | {"status": "completed", "usage": usage}}


async def engine(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await answer.prepare(request)
    for event in chat() if request.path.endswith("completions") else response():
        await asyncio.sleep(PAUSE_S)
        await answer.write(f"data: {json.dumps(event)}\n\n".encode())
    return answer


async def main() -> None:
    app = web.Application()
    app.router.add_post("/{path:.*}", engine)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target = f"http://127.0.0.1:{runner.addresses[0][1]}"
    for path in ("/v1/chat/completions", "/v1/responses"):
        backend = OpenAIHTTPBackend(OpenAIHTTPBackendArgs(target=target, model="demo", request_format=path, http2=False))
        await backend.process_startup()
        request, answer = GenerationRequest(columns={"text_column": ["Rain?"]}), None
        info = RequestInfo(request_id=request.request_id)
        async for answer, info in backend.resolve(request, info):
            pass
        await backend.process_shutdown()
        seen = answer.compile_stats(request, info)
        first, between = seen.time_to_first_token_ms / 1000 / PAUSE_S, seen.inter_token_latency_ms / 1000 / PAUSE_S
        said = "of the first thought" if first < THOUGHTS / 2 else "of the answer"
        print(f"{path}: the first token is that {said}, the time between tokens {'right' if between > 0.9 else 'below a fifth' if between < 0.2 else between}")
    await runner.cleanup()


asyncio.run(main())
PY
seen=$(timeout 60 "$folder/venv/bin/python" -W ignore "$folder/run.py" 2>"$folder/log") || { tail -5 "$folder/log" >&2; exit 1; }
echo "$seen"
[ "$seen" = "/v1/chat/completions: the first token is that of the first thought, the time between tokens right
/v1/responses: the first token is that of the answer, the time between tokens below a fifth" ] || { echo "behaves otherwise now" >&2; exit 1; }
# Output seen:
# /v1/chat/completions: the first token is that of the first thought, the time between tokens right
# /v1/responses: the first token is that of the answer, the time between tokens below a fifth
