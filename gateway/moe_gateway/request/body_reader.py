"""Reads bodies that would stop the event loop for long: large ones in another process, compressed ones in a thread.

One for a gateway; client connections call it. The process starts with the first large body. Where it cannot be had, the
body is parsed here, which only takes time.
"""

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process

from moe_scheduling.engine.prefix_index import DEFAULT_BLOCK_BYTES, block_keys

from moe_gateway.http.bodies import Body, LargeBody, split_body
from moe_gateway.http.content_encoding import decode_body, may_have_encoding, take_encoding
from moe_gateway.http.routes import Route
from moe_gateway.request.body_worker import ANSWER, QUESTION, ROUTES, read_answer
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.form import parse_form
from moe_gateway.request.parsing import MOST_KEYED_BYTES, Parsed, parse_body
from moe_gateway.request.reading import read_request

# Keys of this much of a prompt are computed at a time, about 0.4 ms.
_KEYED_SLICE_BYTES = 512 * DEFAULT_BLOCK_BYTES

log = logging.getLogger("moeserving.gateway")


def needs_reader(request: ClientRequest) -> bool:
    """Whether a body is large, or may be compressed."""
    return isinstance(request.body, LargeBody) or may_have_encoding(request.headers)


class BodyReader:
    """Decodes and parses bodies. Large ones are parsed one after the other."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    async def read(self, request: ClientRequest, route: Route, most_bytes: int) -> Parsed:
        """Returns the fields of a request's body, and leaves the body decoded in the request.

        Args:
            request: whose body and headers are replaced where the body is compressed.
            route: of the request.
            most_bytes: largest size of a decoded body.

        Raises:
            BadBody: the body cannot be dispatched.
            EncodingRefused: it cannot be decoded.
        """
        if may_have_encoding(request.headers):
            encodings, request.headers = take_encoding(request.headers)
            if encodings:
                request.body = await asyncio.to_thread(_decode, request.body, encodings, most_bytes)
        if route.names_response or isinstance(request.body, bytes):
            return read_request(route, request)
        if route.is_form:
            return await asyncio.to_thread(parse_form, request.headers, request.body.join())
        return await self._read_large(request.body, route)

    async def _read_large(self, body: LargeBody, route: Route) -> Parsed:
        async with self._turn:
            try:
                parsed = await self._ask(body, route)
            except (OSError, asyncio.IncompleteReadError) as error:
                log.warning("a large body is parsed in the gateway's own process", extra={"reason": repr(error)})
                self._drop_process()
                parsed = parse_body(route, body.join())
        keys: list[int] = []
        prompt, previous = parsed.prompt[:MOST_KEYED_BYTES], 0
        for start in range(0, len(prompt), _KEYED_SLICE_BYTES):
            keys += block_keys(prompt[start : start + _KEYED_SLICE_BYTES], previous=previous)
            previous = keys[-1] if keys else 0
            await asyncio.sleep(0)
        size = parsed.prompt_bytes or len(parsed.prompt)
        return parsed._replace(prompt=b"", prompt_bytes=size, keys=tuple(keys))

    async def _ask(self, body: LargeBody, route: Route) -> Parsed:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(QUESTION.pack(ROUTES.index(route), len(body)))
        for part in body.parts:
            process.stdin.write(part)
            await process.stdin.drain()
        head_bytes, prompt_bytes = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
        head = await process.stdout.readexactly(head_bytes)
        return read_answer(head, await process.stdout.readexactly(prompt_bytes))

    async def _running(self) -> Process:
        if self._is_closed:
            raise OSError("the gateway ends")
        if self._process is None or self._process.returncode is not None:
            command = (sys.executable, "-P", "-m", "moe_gateway.request.body_worker")
            self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
        return self._process

    def _drop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()

    async def close(self) -> None:
        """Ends the process that parses; later bodies are parsed here."""
        self._is_closed, process = True, self._process
        self._drop_process()
        if process is not None:
            await process.wait()


def _decode(body: Body, encodings: list[bytes], most_bytes: int) -> Body:
    return split_body(decode_body(body.join() if isinstance(body, LargeBody) else body, encodings, most_bytes))
