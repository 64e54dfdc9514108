#!/usr/bin/env bash
# nixl-cu13 1.5.1 (Python): an idle agent keeps a whole core busy with its progress thread.
#
# The thread is on by default. Its pause between two looks, `pthrDelay`, is set to 0 by the Python API, without a
# parameter for it. So a process that made an agent and transfers nothing takes as much processor time as an endless loop.
# By the bindings below the API, with a pause of 1,000 us, it takes nearly none.
#
# What follows: every engine with a KV connector over NIXL loses a core, from its start, whether or not blocks travel; on
# a machine where engines compute on the processor they share it with these threads. Set the pause through the bindings.
# Seen on 2026-11-30, Python 3.11, UCX over loopback, no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Without its dependencies, which are a whole torch for CUDA: the agent needs numpy alone.
"$folder/venv/bin/pip" install -q --disable-pip-version-check --no-deps nixl-cu13==1.5.1 numpy==2.4.6
cat >"$folder/run.py" <<'PY'
import multiprocessing
import sys
import time

import nixl_cu13._bindings as bindings
from nixl_cu13 import nixl_agent, nixl_agent_config

SECONDS = 5.0


def loop_cpu_s(result: multiprocessing.Queue) -> None:
    """Puts the processor seconds that an endless loop gets in the time of one measurement."""
    end_s = time.monotonic() + SECONDS
    while time.monotonic() < end_s:
        pass
    result.put(time.process_time())


def idle_share() -> float:
    """Processor seconds of this process while it sleeps, as a part of those of an endless loop beside it."""
    result = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(target=loop_cpu_s, args=(result,))
    process.start()
    before_s = time.process_time()
    time.sleep(SECONDS)
    idle_s = time.process_time() - before_s
    loop_s = result.get(timeout=60)
    process.join()
    return idle_s / loop_s


way = sys.argv[1]
if way == "default":
    agent = nixl_agent("default", nixl_agent_config(backends=["UCX"]))
elif way == "no thread":
    agent = nixl_agent("quiet", nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
else:
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.pthrDelay = 1000
    agent = bindings.nixlAgent("pause", config)
    agent.createBackend("UCX", {})
time.sleep(1)
share = idle_share()
print(f"{way}: {share:.2f} of an endless loop")
assert share > 0.5 if way == "default" else share < 0.2, share
PY
for way in "default" "no thread" "pause of 1,000 us"; do
  UCX_TLS=tcp,self,sm UCX_NET_DEVICES=lo NIXL_LOG_LEVEL=ERROR "$folder/venv/bin/python" "$folder/run.py" "$way"
done
# Output seen:
# default: 1.01 of an endless loop
# no thread: 0.00 of an endless loop
# pause of 1,000 us: 0.02 of an endless loop
