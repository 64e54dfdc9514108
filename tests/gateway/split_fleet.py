"""A gateway before engines that exchange KV blocks."""

from typing import Any

import aiohttp

from tests.gateway.messages import post
from tests.gateway.split_engines import PATHS, WRONG, Cluster, SplitEngine, body_of, read_stream, text_of
from tests.gateway.waiting import until

ON = {"disaggregation": {"moves_roles": False}}


class Fleet:
    """A gateway before engines of which the first computes prompts and the second decodes."""

    def __init__(self, served, engines, scripts):
        self.served, self.engines, self.scripts = served, engines, scripts
        self.prefill, self.decode = scripts[:2]
        self.placements = served.gateway.dispatcher.placements

    async def ask(self, route="chat", *, stream=True, **fields):
        body = body_of(route, **fields)
        answer = await self.served.ask(post(body | ({"stream": True} if stream else {}), PATHS[route]))
        assert text_of(body) != WRONG
        return answer

    async def read_admin(self):
        """The gateway's state and metrics."""
        async with aiohttp.ClientSession(self.served.admin_url) as session:
            async with session.get("/v1/state") as answer:
                state = await answer.json()
            async with session.get("/metrics") as answer:
                return state, await answer.text()

    def settled(self):
        """Nothing counts as in flight at any engine, also not at one that is gone."""
        assert self.served.gateway.dispatcher.in_flight == 0


def right(answer, route, **fields):
    assert answer.status == 200, answer.body
    assert read_stream(answer.body) == text_of(body_of(route, **fields))


async def begin_chat(served: Any) -> Any:
    """A client that has sent a stream's request and not read its answer yet."""
    client = await served.connect()
    client.send(post(body_of("chat", stream=True), PATHS["chat"]))
    return client


async def ask_without_reading(it: Fleet) -> tuple[Any, Any]:
    """A client of a stream that stops reading before the second engine has it; the client and its connection.

    The script of the first engine has to wait for `go`.
    """
    client = await begin_chat(it.served)
    await until(lambda: it.prefill.phases)
    (connection,) = it.served.gateway._connections
    connection.pause_writing()
    it.prefill.go.set()
    await until(lambda: it.decode.phases, "the second engine")
    return client, connection


async def start_fleet(
    make_engine: Any,
    serve: Any,
    *,
    roles: Any = ("prefill", "decode"),
    ranks: int = 1,
    peers: str = "same",
    **sections: Any,
) -> Fleet:
    """Starts engines with these roles and a gateway before them."""
    cluster = Cluster()
    scripts = [SplitEngine(cluster) for _ in roles]
    engines = [
        await make_engine(script, name=f"{role}-{number}", ranks=ranks)
        for number, (script, role) in enumerate(zip(scripts, roles, strict=True))
    ]
    for engine, role in zip(engines, roles, strict=True):
        engine.agent.say(kv_transfer={"role": role, "lease_s": 30.0, "peers": peers, "token_bytes": 1000.0})
    served = await serve(*engines, ranks=ranks, **(ON | sections))
    running = Fleet(served, engines, scripts)
    await until(lambda: len(running.placements.roles) == len(roles))
    return running
