"""Engines that compute the same tokens have the same identity."""

import pytest
from moe_contract.agent_config import EngineConfig
from moe_contract.engine_identity import identify_engine

BASE = {"port": 8000, "model": "Qwen/tiny", "served_name": "tiny", "args": ("--dtype=float16",)}


def identify(**fields):
    return identify_engine(EngineConfig(**(BASE | fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 8001, "drain_timeout_s": 7.0, "env": {"CUDA_VISIBLE_DEVICES": "3"}, "guarded": True},
        {"served_name": "another"},
        {"args": ("--kv-cache-memory-bytes=5", "--dtype=float16", "--max_num_seqs", "3")},
        {"args": ("--kv-cache-memory-bytes", "5", "--dtype=float16", "--gpu-memory-utilization=0.5")},
        {"args": ("--max-num-seqs", "--dtype=float16")},
    ],
)
def test_place_and_size_are_no_part_of_it(fields):
    assert identify(**fields) == identify()


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "Qwen/other"},
        {"revision": "main"},
        {"args": ()},
        {"args": ("--dtype=float16", "--quantization=fp8")},
        {"args": ("--dtype=float16", "--tokenizer", "other")},
        {"args": ("--dtype", "float16")},
        {"args": ("--max-num-seqs=3", "3", "--dtype=float16")},
    ],
)
def test_the_model_and_any_other_argument_are(fields):
    assert identify(**fields) != identify()
