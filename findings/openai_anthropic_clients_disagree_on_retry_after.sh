#!/usr/bin/env bash
# openai 3.57.0 and anthropic 2.13.0 (Python), openai 7.55.0 and @anthropic-ai/sdk 1.10.0 (JavaScript): a 429 with a Retry-After
# of more than a minute has three outcomes. Their documents promise two retries "with a short exponential backoff" and say
# nothing of the field:
# - openai for JavaScript does not heed it beyond 60 s, and sends the request twice more within two seconds;
# - openai for Python waits for up to 120 s, and beyond that raises at once, without any retry;
# - both of Anthropic's wait all of it, however long, before they try again. `timeout` bounds one attempt, not the wait: a call
#   with a timeout of 5 s takes more than a minute here, and as long as the field says elsewhere.
#
# Who is hurt: gateways whose quotas say truthfully when to come again, and their users: the same limit is an error here, three
# requests for one there, and elsewhere a call that stands still. What follows: set `max_retries=0` (`maxRetries: 0`) where
# a quota can say more than a minute, and retry by yourself; do not count on the field to keep clients away.
# Seen on 2026-11-30, Python 3.11, Node 20. The server below listens on loopback. Takes more than a minute, by its nature.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
(cd "$folder" && npm init -y && npm install --silent --no-audit --no-fund openai@7.55.0 @anthropic-ai/sdk@1.10.0) >"$folder/npm.log" 2>&1 &
"$folder/venv/bin/pip" install -q --disable-pip-version-check openai==3.57.0 anthropic==2.13.0 aiohttp==3.14.5
wait "$!" || { tail -5 "$folder/npm.log" >&2; exit 1; }
cat >"$folder/client.py" <<'PY'
import sys

import anthropic
import openai

kind, base = sys.argv[1:]
messages = [{"role": "user", "content": "Hello"}]
try:
    if kind == "openai":
        openai.OpenAI(api_key="x", base_url=base, timeout=5).chat.completions.create(model="demo", messages=messages)
    else:
        anthropic.Anthropic(api_key="x", base_url=base, timeout=5).messages.create(model="demo", max_tokens=5, messages=messages)
except (openai.RateLimitError, anthropic.RateLimitError):
    print("RateLimitError")
else:
    print("an answer")
PY
cat >"$folder/client.mjs" <<'JS'
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [kind, baseURL] = process.argv.slice(2);
const messages = [{ role: "user", content: "Hello" }];
const settings = { apiKey: "x", baseURL, timeout: 5000 };
try {
  if (kind === "openai") await new OpenAI(settings).chat.completions.create({ model: "demo", messages });
  else await new Anthropic(settings).messages.create({ model: "demo", max_tokens: 5, messages });
  console.log("an answer");
} catch (error) {
  console.log(error.constructor.name);
}
JS
cat >"$folder/run.py" <<'PY'
import asyncio
import sys
import time

from aiohttp import web

FOLDER = sys.argv[1]
CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
COMPLETION = {"id": "x", "object": "chat.completion", "created": 1, "model": "demo", "choices": [CHOICE]}
MESSAGE = {"id": "x", "type": "message", "role": "assistant", "model": "demo", "content": [{"type": "text", "text": "Hi"}]}
MESSAGE |= {"stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 1, "output_tokens": 1}}
PYTHON, NODE = f"{FOLDER}/venv/bin/python {FOLDER}/client.py", f"node {FOLDER}/client.mjs"
CALLS = [
    ("openai, Python", 61, f"{PYTHON} openai"),
    ("openai, Python", 121, f"{PYTHON} openai"),
    ("openai, JavaScript", 61, f"{NODE} openai"),
    ("anthropic, Python", 61, f"{PYTHON} anthropic"),
    ("anthropic, JavaScript", 61, f"{NODE} anthropic"),
]
times: list[list[float]] = [[] for _ in CALLS]


async def answer(request: web.Request) -> web.Response:
    number = int(request.path.split("/")[1])
    wait_s, seen = CALLS[number][1], times[number]
    seen.append(time.monotonic())
    if seen[-1] - seen[0] < wait_s - 1:
        error = {"type": "rate_limit_error", "message": "Come back later."}
        return web.json_response({"type": "error", "error": error}, status=429, headers={"Retry-After": str(wait_s)})
    return web.json_response(MESSAGE if request.path.endswith("messages") else COMPLETION)


async def call(number: int, port: int) -> str:
    """The outcome of the call, and how long after its first request."""
    command = [*CALLS[number][2].split(), f"http://127.0.0.1:{port}/{number}"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    took_s = time.monotonic() - times[number][0]
    length = "more than a minute" if took_s > 60 else "less than 30 seconds" if took_s < 30 else f"{took_s:.0f} seconds"
    return f"{len(times[number])} requests, {out.decode().strip()} after {length}"


async def main() -> None:
    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    ends = await asyncio.gather(*(call(number, port) for number in range(len(CALLS))))
    await runner.cleanup()
    for (name, wait_s, _), end in zip(CALLS, ends):
        print(f"{name}, Retry-After {wait_s}: {end}")


asyncio.run(main())
PY
seen=$(timeout 110 "$folder/venv/bin/python" "$folder/run.py" "$folder")
echo "$seen"
[ "$seen" = "openai, Python, Retry-After 61: 2 requests, an answer after more than a minute
openai, Python, Retry-After 121: 1 requests, RateLimitError after less than 30 seconds
openai, JavaScript, Retry-After 61: 3 requests, RateLimitError after less than 30 seconds
anthropic, Python, Retry-After 61: 2 requests, an answer after more than a minute
anthropic, JavaScript, Retry-After 61: 2 requests, an answer after more than a minute" ] || { echo "behaves otherwise now" >&2; exit 1; }
# Output seen:
# openai, Python, Retry-After 61: 2 requests, an answer after more than a minute
# openai, Python, Retry-After 121: 1 requests, RateLimitError after less than 30 seconds
# openai, JavaScript, Retry-After 61: 3 requests, RateLimitError after less than 30 seconds
# anthropic, Python, Retry-After 61: 2 requests, an answer after more than a minute
# anthropic, JavaScript, Retry-After 61: 2 requests, an answer after more than a minute
