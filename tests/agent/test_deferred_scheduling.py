"""When the next step is scheduled, in vLLM's own engine core: just before the end of the one that runs.

The core's loop is vLLM's, one turn at a time, with its batch queue; the model is a timer.
"""

import copy
import inspect
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.shared_memory.prefill_record import PrefillState
from moe_agent.vllm import deferred_start
from moe_agent.vllm.deferred_start import EVENTS, defer_steps, has_ended, wait
from moe_agent.vllm.prefill_group import WAVE_TURNS
from moe_scheduling.request.deferred_scheduling import LEAD_S
from moe_scheduling.request.prefill_budget import RankLoad
from moe_tools.modelless import build_scheduler, foreign_warnings

with foreign_warnings():
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import DPEngineCoreProc, EngineCoreProc, EngineShutdownState
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

STEP_S = 0.25


class Timer:
    """Executes one step after the other, each as long as is said."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.step_s = STEP_S
        self._free_s = 0.0
        self._output: Any = None

    def execute_model(self, output: Any, non_block: bool = False) -> Future[Any]:
        self._output = output
        done: Future[Any] = Future()
        done.set_result(None if output.total_num_scheduled_tokens else EMPTY_MODEL_RUNNER_OUTPUT)
        return done

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Future[Any]:
        output, now_s = self._output, time.monotonic()
        self._free_s = max(self._free_s, now_s) + self.step_s
        result = self.answer(self.scheduler, output)
        future: Future[Any] = Future()
        timer = threading.Timer(self._free_s - now_s, future.set_result, [result])
        timer.daemon = True
        timer.start()
        return future

    @staticmethod
    def answer(scheduler: Any, output: Any) -> ModelRunnerOutput:
        """A token for each request that has computed all it has."""
        names = list(output.num_scheduled_tokens)
        done = [not scheduler.requests[name].is_prefill_chunk for name in names]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=[[1] if samples else [] for samples in done],
        )


class Core(EngineCoreProc):
    """vLLM's engine core without what it takes to be a process."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.model_executor = Timer(scheduler)
        self.batch_queue, self.batch_queue_size = deque(maxlen=2), 2
        self.input_queue, self.output_queue, self.aborts_queue = queue.Queue(), queue.Queue(), queue.Queue()
        self.step_fn = self.step_with_batch_queue
        self.vllm_config = scheduler.vllm_config
        self.shutdown_state = EngineShutdownState.RUNNING
        self.engines_running = self.log_stats = self.check_for_draft_tokens = False
        self.is_mm_encoder_only = self.is_pooling_model = False
        self.process_input_queue_block = True
        self.publish_dp_lb_stats = False
        self._weight_version = 0
        self._idle_state_callbacks: list[Any] = []

    def add_request(self, request: Any, request_wave: int = 0) -> None:
        self.scheduler.add_request(request)

    def turn(self) -> None:
        """One turn of `run_busy_loop`."""
        self._process_input_queue()
        self._process_engine_step()

    def arrive_in(self, seconds: float, request: Any) -> None:
        later = threading.Timer(seconds, self.input_queue.put, [(EngineCoreRequestType.ADD, (request, 0))])
        later.daemon = True
        later.start()


class DeferringCore(Core):
    """The same, waiting."""


@pytest.fixture
def engine(make_engine, settings):
    settings.put(policy="sjf")
    made = make_engine()
    made.scheduler.clock = time.monotonic
    made.scheduler._step_curve.step_s = lambda *_: STEP_S
    made.scheduler._deferral._least_part = 0.9
    return made


def request_of(engine, name):
    """A request that the scheduler has not seen yet."""
    added = []
    add, engine.scheduler.add_request = engine.scheduler.add_request, added.append
    engine.add(name, 40, out=8)
    engine.scheduler.add_request = add
    return added[0]


def steps_until_scheduled(core, engine, name):
    """How many steps end before the one that a request is in, when it comes early within a step."""
    core.turn()
    core.arrive_in(0.2 * STEP_S, request_of(engine, name))
    ended = 0
    while name not in engine.scheduler.requests or not engine.scheduler.requests[name].num_computed_tokens:
        before = core.output_queue.qsize()
        core.turn()
        ended += core.output_queue.qsize() - before
    return ended


