"""The real agent with a stand-in for vLLM: `python agent_in_group.py CONFIG FOLDER`.

On the leader the engine is `fake_engine.py`, which drains until `FOLDER/drained` is there. On a worker it looks the
leader's name up until it has an address, as vLLM does, writes it to `FOLDER/found`, and lives.
"""

import asyncio
import logging
import sys
from pathlib import Path

from moe_agent import app
from moe_agent.supervisor.node import Node
from moe_contract.agent_config import AgentConfig, EngineConfig

FAKE = Path(__file__).with_name("fake_engine.py")
WORKER = """
import pathlib, signal, socket, sys, time
while True:
    try:
        found = socket.getaddrinfo(sys.argv[1], 1)[0][4][0]
        break
    except OSError:
        time.sleep(0.05)
pathlib.Path(sys.argv[2]).write_text(found)
signal.pause()
"""


def build_command(engine: EngineConfig, node: Node, **_: object) -> list[str]:
    folder = Path(sys.argv[2])
    if node.headless:
        return ["-c", WORKER, node.leader, str(folder / "found")]
    return [str(FAKE), str(engine.port), f'{{"drain_file": "{folder / "drained"}"}}']


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    app.build_command = build_command  # type: ignore[assignment]
    app.is_cpu_build = lambda: False
    asyncio.run(app.run_agent(AgentConfig.model_validate_json(Path(sys.argv[1]).read_bytes())))
