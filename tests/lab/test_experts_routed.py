"""Placements under real routing: what a step costs, and errors where data is missing."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lab.experts import routed
from moe_lab.experts.__main__ import app
from moe_lab.experts.routed import KernelPlane, RoutedRow, bound_copies, count_work, fit_kernels
from moe_scheduling.expert.decision import Placement
from typer.testing import CliRunner

HEADER = "model_shape,kernel,dtype,hidden,inter,topk,experts,moe_tp,moe_ep,distribution,num_tokens,latency_ms\n"


@pytest.fixture
def data(tmp_path):
    """Routing of few layers and tokens, and a table that is a plane."""
    (tmp_path / "routing").mkdir()
    (tmp_path / "step_time").mkdir()
    generator = np.random.default_rng(0)
    for domain in ("intent", "law"):
        order = generator.permutation(64)
        ids = np.stack(
            [np.stack([generator.choice(order[:40], 6, replace=False) for _ in range(600)]) for _ in range(2)]
        )
        np.savez(tmp_path / "routing" / f"deepseek_v2_lite_esft_{domain}.npz", expert_ids=ids.astype(np.uint8))
    rows = [HEADER]
    for ranks in (1, 2, 4, 8):
        for tokens in (8, 64, 512, 4096):
            pairs = tokens * 8 / ranks
            latency_ms = 0.03 + 5e-5 * tokens + 2e-3 * min(128 / ranks, pairs) + 1e-5 * pairs
            rows.append(f"Qwen3-30B-A3B,k,bfloat16,2048,768,8,128,1,{ranks},balanced,{tokens},{latency_ms}\n")
    with gzip.open(tmp_path / "step_time" / "moe_kernel_h200_vllm0.24.csv.gz", "wt") as file:
        file.writelines(rows)
    return tmp_path


def test_the_plane_of_a_table_is_found_and_scaled_to_the_larger_expert(data):
    kernels = fit_kernels(data, "h200")
    assert kernels.launch_s == pytest.approx(3e-5, rel=1e-6)
    assert kernels.expert_s == pytest.approx(2e-6 * 1408 / 768, rel=1e-6)
    assert kernels.pair_s == pytest.approx(1e-8 * 1408 / 768, rel=1e-6)
    assert kernels.median_error < 1e-9


def test_a_layer_waits_for_its_slowest_rank():
    plane = KernelPlane(launch_s=1.0, step_token_s=0.1, expert_s=10.0, pair_s=1.0, median_error=0.0, rows=1)
    assert plane.layers_s(np.array([[1, 2]]), np.array([[9, 3]]), 10) == 1.0 + 1.0 + 23.0


def test_no_placement_is_below_the_floor():
    plane = KernelPlane(launch_s=1.0, step_token_s=0.1, expert_s=10.0, pair_s=1.0, median_error=0.0, rows=1)
    # Five experts on two ranks: one reads three. Four: each reads two, and has half of the pairs.
    assert plane.least_s(np.array([5]), 6, 2, 10) == 1.0 + 1.0 + 33.0
    assert plane.least_s(np.array([4]), 40, 2, 10) == 1.0 + 1.0 + 40.0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_the_floor_is_below_each_placement(ranks, tokens, seed, idle):
    generator = np.random.default_rng(seed)
    plane = KernelPlane(launch_s=1.0, step_token_s=0.1, expert_s=10.0, pair_s=1.0, median_error=0.0, rows=1)
    experts, slots = 6, 8 * ranks
    copies = np.stack([generator.permutation(np.arange(slots) % experts) for _ in range(2)])
    placement = Placement(physical_to_logical=copies, ranks=ranks)
    ids = np.stack([[generator.choice(experts, 2, replace=False) for _ in range(tokens)] for _ in range(2)])
    seconds = plane.layers_s(*count_work(ids.astype(np.uint8), placement, idle=idle), tokens)
    distinct = np.array([len(np.unique(layer)) for layer in ids])
    assert plane.least_s(distinct, 2 * tokens, ranks, tokens) <= seconds + 1e-9


@pytest.mark.parametrize(("idle", "distinct"), [(False, [[3, 2]]), (True, [[2, 2]])])
def test_an_idle_slot_is_read_by_vllm_and_not_by_the_product(idle, distinct):
    placement = Placement(physical_to_logical=np.array([[0, 0, 1, 2, 3, 3]]), ranks=2)
    ids = np.array([[[0, 1], [0, 2], [3, 1], [3, 2], [0, 2]]], np.uint8)
    found, pairs = count_work(ids, placement, idle=idle)
    assert pairs.sum() == 10
    assert found[0, 0] == distinct[0][0]


def test_the_command_prints_a_row_for_each_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(routed, "RUNS", {"decode": (8, 16), "prefill": (2048,)})
    monkeypatch.setattr(routed, "MIXES", {"mixed": ("both",), "switching": ("intent", "law")})
    out = tmp_path / "out.json"
    options = ["routed", str(data), "--redundant", "0,8", "--steps", "1", "--rounds", "4", "--json", str(out)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert result.output.count("switching") == 4 + 2
    assert "by size" in result.output
    assert "Modelled from 16 measured rows of h200" in result.output
    assert '"policy": "ours"' in out.read_text()


def row(redundant, small_ms, large_ms, policy="vLLM"):
    return RoutedRow(
        gpu="h200",
        ranks=8,
        redundant=redundant,
        mix="law",
        run="few",
        policy=policy,
        step_ms=(2 * small_ms + large_ms) / 3,
        by_size={64: small_ms, 2048: large_ms},
        moves=0,
        moves_s=0.0,
        run_s=0.0,
    )


def test_the_bound_of_copies_takes_what_is_fastest_for_each_size(monkeypatch):
    monkeypatch.setattr(routed, "RUNS", {"few": (64, 64, 2048)})
    rows = [row(0, 1.0, 8.0), row(0, 1.2, 7.5, "static"), row(8, 1.5, 6.0), row(8, 0.9, 5.0, "ours")]
    (bound,) = bound_copies(rows)
    assert (bound.without_ms, bound.with_ms, bound.by_size_ms) == pytest.approx((9.9 / 3, 9.0 / 3, 8.0 / 3))
    assert bound_copies(rows[:2]) == bound_copies(rows[2:]) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "b300"], "h100, h200"),
        (["--redundant", "x"], "no list of numbers"),
        (["--redundant", "4"], "multiple of the 8 ranks"),
        (["--ranks", "32", "--redundant", "16"], "multiple of the 32 ranks"),
        (["--ranks", "3"], "3 does not divide the 64 experts"),
        (["--gpu", "h100"], "moe_kernel_h100_vllm0.24.csv.gz"),
    ],
)
def test_what_cannot_be_run_is_said(data, options, message):
    result = CliRunner().invoke(app, ["routed", str(data), *options])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")


def test_missing_routing_is_named(data):
    (data / "routing" / "deepseek_v2_lite_esft_law.npz").unlink()
    result = CliRunner().invoke(app, ["routed", str(data)])
    assert result.exit_code == 2
    assert "deepseek_v2_lite_esft_law.npz" in result.output.replace("\n", "")
