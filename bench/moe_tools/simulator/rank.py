"""One rank: a real vLLM scheduler, and a model that hands back one token for each request that has computed all.

Made by `RankMaker`, which loads vLLM once and keeps its configurations, whose making takes seconds. The scheduler's
class is the caller's choice: vLLM's own, ours, or any class by its path, as for vLLM's `--scheduler-cls`.

The settings of layer 1 reach our scheduler as in an engine, through the agent's control record. Its signal is caught
where it would be written to the rank's record in shared memory.
"""

import copy
import functools
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_contract.input_errors import InputError, InvalidInput
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal

from moe_tools.modelless import build_scheduler, foreign_warnings, make_config, write_model
from moe_tools.simulator.costs import COMPRESSED_TOKENS, Work
from moe_tools.simulator.workload import VLLM_BLOCK_TOKENS, SimRequest, block_hashes

OURS = "moe_agent.vllm.scheduler.OrderedScheduler"
STOCK = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Limits of an engine, by the names of vLLM's own arguments.

    Attributes:
        max_num_seqs: requests that run at once.
        max_num_batched_tokens: tokens that a step may carry; vLLM's static prefill budget.
        kv_blocks: KV blocks of 16 tokens.
        max_model_len: longest prompt with its answer.
        scheduling_policy: vLLM's own order of its waiting queue.
        long_prefill_token_threshold: tokens of one prompt that a step takes at most; 0 for no bound.
        prefill_schedule_interval: prefills begin in every n-th step of a lockstep group alone; vLLM 0.33 has it for a
            single rank too, counted from its last prefill, while for one of 0.32 it has no effect.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_blocks: int = 8192
    max_model_len: int = 32_768
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: int = 0
    prefill_schedule_interval: int = 1


class ScheduledStep(NamedTuple):
    """One scheduled step of a rank, until its output is there; `pulls` are the KV transfers that begin with it."""

    output: Any
    work: Work
    sampling: list[str]
    pulls: Sequence[Any] = ()


class Progress(NamedTuple):
    """First tokens and finished requests of a step; `prefilled` are those whose prompt another engine asked for."""

    first_tokens: list[SimRequest]
    finished: list[SimRequest]
    prefilled: list[SimRequest]


class RequestPhase(StrEnum):
    """The part of a request that an engine is asked for."""

    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(slots=True)
