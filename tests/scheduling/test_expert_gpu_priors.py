"""Assumed costs of expert work against rows of the tables that they were fitted to."""

import pytest
from moe_scheduling.expert.gpu_priors import work_prior

# Weights of an expert in bfloat16: three matrices.
QWEN3_30B = 3 * 2048 * 768 * 2
QWEN3_235B = 3 * 4096 * 1536 * 2


@pytest.mark.parametrize(
    ("gpu", "expert_bytes", "slots", "pairs", "measured_s"),
    [
        # More experts of a rank at the same step: 128 tokens on 1 and on 2 ranks, and so on.
        ("NVIDIA H200", QWEN3_30B, (128, 64), (1024, 512), 316.1e-6 - 188.0e-6),
        ("NVIDIA H200", QWEN3_30B, (64, 32), (256, 128), 182.4e-6 - 117.2e-6),
        ("NVIDIA H200", QWEN3_30B, (128, 64), (131072, 65536), 2462.9e-6 - 1685.5e-6),
    ],
)
def test_the_difference_that_experts_make_is_about_the_measured_one(gpu, expert_bytes, slots, pairs, measured_s):
    prior = work_prior(gpu, expert_bytes, "bfloat16")
    assert prior is not None
    times = [prior.expert_s * distinct + prior.token_s * tokens for distinct, tokens in zip(slots, pairs, strict=True)]
    assert times[0] - times[1] == pytest.approx(measured_s, rel=0.25)


def test_reading_an_expert_takes_longer_the_larger_it_is():
    small, large = (
        work_prior("NVIDIA H100 80GB HBM3", QWEN3_30B, "bfloat16"),
        work_prior("NVIDIA H100 80GB HBM3", QWEN3_235B, "bfloat16"),
    )
    assert small is not None
    assert large is not None
    assert large.expert_s == pytest.approx(4 * small.expert_s)
    assert large.token_s == pytest.approx(4 * small.token_s)


@pytest.mark.parametrize(
    ("gpu", "element_type"),
    [
        ("NVIDIA L4", "bfloat16"),
        ("NVIDIA H100", "float32"),
        ("", "bfloat16"),
        ("NVIDIA GH200", "bfloat16"),
        ("NVIDIA H200", "uint8"),
        ("NVIDIA H100 PCIe", "bfloat16"),
        ("NVIDIA H200 NVL", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
    ],
)
def test_without_a_table_there_is_no_prior(gpu, element_type):
    assert work_prior(gpu, QWEN3_30B, element_type) is None


@pytest.mark.parametrize("gpu", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_half_the_bytes_are_read_in_about_half_the_time(gpu):
    whole, half = work_prior(gpu, QWEN3_30B, "bfloat16"), work_prior(gpu, QWEN3_30B // 2, "float8_e4m3fn")
    assert whole is not None
    assert half is not None
    assert half.expert_s == pytest.approx(whole.expert_s / 2, rel=0.1)
