"""The agent's real process, with the fake engine in place of vLLM: `python agent_with_fake_engine.py CONFIG WAYS`."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from moe_agent import app
from moe_contract.agent_config import EngineConfig, load_agent_config

FAKE = Path(__file__).with_name("fake_engine.py")


def build_command(engine: EngineConfig, *_: Any, **__: Any) -> list[str]:
    ways = json.loads(sys.argv[2]) | {"host": engine.host}
    return [str(FAKE), str(engine.port), json.dumps(ways)]


if __name__ == "__main__":
    app.build_command = build_command
    asyncio.run(app.run_agent(load_agent_config(Path(sys.argv[1]))))