def test_a_request_that_comes_within_a_step_is_in_the_next_one(engine):
    defer_steps(DeferringCore)
    core = DeferringCore(engine.scheduler)
    engine.add("first", 40, out=8)
    # The step that it came in ends in the same turn that schedules it: vLLM schedules, then waits for the result.
    assert steps_until_scheduled(core, engine, "second") == 1


def test_vllm_itself_lets_it_wait_for_a_step_more(engine):
    core = Core(engine.scheduler)
    engine.add("first", 40, out=8)
    assert steps_until_scheduled(core, engine, "second") == 2


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_under_vllms_own_orders_it_does_what_vllm_does(engine, settings, policy):
    settings.put(policy=policy)
    defer_steps(DeferringCore)
    core = DeferringCore(engine.scheduler)
    engine.add("first", 40, out=8)
    assert steps_until_scheduled(core, engine, "second") == 2


def test_switched_off_it_does_what_vllm_does(engine, settings):
    settings.put(policy="sjf", defer_scheduling=False)
    defer_steps(DeferringCore)
    core = DeferringCore(engine.scheduler)
    engine.add("first", 40, out=8)
    assert steps_until_scheduled(core, engine, "second") == 2


def test_a_step_that_ends_sooner_than_predicted_ends_the_wait(engine):
    defer_steps(DeferringCore)
    core = DeferringCore(engine.scheduler)
    engine.scheduler._step_curve.step_s = lambda *_: 60.0
    engine.add("first", 40, out=3)
    begun_s = time.monotonic()
    core.model_executor.step_s = 0.02
    while engine.scheduler.has_requests() or core.batch_queue:
        core.turn()
    assert time.monotonic() - begun_s < 30.0


def test_an_idle_engine_schedules_at_once(engine):
    assert engine.scheduler.defer_s() == 0.0
    engine.add("first", 40)
    assert engine.scheduler.defer_s() == 0.0


def test_the_scheduler_learns_how_long_steps_take_and_waits_for_part_of_the_next(make_engine, settings):
    settings.put(policy="sjf")
    engine = make_engine(ahead=2)
    # As long as their tokens say: what the curve finds.
    engine.pace = lambda prefill_tokens, decoding: 0.02 + 0.0001 * prefill_tokens
    for number in range(60):
        engine.add(f"r{number}", 100, out=8, arrival_s=engine.now_s)
        for _ in range(4):
            engine.step()
    engine.run()
    assert engine.scheduler._deferral.wait_s(0.02) > 0.6 * 0.02 - 0.003


def serve_deferred(scheduler, steps, *, step_s, host_s, tells_end):
    """The core's loop in virtual time: a step is launched `host_s` after it is scheduled, and outputs come after that.

    Returns:
        How long the device idled before each of the last steps.
    """
    now_s, running_ends_s, previous, idle_s = 0.0, 0.0, None, []
    scheduler.clock = lambda: now_s
    for _ in range(steps):
        if previous is not None and (defer_s := scheduler.defer_s()) > 0.0:
            ended = tells_end and running_ends_s <= now_s + defer_s
            now_s = max(now_s, running_ends_s) if ended else now_s + defer_s
            scheduler.waited(has_ended=ended)
        output = scheduler.schedule()
        now_s += host_s
        scheduler.get_grammar_bitmask(output)
        begins_s = max(now_s, running_ends_s)
        idle_s.append(begins_s - running_ends_s)
        if previous is not None:
            now_s = max(now_s, running_ends_s)
            scheduler.update_from_output(previous, Timer.answer(scheduler, previous))
        running_ends_s, previous = begins_s + step_s, output
    return idle_s[-200:]


