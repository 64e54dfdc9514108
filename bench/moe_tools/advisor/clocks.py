"""Step times by GPU and model: fitted presets where there are any, else a roofline; and their errors.

A clock answers for servers of one group. Fitted step times are of the groups that were measured alone, so shapes with
other groups are not compared: two clocks in one table would compare the clocks.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, Protocol

from moe_contract.input_errors import InputError, InvalidInput

from moe_tools.calibration.preset_errors import describe_errors
from moe_tools.simulator.costs import CostModel
from moe_tools.simulator.experts import PlacementPolicy
from moe_tools.simulator.fitted_presets import FITTED_PRESETS
from moe_tools.simulator.hardware import DEEPSEEK_V3, PRESETS, QWEN3_30B_A3B, Preset

# KV blocks of a rank that are simulated at most: each is an object of vLLM, and a B300 has over half a million.
MOST_KV_BLOCKS = 131_072
# Qwen3.6-35B-A3B: 10 layers of full attention, 2 KV heads of 256, BF16.
_QWEN36_KV_BYTES = 2 * 2 * 256 * 2 * 10


class ServerParallelism(NamedTuple):
    """Parallelism of a server, as `engine.parallelism` has it.

    Attributes:
        ranks: data-parallel ranks, in lockstep.
        tensor: GPUs of a rank, which compute each layer together.
        expert: whether experts are spread over all GPUs; true of one GPU, of which it says nothing.
    """

    ranks: int
    tensor: int = 1
    expert: bool = True

    @property
    def gpus(self) -> int:
        """Returns the GPUs of the server."""
        return self.ranks * self.tensor

    def describe(self) -> str:
        """Returns it in words: `4` (ranks of one GPU, experts spread), `tensor 2 x data 2, experts spread`."""
        if self.tensor == 1 and self.expert:
            return f"{self.ranks}"
        words = [f"tensor {self.tensor}"] if self.tensor > 1 else []
        words += [f"data {self.ranks}"] if self.ranks > 1 else []
        return " x ".join(words) + (", experts spread" if self.expert else "")


class Clock(Protocol):
    """Step times of one model on one GPU."""

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of a token in the KV cache."""

    @property
    def source(self) -> str:
        """Where the step times come from."""

    def groups(self, gpus: int) -> Sequence[ServerParallelism]:
        """Returns the groups of servers of this many GPUs whose step times are known."""

    def covers(self, group: ServerParallelism) -> bool:
        """Whether the step times of such a server are known."""

    def copies(self, group: ServerParallelism) -> int:
        """Copies of experts that are tried on such a server: one for each rank and layer, or 0."""

    def cost(self, group: ServerParallelism, *, redundant: int = 0, seed: int = 0) -> CostModel:
        """Returns the step times of a server; `redundant` copies of experts in a layer, popularity by `seed`."""

    def kv_blocks(self, group: ServerParallelism) -> int:
        """Returns the KV blocks of 16 tokens of a rank."""

    def describe(self) -> str:
        """Returns the clock and its measured error in sentences, for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineClock:
    """Rooflines of data sheets, for any number of ranks of one GPU; experts lie as vLLM puts them."""

    preset: Preset

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of a token in the KV cache."""
        return self.preset.model.kv_bytes

    @property
    def source(self) -> str:
        """The figures behind the roofline."""
        return self.preset.source

    def groups(self, gpus: int) -> Sequence[ServerParallelism]:
        """Returns the one of as many ranks."""
        return [ServerParallelism(gpus)]

    def covers(self, group: ServerParallelism) -> bool:
        """Whether a roofline has such ranks: any number of them, of one GPU each."""
        return group.tensor == 1 and group.expert

    def copies(self, group: ServerParallelism) -> int:
        """One a rank, where the experts divide among them."""
        return group.ranks if group.ranks > 1 and self._divides(group.ranks) else 0

    def cost(self, group: ServerParallelism, *, redundant: int = 0, seed: int = 0) -> CostModel:
        """Returns the roofline; experts lie evenly where they do not divide among the ranks."""
        ranks = group.ranks
        policy = PlacementPolicy.PLANNED if redundant else PlacementPolicy.INITIAL
        placement = policy if self._divides(ranks) else PlacementPolicy.EVEN
        copies = redundant if self._divides(ranks) and ranks > 1 else 0
        return self.preset.cost(ranks, placement=placement, redundant=copies, seed=seed)

    def kv_blocks(self, group: ServerParallelism) -> int:
        """Returns the blocks in the memory that the weights leave."""
        return self.preset.cost(group.ranks, placement=PlacementPolicy.EVEN).kv_blocks(group.ranks)

    def describe(self) -> str:
        """Returns that no fitted step times were used, and that rooflines have no measured error."""
        return (
            f"Step times: {self.source}; none that are fitted serve this model, GPU and number of GPUs. "
            "Rooflines were not compared with a GPU."
        )

    def _divides(self, ranks: int) -> bool:
        return self.preset.model.experts % ranks == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedClock:
    """Fitted presets by the parallelism of a server.

    Attributes:
        presets: names in `FITTED_PRESETS`.
        kv_token_bytes: bytes of a token in the KV cache.
    """

    presets: Mapping[ServerParallelism, str]
    kv_token_bytes: float

    @property
    def source(self) -> str:
        """Where the presets come from, each source once."""
        return "; ".join(sorted({FITTED_PRESETS[name].source for name in self.presets.values()}))

    def groups(self, gpus: int) -> Sequence[ServerParallelism]:
        """Returns those of this size that were measured."""
        return [group for group in self.presets if group.gpus == gpus]

    def covers(self, group: ServerParallelism) -> bool:
        """Whether such a group was measured."""
        return group in self.presets

    def copies(self, group: ServerParallelism) -> int:
        """None: fitted step times are those of the experts as they lay."""
        return 0

    def cost(self, group: ServerParallelism, *, redundant: int = 0, seed: int = 0) -> CostModel:
        """Returns the fitted step times.

        Raises:
            KeyError: none of such a group.
        """
        return FITTED_PRESETS[self.presets[group]].cost(group.ranks)

    def kv_blocks(self, group: ServerParallelism) -> int:
        """Returns the blocks of the preset, at most `MOST_KV_BLOCKS`."""
        return min(MOST_KV_BLOCKS, FITTED_PRESETS[self.presets[group]].kv_blocks)

    def describe(self) -> str:
        """Returns the presets with the errors of each."""
        errors = "; ".join(f"of {group.describe()}: {describe_errors(name)}" for group, name in self.presets.items())
        return f"Step times: {self.source}. Median errors, servers {errors}. No copies of experts are compared."


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """Step times that are known of a GPU and a model.

    Attributes:
        gpu: a word of the product labels of nodes.
        model: as a model's URI contains it.
        fitted: names of fitted presets.
        kv_token_bytes: bytes of a token in the KV cache.
        roofline: name of a preset of rooflines; empty for none.
        step_tokens: vLLM 0.32's default of `max_num_batched_tokens` for a server with an API on this GPU.
        sequences: its default of `max_num_seqs` there.
    """

    gpu: str
    model: str
    kv_token_bytes: float
    fitted: Mapping[ServerParallelism, str] = field(default_factory=dict)
    roofline: str = ""
    step_tokens: int = 8192
    sequences: int = 1024


