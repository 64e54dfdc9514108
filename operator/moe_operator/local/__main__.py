"""`python -m moe_operator.local STATE_DIR NAME`: the supervisor. `up` starts it, its lock already held for it."""

import asyncio
import logging
import sys
from pathlib import Path

from moe_operator.local.folder import Folder
from moe_operator.local.record import load_record
from moe_operator.local.restarts import Rules
from moe_operator.local.supervisor import run_supervisor

if __name__ == "__main__":
    folder = Folder(root=Path(sys.argv[1]), name=sys.argv[2])
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    record = load_record(folder)
    if record is None:
        sys.exit(f"{folder.state}: no such file; start deployments with `moeserving up`")
    asyncio.run(run_supervisor(folder, record, Rules()))
