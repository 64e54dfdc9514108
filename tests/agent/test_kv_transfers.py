"""KV blocks that travel: how vLLM is started for it, what its scheduler counts, and what the agent says of it."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.api.metrics import AgentCollector
from moe_agent.shared_memory.transfer_record import (
    TransferRecord,
    TransferRecords,
    TransferRecordWriter,
    build_state,
)
from moe_agent.supervisor import kv_transfer
from moe_agent.supervisor.engine_command import build_arguments
from moe_agent.supervisor.kv_transfer import find_missing_connector, with_transfer_environment
from moe_agent.supervisor.node import build_node
from moe_agent.supervisor.supervisor import EngineSupervisor, Phase
from moe_agent.vllm.transfers import TransferMeter, count_token_bytes, count_transfers
from moe_contract.agent_config import EngineConfig
from moe_contract.agent_state import AgentSettingsInForce, AgentState
from moe_contract.engine_process import KV_TRANSFER_OPTION, KV_TRANSFER_VARIABLE, NO_CONNECTOR, POD_IP_VARIABLE
from moe_contract.kv_transfer import KvTransferConfig, KvTransferState
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.request.order import RequestSettings
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

TRANSFER = KvTransferConfig(port=15600, role=EngineRole.PREFILL, lease_s=12.4)


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig(**({"port": 8001, "model": "/m", "served_name": "m", "kv_transfer": TRANSFER} | fields))


def arguments(config: EngineConfig, *, cpu_build: bool = True) -> list[str]:
    return build_arguments(config, build_node(config, {}), cpu_build=cpu_build)


# 1. The command line and the environment.


def test_an_engine_that_takes_no_part_is_started_as_before():
    assert KV_TRANSFER_OPTION not in arguments(engine(kv_transfer=None))
    environment = {"A": "1", "VLLM_NIXL_SIDE_CHANNEL_PORT": "3"}
    assert with_transfer_environment(environment, engine(kv_transfer=None), {}, cpu_build=True) == environment


@pytest.mark.parametrize(
    ("role", "expected"), [("unified", "kv_consumer"), ("prefill", "kv_producer"), ("decode", "kv_consumer")]
)
def test_vllm_is_given_the_connector_of_the_role(role, expected):
    given_arguments = arguments(engine(kv_transfer=KvTransferConfig(port=1, role=role, lease_s=12.4)))
    config = json.loads(given_arguments[given_arguments.index(KV_TRANSFER_OPTION) + 1])
    assert config == {
        "kv_connector": "NixlConnector",
        "kv_role": expected,
        "kv_load_failure_policy": "recompute",
        "kv_buffer_device": "cpu",
        "kv_connector_extra_config": {"kv_lease_duration": 12},
    }


def test_vllm_reads_the_configuration(virtual_engines):
    from vllm.config import KVTransferConfig

    given_arguments = arguments(engine(), cpu_build=False)
    said = json.loads(given_arguments[given_arguments.index(KV_TRANSFER_OPTION) + 1])
    assert KVTransferConfig(**said).is_kv_producer
    assert "kv_buffer_device" not in said, "with GPUs the blocks stay there"


def test_the_side_channel_is_at_the_pods_own_address():
    found = with_transfer_environment({}, engine(host="::"), {POD_IP_VARIABLE: "10.1.2.3"}, cpu_build=True)
    assert found["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.1.2.3"
    assert found["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "15600"
    assert found[KV_TRANSFER_VARIABLE] == "1"
    assert found["UCX_TLS"] == "tcp,self,sm"
    assert "UCX_NET_DEVICES" not in found


def test_on_one_machine_all_stays_on_loopback():
    found = with_transfer_environment({}, engine(), {}, cpu_build=True)
    assert (found["VLLM_NIXL_SIDE_CHANNEL_HOST"], found["UCX_NET_DEVICES"]) == ("127.0.0.1", "lo")


def test_a_port_that_the_shell_has_is_not_taken_and_the_resources_own_variables_win():
    inherited = {"VLLM_NIXL_SIDE_CHANNEL_PORT": "1", "UCX_TLS": "all"}
    found = with_transfer_environment(inherited, engine(env={"UCX_NET_DEVICES": "eth7"}), {}, cpu_build=True)
    assert found["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "15600"
    assert found["UCX_TLS"] == "all"
    assert found["UCX_NET_DEVICES"] == "eth7"


def test_with_gpus_the_transports_are_left_to_ucx():
    found = with_transfer_environment({}, engine(), {POD_IP_VARIABLE: "10.1.2.3"}, cpu_build=False)
    assert not [name for name in found if name.startswith("UCX_")]


# 2. An engine without the connector.


def test_a_missing_package_is_named_and_only_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(kv_transfer, "find_spec", lambda name: None)
    assert find_missing_connector(engine(kv_transfer=None)) == ""
    assert find_missing_connector(engine()).startswith(NO_CONNECTOR)


def test_the_package_is_found_here():
    assert find_missing_connector(engine()) == ""


async def test_an_engine_that_cannot_start_is_not_started_and_says_why(tmp_path):
    supervisor = EngineSupervisor(
        engine(), ["/nowhere/to/be/found"], dict(os.environ), tmp_path / "engine.log", obstacle="no connector here"
    )
    running = asyncio.create_task(supervisor.run())
    for _ in range(6000):
        if supervisor.phase is Phase.BACKOFF:
            break
        await asyncio.sleep(0.01)
    assert (supervisor.phase, supervisor.last_exit) == (Phase.BACKOFF, "no connector here")
    assert (supervisor.restarts, supervisor.pid, supervisor.accepting) == (0, None, False)
    supervisor.request_drain()
    await asyncio.wait_for(running, 60)
    assert supervisor.phase is Phase.STOPPED


# 3. What the agent says.


def record(**fields: Any) -> TransferRecord:
    return TransferRecord(**({"peers": 0xABC, "token_bytes": 4096.0} | fields))


def test_nothing_is_known_before_an_engine_has_started(tmp_path):
    records = TransferRecords(tmp_path, range(2), TRANSFER)
    assert records.read() == KvTransferState(role=EngineRole.PREFILL, lease_s=12.4)
    assert records.versions() == (0, 0)


def test_the_ranks_are_added_up_and_removed_with_their_engine(tmp_path):
    records = TransferRecords(tmp_path, range(2), TRANSFER)
    first = record(moved_bytes=3e6, moved_s=1.0, transfers=3, failed=1)
    with TransferRecordWriter(tmp_path, 0, first):
        assert records.read().peers == ""
        with TransferRecordWriter(tmp_path, 1, record(moved_bytes=1e6, moved_s=1.0, transfers=2)):
            assert records.read() == KvTransferState(
                role=EngineRole.PREFILL,
                lease_s=12.4,
                peers="0000000000000abc",
                token_bytes=4096.0,
                bytes_per_s=2e6,
                transfers=5,
                failed=1,
            )
            assert all(records.versions())
    records.remove()
    assert records.read().transfers == 0
    assert not list(tmp_path.iterdir())


def test_ranks_that_differ_fit_no_peer():
    assert build_state(TRANSFER, [record(), record(peers=7)], 2).peers == ""


# 4. What the scheduler counts.


def test_figures_of_a_step_are_added():
    figures = {"transfer_duration": [0.5, 0.5], "bytes_transferred": [1e6, 1e6], "num_failed_transfers": [1]}
    found = count_transfers(record(), figures)
    assert (found.transfers, found.failed) == (2, 1)
    assert found.moved_bytes / found.moved_s == pytest.approx(2e6)
    assert count_transfers(found, {"num_failed_handshakes": [1, 1]}).failed == 3


def test_of_several_connectors_nixls_figures_count():
    figures = {"NixlConnector": SimpleNamespace(data={"transfer_duration": [1.0], "bytes_transferred": [8.0]})}
    assert count_transfers(record(), figures).transfers == 1
    assert count_transfers(record(), {"OffloadingConnector": SimpleNamespace(data={})}).transfers == 0


@given(st.lists(st.tuples(st.floats(1e-6, 10.0), st.integers(1, 10**12)), max_size=30))
def test_the_rate_is_between_the_slowest_and_the_fastest_transfer(transfers):
    state = record()
    for seconds, size in transfers:
        state = count_transfers(state, {"transfer_duration": [seconds], "bytes_transferred": [size]})
    rates = [size / seconds for seconds, size in transfers]
    assert state.transfers == len(transfers)
    if rates:
        assert min(rates) * 0.999 <= state.moved_bytes / state.moved_s <= max(rates) * 1.001


def test_a_step_without_transfers_writes_nothing():
    state = record()
    assert count_transfers(state, {"num_kv_expired_reqs": [1]}) is state
    assert count_transfers(state, {}) is state


def test_the_figures_have_the_names_of_vllms_connector(virtual_engines):
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    names = {"transfer_duration", "bytes_transferred", "num_failed_transfers", "num_failed_handshakes"}
    assert names <= NixlKVConnectorStats().data.keys()


def group(layers: int, size: int, block: int, *, together: bool = False) -> Any:
    spec: dict[str, Any] = {"page_size_bytes": size, "block_size": block} | ({"kv_cache_specs": {}} if together else {})
    return SimpleNamespace(layer_names=["l"] * layers, kv_cache_spec=SimpleNamespace(**spec))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group(4, 1024, 16)], 256.0),
        ([group(4, 1024, 16), group(2, 512, 16)], 320.0),
        ([group(4, 1024, 16, together=True)], 64.0),
    ],
)
def test_the_bytes_of_a_token_are_those_of_all_layers(groups, expected):
    assert count_token_bytes(SimpleNamespace(kv_cache_groups=groups)) == expected


def test_the_scheduler_publishes_what_fits_it_and_what_arrived(make_engine: Callable[..., Any], tmp_path: Path):
    scheduler = make_engine().scheduler
    meter = TransferMeter(tmp_path, 0, scheduler.vllm_config, scheduler.kv_cache_config)
    records = TransferRecords(tmp_path, range(1), TRANSFER)
    before = records.read()
    assert before.peers
    assert before.token_bytes > 0.0
    figures = {"transfer_duration": [0.01], "bytes_transferred": [1000.0]}
    stats = SimpleNamespace(kv_connector_stats=SimpleNamespace(data=figures))
    meter.observe(SimpleNamespace(kv_connector_output=None))
    meter.observe(SimpleNamespace(kv_connector_output=SimpleNamespace(kv_connector_stats=None)))
    meter.observe(SimpleNamespace(kv_connector_output=stats))
    assert records.read().transfers == 1
    assert records.read().bytes_per_s == pytest.approx(100_000.0)


def test_engines_of_other_types_are_no_peers(make_engine: Callable[..., Any]):
    from moe_agent.vllm.transfers import identify_peers

    config = make_engine().scheduler.vllm_config
    first = identify_peers(config)
    assert first == identify_peers(config)
    assert 0 <= first < 2**63
    model = config.model_config
    for name in ("model", "revision", "quantization"):
        before = getattr(model, name)
        try:
            setattr(model, name, "another")
            assert identify_peers(config) != first
        finally:
            setattr(model, name, before)


class Connector:
    """The part of vLLM's connector by which a scheduler gets what its workers tell other engines."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
        self.given.append(metadata)


