"""Why no field switches vLLM's fault tolerance on: what it asks for is not the shape of our engines (docs/agent.md)."""

from types import SimpleNamespace

import pytest
from moe_tools.modelless import foreign_warnings
from moe_tools.tiny import TinySettings, ensure_tiny_model

with foreign_warnings():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.serve.fault_tolerance import api_router
    from vllm.v1.worker.sentinel.gpu_worker_sentinel import WorkerSentinel


def test_vllm_refuses_it_for_a_server_with_several_ranks(tmp_path):
    model = ensure_tiny_model(tmp_path / "model", settings=TinySettings(steps=0), show_progress=False)
    args = EngineArgs(model=str(model), data_parallel_size=2, enable_fault_tolerance=True, max_model_len=64)
    with pytest.raises(ValueError, match="Fault tolerance requires external load balancer mode"):
        args.create_engine_config()


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
