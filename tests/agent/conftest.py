"""Fixtures: vLLM's real scheduler without a model, in virtual time."""

import copy
import functools
import importlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from moe_agent.pages import RUN_DIR_VARIABLE, Control, ControlPageWriter
from moe_scheduling.request import RequestPolicy, RequestSettings

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
}
BLOCK = 16


class Ledger:
    """What each request has computed, kept from what the steps carried and handed back alone."""

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
        self.ledger = Ledger()
        self.now_s = 0.0
        self.pace: Callable[[int, int], float] = lambda prefill_tokens, decoding: 0.001
        self.first_token_order: list[str] = []
        self.finished_order: list[str] = []
        self.schedules: list[dict[str, int]] = []
        self._hasher = block_hasher
        self._ahead = ahead
        self._in_flight: list[Any] = []

    def add(
        self, name: str, prompt: int | list[int], *, out: int = 4, arrival_s: float = 0.0, priority: int = 0
    ) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        # Of other tokens for each name, so that no two share a prefix by chance.
        seed = zlib.crc32(name.encode())
        tokens = prompt if isinstance(prompt, list) else [(seed >> i % 20) % 1000 for i in range(prompt)]
        self.ledger.arrive(name, len(tokens))
        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=out, ignore_eos=True),
            pooling_params=None,
            arrival_time=arrival_s,
            priority=priority,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, *names: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(list(names), RequestStatus.FINISHED_ABORTED)

    def step(self) -> bool:
        """One round; False when there is nothing left to do."""
        while len(self._in_flight) < self._ahead and self.scheduler.has_requests():
            output = self.scheduler.schedule()
            # Whoever has computed all its tokens samples one, as the model runner would.
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

        self.ledger.schedule(output)
        self.now_s += self.pace(*self.ledger.load(output))
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
        self.ledger.end(output, {row.request_id: len(row.new_token_ids) for row in rows})
        for row in rows:
            if row.new_token_ids and row.request_id not in self.first_token_order:
                self.first_token_order.append(row.request_id)
            if row.finish_reason is not None:
                self.finished_order.append(row.request_id)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first pays for loading vLLM, which takes minutes on a busy machine."""
    for item in items:
        if "engine_config" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(600))


@contextmanager
def foreign_warnings() -> Iterator[None]:
    """Torch and vLLM warn of their own deprecations when they are loaded; ours stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder


@pytest.fixture(scope="session")
def engine_config(model_dir: Path) -> Callable[..., Any]:
    """Makes vLLM's configuration of an engine with few seats and a small budget."""
    with foreign_warnings():
        importlib.import_module("moe_agent.vllm.scheduler")
        from vllm.engine.arg_utils import EngineArgs

    def make(*, seats: int, budget: int, policy: str) -> Any:
        arguments = EngineArgs(
            model=str(model_dir),
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=seats,
            max_num_batched_tokens=budget,
            scheduling_policy=policy,
            block_size=BLOCK,
            enforce_eager=True,
        )
        with foreign_warnings():
            return arguments.create_engine_config()

    return functools.cache(make)


@pytest.fixture
def make_engine(engine_config: Callable[..., Any]) -> Iterator[Callable[..., VirtualEngine]]:
    """Makes a virtual engine with our scheduler, or with vLLM's own (`stock=True`)."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    made = []

    def make(
        *,
        stock: bool = False,
        seats: int = 4,
        budget: int = 256,
        blocks: int = 1000,
        policy: str = "fcfs",
        ahead: int = 1,
    ) -> VirtualEngine:
        from moe_agent.vllm.scheduler import OrderedScheduler
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        config = copy.deepcopy(engine_config(seats=seats, budget=budget, policy=policy))
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        scheduler = build_scheduler(AsyncScheduler if stock else OrderedScheduler, config, blocks)
        engine = VirtualEngine(scheduler, get_request_block_hasher(BLOCK, hash_function), ahead=ahead)
        scheduler.clock = lambda: engine.now_s
        made.append(scheduler)
        return engine

    yield make
    for scheduler in made:
        scheduler.shutdown()


def build_scheduler(kind: type[Any], config: Any, blocks: int) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    config.cache_config.num_gpu_blocks = blocks
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )


class Settings:
    """The agent's side: puts settings in force for schedulers made after it."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._version = 1
        self._writer = ControlPageWriter(run_dir, Control(version=1, request=RequestSettings()))

    def put(self, **values: Any) -> None:
        values["policy"] = RequestPolicy(values["policy"])
        self._version += 1
        self._writer.write(Control(version=self._version, request=RequestSettings(**values)))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    return Settings(tmp_path)
