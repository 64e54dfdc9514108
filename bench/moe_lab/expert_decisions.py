"""Micro-benchmark of the decision on experts, beside that of vLLM. Run by `python -m moe_lab`.

Each value is the CPU time of one decision from a load by source, on one core.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

from moe_scheduling.expert.decision import ExpertSettings, plan_experts

from moe_lab.rows import BenchmarkRow

DECISIONS = 20


def run() -> Iterator[BenchmarkRow]:
    """All sizes: the whole decision, and vLLM's placement alone."""
    # They bring torch and vLLM, which a look for benchmarks does without.
    import torch

    from moe_lab.experts.compare import COSTS
    from moe_lab.experts.loads import GROUPS, make_tenants
    from moe_lab.experts.rivals import make_policies

    torch.set_num_threads(1)
    settings = ExpertSettings()
    for name, group in GROUPS.items():
        load, start = make_tenants(group, exponent=1.0, tenants=2, seed=0), group.start
        theirs = make_policies(group, COSTS, settings)["vLLM"]
        goal = "< 50 ms" if name.startswith("DeepSeek-V3") else ""
        ours_ms = _decisions_ms(partial(plan_experts, load, start, COSTS, settings))
        yield BenchmarkRow(benchmark="experts", case=f"decision, {name}", unit="ms", values=ours_ms, goal=goal)
        theirs_ms = _decisions_ms(partial(theirs, load, start))
        yield BenchmarkRow(benchmark="experts", case=f"vLLM's placement, {name}", unit="ms", values=theirs_ms)


def _decisions_ms(decide: Callable[[], object]) -> list[float]:
    values = []
    for _ in range(DECISIONS):
        begun_s = time.process_time()
        decide()
        values.append((time.process_time() - begun_s) * 1e3)
    return values