@pytest.mark.parametrize("tells_end", [True, False])
@pytest.mark.parametrize("host_s", [0.001, 0.006])
def test_what_launching_takes_is_not_learnt_as_the_steps_own_time(make_engine, settings, host_s, tells_end):
    """Outputs are read after the next launch: a wait that is too long hides the end of the step that it waits for."""
    settings.put(policy="sjf")
    engine = make_engine()
    engine.add("one", 16, out=3000)
    idle_s = serve_deferred(engine.scheduler, 1500, step_s=0.020, host_s=host_s, tells_end=tells_end)
    assert engine.scheduler._step_curve.step_s(0, 1, 1) == pytest.approx(0.020, rel=0.1)
    # One step in twenty may end before the next is launched.
    assert sum(idle_s) / len(idle_s) < 0.15 * host_s
    assert engine.scheduler._deferral.wait_s(0.020) > 0.3 * 0.020


# The seam to vLLM.


def test_a_class_is_made_to_wait_once():
    class Plain:
        def _process_input_queue(self) -> None: ...

    defer_steps(Plain)
    first = Plain._process_input_queue
    defer_steps(Plain)
    assert Plain._process_input_queue is first


def test_a_core_without_a_batch_queue_never_waits():
    called = []

    class Plain:
        batch_queue = None
        scheduler = SimpleNamespace(defer_s=lambda: pytest.fail("asked"))

        def _process_input_queue(self) -> None:
            called.append(1)

    defer_steps(Plain)
    Plain()._process_input_queue()
    assert called == [1]


@pytest.mark.parametrize(
    ("runner", "event"),
    [("vllm.v1.worker.gpu_model_runner", EVENTS[0]), ("vllm.v1.worker.gpu.async_utils", EVENTS[1])],
)
def test_the_event_behind_a_future_of_a_gpu_tells_its_end(runner, event):
    future: Future[Any] = Future()
    assert not has_ended(future)
    future.async_output = SimpleNamespace(**{event: SimpleNamespace(query=lambda: False)})
    assert not has_ended(future)
    future.async_output = SimpleNamespace(**{event: SimpleNamespace(query=lambda: True)})
    assert has_ended(future)
    assert f"self.{event} = torch.cuda.Event" in Path(find_spec(runner).origin).read_text()