def _kernels(gpu: str, model: str, *sizes: int) -> dict[ServerParallelism, str]:
    return {ServerParallelism(ranks): f"{gpu}-{model}-kernels-dp{ranks}" for ranks in sizes}


def _measured(engine: str) -> dict[ServerParallelism, str]:
    """The presets of a measured GPU and model, by the parallelism in their names."""
    found = {}
    for name, preset in FITTED_PRESETS.items():
        if match := re.fullmatch(rf"{re.escape(engine)}-tp(\d+)-ep(\d+)(-dp\d+)?", name):
            tensor, spread = int(match[1]), int(match[2])
            is_spread = spread > 1 or preset.ranks * tensor == 1
            found[ServerParallelism(preset.ranks, tensor, expert=is_spread)] = name
    return found


_QWEN, _DEEPSEEK = QWEN3_30B_A3B.kv_bytes, DEEPSEEK_V3.kv_bytes
# Of each model the first one is taken where the resource names no GPU.
CLOCKS = MappingProxyType(
    {
        f"{known.gpu}-{known.model}": known
        for known in (
            _Known(
                gpu="h100", model="qwen3-30b-a3b", kv_token_bytes=_QWEN, roofline="h100-qwen3-30b-a3b",
                fitted=_kernels("h100", "qwen3-30b-a3b", 1, 2, 4, 8),
            ),
            _Known(
                gpu="h200", model="qwen3-30b-a3b", kv_token_bytes=_QWEN,
                fitted=_kernels("h200", "qwen3-30b-a3b", 1, 2, 4, 8),
            ),
            _Known(
                gpu="a100", model="qwen3-30b-a3b", kv_token_bytes=_QWEN, roofline="a100-qwen3-30b-a3b",
                step_tokens=2048, sequences=256,
            ),
            _Known(
                gpu="b300", step_tokens=16_384, model="qwen3.6-35b-a3b", kv_token_bytes=_QWEN36_KV_BYTES,
                fitted=_measured("b300-qwen3.6-35b-a3b"),
            ),
            # The size of its KV cache is not published: DeepSeek-V3's, which is not compressed (assumed).
            _Known(
                gpu="b300", step_tokens=16_384, model="deepseek-v4-flash", kv_token_bytes=_DEEPSEEK,
                fitted=_measured("b300-deepseek-v4-flash"),
            ),
            _Known(
                gpu="h100", model="deepseek-v3", kv_token_bytes=_DEEPSEEK, roofline="h100-deepseek-v3",
                fitted=_kernels("h100", "deepseek-v3", 16),
            ),
            _Known(
                gpu="h200", model="deepseek-v3", kv_token_bytes=_DEEPSEEK, fitted=_kernels("h200", "deepseek-v3", 8)
            ),
        )
    }
)  # fmt: skip


def list_clocks(model_uri: str, gpu_product: str) -> Sequence[str]:
    """Returns the names of the clocks of a model, those of its GPU alone where that is named and known.

    Args:
        model_uri: of the resource.
        gpu_product: label of the nodes that the resource asks for; empty: none.
    """
    uri, product = model_uri.lower().replace("_", "-"), gpu_product.lower()
    of_model = [name for name, known in CLOCKS.items() if known.model in uri]
    # A GH200 is no H200.
    words = re.split(r"[^a-z0-9]+", product)
    return [name for name in of_model if CLOCKS[name].gpu in words] if product else of_model


def choose_clock(name: str, gpus: int) -> Clock:
    """Returns the fitted presets of a clock where one serves a part of the GPUs, else its roofline.

    Raises:
        InvalidInput: no servers of these GPUs have known step times.
    """
    known = CLOCKS[name]
    if fitted := {group: preset for group, preset in known.fitted.items() if gpus % group.gpus == 0}:
        return FittedClock(presets=fitted, kv_token_bytes=known.kv_token_bytes)
    if known.roofline:
        return RooflineClock(preset=PRESETS[known.roofline])
    sizes = ", ".join(map(str, sorted({group.gpus for group in known.fitted})))
    message = f"{name} has step times of servers of {sizes} GPUs alone, into which {gpus} cannot be cut"
    raise InvalidInput([InputError("spec.engine", message)])
