"""Why no field switches vLLM's fault tolerance on: what it asks for is not the shape of our engines (docs/agent.md)."""

from types import SimpleNamespace

import pytest
from moe_tools.modelless import foreign_warnings, make_config, write_model

with foreign_warnings():
    from vllm.entrypoints.serve.fault_tolerance import api_router
    from vllm.v1.worker.sentinel.gpu_worker_sentinel import WorkerSentinel


def test_vllm_refuses_it_for_a_server_with_several_ranks(tmp_path):
    write_model(tmp_path)
    with pytest.raises(ValueError, match="Fault tolerance requires external load balancer mode"):
        make_config(tmp_path, data_parallel_size=2, enable_fault_tolerance=True)


def test_a_worker_without_deepep_or_nixl_refuses_it():
    parallel = SimpleNamespace(
        data_parallel_rank=0,
        data_parallel_size=2,
        data_parallel_master_ip="127.0.0.1",
        all2all_backend="allgather_reducescatter",
    )
    with pytest.raises(ValueError, match=r"FT-capable all2all backend \(one of \['deepep_low_latency', 'nixl_ep'\]\)"):
        WorkerSentinel(SimpleNamespace(parallel_config=parallel))


def test_its_one_instruction_is_retry():
    allowed = api_router._ALLOWED_INSTRUCTIONS
    assert set(allowed) == {"retry"}
