"""The load kernel counts what its reference counts; by Triton's interpreter here, natively where a GPU is."""

import pytest
import torch
from moe_kernels.expert_load import count_kernel, expert_load, expert_load_reference, expert_load_triton
from triton.runtime.interpreter import InterpretedFunction

interpreted = InterpretedFunction(count_kernel.fn)


def routed(tokens: int, top_k: int, experts: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + top_k)
    return torch.randint(0, experts, (tokens, top_k), generator=generator, dtype=dtype)


def test_the_reference_counts_by_hand():
    ids = torch.tensor([[0, 2], [2, 3], [1, 1]])
    assert expert_load_reference(ids, num_experts=4, num_tokens=2).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "real", "top_k", "experts"),
    [(0, 0, 2, 4), (1, 1, 1, 1), (7, 5, 2, 16), (700, 700, 2, 16), (513, 100, 8, 128)],
)
def test_the_kernel_counts_what_the_reference_counts(tokens, real, top_k, experts, dtype):
    ids = routed(tokens, top_k, experts, dtype)
    expected = expert_load_reference(ids, experts, real)
    assert torch.equal(expert_load_triton(ids, experts, real, kernel=interpreted), expected)
    assert int(expected.sum()) == real * top_k


def test_ids_of_no_expert_are_not_counted():
    ids = torch.tensor([[-1, 4], [3, 0]], dtype=torch.int32)
    for load in (expert_load_reference(ids, 4, 2), expert_load_triton(ids, 4, 2, kernel=interpreted)):
        assert load.tolist() == [1, 0, 0, 1]


def test_more_real_tokens_than_rows_count_the_rows():
    ids = routed(3, 2, 4)
    assert torch.equal(expert_load_triton(ids, 4, 99, kernel=interpreted), expert_load_reference(ids, 4, 99))


def test_a_strided_view_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        expert_load_triton(routed(4, 4, 4)[:, ::2], 4, 4, kernel=interpreted)


def test_on_the_cpu_the_reference_serves():
    ids = routed(10, 2, 4)
    assert torch.equal(expert_load(ids, 4, 10), expert_load_reference(ids, 4, 10))


if torch.cuda.is_available():

    def test_the_kernel_counts_natively():
        ids = routed(4096, 8, 128).cuda()
        assert torch.equal(expert_load(ids, 128, 4000).cpu(), expert_load_reference(ids.cpu(), 128, 4000))
