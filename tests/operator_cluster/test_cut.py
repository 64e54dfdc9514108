"""An operator that is killed at any moment: the next one goes on, and what comes of it is the same."""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fresh_operator import FreshOperator, comparable, connect, fetch_children, fetch_serving, let_go_of_claims
from moe_contract.api_server import ApiServer
from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.store import Key
from serving_documents import serving

KILLS_IN_A_LIFE = 12
MOST_CALLS_BETWEEN_KILLS = 9
Document = dict[str, Any]
State = dict[tuple[str, str], Document]

CACHE = {"path": "/cache", "size": "1Gi"}
BEFORE = serving(model={"uri": "hf://org/tiny", "cache": CACHE}, engine={"replicas": 2})
AFTER = serving(
    model={"uri": "hf://org/tiny"},
    engine={"replicas": 3, "args": ["--seed=1"], "canary": {"weight": 20}},
    gateway={"service": {"port": 8080}},
)


class Killed(BaseException):
    """Stands for the end of the operator's process."""


class Scissors:
    """A connection that ends with its process: before a call reaches the API server, or after it did."""

    def __init__(self, server: Any, calls_left: int, *, after: bool) -> None:
        self._server, self._calls_left, self._after = server, calls_left, after

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._server, name)
        return self._cutting(method) if name in ("apply", "merge", "create", "replace", "delete", "get") else method

    def _cutting(self, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*arguments: Any, **options: Any) -> Any:
            # Of calls that are made together each has its own number; those that have begun go on without the process.
            self._calls_left -= 1
            number = self._calls_left
            if number < 0 or (number == 0 and not self._after):
                raise Killed
            try:
                return await method(*arguments, **options)
            finally:
                if number == 0:
                    raise Killed

        return call


class Life:
    """A resource from its creation to its end, under operators that are killed and replaced."""

    def __init__(
        self, server: ApiServer, session: aiohttp.ClientSession, key: Key, gaps: list[int], chance: random.Random
    ) -> None:
        self._server, self._api, self._session, self.key = server, Api(server), session, key
        self._gaps, self._chance, self.kills = gaps, chance, 0

    async def run(self) -> list[State]:
        """The children after each part of the life."""
        place = {"name": self.key.name, "namespace": self.key.namespace}
        await self._api.create(SERVING, BEFORE | {"metadata": place})
        await self._start()
        states = [await self._settle()]
        patch = {"spec": AFTER["spec"] | {"model": {"cache": None}}}
        await self._api.merge(SERVING, self.key.namespace, self.key.name, patch)
        states.append(await self._settle())
        await self._api.delete(SERVING, {"metadata": place})
        states.append(await self._settle())
        assert await fetch_serving(self._api, self.key) is None
        return states

    async def _start(self) -> None:
        api = self._api
        if self._gaps:
            scissors: Any = Scissors(self._server, self._gaps.pop(), after=self._chance.random() < 0.5)
            api = Api(scissors)
        self._operator = FreshOperator(api, self._session, [self.key.namespace])
        await self._operator.relist()

    async def _settle(self) -> State:
        while True:
            try:
                await self._operator.relist()
                await self._operator.settle(self.key)
                break
            except Killed:
                self.kills += 1
                await self._start()
        await let_go_of_claims(self._api, self._operator.store, self.key)
        found = await fetch_children(self._api, self.key.namespace)
        return {place: comparable(document) for place, document in found.items()}


async def live(kubeconfig: Path, namespace: str, kills: int, seed: int) -> tuple[list[State], int]:
    chance = random.Random(seed)
    gaps = [chance.randint(1, MOST_CALLS_BETWEEN_KILLS) for _ in range(kills)]
    async with connect(kubeconfig) as server, aiohttp.ClientSession() as session:
        life = Life(server, session, Key(namespace, "tiny"), gaps, chance)
        return await life.run(), life.kills


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("lives", "least_kills"), [(2, 14), pytest.param(14, 100, marks=pytest.mark.long)])
async def test_killed_at_any_moment_it_comes_to_the_same_objects_and_leaves_none(
    kubeconfig: Path, namespace: str, lives: int, least_kills: int
) -> None:
    wanted, _ = await live(kubeconfig, namespace, 0, 0)
    assert [len(state) for state in wanted] == [15, 17, 0]
    total = 0
    for seed in range(lives):
        found, kills = await live(kubeconfig, namespace, KILLS_IN_A_LIFE, seed)
        assert found == wanted, f"seed {seed}"
        total += kills
    assert total >= least_kills
