"""Bytes that a client has sent and the loop has not read; an idle connection that has some is not closed."""

import asyncio
import os
import socket
from types import SimpleNamespace

from moe_gateway.http.unread import has_unread

from tests.gateway.messages import OK, post, prompt
from tests.gateway.waiting import until


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


async def test_a_client_that_reads_nothing_and_goes_on_sending_ends_by_the_idle_timeout(make_engine, serve):
    """Reading is paused there, so what it sends stays in the kernel."""
    served = await serve(await make_engine(), limits={"idle_timeout_s": 3600})
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", served.config.listen.port))
        await until(lambda: served.gateway._connections)
        (connection,) = served.gateway._connections
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        while not connection._is_reading_paused:
            await loop.sock_sendall(client, b"GET /nowhere HTTP/1.1\r\nhost: a\r\n\r\n")
            await asyncio.sleep(0)
        await loop.sock_sendall(client, b"GET /nowhere HTTP/1.1\r\nhost: a\r\n\r\n")
        # It is closed; what it has not read is waited for once more, then it is cut.
        for _ in range(2):
            connection.check(served.gateway.clock() + 10_000)
        await until(lambda: not served.gateway._connections)