class _TransferNotices:
    """Ends of KV transfers that the scheduler does not know yet: what a worker reports with the output of a step."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.sent or self.received)


class Rank:
    """One data-parallel rank of a server. All times are arguments; the scheduler reads `now_s` as its clock.

    Args:
        scheduler: a vLLM scheduler.
        publishes: whether it publishes a signal.
    """

    def __init__(self, scheduler: Any, *, publishes: bool) -> None:
        self.scheduler = scheduler
        self.now_s = 0.0
        self.published: EngineSignal | None = EngineSignal() if publishes else None
        self.published_s = 0.0
        self.preemptions = 0
        # What the expert layer of an engine measures; here the cost model knows it.
        self.expert_values: dict[str, float] = {}
        self._requests: dict[str, SimRequest] = {}
        self._prefilling: set[str] = set()
        self._notices = _TransferNotices()
        self._steps_on_way = 0
        scheduler.clock = lambda: self.now_s
        if publishes:
            scheduler._record = _RecordTap(self)
        _count_preemptions(scheduler, self)

    def add(self, request: SimRequest, now_s: float, phase: RequestPhase = RequestPhase.WHOLE) -> None:
        """A request comes to the engine."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.now_s = now_s
        is_prefill = phase is RequestPhase.PREFILL
        name = request.prefill_name if is_prefill else request.name
        self._requests[name] = request
        if is_prefill:
            self._prefilling.add(name)
        self.scheduler.add_request(
            Request(
                request_id=name,
                prompt_token_ids=[0] * request.prompt_tokens,
                sampling_params=SamplingParams(
                    max_tokens=1 if is_prefill else request.output_tokens,
                    ignore_eos=True,
                    extra_args=_transfer_arguments(phase),
                ),
                pooling_params=None,
                arrival_time=now_s,
                priority=request.priority,
                block_hasher=_hasher(request),
            )
        )

    def find(self, name: str) -> SimRequest:
        """Returns the request of this id at the engine."""
        return self._requests[name]

    @property
    def requests(self) -> list[SimRequest]:
        """Requests that have not finished on this rank."""
        return list(self._requests.values())

    @property
    def has_requests(self) -> bool:
        """Whether the scheduler wants a step, be it to take note of an end.

        vLLM steps also while it only keeps blocks that another engine will fetch; such a step takes no time, and the
        ends of transfers are reported at once (`report`), so it is left out.
        """
        if self.scheduler.connector is None:
            return bool(self.scheduler.has_requests())
        return self.has_unfinished or bool(self.scheduler.finished_req_ids)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self.scheduler.has_unfinished_requests())

    @property
    def keeps_step(self) -> bool:
        """Whether the rank schedules its part of a step no sooner than another has to, and with the first that does."""
        return bool(getattr(self.scheduler, "keeps_step", False))

    def defer_s(self, now_s: float) -> float:
        """Seconds by which the scheduling of the next step is still deferred; 0 for vLLM's own scheduler."""
        self.now_s = now_s
        return float(self.scheduler.defer_s()) if hasattr(self.scheduler, "defer_s") else 0.0

    def schedule(self, now_s: float, *, throttle_prefills: bool) -> ScheduledStep:
        """Schedules the next step; returns its work."""
        self.now_s = now_s
        scheduler = self.scheduler
        output = scheduler.schedule(throttle_prefills)
        for new in output.scheduled_new_reqs:
            request = self._requests[new.req_id]
            # The cached tokens of a pair are those at the engine that computes the prompt.
            if request.prefilled_s is None:
                request.cached_tokens = new.num_computed_tokens
        work, sampling = work_of(output, scheduler.requests)
        self._steps_on_way += 1
        metadata = output.kv_connector_metadata
        return ScheduledStep(output, work, sampling, () if metadata is None else metadata.pulls)

    def finish(self, step: ScheduledStep, now_s: float) -> Progress:
        """The output of a step is there. Steps end in the order of their beginning."""
        from vllm.v1.outputs import ModelRunnerOutput

        self.now_s = now_s
        self._steps_on_way -= 1
        names = list(step.output.num_scheduled_tokens)
        sampling = set(step.sampling)
        answers = self.scheduler.update_from_output(
            step.output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[1] if name in sampling else [] for name in names],
                kv_connector_output=self._take_notices(),
            ),
        )
        progress = Progress([], [], [])
        first_tokens, finished, prefilled = progress
        for answer in answers.values():
            for row in answer.outputs:
                if row.request_id in self._prefilling:
                    if row.finish_reason is not None:
                        self._prefilling.remove(row.request_id)
                        request = self._requests.pop(row.request_id)
                        request.prefilled_s = now_s
                        prefilled.append(request)
                    continue
                request = self._requests[row.request_id]
                if request.first_token_s is None and row.new_token_ids:
                    request.first_token_s = now_s
                    first_tokens.append(request)
                if row.finish_reason is not None:
                    request.finished_s = now_s
                    finished.append(self._requests.pop(row.request_id))
        return progress

    # Ends of KV transfers.

    def sent(self, name: str, now_s: float) -> None:
        """The blocks of this request were fetched, or their lease is over: they are free."""
        self._notices.sent.add(name)
        self._report_when_idle(now_s)

    def received(self, name: str, *, failed: bool = False) -> None:
        """The blocks of this request are here, or are known not to come."""
        self._notices.received.add(name)
        if failed:
            self._notices.failed.add(name)

    def _report_when_idle(self, now_s: float) -> None:
        """An engine without requests to serve makes a step without tokens; any other reports with its next step."""
        if not self._steps_on_way and not self.has_unfinished:
            self.finish(self.schedule(now_s, throttle_prefills=False), now_s)

    def _take_notices(self) -> Any:
        if not self._notices:
            return None
        from vllm.v1.outputs import KVConnectorOutput

        taken, self._notices = self._notices, _TransferNotices()
        # Of a failed transfer vLLM is informed twice: that it ended, and how.
        return KVConnectorOutput(
            finished_sending=taken.sent, finished_recving=taken.received, failed_recving=taken.failed
        )

    def counts(self) -> EngineSignal:
        """The signal that vLLM's own metrics give: no prefill tokens."""
        running, waiting = self.scheduler.get_request_counts()
        return EngineSignal(
            running=running,
            waiting=waiting,
            decode_tokens=running,
            kv_usage=self.scheduler.get_kv_cache_usage(),
            preemptions=self.preemptions,
        )

    def close(self) -> None:
        """Shuts vLLM's scheduler of this rank down."""
        self.scheduler.shutdown()


