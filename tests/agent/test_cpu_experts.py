"""The repairs of vLLM's CPU build: each does what the GPU's code does, and each fails loudly when vLLM has moved."""

import inspect
import threading
from typing import Any

import pytest
import torch
from moe_agent.experts.step_times import WorkMeter
from moe_agent.vllm import version
from moe_agent.vllm.version import UnsupportedVersion, replace_attribute

EXPERTS, HIDDEN, INNER, TOP_K = 8, 64, 32, 2


@pytest.fixture(scope="module", autouse=True)
def vllm_loaded(virtual_engines: Any) -> None:
    """The session's fixture loads vLLM once, with its own warnings aside."""


@pytest.mark.parametrize(
    ("module", "owner", "method", "parameters"),
    [
        ("vllm.distributed.eplb.eplb_state", "EplbState", "add_model", ["self", "model", "model_config", "model_name"]),
        (
            "vllm.distributed.eplb.eplb_state",
            "EplbState",
            "prepare_forward",
            ["self", "model_config", "num_unpadded_tokens", "ubatch_slices"],
        ),
        ("vllm.distributed.eplb.eplb_state", "EplbState", "step", ["self", "is_dummy", "is_profile", "log_stats"]),
        ("vllm.v1.worker.gpu_worker", "Worker", "execute_dummy_batch", ["self"]),
        ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", "load_model", ["self", "load_dummy_weights"]),
        ("vllm.model_executor.layers.fused_moe.runner.moe_runner", "MoERunner", "_select_forward", ["self"]),
        (
            "vllm.model_executor.layers.fused_moe.router.base_router",
            "BaseRouter",
            "set_capture_fn",
            ["self", "capture_fn"],
        ),
        (
            "vllm.distributed.device_communicators.base_device_communicator",
            "DeviceCommunicatorBase",
            "all_gatherv",
            ["self", "input_", "dim", "sizes"],
        ),
        (
            "vllm.distributed.device_communicators.base_device_communicator",
            "DeviceCommunicatorBase",
            "reduce_scatterv",
            ["self", "input_", "dim", "sizes"],
        ),
    ],
)
def test_what_is_replaced_or_called_has_the_parameters_that_are_passed(module, owner, method, parameters):
    found = getattr(getattr(__import__(module, fromlist=[owner]), owner), method)
    assert list(inspect.signature(inspect.unwrap(found)).parameters) == parameters


@pytest.mark.parametrize(
    ("module", "function", "parameters"),
    [
        (
            "vllm.model_executor.layers.fused_moe.router.base_router",
            "eplb_map_to_physical_and_record",
            [
                "topk_ids",
                "expert_load_view",
                "logical_to_physical_map",
                "logical_replica_count",
                "record_enabled",
                "num_unpadded_tokens",
            ],
        ),
        (
            "vllm.distributed.eplb.eplb_state",
            "_commit_eplb_maps_for_layer",
            ["model_state", "new_physical_to_logical_map", "layer"],
        ),
        (
            "vllm.distributed.eplb.rebalance_execute",
            "move_from_buffer",
            ["expert_weights", "expert_weights_buffers", "transfer_metadata", "new_indices", "ep_rank"],
        ),
    ],
)
def test_functions_of_the_balancer_have_the_parameters_that_are_passed(module, function, parameters):
    found = getattr(__import__(module, fromlist=[function]), function)
    assert list(inspect.signature(found).parameters) == parameters


def test_the_transfer_of_a_layer_takes_what_it_is_given():
    from vllm.distributed.eplb.rebalance_execute import transfer_layer

    names = {
        "old_layer_indices",
        "new_layer_indices",
        "expert_weights",
        "expert_weights_buffer",
        "ep_group",
        "communicator",
        "layer_idx",
    }
    assert names <= inspect.signature(transfer_layer).parameters.keys()


