"""A request of `/v1/responses` goes to the rank that the gateway chose, also in vLLM 0.32, which ignores the header."""

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.vllm import responses_rank
from moe_agent.vllm.middleware import ServingRoutesOnly


def make_client() -> Any:
    class Client:
        """vLLM's client of the core, as far as a request needs it."""

        errored = False

        def __init__(self) -> None:
            self.ranks: list[int | None] = []

        async def generate(self, prompt: str, *, data_parallel_rank: int | None = None) -> Any:
            self.ranks.append(data_parallel_rank)
            yield prompt

    return Client()


async def serve(client: Any, path: str, header: bytes | None, *, named: int | None = None) -> int | None:
    """The rank at which a request is computed whose handler names this one, in a task of its own."""

    async def compute() -> None:
        fields = {} if named is None else {"data_parallel_rank": named}
        async for _ in client.generate("prompt", **fields):
            pass

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(compute())

    headers = [] if header is None else [(b"x-data-parallel-rank", header)]
    app = SimpleNamespace(state=SimpleNamespace(engine_client=client))
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": app}
    await ServingRoutesOnly(answer)(scope, None, None)
    return client.ranks[-1]


@pytest.fixture
def install(monkeypatch):
    def install(version: str) -> None:
        monkeypatch.setattr(responses_rank, "find_version", lambda: version)
        responses_rank._ignores_rank.cache_clear()

    yield install
    responses_rank._ignores_rank.cache_clear()


RESPONSES, CHATS = "/v1/responses", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("version", "path", "header", "named", "rank"),
    [
        ("0.32.1", RESPONSES, b"3", None, 3),
        ("0.32.1", RESPONSES, b"0", None, 0),
        ("0.32.1", RESPONSES, b"3", 1, 1),
        ("0.32.1", RESPONSES, None, None, None),
        ("0.32.1", RESPONSES, b"-1", None, None),
        ("0.32.1", RESPONSES, b"x", None, None),
        ("0.32.1", RESPONSES, b"9" * 5000, None, None),
        ("0.32.1", CHATS, b"3", None, None),
        ("0.33.0", RESPONSES, b"3", None, None),
        ("0.33.0", RESPONSES, b"3", 3, 3),
    ],
)
async def test_the_rank_of_the_header_is_taken_where_vllm_does_not(install, version, path, header, named, rank):
    install(version)
    assert await serve(make_client(), path, header, named=named) == rank


async def test_requests_side_by_side_keep_their_ranks(install):
    install("0.32.0")
    client = make_client()
    await asyncio.gather(*(serve(client, RESPONSES, b"%d" % (rank % 4)) for rank in range(40)))
    await serve(client, RESPONSES, None)
    assert client.ranks == [*(rank % 4 for rank in range(40)), None]


async def test_a_request_that_begins_within_the_task_of_the_one_before_has_no_rank_of_it(install):
    """As uvicorn begins a request that came behind another one on its connection."""
    install("0.32.0")
    client = make_client()
    await serve(client, RESPONSES, b"3")
    responses_rank._rank.set(3)
    assert await serve(client, CHATS, None) is None


def test_vllm_ignores_the_header_exactly_where_it_is_repaired(virtual_engines):
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.v1.engine.async_llm import AsyncLLM

    responses_rank._ignores_rank.cache_clear()
    reads = "self._get_data_parallel_rank(raw_request)" in inspect.getsource(OpenAIServingResponses)
    assert reads is not responses_rank._ignores_rank()
    assert "data_parallel_rank" in inspect.signature(AsyncLLM.generate).parameters