def work_of(output: Any, requests: Mapping[str, Any]) -> tuple[Work, list[str]]:
    """What a step carries, and which of its requests sample a token: those that have computed all they have."""
    sampling = []
    prefill_tokens = decode_requests = context_tokens = prefill_pairs = compressions = 0
    for name, tokens in output.num_scheduled_tokens.items():
        request = requests[name]
        if not request.is_prefill_chunk:
            sampling.append(name)
        # vLLM counts a token as computed once it is scheduled.
        if tokens == 1:
            decode_requests += 1
            context_tokens += request.num_computed_tokens
            compressions += request.num_computed_tokens % COMPRESSED_TOKENS == 0
        else:
            prefill_tokens += tokens
            prefill_pairs += tokens * (request.num_computed_tokens - tokens // 2)
    return Work(prefill_tokens, decode_requests, context_tokens, prefill_pairs, compressions), sampling


def _transfer_arguments(phase: RequestPhase) -> dict[str, Any] | None:
    """What a gateway puts into the two requests of a pair; blocks and addresses are known to the world."""
    if phase is RequestPhase.WHOLE:
        return None
    is_prefill = phase is RequestPhase.PREFILL
    return {"kv_transfer_params": {"do_remote_decode": is_prefill, "do_remote_prefill": not is_prefill}}


class _RecordTap:
    """Takes the place of our scheduler's shared-memory record, and keeps the last signal."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank

    def write(self, state: Any) -> None:
        self._rank.published = EngineSignal(**{**vars(state.signal), **self._rank.expert_values})
        self._rank.published_s = state.written_s

    def close(self) -> None:
        """Does nothing; a record has to be closed."""


def _count_preemptions(scheduler: Any, rank: Rank) -> None:
    preempt = scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        rank.preemptions += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted


def _hasher(request: SimRequest) -> Callable[[Any], Any]:
    """vLLM's hook for the hashes of blocks that have become full."""
    hashes = block_hashes(request)
    made = 0

    def hash_new_blocks(vllm_request: Any) -> list[bytes]:
        nonlocal made
        full = vllm_request.num_tokens // VLLM_BLOCK_TOKENS
        new = list(islice(hashes, full - made)) if full > made else []
        made += len(new)
        return new

    return hash_new_blocks


SchedulerFactory = Callable[..., Any]
"""Makes a scheduler from vLLM's own arguments: a class, or any callable."""


class RankMaker:
    """Makes ranks; one for a process.

    Args:
        folder: an empty folder for the model's configuration.
    """

    def __init__(self, folder: Path) -> None:
        write_model(folder)
        self._folder = folder
        self._config = functools.cache(self._make_config)

    def make(
        self,
        limits: EngineLimits,
        scheduler: str | SchedulerFactory,
        request: RequestSettings,
        *,
        transfers: bool = False,
    ) -> Rank:
        """Returns a new rank without requests.

        Args:
            limits: of the engine.
            scheduler: a class by its path, or a factory.
            request: settings of layer 1, for schedulers that read them.
            transfers: whether its KV blocks can travel.

        Raises:
            InvalidInput: there is no class of this path.
        """
        factory = find_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        config = copy.deepcopy(self._config(limits, transfers))
        with _control_record(request):
            made = build_scheduler(factory, config, limits.kv_blocks, log_stats=False)
        return Rank(made, publishes=hasattr(made, "_record"))

    def _make_config(self, limits: EngineLimits, transfers: bool) -> Any:
        return make_config(
            self._folder,
            max_model_len=limits.max_model_len,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            scheduling_policy=limits.scheduling_policy,
            long_prefill_token_threshold=limits.long_prefill_token_threshold,
            prefill_schedule_interval=limits.prefill_schedule_interval,
            enable_prefix_caching=True,
            kv_transfer_config=_transfer_config() if transfers else None,
        )


def _transfer_config() -> Any:
    with foreign_warnings():
        from vllm.config import KVTransferConfig

        return KVTransferConfig(
            kv_connector="SimulatedConnector",
            kv_connector_module_path="moe_tools.simulator.kv_connector",
            # A role is a preference of the dispatch: each engine can do both.
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        )


def find_scheduler(path: str) -> SchedulerFactory:
    """The class of this path.

    Raises:
        InvalidInput: there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        with foreign_warnings():
            found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidInput([InputError("engines.scheduler", f"no class {path!r}: {error}")]) from None
    return found  # type: ignore[no-any-return]


@contextmanager
def _control_record(settings: RequestSettings) -> Iterator[None]:
    """The control record that an agent writes before its engine starts."""
    from moe_agent.shared_memory.control_record import Control, ControlRecordWriter
    from moe_contract.engine_process import RUN_DIR_VARIABLE

    before = os.environ.get(RUN_DIR_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RUN_DIR_VARIABLE] = folder
        try:
            with ControlRecordWriter(Path(folder), Control(version=1, request=settings)):
                yield
        finally:
            del os.environ[RUN_DIR_VARIABLE]
            if before is not None:
                os.environ[RUN_DIR_VARIABLE] = before
