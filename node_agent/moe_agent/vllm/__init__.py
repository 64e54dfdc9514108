"""The plugin that carries the scheduling layers into vLLM; `import moe_agent.vllm` loads neither torch nor vllm.

vLLM calls `register` in each of its processes (`vllm.general_plugins`). The scheduler and the middleware are named on
vLLM's command line, so there is nothing to patch: `register` only makes a version that does not fit fail at the start,
in the first process, with a clear line.
"""

import os

from moe_agent.pages import RUN_DIR_VARIABLE
from moe_agent.vllm.version import check_version


def register() -> None:
    """Does nothing in a vLLM that no agent started."""
    if RUN_DIR_VARIABLE in os.environ:
        check_version()