@pytest.mark.parametrize(("ahead", "stages", "waits"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_cores_wait_where_vllm_schedules_ahead_and_has_no_pipeline(
    make_engine, settings, monkeypatch, ahead, stages, waits
):
    settings.put(policy="sjf")
    scheduler = make_engine().scheduler
    config = copy.deepcopy(scheduler.vllm_config)
    config.scheduler_config.async_scheduling = ahead
    config.parallel_config.pipeline_parallel_size = stages
    made = []
    monkeypatch.setattr("moe_agent.vllm.scheduler._defer_steps", lambda: made.append(1))
    build_scheduler(type(scheduler), config, 100, log_stats=False).shutdown()
    assert bool(made) is waits


def test_a_shutdown_ends_the_wait(monkeypatch):
    looks = iter([True, True, False])
    core = SimpleNamespace(
        batch_queue=[(Future(), None, None)], input_queue=queue.Queue(), is_running=lambda: next(looks)
    )
    monkeypatch.setattr(deferred_start, "_CHECK_INTERVAL_S", 0.001)
    waited = []
    scheduler = SimpleNamespace(
        defer_s=lambda: 60.0,
        others_scheduled=lambda: False,
        waited=lambda *, has_ended: waited.append(has_ended),
    )
    wait(core, scheduler)
    assert waited == [False]


def test_all_that_has_come_is_taken_in_when_the_wait_ends():
    taken = []
    core = SimpleNamespace(
        batch_queue=[(Future(), None, None)],
        input_queue=queue.Queue(),
        is_running=lambda: True,
        _handle_client_request=lambda *request: taken.append(request),
    )
    for number in range(5):
        core.input_queue.put((number,))
    defer_s = iter([0.001, 0.0])
    scheduler = SimpleNamespace(
        defer_s=lambda: next(defer_s), others_scheduled=lambda: False, waited=lambda has_ended: None
    )
    wait(core, scheduler)
    assert taken == [(number,) for number in range(5)]


def test_vllm_calls_the_hook_between_two_steps():
    """What `defer_steps` replaces: where the loop of either core takes in what has come."""
    assert "_process_input_queue" not in vars(DPEngineCoreProc)
    for core_class in (EngineCoreProc, DPEngineCoreProc):
        _, loop = inspect.getsource(core_class).split("def run_busy_loop")
        assert loop.index("self._process_input_queue()") < loop.index("self._process_engine_step()")


# Ranks of a group.


class FakeGroup:
    """A group with one other rank, whose state the test sets."""

    def __init__(self) -> None:
        self.state = PrefillState(0.0, 0.0, RankLoad(), RankLoad())

    def publish(self, state: PrefillState) -> None:
        """Nothing reads it."""

    def others(self, now_s: float) -> list[PrefillState]:
        return [self.state]


@pytest.fixture
def grouped(engine):
    """The core of a rank in a group that runs; two turns of its wave are over."""
    defer_steps(DeferringCore)
    group = FakeGroup()
    engine.scheduler.join(group)
    core = DeferringCore(engine.scheduler)
    core.engines_running, core.current_wave, core.step_counter = True, 3, 2
    return core, group


def waited_s(core):
    began_s = time.monotonic()
    core._process_input_queue()
    return time.monotonic() - began_s


TURN = 3 * WAVE_TURNS + 2


def test_a_rank_with_nothing_on_its_way_waits_until_another_one_schedules(grouped):
    core, group = grouped
    group.state = group.state._replace(turn=TURN - 1, next_s=time.monotonic() + 60.0)
    later = threading.Timer(0.1, lambda: setattr(group, "state", group.state._replace(turn=TURN)))
    later.start()
    assert 0.08 < waited_s(core) < 10.0
    assert core.scheduler.turn == TURN


def test_it_waits_no_longer_than_the_other_one_means_to(grouped):
    core, group = grouped
    group.state = group.state._replace(turn=TURN - 1, next_s=time.monotonic() + 0.1)
    assert 0.08 < waited_s(core) < 10.0


def test_what_comes_to_it_meanwhile_is_taken_in(grouped, engine):
    core, group = grouped
    group.state = group.state._replace(turn=TURN - 1, next_s=time.monotonic() + 0.2)
    core.arrive_in(0.05, request_of(engine, "new"))
    core._process_input_queue()
    assert "new" in engine.scheduler.requests


@pytest.mark.parametrize(
    "turn", [TURN, TURN - 2, TURN + 1, TURN - WAVE_TURNS, TURN - 1 + WAVE_TURNS, 0], ids=lambda turn: f"{turn - TURN}"
)
def test_it_waits_for_none_that_was_not_in_the_step_before(grouped, turn):
    """Nor does a rank whose wave is another hold it up, which may be so for a moment when a group begins to step."""
    core, group = grouped
    group.state = group.state._replace(turn=turn, next_s=time.monotonic() + 60.0)
    assert waited_s(core) < 10.0


def test_a_group_that_does_not_run_is_not_waited_for(grouped, engine):
    core, group = grouped
    core.engines_running = False
    core.input_queue.put((EngineCoreRequestType.ADD, (request_of(engine, "new"), 0)))
    group.state = group.state._replace(turn=TURN - 1, next_s=time.monotonic() + 60.0)
    assert waited_s(core) < 10.0


def test_the_first_that_schedules_ends_the_wait_of_those_that_compute(grouped, engine):
    core, group = grouped
    engine.add("first", 40, out=8)
    core.model_executor.step_s = engine.scheduler._step_curve.step_s() * 40
    engine.scheduler._step_curve.step_s = lambda *_: 10.0
    core._process_engine_step()
    assert len(core.batch_queue) == 1
    group.state = group.state._replace(turn=TURN)
    assert waited_s(core) < 2.0


def test_a_rank_publishes_when_it_will_schedule_next(grouped, engine):
    core, group = grouped
    states = []
    group.publish = states.append
    core._process_input_queue()
    engine.add("first", 40, out=8)
    core._process_engine_step()
    before = states[-1]
    assert before.turn == TURN
    # Nine tenths of the step, as was learnt, less `LEAD_S`; the second step is not scheduled yet.
    assert before.next_s == pytest.approx(before.decided_s + 0.9 * STEP_S - LEAD_S, abs=0.01)
    core._process_engine_step()
    core._process_engine_step()
    after = states[-1]
    assert after.decided_s > before.decided_s
    assert after.next_s > before.next_s
