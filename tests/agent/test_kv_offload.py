"""Offloaded KV blocks: how vLLM is started for it, and what its scheduler's queue knows of the blocks.

The OffloadingConnector's worker needs a GPU. Its scheduler does not: it runs here as in an engine, and the test
answers for the worker that each transfer is done.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.supervisor.engine_command import build_arguments
from moe_agent.supervisor.node import build_node
from moe_contract.agent_config import EngineConfig
from moe_contract.engine_process import KV_TRANSFER_OPTION, KV_TRANSFER_VARIABLE
from moe_contract.kv_transfer import KvTransferConfig
from moe_scheduling.engine.disaggregation import EngineRole
from moe_tools.modelless import BLOCK_TOKENS, build_scheduler, foreign_warnings, make_config, write_model
from moe_tools.virtual_engine import VirtualEngine

TIER_BYTES = 64 * 2**30
# The cache of the modelless scheduler has small blocks, and vLLM rounds an offloaded one up to a page.
PAGE_BYTES = 4096


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig(port=8001, model="/m", served_name="m", **({"kv_offload_bytes": TIER_BYTES} | fields))


def connector_of(config: EngineConfig, *, cpu_build: bool = False) -> dict[str, Any]:
    given = build_arguments(config, build_node(config, {}), cpu_build=cpu_build)
    assert given.count(KV_TRANSFER_OPTION) == 1
    return dict(json.loads(given[given.index(KV_TRANSFER_OPTION) + 1]))


# 1. The command line.


def test_alone_it_is_vllms_own_connector_with_the_bytes_of_a_rank():
    assert connector_of(engine()) == {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"cpu_bytes_to_use": TIER_BYTES},
    }


@pytest.mark.parametrize(
    ("role", "expected"), [("unified", "kv_consumer"), ("prefill", "kv_producer"), ("decode", "kv_consumer")]
)
def test_beside_an_exchange_both_are_in_a_multi_connector(role, expected):
    found = connector_of(engine(kv_transfer=KvTransferConfig(port=1, role=EngineRole(role), lease_s=12.4)))
    exchange, offload = found["kv_connector_extra_config"]["connectors"]
    assert (found["kv_connector"], found["kv_role"]) == ("MultiConnector", "kv_both")
    assert found["kv_load_failure_policy"] == "recompute"
    assert exchange == {
        "kv_connector": "NixlConnector",
        "kv_role": expected,
        "kv_connector_extra_config": {"kv_lease_duration": 12},
    }
    assert offload["kv_connector"] == "OffloadingConnector"
    assert offload["kv_connector_extra_config"] == {"cpu_bytes_to_use": TIER_BYTES}


def test_without_it_nothing_is_said():
    config = engine(kv_offload_bytes=None)
    assert KV_TRANSFER_OPTION not in build_arguments(config, build_node(config, {}), cpu_build=False)


# 2. The scheduler.


class OffloadingEngine(VirtualEngine):
    """A virtual engine whose transfers are done at the end of the step that begins them."""

    def __init__(self, scheduler: Any, hasher: Any) -> None:
        super().__init__(scheduler, hasher, ahead=1)
        self.loaded: list[str] = []
        self.stored_jobs = 0
        take = scheduler.update_from_output
        scheduler.update_from_output = lambda output, found: take(output, self._transferred(output, found))

    def _transferred(self, output: Any, found: Any) -> Any:
        from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiKVConnectorWorkerMetadata
        from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
        from vllm.v1.outputs import KVConnectorOutput

        metadata = output.kv_connector_metadata
        parts = getattr(metadata, "metadata", None)
        jobs = metadata if parts is None else parts[-1]
        done: Any = OffloadingWorkerMetadata(completed_jobs=dict.fromkeys([*jobs.load_jobs, *jobs.store_jobs], 1))
        names = {job.req_id for job in jobs.load_jobs.values()}
        self.loaded += sorted(names)
        self.stored_jobs += len(jobs.store_jobs)
        if parts is not None:
            done = MultiKVConnectorWorkerMetadata(metadata=(None, done))
        found.kv_connector_output = KVConnectorOutput(finished_recving=names or None, kv_connector_worker_meta=done)
        return found


@pytest.fixture
def make_offloading(
    virtual_engines: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., OffloadingEngine]]:
    """Makes engines of 60 blocks, whose ranks have a tier of the given number of blocks."""
    from moe_agent.vllm.scheduler import OrderedScheduler
    from vllm.config import KVTransferConfig
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "15611")
    monkeypatch.delenv(KV_TRANSFER_VARIABLE, raising=False)
    write_model(tmp_path)
    made = []

    def make(blocks: int, **fields: Any) -> OffloadingEngine:
        said = connector_of(engine(kv_offload_bytes=blocks * PAGE_BYTES, **fields), cpu_build=True)
        with foreign_warnings():
            transfer = KVTransferConfig(**said)
        limits = {"max_model_len": 4096, "max_num_seqs": 1, "max_num_batched_tokens": 256}
        config = make_config(tmp_path, kv_transfer_config=transfer, enable_prefix_caching=True, **limits)
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        scheduler = build_scheduler(OrderedScheduler, config, 60, log_stats=True)
        made.append(OffloadingEngine(scheduler, get_request_block_hasher(BLOCK_TOKENS, hash_function)))
        scheduler.clock = lambda: made[-1].now_s
        return made[-1]

    yield make
    for one in made:
        one.scheduler.shutdown()


EXCHANGE = {"kv_transfer": KvTransferConfig(port=15611, role=EngineRole.UNIFIED)}


@pytest.mark.parametrize("fields", [{}, EXCHANGE], ids=["alone", "beside an exchange"])
def test_the_size_of_a_job_is_what_neither_the_gpu_nor_the_tier_holds(make_offloading, fields):
    one = make_offloading(200, **fields)
    first, second = list(range(800)), [1000 - i % 900 for i in range(800)]
    one.add("first", first, out=1)
    one.run()
    one.add("second", second, out=1)
    one.run()
    assert one.stored_jobs
    one.add("running", 16, out=20)
    one.step()
    one.add("fresh", [900 + i % 50 for i in range(200)], arrival_s=0.1)
    assert one.scheduler.waiting.prefill_tokens == 200
    one.add("offloaded", [*first, 1, 2, 3], arrival_s=0.101)
    assert one.scheduler.waiting.prefill_tokens == 200 + 3
    assert not one.loaded
    assert one.run().first_token_order[-2:] == ["offloaded", "fresh"]
    assert one.loaded == ["offloaded"]


def test_blocks_that_left_the_tier_are_computed_again(make_offloading):
    one = make_offloading(20)
    first = list(range(800))
    one.add("first", first, out=1)
    one.run()
    one.add("second", [1000 - i % 900 for i in range(800)], out=1)
    one.run()
    one.add("again", [*first, 1, 2, 3])
    assert one.scheduler.waiting.prefill_tokens > 400
    one.run()
    assert sorted(one.finished_order) == ["again", "first", "second"]


@pytest.mark.parametrize(("blocks", "larger"), [(200, 200), (20, 60)], ids=["tier", "cache"])
@pytest.mark.parametrize("fields", [{}, EXCHANGE], ids=["alone", "beside an exchange"])
def test_the_room_is_that_of_the_tier_where_it_is_larger_than_the_cache(make_offloading, blocks, larger, fields):
    signal = make_offloading(blocks, **fields).scheduler._state.signal
    assert signal.kv_tokens == larger * BLOCK_TOKENS


def test_without_a_connector_there_is_no_tier(make_engine):
    assert make_engine().scheduler._offload_tier is None


def test_windows_of_attention_are_left_to_vllm(make_offloading):
    from moe_agent.vllm.offload_tier import find_tier

    one = make_offloading(20)
    connector = one.scheduler.connector
    assert find_tier(connector) is not None
    config = connector.scheduler.config
    windows = tuple(group._replace(sliding_window_size_in_chunks=2) for group in config.kv_group_configs)
    connector.scheduler.config = config._replace(kv_group_configs=windows)
    assert find_tier(connector) is None


@pytest.mark.parametrize(
    "part",
    [
        SimpleNamespace(),
        SimpleNamespace(sub_connectors=[SimpleNamespace(scheduler=None)]),
        SimpleNamespace(sub_connectors=[]),
    ],
)
def test_a_connector_of_another_kind_has_no_tier(part):
    from moe_agent.vllm.offload_tier import find_tier

    assert find_tier(part) is None


@pytest.mark.parametrize(
    "scheduler",
    [
        SimpleNamespace(),
        SimpleNamespace(manager=object()),
        SimpleNamespace(manager=None, config=SimpleNamespace(kv_group_configs=())),
    ],
)
def test_an_offloading_connector_whose_table_is_unknown_has_no_tier(scheduler):
    """One of the user's own, which keeps its blocks in another way: the engine starts, and its order knows no tier."""
    from moe_agent.vllm.offload_tier import find_tier
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

    class Own(OffloadingConnector):
        def __init__(self) -> None:
            self.connector_scheduler = scheduler

    assert find_tier(Own()) is None


def test_a_table_without_groups_has_no_tier():
    from moe_agent.vllm.offload_tier import find_tier
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
    from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

    manager = CPUOffloadingManager.__new__(CPUOffloadingManager)
    connector = OffloadingConnector.__new__(OffloadingConnector)
    connector.connector_scheduler = SimpleNamespace(
        manager=manager, config=SimpleNamespace(kv_group_configs=()), shutdown=lambda: None
    )
    assert find_tier(connector) is None
