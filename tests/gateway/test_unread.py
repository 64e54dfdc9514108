"""Bytes that a client has sent and the loop has not read; an idle connection that has some is not closed."""

import asyncio
import os
import socket
from types import SimpleNamespace

from moe_gateway.http.unread import has_unread

from tests.gateway.messages import OK, post, prompt


def transport_of(made):
    return SimpleNamespace(get_extra_info=lambda name: made)


def test_bytes_count_until_they_are_read():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not has_unread(transport_of(ours))
        theirs.sendall(b"GET")
        assert has_unread(transport_of(ours))
        ours.recv(16)
        assert not has_unread(transport_of(ours))


def test_a_closed_socket_and_none_have_no_bytes():
    ours, theirs = socket.socketpair()
    theirs.close()
    ours.close()
    assert not has_unread(transport_of(ours))
    assert not has_unread(transport_of(None))


async def test_an_idle_connection_whose_time_is_over_is_answered_if_its_request_is_there(make_engine, serve):
    served = await serve(await make_engine(), limits={"idle_timeout_s": 3600})
    client = await served.connect()
    client.send(post(prompt()))
    await client.answer()
    (connection,) = served.gateway._connections
    # In one turn of the loop, which reads nothing meanwhile.
    os.write(client.writer.get_extra_info("socket").fileno(), post(prompt()))
    connection.check(served.gateway.clock() + 10_000)
    assert (await client.answer()).json == OK


async def test_an_idle_connection_whose_time_is_over_ends(make_engine, serve):
    served = await serve(await make_engine(), limits={"idle_timeout_s": 3600})
    client = await served.connect()
    client.send(post(prompt()))
    await client.answer()
    (connection,) = served.gateway._connections
    connection.check(served.gateway.clock() + 10_000)
    assert await asyncio.wait_for(client.ended(), 60)
