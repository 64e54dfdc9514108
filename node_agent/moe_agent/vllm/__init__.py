"""The plugin that carries the scheduling layers into vLLM; `import moe_agent.vllm` loads neither torch nor vllm.

vLLM calls `register` in each of its processes (`vllm.general_plugins`). It makes a version that does not fit fail at
the start, in the first process, with a clear line. The scheduler and the middleware are named on vLLM's command line,
so that they need no patch; an expert group does, and only the processes of one are patched.
"""

import multiprocessing
import os
from pathlib import Path

from moe_contract.engine_process import EXPERT_GROUP_VARIABLE, RUN_DIR_VARIABLE

from moe_agent.vllm.version import check_version, is_cpu_build


def register() -> None:
    """Does nothing in a vLLM that no agent started."""
    if RUN_DIR_VARIABLE not in os.environ:
        return
    check_version()
    if EXPERT_GROUP_VARIABLE in os.environ:
        _join_expert_group()


def _join_expert_group() -> None:
    if multiprocessing.parent_process() is None:
        # The server, which has no worker: it makes the configuration and starts the others.
        if is_cpu_build():
            from moe_agent.vllm.cpu_config import allow_balancer

            allow_balancer()
        from moe_agent.vllm.balanceable import balance_where_possible

        balance_where_possible(Path(os.environ[RUN_DIR_VARIABLE]))
        return
    from moe_agent.experts.step_times import WorkMeter

    meter = WorkMeter()
    if is_cpu_build():
        from moe_agent.vllm.cpu_experts import repair_cpu_experts

        repair_cpu_experts(meter)
    from moe_agent.vllm.expert_group import join_expert_group

    join_expert_group(meter)