def test_the_model_and_the_state_have_the_fields_that_are_read():
    from vllm.distributed.eplb.eplb_state import EplbModelState, EplbState
    from vllm.model_executor.models.interfaces import MixtureOfExperts

    assert {
        "physical_to_logical_map",
        "model",
        "expert_buffer",
        "expert_load_pass",
        "communicator",
    } <= EplbModelState.__dataclass_fields__.keys()
    assert {
        "expert_weights",
        "num_moe_layers",
        "num_logical_experts",
        "num_local_physical_experts",
        "moe_layers",
    } <= MixtureOfExperts.__annotations__.keys()
    source = inspect.getsource(EplbState.__init__)
    assert all(name in source for name in ("self.model_states", "self.should_record_tensor", "self.parallel_config"))


def test_vllm_still_refuses_a_balancer_on_a_cpu_and_admits_it_on_the_platform_as_it_is_shown(virtual_engines):
    import vllm.config.parallel as parallel
    from moe_agent.vllm.cpu_config import BalancingPlatform

    shape = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "enable_eplb": True}
    with pytest.raises(ValueError, match=r"CUDA|cuda"):
        parallel.ParallelConfig(**shape, distributed_executor_backend="mp")
    real = parallel.current_platform
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "current_platform", BalancingPlatform(real))
        config = parallel.ParallelConfig(**shape, distributed_executor_backend="mp")
    assert config.enable_eplb


class Calls(WorkMeter):
    """The tokens of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.tokens = True, []

    def add(self, tokens: int, seconds: float, experts: int = 0) -> None:
        self.tokens.append(tokens)


@pytest.fixture
def repaired_kernel(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Calls]:
    from moe_agent.vllm.cpu_experts import skip_foreign_experts
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    monkeypatch.setattr(CPUUnquantizedExperts, "apply", CPUUnquantizedExperts.apply)
    meter = Calls()
    skip_foreign_experts(meter)
    return CPUUnquantizedExperts, meter


class Kernel:
    """The attributes of a layer's experts that vLLM's CPU kernel reads."""

    isa, w1_bias, w2_bias, _use_zentorch = "vec", None, None, False


def compute(kernel: Any, weights: tuple[Any, Any], tokens: Any, shares: Any, ids: Any, expert_map: Any) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    output = torch.full_like(tokens, 9.0)
    rest = (None, None, torch.empty(0), torch.empty(0), None, False)
    kernel.apply(Kernel(), output, tokens, *weights, shares, ids, MoEActivation.SILU, EXPERTS, expert_map, *rest)
    return output


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_what_two_ranks_compute_of_their_own_experts_adds_up_to_what_one_computes_of_all(repaired_kernel, tokens):
    from vllm._custom_ops import cpu_prepack_moe_weight

    kernel, calls = repaired_kernel
    dice = torch.Generator().manual_seed(tokens)
    w1 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=dice) * 0.1
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=dice) * 0.1
    hidden = torch.randn(tokens, HIDDEN, generator=dice)
    ids = torch.stack([torch.randperm(EXPERTS, generator=dice)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    shares = torch.rand(tokens, TOP_K, generator=dice)

    def packed(experts: slice) -> tuple[Any, Any]:
        return cpu_prepack_moe_weight(w1[experts], "vec"), cpu_prepack_moe_weight(w2[experts], "vec")

    whole = compute(kernel, packed(slice(None)), hidden, shares, ids, None)
    half = EXPERTS // 2
    own, foreign = torch.arange(half), torch.full((half,), -1)
    first = compute(kernel, packed(slice(half)), hidden, shares, ids, torch.cat([own, foreign]))
    second = compute(kernel, packed(slice(half, None)), hidden, shares, ids, torch.cat([foreign, own]))
    torch.testing.assert_close(first + second, whole, rtol=1e-5, atol=1e-6)
    assert sum(calls.tokens) == tokens * TOP_K, "each is computed once"


def test_a_rank_none_of_whose_experts_is_asked_for_adds_nothing(repaired_kernel):
    kernel, _ = repaired_kernel
    tokens, ids = torch.ones(3, HIDDEN), torch.zeros(3, TOP_K, dtype=torch.int32)
    output = compute(kernel, (None, None), tokens, torch.ones(3, TOP_K), ids, torch.full((EXPERTS,), -1))
    assert not output.any()


def test_slots_are_those_of_the_experts_and_replicas_share_the_tokens():
    from moe_kernels.expert_load import map_and_record

    # Expert 0 lies in slots 0 and 3, expert 1 in slot 2.
    slots, counts = torch.tensor([[0, 3], [2, -1]]), torch.tensor([2, 1])
    ids = torch.tensor([[0, 1]] * 1000, dtype=torch.int32)
    load = torch.zeros(4, dtype=torch.int32)
    found = map_and_record(ids, load, slots, counts, torch.tensor(True), torch.tensor(10))
    assert found.dtype == ids.dtype
    assert set(found[:, 1].tolist()) == {2}
    assert set(found[:, 0].tolist()) == {0, 3}
    assert 400 < int((found[:, 0] == 0).sum()) < 600
    assert load.tolist() == [10, 10, 0, 0], "by expert, and padded tokens are not counted"
    map_and_record(ids, load, slots, counts, torch.tensor(False), torch.tensor(10))
    assert load.sum() == 20


class ThreadRank(threading.local):
    """Number of the rank that a thread plays."""

    number = 0


def exchange_between_threads(monkeypatch: pytest.MonkeyPatch, dist: Any) -> ThreadRank:
    """Makes collectives of two threads from those of `torch.distributed`; returns what names the caller's rank."""
    parts: dict[int, Any] = {}
    barrier = threading.Barrier(2, timeout=30)
    rank = ThreadRank()

    def exchange(mine: Any) -> list[Any]:
        parts[rank.number] = mine
        barrier.wait()
        both = [parts[0].clone(), parts[1].clone()]
        barrier.wait()
        return both

    def gather(everyone: Any, mine: Any, group: Any) -> None:
        everyone.copy_(torch.cat(exchange(mine)))

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: tensor.copy_(sum(exchange(tensor))))
    return rank


