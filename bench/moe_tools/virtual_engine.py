"""vLLM's own scheduler, without a model and in virtual time: the same decisions, without noise.

Used by the tests of the queue order and by the micro-benchmark of the telemetry. The scheduler is real (ours, or stock
vLLM as the baseline); only the model is not: it hands back one token for each request that has computed all it has, and
`pace` gives the seconds of a step. Importing this module does not import vllm or torch.

The scheduler's shared-memory record and settings are found through the environment, as in an engine
(`moe_agent.shared_memory`).
"""

import copy
import functools
import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_tools.modelless import BLOCK_TOKENS, build_scheduler, foreign_warnings, make_config, write_model


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """Limits of an engine.

    Attributes:
        max_num_seqs: requests that run at once.
        step_tokens: tokens that a step may carry.
        kv_blocks: KV blocks, of 16 tokens each.
        vllm_policy: vLLM's own scheduling policy, `fcfs` or `priority`.
        ahead: steps on their way at once; 2 is vLLM's asynchronous scheduling.
    """

    max_num_seqs: int = 4
    step_tokens: int = 256
    kv_blocks: int = 1000
    vllm_policy: Literal["fcfs", "priority"] = "fcfs"
    ahead: int = 1


class RequestProgress:
    """Computed tokens of each request, counted from the scheduled steps and their outputs alone."""

    def __init__(self) -> None:
        self.target: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.tokens: dict[str, int] = {}

    def arrive(self, name: str, prompt_tokens: int) -> None:
        self.tokens[name] = prompt_tokens

    def schedule(self, output: Any) -> None:
        """A request that begins, or begins again, has a prefill of all tokens it has, less those from the cache."""
        cached = output.scheduled_cached_reqs
        begun = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                begun[name] = computed
        for name, computed in begun.items():
            self.target[name], self.computed[name] = self.tokens[name], computed

    def load(self, output: Any) -> tuple[int, int]:
        """Prefill tokens and decoding requests of a step."""
        carried = output.num_scheduled_tokens
        prefilling = [name for name in carried if self.left(name)]
        return sum(carried[name] for name in prefilling), len(carried) - len(prefilling)

    def end(self, output: Any, new_tokens: dict[str, int]) -> None:
        for name, carried in output.num_scheduled_tokens.items():
            self.computed[name] += carried
        for name, count in new_tokens.items():
            self.tokens[name] += count

    def left(self, name: str) -> int:
        return max(0, self.target[name] - self.computed[name])


class VirtualEngine:
    """One scheduler, driven step by step: `step()` schedules, lets virtual time pass, and hands back one token each."""

    def __init__(self, scheduler: Any, block_hasher: Any, *, ahead: int) -> None:
        self.scheduler = scheduler
        self.progress = RequestProgress()
        self.now_s = 0.0
        self.pace: Callable[[int, int], float] = lambda prefill_tokens, decoding: 0.001
        self.first_token_order: list[str] = []
        self.finished_order: list[str] = []
        self.schedules: list[dict[str, int]] = []
        self._hasher = block_hasher
        self._ahead = ahead
        self._in_flight: list[Any] = []

    def add(
        self,
        name: str,
        prompt: int | list[int],
        *,
        out: int = 4,
        arrival_s: float = 0.0,
        priority: int = 0,
        resumable: bool = False,
    ) -> Any:
        """Lets a request arrive; with `resumable` a session of streaming input, of which the same name is a chunk."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        # Of other tokens for each name, so that no two share a prefix by chance.
        seed = zlib.crc32(name.encode())
        tokens = prompt if isinstance(prompt, list) else [(seed >> i % 20) % 1000 for i in range(prompt)]
        self.progress.arrive(name, len(tokens))
        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=out, ignore_eos=True),
            pooling_params=None,
            arrival_time=arrival_s,
            priority=priority,
            block_hasher=self._hasher,
            resumable=resumable,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, *names: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """Schedules and ends one step; False when no request is left."""
        while len(self._in_flight) < self._ahead and self.scheduler.has_requests():
            output = self.scheduler.schedule()
            # A request whose tokens are all computed samples one, as the model runner would.
            sampling = [
                name for name in output.num_scheduled_tokens if not self.scheduler.requests[name].is_prefill_chunk
            ]
            self.schedules.append(dict(output.num_scheduled_tokens))
            self._in_flight.append((output, sampling))
        if not self._in_flight:
            return False
        self._finish(*self._in_flight.pop(0))
        return True

    def run(self, limit: int = 20_000) -> "VirtualEngine":
        for _ in range(limit):
            if not self.step():
                return self
        raise AssertionError(f"not done after {limit} steps")

    def _finish(self, output: Any, sampling: list[str]) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        self.progress.schedule(output)
        self.now_s += self.pace(*self.progress.load(output))
        names = list(output.num_scheduled_tokens)
        answers = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[1] if name in sampling else [] for name in names],
            ),
        )
        rows = [row for answer in answers.values() for row in answer.outputs]
        self.progress.end(output, {row.request_id: len(row.new_token_ids) for row in rows})
        for row in rows:
            if row.new_token_ids and row.request_id not in self.first_token_order:
                self.first_token_order.append(row.request_id)
            if row.finish_reason is not None:
                self.finished_order.append(row.request_id)


class VirtualEngineFactory:
    """Makes virtual engines; loads vLLM once, and keeps its configurations, whose making takes seconds.

    Args:
        folder: an empty folder for the model's configuration.
    """

    def __init__(self, folder: Path) -> None:
        write_model(folder)
        self._folder = folder
        with foreign_warnings():
            importlib.import_module("moe_agent.vllm.scheduler")
        self._config = functools.cache(self._make_config)

    def make(self, shape: EngineShape, *, stock: bool = False) -> VirtualEngine:
        """An engine with our scheduler, or with vLLM's own."""
        from moe_agent.vllm.scheduler import OrderedScheduler
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        config = copy.deepcopy(self._config(shape.max_num_seqs, shape.step_tokens, shape.vllm_policy))
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        kind = AsyncScheduler if stock else OrderedScheduler
        scheduler = build_scheduler(kind, config, shape.kv_blocks, log_stats=True)
        engine = VirtualEngine(scheduler, get_request_block_hasher(BLOCK_TOKENS, hash_function), ahead=shape.ahead)
        scheduler.clock = lambda: engine.now_s
        return engine

    def _make_config(self, max_num_seqs: int, step_tokens: int, policy: Literal["fcfs", "priority"]) -> Any:
        return make_config(
            self._folder,
            max_model_len=4096,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=step_tokens,
            scheduling_policy=policy,
        )
