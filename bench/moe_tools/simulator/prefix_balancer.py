"""Base of the rivals that know which prefixes they sent where."""

import random
from collections.abc import Mapping, Sequence

from moe_scheduling.engine.prefix_index import PrefixIndex, block_keys
from moe_scheduling.signals import Target

from moe_tools.simulator.router import Balancer, Wire
from moe_tools.simulator.workload import SimRequest, prompt_bytes


class PrefixBalancer(Balancer):
    """Remembers the prefixes sent to each target in the product's own index, so that no rival has a worse one."""

    def __init__(self, wire: Wire, targets: Sequence[Target], number: int, *, gateways: int, seed: int) -> None:
        super().__init__(wire, targets)
        self._prefixes = PrefixIndex()
        self._keys: dict[SimRequest, tuple[int, ...]] = {}
        self.random = random.Random(f"{seed}/{number}")

    def arrive(self, request: SimRequest, now_s: float) -> None:
        self._keys[request] = block_keys(prompt_bytes(request))
        super().arrive(request, now_s)

    def held_shares(self, request: SimRequest) -> Mapping[Target, float]:
        """Returns the part of the prompt that each target holds, in full blocks of the index."""
        keys = self._keys[request]
        return {target: count / len(keys) for target, count in self._prefixes.held_blocks(keys).items()}

    def sent(self, request: SimRequest, target: Target, now_s: float) -> None:
        self._prefixes.record(self._keys[request], target)

    def ended(self, request: SimRequest, target: Target, now_s: float) -> None:
        if request.finished_s is not None:
            self._keys.pop(request, None)

    def restarted(self, server: str) -> None:
        for target in self.targets:
            if target.server == server:
                self._prefixes.forget(target)
