"""Blocks whose lease may be over are computed anew: what vLLM's real scheduler does with requests that come late."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.shared_memory.transfer_record import TransferRecords
from moe_contract.engine_process import KV_TRANSFER_VARIABLE
from moe_contract.kv_transfer import KvTransferConfig
from moe_scheduling.engine.disaggregation import EngineRole
from moe_tools.modelless import BLOCK_TOKENS, build_scheduler, foreign_warnings, make_config, write_model

LEASE_S = 30.0
PROMPT = list(range(4 * BLOCK_TOKENS))


@pytest.fixture
def make_scheduler(
    virtual_engines: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Makes schedulers with vLLM's NixlConnector, whose clocks the test sets."""
    from moe_agent.supervisor.kv_transfer import build_connector_arguments
    from moe_agent.vllm.scheduler import OrderedScheduler
    from moe_contract.agent_config import EngineConfig
    from vllm.config import KVTransferConfig

    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "15613")
    monkeypatch.setenv(KV_TRANSFER_VARIABLE, "1")
    write_model(tmp_path)
    made = []

    def make(role: EngineRole, *, offloads: bool = False) -> Any:
        import json

        transfer = KvTransferConfig(port=15613, role=role, lease_s=LEASE_S)
        engine = EngineConfig(
            port=1, model="m", served_name="m", kv_transfer=transfer, kv_offload_bytes=4096 * 60 if offloads else None
        )
        with foreign_warnings():
            said = KVTransferConfig(**json.loads(build_connector_arguments(engine, cpu_build=True)[1]))
        config = make_config(
            tmp_path,
            kv_transfer_config=said,
            enable_prefix_caching=True,
            max_model_len=4096,
            max_num_seqs=4,
            max_num_batched_tokens=4096,
        )
        made.append(build_scheduler(OrderedScheduler, config, 60, log_stats=True))
        return made[-1]

    yield make
    for one in made:
        one.shutdown()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


def request(name: str, params: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    made = Request(
        request_id=name,
        prompt_token_ids=PROMPT,
        sampling_params=SamplingParams(
            max_tokens=4, ignore_eos=True, extra_args=None if params is None else {"kv_transfer_params": params}
        ),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_TOKENS, hash_function),
    )
    assert made.kv_transfer_params == params
    return made


def params_of(held_until_s: float | None) -> dict[str, Any]:
    params = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "other",
        "remote_request_id": "r",
        "remote_block_ids": [[1, 2, 3, 4]],
        "remote_host": "127.0.0.1",
        "remote_port": 1,
        "tp_size": 1,
    }
    return params if held_until_s is None else params | {"moeserving_held_until_s": held_until_s}


def fetches(scheduler: Any, name: str) -> bool:
    """Whether a request waits for the blocks of another engine after a step; else its prompt is computed here."""
    output = scheduler.schedule()
    computed = output.num_scheduled_tokens.get(name, 0)
    assert computed in (0, len(PROMPT))
    return computed == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, virtual_engines: Any) -> Clock:
    from moe_agent.vllm import leases

    made = Clock()
    monkeypatch.setattr(leases.LeaseGuard, "clock", staticmethod(made))
    return made


@pytest.mark.parametrize("offloads", [False, True], ids=["alone", "beside a tier"])
@pytest.mark.parametrize(
    ("left_s", "expected"), [(30.0, True), (11.0, True), (9.0, False), (0.0, False), (-100.0, False), (None, True)]
)
def test_blocks_are_fetched_while_a_third_of_their_lease_is_left(make_scheduler, clock, left_s, expected, offloads):
    scheduler = make_scheduler(EngineRole.DECODE, offloads=offloads)
    held_until_s = None if left_s is None else clock.now_s + left_s
    scheduler.add_request(request("a", params_of(held_until_s)))
    assert fetches(scheduler, "a") is expected


def test_a_request_without_blocks_of_others_is_left_alone(make_scheduler, clock):
    scheduler = make_scheduler(EngineRole.DECODE)
    scheduler.add_request(request("a", None))
    assert not fetches(scheduler, "a")


def test_an_engine_that_stood_still_does_not_fetch_for_those_that_waited(make_scheduler, clock):
    scheduler = make_scheduler(EngineRole.DECODE)
    scheduler.add_request(request("a", params_of(clock.now_s + 25.0)))
    clock.now_s += 16.0
    assert not fetches(scheduler, "a")


def test_an_engine_that_makes_steps_renews_the_leases_of_those_that_wait(make_scheduler, clock):
    scheduler = make_scheduler(EngineRole.DECODE)
    blocked = [request(f"b{number}", None) for number in range(4)]
    for one in blocked:
        scheduler.add_request(one)
    scheduler.add_request(request("a", params_of(clock.now_s + LEASE_S)))
    for _ in range(10):
        scheduler.schedule()
        clock.now_s += 10.0
    from vllm.v1.request import RequestStatus

    scheduler.finish_requests([one.request_id for one in blocked], RequestStatus.FINISHED_ABORTED)
    assert fetches(scheduler, "a")


def test_an_engine_says_until_when_it_holds_blocks(make_scheduler, clock):
    from moe_agent.vllm.leases import HELD_UNTIL
    from vllm.v1.request import RequestStatus

    scheduler = make_scheduler(EngineRole.PREFILL)
    asked = request("a", {"do_remote_decode": True, "do_remote_prefill": False})
    scheduler.add_request(asked)
    scheduler.schedule()
    asked.status = RequestStatus.FINISHED_LENGTH_CAPPED
    params, _ = scheduler._free_request(asked)
    assert params["do_remote_prefill"]
    assert params[HELD_UNTIL] == clock.now_s + LEASE_S


def test_what_is_not_fetched_counts_as_failed(make_scheduler, clock, settings):
    scheduler = make_scheduler(EngineRole.DECODE)
    records = TransferRecords(settings.run_dir, range(1), KvTransferConfig(port=1))
    scheduler.add_request(request("a", params_of(clock.now_s + 20.0)))
    assert records.read().failed == 0
    scheduler.add_request(request("b", params_of(clock.now_s)))
    assert records.read().failed == 1


@pytest.mark.parametrize("value", ["soon", float("nan"), True, None])
def test_a_time_that_is_none_is_no_time(make_scheduler, clock, value):
    scheduler = make_scheduler(EngineRole.DECODE)
    scheduler.add_request(request("a", params_of(None) | {"moeserving_held_until_s": value}))
    assert fetches(scheduler, "a")


@pytest.mark.parametrize(
    ("connector", "extra", "expected"),
    [
        ("NixlConnector", {}, 30.0),
        ("NixlConnector", {"kv_lease_duration": 8}, 8.0),
        ("MultiConnector", {"connectors": [{"kv_connector": "OffloadingConnector"}, {"kv_connector": "X"}]}, None),
        (
            "MultiConnector",
            {
                "connectors": [
                    {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"kv_lease_duration": 9}},
                    {"kv_connector": "OffloadingConnector"},
                ]
            },
            9.0,
        ),
        ("MultiConnector", {"connectors": [{"kv_connector": "NixlConnector"}]}, 30.0),
        ("MooncakeConnector", {}, None),
        ("OffloadingConnector", {}, None),
    ],
)
def test_only_blocks_of_the_connector_with_leases_are_looked_at(virtual_engines, connector, extra, expected):
    """Others hold blocks by rules of their own."""
    from moe_agent.vllm.leases import find_lease_s

    said = SimpleNamespace(kv_connector=connector, kv_connector_extra_config=extra)
    assert find_lease_s(said) == expected
