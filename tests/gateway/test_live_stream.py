"""The command line's reader of the live page's snapshots, against a real gateway."""

import asyncio
from contextlib import aclosing

import pytest
from moe_contract.clients import Refused, Unreachable, Unreadable
from moe_contract.live_page import LiveSnapshot, TimePoint, write_event
from moe_contract.live_stream import _read_event, read_snapshot, watch_snapshots
from moe_contract.page_keys import derive_page_key

from tests.gateway.clients import TOKEN
from tests.gateway.messages import post, prompt

KEY = derive_page_key(TOKEN.encode())


async def read(url: str, number: int, key: str = KEY) -> list[LiveSnapshot]:
    found: list[LiveSnapshot] = []
    async with aclosing(watch_snapshots(url, key)) as snapshots:
        async for snapshot in snapshots:
            found.append(snapshot)
            if len(found) == number:
                break
    return found


async def test_snapshots_of_a_gateway_are_read_as_they_were_written(make_engine, serve):
    served = await serve(await make_engine(), await make_engine())
    await served.ask(post(prompt(), extra=b"x-request-id: mine\r\n"))
    first, second = await read(served.admin_url, 2)
    assert (len(second.engines), second.requests) == (2, 1)
    assert second.newest[0].record.request_id == "mine"
    assert second.at_s > first.at_s
    assert read_snapshot(write_event(second)) == second


async def test_a_wrong_key_a_page_that_is_off_and_a_gateway_that_is_gone_are_errors(make_engine, serve):
    served = await serve(await make_engine())
    with pytest.raises(Refused, match="page key"):
        await read(served.admin_url, 1, key="wrong")
    off = await serve(await make_engine(), ui=False)
    with pytest.raises(Refused):
        await read(off.admin_url, 1)
    with pytest.raises(Unreachable):
        await read("http://127.0.0.1:1", 1)


async def test_a_snapshot_without_an_end_is_an_error():
    """Longer than the buffer for a line."""
    content = asyncio.StreamReader(limit=2**10)
    content.feed_data(b"event: snapshot\ndata: " + b"x" * 2**12 + b"\n")
    with pytest.raises(Unreadable, match="too large"):
        await _read_event(content)


@pytest.mark.parametrize("event", [b"", b"event: snapshot\ndata: {}\n\n", b"event: snapshot\ndata: {\n\n"])
def test_an_event_that_is_no_snapshot_is_an_error(event):
    assert read_snapshot(write_event(LiveSnapshot(at_s=1.0, point=TimePoint(at_s=1.0)))).at_s == 1.0
    with pytest.raises(Unreadable):
        read_snapshot(event)
