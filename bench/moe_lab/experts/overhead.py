"""What the expert layer adds to serving in its default mode: host time a step, beside a modelled step of the model.

Two ranks run `ExpertGroup`, as vLLM's workers do, joined by gloo. A pass is what `ExpertGroup` does on the host in one
forward pass of a GPU engine: begin and end of the pass, sync rounds, gathers, and on the first rank the decisions and
publications of its thread. The counts themselves are made on a GPU within the mapping kernel that runs anyway; on a CPU
engine they cost host time, which is measured apart. All processor time of the process counts, the thread's too, as if
the step waited for it: an upper bound. The clock is that of the modelled step, so that what happens once a second
happens as often as in an engine.
"""

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from moe_tools.simulator.costs import Work
from moe_tools.simulator.experts import PlacementPolicy
from moe_tools.simulator.hardware import PRESETS, ModelArchitecture
from rich.table import Table

PROCESSES = 2
CONTEXT_TOKENS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Host time of one shape.

    Attributes:
        preset: the model on its hardware.
        requests: decoding requests of each rank.
        step_us: modelled step.
        pass_us: processor time of a pass on the first rank with its thread, one value for each repetition.
        path_us: the same of the thread that steps alone: what lies in the step's path.
        other_us: the same on another rank.
        counting_us: processor time that counting one pass adds on a CPU engine, one value for each repetition.
    """

    preset: str
    requests: int
    step_us: float
    pass_us: Sequence[float]
    path_us: Sequence[float]
    other_us: Sequence[float]
    counting_us: Sequence[float]


def measure_overhead(preset: str, *, requests: int, passes: int, repetitions: int) -> Overhead:
    """Measures one shape; the placement has one spare slot for each 8 experts."""
    # Loaded once, before the ranks are forked.
    from moe_agent.vllm import expert_group  # noqa: F401

    found = PRESETS[preset]
    cost = found.cost(found.ranks, placement=PlacementPolicy.EVEN)
    works = [Work(decode_requests=requests, context_tokens=requests * CONTEXT_TOKENS)] * found.ranks
    step_s = cost.group_step_s(works)
    context = multiprocessing.get_context("fork")
    values: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (found.model, found.ranks, requests, step_s, passes, repetitions, folder, values)
        ranks = [context.Process(target=_run_rank, args=(rank, *given)) for rank in range(PROCESSES)]
        for process in ranks:
            process.start()
        results = dict(values.get(timeout=600) for _ in ranks)
        for process in ranks:
            process.join()
    return Overhead(
        preset=preset,
        requests=requests,
        step_us=step_s * 1e6,
        pass_us=[row[0] for row in results[0]],
        path_us=[row[1] for row in results[0]],
        other_us=[row[0] for row in results[1]],
        counting_us=measure_counting(found.model, requests, repetitions),
    )


def _run_rank(
    rank: int,
    model: ModelArchitecture,
    ranks: int,
    requests: int,
    step_s: float,
    passes: int,
    repetitions: int,
    folder: str,
    values: Any,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    run_dir = Path(folder) / f"rank-{rank}"
    run_dir.mkdir()
    control = _open_control(run_dir) if rank == 0 else None
    clock = _Clock(step_s)
    group, state = _make_group(rank, model, ranks, run_dir, clock)
    dice = np.random.default_rng(rank)
    popularity = dice.pareto(1.5, (model.moe_layers, model.experts)) + 0.1
    tokens = torch.from_numpy(popularity / popularity.sum(1, keepdims=True) * requests * model.top_k)
    measured = []
    for repetition in range(1 + repetitions):
        begun_s, alone_s = time.process_time(), time.thread_time()
        for _ in range(passes):
            clock.passes += 1
            group.begin_pass(requests)
            if clock.passes % 64 == 0:
                state.expert_load_pass[:, : model.experts] += (64 * tokens).round().int()
            group.end_pass(False)
            _wait_for_thread(group)
        if repetition:
            seconds = time.process_time() - begun_s, time.thread_time() - alone_s
            measured.append([value / passes * 1e6 for value in seconds])
    values.put((rank, measured))
    dist.barrier()
    if control is not None:
        control.close()


class _Clock:
    """The time of the modelled engine on the thread that steps, real time on others."""

    def __init__(self, step_s: float) -> None:
        self.passes, self._step_s = 0, step_s
        self._main = threading.get_ident()

    def monotonic(self) -> float:
        stepping = threading.get_ident() == self._main
        return 1000.0 + self.passes * self._step_s if stepping else time.monotonic()

    def thread_time(self) -> float:
        return time.thread_time()


def _open_control(run_dir: Path) -> Any:
    from moe_agent.shared_memory.control_record import Control, ControlRecordWriter
    from moe_scheduling.expert.decision import ExpertSettings
    from moe_scheduling.request.order import RequestSettings

    # The default mode and interval.
    return ControlRecordWriter(run_dir, Control(version=1, request=RequestSettings(), expert=ExpertSettings()))


def _make_group(rank: int, model: ModelArchitecture, ranks: int, run_dir: Path, clock: _Clock) -> tuple[Any, Any]:
    """Returns the group of this rank, with what it reads of vLLM's in plain objects, and vLLM's counters."""
    import torch
    import torch.distributed as dist
    from moe_agent.experts import coordinator
    from moe_agent.experts.step_times import WorkMeter
    from moe_agent.vllm import expert_group
    from moe_scheduling.expert.decision import initial_placement

    slots = model.experts + model.experts // 8
    table = initial_placement(
        layers=model.moe_layers, experts=model.experts, redundant=slots - model.experts, ranks=ranks
    )
    router = SimpleNamespace(set_capture_fn=lambda _: None)
    config = SimpleNamespace(experts_per_token=model.top_k, is_sequence_parallel=False)
    layers = [SimpleNamespace(is_monolithic=True, router=router, moe_config=config, layer_name="")] * model.moe_layers
    weights = [torch.empty((1, int(model.expert_parameters)), dtype=torch.uint8, device="meta")]
    served = SimpleNamespace(
        num_moe_layers=model.moe_layers,
        num_logical_experts=model.experts,
        num_local_physical_experts=slots // ranks,
        moe_layers=layers,
        expert_weights=[weights],
    )
    state = SimpleNamespace(
        model=served,
        physical_to_logical_map=torch.from_numpy(table.physical_to_logical),
        expert_load_pass=torch.zeros((model.moe_layers, slots), dtype=torch.int32),
    )
    balancer = SimpleNamespace(
        model_states={"": state},
        device=torch.device("cpu"),
        should_record_tensor=torch.tensor(False),
        parallel_config=SimpleNamespace(data_parallel_index=rank),
    )
    joined = SimpleNamespace(
        cpu_group=dist.group.WORLD, device_group=None, rank_in_group=rank, ranks=list(range(ranks)), world_size=ranks
    )
    module: Any = expert_group
    module.get_ep_group = lambda: joined
    module.get_tp_group = lambda: SimpleNamespace(rank_in_group=0, world_size=1)
    module.get_node_count = lambda: 1
    module.dist = _TwoOfMany()
    module.logger = SimpleNamespace(warning=lambda *_: None)
    stepped: Any = coordinator
    stepped.time = clock
    group = expert_group.ExpertGroup(balancer, run_dir, WorkMeter())  # type: ignore[arg-type]
    group.on_cpu = False
    return group, state


class _TwoOfMany:
    """`torch.distributed` in which two real ranks stand for all: the second reports for the others."""

    def __getattr__(self, name: str) -> Any:
        import torch.distributed as dist

        return getattr(dist, name)

    def gather(self, mine: Any, everyone: Any, **named: Any) -> Any:
        import torch.distributed as dist

        work = dist.gather(mine, None if everyone is None else everyone[:PROCESSES], **named)

        def wait() -> None:
            work.wait()
            for row in (everyone or [])[PROCESSES:]:
                row.copy_(everyone[1])

        return SimpleNamespace(wait=wait)


def _wait_for_thread(group: Any) -> None:
    """The thread has the time of many steps in an engine, so it is done before the next pass here."""
    coordinator = group._coordinator
    if coordinator is None:
        return
    for future in (coordinator._publication, coordinator.controller._planner._future):
        if future is not None and not future.done():
            future.exception()


def measure_counting(model: ModelArchitecture, requests: int, repetitions: int) -> list[float]:
    """Processor time in microseconds that counting adds to the mapping of one pass on a CPU engine."""
    import torch
    from moe_kernels.expert_load import map_and_record_reference

    torch.set_num_threads(1)
    ids = torch.randint(0, model.experts, (requests, model.top_k), dtype=torch.int32)
    slots, replicas = torch.arange(model.experts)[:, None], torch.ones(model.experts, dtype=torch.int64)
    load, real = torch.zeros(model.experts, dtype=torch.int32), torch.tensor(requests, dtype=torch.int32)
    flags = [torch.tensor(on) for on in (True, False)]
    values = []
    for _ in range(1 + repetitions):
        seconds = []
        for enabled in flags:
            begun_s = time.process_time()
            for _ in range(20 * model.moe_layers):
                map_and_record_reference(ids, load, slots, replicas, enabled, real)
            seconds.append((time.process_time() - begun_s) / 20)
        values.append((seconds[0] - seconds[1]) * 1e6)
    return values[1:]


def render_overhead(rows: Sequence[Overhead]) -> Table:
    """Medians over the repetitions, with their range, and the part of the modelled step."""
    table = Table(title="Expert layer in its default mode: host time a step", title_justify="left")
    for heading in (
        "shape",
        "requests a rank",
        "step, modelled",
        "step's path, first rank",
        "with its thread",
        "part of the step",
        "other ranks",
    ):
        table.add_column(heading)
    table.add_column("counting, CPU engine alone")
    for row in rows:
        part = [value / row.step_us for value in row.pass_us]
        table.add_row(
            row.preset,
            str(row.requests),
            f"{row.step_us / 1e3:.1f} ms",
            _spread(row.path_us, "us"),
            _spread(row.pass_us, "us"),
            f"{np.median(part):.3%} [{min(part):.3%}, {max(part):.3%}]",
            _spread(row.other_us, "us"),
            _spread(row.counting_us, "us"),
        )
    return table


def _spread(values: Sequence[float], unit: str) -> str:
    return f"{np.median(values):.3g} {unit} [{min(values):.3g}, {max(values):.3g}]"
