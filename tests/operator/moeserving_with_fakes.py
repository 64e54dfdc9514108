"""The real command line, with the fake agent and gateway in place of the real ones."""

import sys
from pathlib import Path

from moe_operator.cli.command import app
from moe_operator.local.start import Programs

FAKE = str(Path(__file__).with_name("fake_peer.py"))

if __name__ == "__main__":
    programs = Programs(agent=(sys.executable, FAKE, "agent"), gateway=(sys.executable, FAKE, "gateway"))
    app(prog_name="moeserving", obj=programs)
