"""Expert parallelism with movable experts on vLLM's CPU build: six small repairs, applied by the plugin.

Each function repairs one thing that vLLM 0.32 lacks on the CPU, where its own GPU code has it; none is applied on a GPU
build. `tests/agent/test_cpu_experts.py` fails when what they hold on to has moved.

1. `allow_balancer` (`cpu_config.py`): the configuration admits expert load balancing on a CPU.
2. `skip_foreign_experts`: a rank computes the experts that it holds, and of its own tokens those alone.
3. `build_balancer`: the model runner makes the balancer's state.
4. `allow_streamless_moves`: weights move without an accelerator's streams.
5. `exchange_tokens`: gather and scatter of unequal numbers of tokens between data-parallel ranks, over gloo.
6. `keep_layers_opaque`: a compiled model calls an MoE layer as one operation, as on GPUs.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from moe_agent.experts.step_times import WorkMeter
from moe_agent.vllm.cpu_config import allow_balancer
from moe_agent.vllm.version import replace_attribute


def repair_cpu_experts(meter: WorkMeter) -> None:
    """Applies all repairs, once in a process; `meter` learns what expert work takes, while it is on."""
    allow_balancer()
    skip_foreign_experts(meter)
    build_balancer()
    allow_streamless_moves()
    exchange_tokens()
    keep_layers_opaque()


# 2.


def skip_foreign_experts(meter: WorkMeter) -> None:
    """vLLM's CPU kernel takes ids of the rank's own experts alone, and crashes on others.

    Each (token, expert) that this rank holds becomes a row with one expert: what a rank computes is what its experts
    are asked for, so that balance is worth time, and the rows are added up in the order of the tokens.
    """
    compute_all = CPUUnquantizedExperts.apply

    def apply(
        self: CPUUnquantizedExperts,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        *rest: Any,
        **named: Any,
    ) -> None:
        if expert_map is None:
            own = (output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, None)
            compute_all(self, *own, *rest, **named)
            return
        local = expert_map[topk_ids.long()]
        rows, places = torch.nonzero(local >= 0, as_tuple=True)
        output.zero_()
        if rows.numel() == 0:
            return
        computed = torch.empty((rows.numel(), hidden_states.shape[1]), dtype=output.dtype)
        ids = local[rows, places].to(torch.int32).unsqueeze(1)
        weights = topk_weights[rows, places].unsqueeze(1)
        given = (computed, hidden_states[rows], w1, w2, weights, ids, activation, global_num_experts, None)
        begun_s = time.perf_counter()
        compute_all(self, *given, *rest, **named)
        if meter.on:
            took_s = time.perf_counter() - begun_s
            meter.add(rows.numel(), took_s, int((torch.bincount(ids.flatten()) > 0).sum()))
        output.index_add_(0, rows, computed)

    replace_attribute(CPUUnquantizedExperts, "apply", apply)


# 3.


def build_balancer() -> None:
    """As `GPUModelRunner.load_model` does it, which the CPU's replaces."""
    load = CPUModelRunner.load_model

    def load_model(self: CPUModelRunner, load_dummy_weights: bool = False) -> None:
        load(self, load_dummy_weights)
        model = get_mixture_of_experts_model(self.model)
        if model is None or not self.parallel_config.enable_eplb:
            return
        self._moe_model = model
        self.eplb_state = EplbState(self.parallel_config, self.device)
        self.eplb_state.add_model(model, self.model_config)

    replace_attribute(CPUModelRunner, "load_model", load_model)


# 4.


class _NoStream:
    def synchronize(self) -> None:
        """All work of a CPU is done when the call returns."""


def allow_streamless_moves() -> None:
    """vLLM replaces `torch.accelerator.synchronize` on the CPU in the same way."""
    replace_attribute(torch.accelerator, "current_stream", lambda *_, **__: _NoStream())


# 5.


def gather_rows(tensors: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Rows of all ranks, rank by rank, of several tensors with as many rows each, in one message.

    Args:
        tensors: this rank's, all with the same number of rows.
        sizes: rows of each rank.
        group: ranks that all call this.
    """
    rows, most = tensors[0].shape[0], max(sizes)
    packed = [tensor.contiguous().flatten(1).view(torch.uint8) for tensor in tensors]
    widths = [part.shape[1] for part in packed]
    mine = torch.zeros((most, sum(widths)), dtype=torch.uint8)
    torch.cat(packed, dim=1, out=mine[:rows])
    everyone = torch.empty((len(sizes) * most, sum(widths)), dtype=torch.uint8)
    dist.all_gather_into_tensor(everyone, mine, group=group)
    if min(sizes) < most:
        everyone = torch.cat([everyone[at * most : at * most + size] for at, size in enumerate(sizes)])
    parts = torch.split(everyone, widths, dim=1)
    return [_unpack(part, tensor) for part, tensor in zip(parts, tensors, strict=True)]


def _unpack(part: Tensor, like: Tensor) -> Tensor:
    rows = part.contiguous().view(like.dtype)
    return rows.reshape(rows.shape[0], *like.shape[1:])


def all_gatherv(
    self: CpuCommunicator, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
) -> Tensor | list[Tensor]:
    """As the communicators of GPUs do it; along the first dimension alone."""
    assert dim == 0
    tensors = input_ if isinstance(input_, list) else [input_]
    gathered = gather_rows(tensors, sizes or [tensors[0].shape[0]] * self.world_size, self.cpu_group)
    return gathered if isinstance(input_, list) else gathered[0]


def reduce_scatterv(self: CpuCommunicator, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """As the communicators of GPUs do it; along the first dimension alone."""
    assert dim == 0
    sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
    summed = input_.contiguous()
    dist.all_reduce(summed, group=self.cpu_group)
    first = sum(sizes[: self.rank_in_group])
    return summed[first : first + sizes[self.rank_in_group]].contiguous()


def exchange_tokens() -> None:
    """`CpuCommunicator` inherits two methods that only say that they are not implemented."""
    replace_attribute(CpuCommunicator, "all_gatherv", all_gatherv)
    replace_attribute(CpuCommunicator, "reduce_scatterv", reduce_scatterv)


# 6.


def keep_layers_opaque() -> None:
    """On the CPU vLLM lets the compiler look into an MoE layer, which cannot trace what ranks say to each other."""

    def select_forward(self: MoERunner) -> Any:
        alone = self._shared_experts is None
        return torch.ops.vllm.moe_forward if alone else torch.ops.vllm.moe_forward_shared

    replace_attribute(MoERunner, "_select_forward", select_forward)