def handshakes(*hashes: str) -> Any:
    return {(0, rank): SimpleNamespace(compatibility_hash=text) for rank, text in enumerate(hashes)}


def test_peers_are_those_whose_workers_tell_the_same(make_engine: Callable[..., Any], tmp_path: Path):
    scheduler, found = make_engine().scheduler, {}
    for name, hashes in {"a": ("flash",), "b": ("flash",), "c": ("flash", "flash"), "d": ("other",)}.items():
        (tmp_path / name).mkdir()
        meter = TransferMeter(tmp_path / name, 0, scheduler.vllm_config, scheduler.kv_cache_config)
        meter.watch(connector := Connector())
        records = TransferRecords(tmp_path / name, range(1), TRANSFER)
        before = records.read()
        connector.set_xfer_handshake_metadata_pp_aware(given := handshakes(*hashes))
        assert connector.given == [given]
        found[name] = records.read()
        assert found[name].peers != before.peers
        assert found[name].token_bytes == before.token_bytes
    assert found["a"].peers == found["b"].peers == found["c"].peers != found["d"].peers


def test_workers_that_tell_nothing_leave_what_is_configured(make_engine: Callable[..., Any], tmp_path: Path):
    scheduler = make_engine().scheduler
    meter = TransferMeter(tmp_path, 0, scheduler.vllm_config, scheduler.kv_cache_config)
    before = TransferRecords(tmp_path, range(1), TRANSFER).read()
    meter.watch(connector := Connector())
    connector.set_xfer_handshake_metadata_pp_aware({(0, 0): SimpleNamespace()})
    assert TransferRecords(tmp_path, range(1), TRANSFER).read() == before
    assert len(connector.given) == 1
    meter.watch(None)


