"""Step times of GPUs from published figures: a roofline of each part of a step, the experts' by their slowest rank.

All its results are modelled, not measured, and reports say so. Each figure has its source beside it; where
none is published, the comment says "assumed".

The parts of a step follow each other in every layer, so a step is their sum, and in each part the group waits for its
slowest rank: attention and dense layers by each rank's own tokens, experts by the tokens of all ranks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from moe_tools.simulator.costs import Work
from moe_tools.simulator.experts import PlacementBalance, PlacementPolicy, balance_of, draw_traffic, even_balance, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU and its link to the others of its group.

    Attributes:
        flops: dense tensor-core FLOP/s in the precision of the model's weights.
        memory_bytes_per_s: of HBM.
        memory_bytes: of HBM.
        link_bytes_per_s: in one direction, of the slowest link on the way.
        nodes: that a group spans; on several, a token crosses to each other node once and is spread there.
    """

    flops: float
    memory_bytes_per_s: float
    memory_bytes: float
    link_bytes_per_s: float
    nodes: int = 1


# NVIDIA H100 SXM data sheet: 989 TFLOP/s in BF16, 1,979 in FP8 (dense), 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways.
H100_BF16 = Gpu(flops=989e12, memory_bytes_per_s=3.35e12, memory_bytes=80e9, link_bytes_per_s=450e9)
# Two nodes: DeepEP's normal kernels reach 43 GB/s between 16 H800 of two nodes (DeepEP, docs/legacy.md).
H100_FP8_TWO_NODES = Gpu(flops=1979e12, memory_bytes_per_s=3.35e12, memory_bytes=80e9, link_bytes_per_s=43e9, nodes=2)
# NVIDIA A100 80GB SXM data sheet: 312 TFLOP/s in BF16, 80 GB at 2.039 TB/s, NVLink 600 GB/s both ways.
A100_BF16 = Gpu(flops=312e12, memory_bytes_per_s=2.039e12, memory_bytes=80e9, link_bytes_per_s=300e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArchitecture:
    """A Mixture-of-Experts model. Parameters are counts; `weight_bytes` and `kv_bytes` are of a parameter and a token.

    Attributes:
        moe_layers: layers with experts.
        hidden: width.
        dense_parameters: those that every token goes through, attention and output head among them.
        expert_parameters: those of one expert in one layer.
        experts: routed experts in a layer.
        top_k: experts of a token in a layer.
        attention_flops: FLOPs of one (token, earlier token) pair over all layers.
        weight_bytes: of one parameter.
        kv_bytes: of one token in the KV cache.
    """

    moe_layers: int
    hidden: int
    dense_parameters: float
    expert_parameters: float
    experts: int
    top_k: int
    attention_flops: float
    weight_bytes: float
    kv_bytes: float


# Qwen/Qwen3-30B-A3B, config.json: 48 layers, hidden 2048, 32 heads and 4 KV heads of 128, 128 experts of width 768, 8
# of them for a token, vocabulary 151,936, BF16. Dense: 48 * (2048 * 128 * (32 + 4 + 4) + 32 * 128 * 2048) of attention
# and 151,936 * 2048 of the head. A pair: 2 * 2 * 32 * 128 FLOPs in each of 48 layers. KV: 2 * 4 * 128 * 2 bytes * 48.
QWEN3_30B_A3B = ModelArchitecture(
    moe_layers=48,
    hidden=2048,
    dense_parameters=48 * (2048 * 128 * 40 + 4096 * 2048) + 151_936 * 2048,
    expert_parameters=3 * 2048 * 768,
    experts=128,
    top_k=8,
    attention_flops=4 * 32 * 128 * 48,
    weight_bytes=2,
    kv_bytes=2 * 4 * 128 * 2 * 48,
)
# DeepSeek-V3 (arXiv 2412.19437): 61 layers, 58 of them with 256 routed experts of width 2048, 8 for a token, and a
# shared one; hidden 7168; 37 B parameters active of 671 B, so 37e9 - 58 * 8 * 3 * 7168 * 2048 are dense. MLA: 128 heads
# over a latent of 512 + 64: a pair takes 2 * 128 * (576 + 512) FLOPs a layer; KV 576 * 2 bytes * 61. Weights in FP8.
DEEPSEEK_V3 = ModelArchitecture(
    moe_layers=58,
    hidden=7168,
    dense_parameters=37e9 - 58 * 8 * 3 * 7168 * 2048,
    expert_parameters=3 * 7168 * 2048,
    experts=256,
    top_k=8,
    attention_flops=2 * 128 * (576 + 512) * 61,
    weight_bytes=1,
    kv_bytes=576 * 2 * 61,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What of the data sheet is reached.

    Attributes:
        compute: part of the FLOP/s in large matrix products.
        memory: part of the memory's bandwidth.
        host_s: seconds of a step outside the model's kernels.
        exchange_s: least seconds of one layer's dispatch and combine.
        exposed: part of the exchange of tokens that is not hidden behind computation.
    """

    compute: float
    memory: float
    host_s: float
    exchange_s: float
    exposed: float


# Compute: SGLang serves DeepSeek-V3 at 52,300 input tokens a second and node of 8 H100 (lmsys.org, 2025-05-05): 2 *
# 37e9 * 52,300 / 8 = 484 TFLOP/s a GPU, 0.24 of FP8's, all losses in it. In BF16 the same losses weigh half:
# 0.45 (assumed).
# Memory: 0.8 of the bandwidth, what STREAM-like kernels reach on HBM (assumed). Host: 2 ms (assumed).
# Exchange: two collectives of about 15 us over NVLink in each layer (assumed); vLLM's default overlaps none.
NVLINK_BF16 = Efficiency(compute=0.45, memory=0.8, host_s=0.002, exchange_s=30e-6, exposed=1.0)
# Between two nodes DeepEP's low-latency kernels take 118 us to dispatch and 195 us to combine (docs/legacy.md, EP 16).
# Two-batch overlap hides a part: SGLang gains 27 to 35 % of prefill by it (same post), so half is left (assumed).
# Compute without the exchange: 0.35 gives 54,800 input tokens a second and node with balanced experts.
TWO_NODES_FP8 = Efficiency(compute=0.35, memory=0.8, host_s=0.002, exchange_s=313e-6, exposed=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineCost:
    """A `CostModel` of one data-parallel group of `len(works)` GPUs with the experts spread over all of them.

    Attributes:
        gpu: of each rank.
        model: served by the group.
        efficiency: reached share of that figure.
        balance: of the experts over the ranks.
        source: for reports.
    """

    gpu: Gpu
    model: ModelArchitecture
    efficiency: Efficiency
    balance: PlacementBalance
    source: str

    def group_step_s(self, works: Sequence[Work]) -> float:
        """Seconds of a step of the group: the slowest rank's work, attention, experts and exchange by the roofline."""
        ranks = len(works)
        most_tokens = max(work.tokens for work in works)
        experts_s = self._experts_s(sum(work.tokens for work in works), ranks)
        return self.efficiency.host_s + self.own_s(works) + experts_s + self.exchange_s(most_tokens, ranks)

    def own_s(self, works: Sequence[Work]) -> float:
        """Seconds of attention and dense layers of the slowest rank."""
        gpu, model, efficiency = self.gpu, self.model, self.efficiency
        flops = gpu.flops * efficiency.compute
        memory = gpu.memory_bytes_per_s * efficiency.memory
        weights_s = model.dense_parameters * model.weight_bytes / memory
        own_s = 0.0
        for work in works:
            tokens = work.prefill_tokens + work.decode_requests
            dense_s = max(2 * model.dense_parameters * tokens / flops, weights_s)
            attention_s = (
                model.attention_flops * work.prefill_pairs / flops + model.kv_bytes * work.context_tokens / memory
            )
            own_s = max(own_s, dense_s + attention_s)
        return own_s

    def _experts_s(self, tokens: int, ranks: int) -> float:
        """Of the rank that gets the most tokens: their FLOPs, or the weights of the experts that any of them meets."""
        gpu, model, efficiency = self.gpu, self.model, self.efficiency
        parameters = model.expert_parameters * model.moe_layers
        compute_s = (
            2 * parameters * tokens * model.top_k / ranks * self.balance.slowest / (gpu.flops * efficiency.compute)
        )
        # A token misses an expert with probability 1 - k / E.
        met = model.experts / ranks * (1 - (1 - model.top_k / model.experts) ** tokens)
        read_s = parameters * met * model.weight_bytes / (gpu.memory_bytes_per_s * efficiency.memory)
        return max(compute_s, read_s)

    def exchange_s(self, tokens: int, ranks: int) -> float:
        """Seconds over all layers in which tokens go to their experts, in one byte a value, and come back in two."""
        if ranks == 1:
            return 0.0
        model, efficiency = self.model, self.efficiency
        places = ranks if self.gpu.nodes == 1 else self.gpu.nodes
        away = (places - 1) * (1 - (1 - 1 / places) ** model.top_k)
        moved_s = tokens * away * model.hidden * 3 / self.gpu.link_bytes_per_s
        return model.moe_layers * efficiency.exposed * max(efficiency.exchange_s, moved_s)

    def expert_pressures(self, works: Sequence[Work]) -> tuple[float, tuple[float, ...]]:
        """Balance and pressures of the experts under this placement, the same in every step."""
        return self.balance.worst, self.balance.by_rank

    def kv_blocks(self, ranks: int, block_tokens: int = 16, used_share: float = 0.9) -> int:
        """KV blocks of one rank: its memory beside the weights; vLLM uses 0.9 of the memory by default."""
        model = self.model
        experts = model.expert_parameters * model.experts * model.moe_layers / ranks
        weights = (model.dense_parameters + experts) * model.weight_bytes
        return int((self.gpu.memory_bytes * used_share - weights) / (model.kv_bytes * block_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named model on named hardware.

    Attributes:
        gpu: of each rank.
        model: served.
        efficiency: reached.
        ranks: that the preset is meant for.
        spread: of the experts' popularity, see `experts.draw_traffic`.
        source: for reports.
    """

    gpu: Gpu
    model: ModelArchitecture
    efficiency: Efficiency
    ranks: int
    spread: float
    source: str

    def cost(
        self,
        ranks: int,
        *,
        placement: PlacementPolicy = PlacementPolicy.INITIAL,
        redundant: int = 0,
        seed: int = 0,
    ) -> RooflineCost:
        """The cost of a group of `ranks` ranks.

        Args:
            ranks: of the group.
            placement: how its experts lie.
            redundant: slots of a layer beside one for each expert.
            seed: of the experts' popularity.

        Raises:
            ValueError: the slots of a layer do not divide among the ranks.
        """
        model, balance = self.model, even_balance(ranks)
        if placement is not PlacementPolicy.EVEN and ranks > 1:
            shares = draw_traffic(layers=model.moe_layers, experts=model.experts, spread=self.spread, seed=seed)
            nodes = self.gpu.nodes if ranks % self.gpu.nodes == 0 else 1
            placed = place(shares, placement, ranks=ranks, nodes=nodes, redundant=redundant)
            balance = balance_of(shares, placed)
        return RooflineCost(gpu=self.gpu, model=model, efficiency=self.efficiency, balance=balance, source=self.source)


# Gives Qwen3 on two ranks a fullest rank of 1.07 times the mean, on four of 1.17, and DeepSeek-V3 on 16 of 1.48
# (assumed: no distribution is published).
_SPREAD = 0.8
PRESETS = MappingProxyType(
    {
        "h100-qwen3-30b-a3b": Preset(
            gpu=H100_BF16, model=QWEN3_30B_A3B, efficiency=NVLINK_BF16, ranks=2, spread=_SPREAD,
            source="modelled: roofline of Qwen3-30B-A3B on H100 SXM, data sheet and config.json",
        ),
        "a100-qwen3-30b-a3b": Preset(
            gpu=A100_BF16, model=QWEN3_30B_A3B, efficiency=replace(NVLINK_BF16, compute=0.55), ranks=2, spread=_SPREAD,
            source="modelled: roofline of Qwen3-30B-A3B on A100 80GB SXM, data sheet and config.json",
        ),
        "h100-deepseek-v3": Preset(
            gpu=H100_FP8_TWO_NODES, model=DEEPSEEK_V3, efficiency=TWO_NODES_FP8, ranks=16, spread=_SPREAD,
            source="modelled: roofline of DeepSeek-V3 on 16 H100 of two nodes, arXiv 2412.19437, DeepEP, SGLang",
        ),
    }
)  # fmt: skip
