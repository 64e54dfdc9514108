"""Which target holds which prefix of a prompt in its KV cache, judged by the prompts that were sent there.

The gateway's dispatcher (or the simulator) owns one index and calls `block_keys` for each request, `held_blocks` before
the choice, `record` after it. Engines are not asked: a block that an engine evicted early counts as held until it ages
out here. A block counts from when its request is sent, so that requests with the same prefix meet while it is computed;
where the request ends before (`discard`), the blocks that no other request has recorded since are held no more.

Invariants: a target that holds a block holds all blocks before it, because `record` renews earlier blocks after later
ones and the oldest leave first (a request that is discarded may leave later blocks of another one without them, which
then do not count until they are recorded again); memory is bounded by targets times `capacity_blocks`, and
`spare_blocks` for all targets together that hold more.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence

from moe_scheduling.signals import Target

# 512 bytes are about 128 tokens, eight of vLLM's own blocks. On average half a block of a shared prefix is missed, 64
# tokens, a few milliseconds of prefill; a smaller block would miss less, but each block costs about a microsecond.
DEFAULT_BLOCK_BYTES = 512
# 8 MiB of prompts, about two million tokens: more than the KV cache of one rank usually holds, at about 3 MB here.
DEFAULT_CAPACITY_BLOCKS = 16384

# For the targets together that have room for more; about 200 MB where all are used.
DEFAULT_SPARE_BLOCKS = 1 << 20

# In place of the number of a request: the block is computed.
COMPUTED = 0


def block_keys(prompt: bytes, block_bytes: int = DEFAULT_BLOCK_BYTES, *, previous: int = 0) -> tuple[int, ...]:
    """Returns the keys of the full blocks of a prompt; each depends on all bytes up to the end of its block.

    Keys are Python's keyed hashes: fast, and no client can construct a collision; they mean nothing in another process.

    Args:
        prompt: whole, or a part that begins after a full block.
        block_bytes: size of a block.
        previous: key of the block before this part; 0 at the beginning.

    Raises:
        ValueError: `block_bytes` is less than 1.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes must be at least 1, got {block_bytes}")
    keys = []
    key = previous
    for start in range(0, len(prompt) - block_bytes + 1, block_bytes):
        key = hash((key, prompt[start : start + block_bytes]))
        keys.append(key)
    return tuple(keys)


class PrefixIndex:
    """Remembers the blocks of each target in least-recently-used order.

    Args:
        capacity_blocks: blocks remembered of each target, more where it is known to have room for more.
        spare_blocks: most further blocks, of all targets together; those that have room for more share them evenly.

    Raises:
        ValueError: the capacity is less than 1.
    """

    __slots__ = ("_capacity_blocks", "_held", "_spare_blocks", "_wanted")

    def __init__(
        self, capacity_blocks: int = DEFAULT_CAPACITY_BLOCKS, spare_blocks: int = DEFAULT_SPARE_BLOCKS
    ) -> None:
        if capacity_blocks < 1:
            raise ValueError(f"capacity_blocks must be at least 1, got {capacity_blocks}")
        self._capacity_blocks = capacity_blocks
        self._spare_blocks = spare_blocks
        # By target, the blocks beyond the capacity for which it has room; those without are absent.
        self._wanted: dict[Target, int] = {}
        # By block, the newest request that has yet to compute it; `COMPUTED` once one has.
        self._held: dict[Target, OrderedDict[int, int]] = {}

    def set_room(self, target: Target, blocks: int) -> None:
        """Notes for how many blocks a target has room. O(targets) where that differs from before."""
        wanted = max(0, blocks - self._capacity_blocks)
        if self._wanted.get(target, 0) == wanted:
            return
        if wanted:
            self._wanted[target] = wanted
        else:
            del self._wanted[target]
        for other, held in self._held.items():
            self._trim(other, held)

    def count_blocks(self) -> dict[Target, int]:
        """Returns the number of blocks that are remembered of each target."""
        return {target: len(held) for target, held in self._held.items()}

    def _trim(self, target: Target, held: OrderedDict[int, int]) -> None:
        most = self._capacity_blocks
        if wanted := self._wanted.get(target):
            most += min(wanted, self._spare_blocks // len(self._wanted))
        while len(held) > most:
            held.popitem(last=False)

    def held_blocks(self, keys: Sequence[int]) -> dict[Target, int]:
        """Returns the number of leading blocks that each target holds, where it holds any. Changes nothing."""
        if not keys:
            return {}
        first, last, count = keys[0], keys[-1], len(keys)
        held_blocks = {}
        for target, held in self._held.items():
            if first not in held:
                continue
            # The held blocks are a leading run, so its end can be bisected.
            held_blocks[target] = count if last in held else bisect_left(keys, True, key=lambda key: key not in held)
        return held_blocks

    def record(self, keys: Sequence[int], target: Target, request: int = COMPUTED) -> Sequence[int]:
        """Notes that a prompt with these blocks was sent to the target, which holds them from now on.

        Args:
            keys: of the prompt.
            target: where it was sent.
            request: a number other than 0 for a request that may be discarded; 0: the blocks are computed.

        Returns:
            The keys of the blocks that the request has to compute, to be given to `confirm` or `discard`.
        """
        held = self._held.setdefault(target, OrderedDict())
        computed = 0
        for key in reversed(keys):
            if held.get(key) == COMPUTED:
                computed += 1
            else:
                held[key] = request
            held.move_to_end(key)
        self._trim(target, held)
        return keys[computed:]

    def confirm(self, keys: Sequence[int], target: Target) -> None:
        """Notes that the target has computed these blocks."""
        held: dict[int, int] = self._held.get(target, OrderedDict())
        for key in keys:
            if key in held:
                held[key] = COMPUTED

    def discard(self, keys: Sequence[int], target: Target, request: int) -> None:
        """Forgets the blocks that this request was to compute, and no later one."""
        held: dict[int, int] = self._held.get(target, OrderedDict())
        for key in keys:
            if held.get(key) == request:
                del held[key]

    def forget(self, target: Target) -> None:
        """Drops all blocks of a target whose engine restarted or is gone."""
        self._held.pop(target, None)
        self._wanted.pop(target, None)