@pytest.mark.parametrize("sizes", [[2, 2], [3, 1], [1, 4], [0, 2]])
def test_ranks_gather_unequal_rows_and_scatter_their_sums(monkeypatch, sizes):
    from moe_agent.vllm import cpu_experts

    given = [
        [torch.randn(size, 5), torch.randint(0, 9, (size, 2), dtype=torch.int32), torch.rand(size, 2, 3)]
        for size in sizes
    ]
    rank = exchange_between_threads(monkeypatch, cpu_experts.dist)

    class Communicator:
        world_size, cpu_group = 2, None

        def __init__(self, number: int) -> None:
            self.rank_in_group = number

    gathered, scattered = {}, {}
    partial = [torch.randn(sum(sizes), 5) for _ in sizes]

    def work(number: int) -> None:
        rank.number = number
        gathered[number] = cpu_experts.all_gatherv(Communicator(number), given[number], 0, sizes)
        scattered[number] = cpu_experts.reduce_scatterv(Communicator(number), partial[number].clone(), 0, sizes)

    threads = [threading.Thread(target=work, args=[number]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for number in (0, 1):
        for at, tensor in enumerate(gathered[number]):
            assert torch.equal(tensor, torch.cat([given[0][at], given[1][at]]))
    assert torch.equal(torch.cat([scattered[0], scattered[1]]), partial[0] + partial[1])


def test_a_name_that_vllm_has_no_more_is_reported(monkeypatch):
    class Moved:
        pass

    monkeypatch.setattr(version, "find_version", lambda: "0.32.9")
    with pytest.raises(UnsupportedVersion, match=r"of vLLM 0\.32\.9 has no apply, which moe_agent\.vllm replaces"):
        replace_attribute(Moved, "apply", None)


@pytest.mark.parametrize(("fixed_s", "token_s"), [(1e-3, 2e-6), (0.0, 5e-6)])
def test_the_meter_finds_what_a_token_more_takes(fixed_s, token_s):
    meter = WorkMeter()
    assert meter.costs.token_s == 0.0
    for tokens in range(1, 200):
        meter.add(tokens % 17, fixed_s + token_s * (tokens % 17))
    assert meter.costs.token_s == pytest.approx(token_s)


def test_the_meter_takes_the_mean_where_all_calls_are_alike():
    meter = WorkMeter()
    for _ in range(50):
        meter.add(4, 8e-6)
    assert meter.costs.token_s == pytest.approx(2e-6)