def test_the_workers_tell_it_under_the_names_of_vllm(virtual_engines):
    from dataclasses import fields

    from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlConnector
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload

    assert "compatibility_hash" in {field.name for field in fields(NixlHandshakePayload)}
    assert callable(NixlConnector.set_xfer_handshake_metadata_pp_aware)
    assert callable(MultiConnector.set_xfer_handshake_metadata_pp_aware)


def test_the_progress_thread_of_nixl_pauses():
    import nixl
    from moe_agent.vllm.cpu_transfers import PROGRESS_PAUSE_US, with_pause

    config = with_pause(nixl._bindings.nixlAgentConfig)()
    config.pthrDelay = 0
    assert config.pthrDelay == PROGRESS_PAUSE_US
    config.pthrDelay = 7
    assert config.pthrDelay == 7


def test_metrics_have_the_transfers_of_an_engine_that_takes_part():
    transfer = KvTransferState(role=EngineRole.DECODE, transfers=7, failed=2, bytes_per_s=5.0)

    def scraped(state: AgentState) -> str:
        registry = CollectorRegistry()
        registry.register(AgentCollector(lambda: state, lambda: None))
        return generate_latest(registry).decode()

    settings = AgentSettingsInForce(request=RequestSettings())
    text = scraped(AgentState(name="e0", phase="ready", config=settings, kv_transfer=transfer))
    for row in (
        'moeserving_engine_kv_transfers_total{engine="e0",role="decode"} 7.0',
        'moeserving_engine_kv_transfers_failed_total{engine="e0",role="decode"} 2.0',
        'moeserving_engine_kv_transfer_bytes_per_second{engine="e0"} 5.0',
    ):
        assert row in text.splitlines()
    assert "kv_transfer" not in scraped(AgentState(name="e0", phase="ready", config=settings))
