"""Reads bodies that would stop the event loop for long: large ones in another process, compressed ones in a thread.

One for a gateway; client connections call it. The process starts with the first large body. Where it cannot be started,
the body is parsed here, which only takes time.
"""

import asyncio
import logging
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress

from moe_scheduling.engine.prefix_index import DEFAULT_BLOCK_BYTES, block_keys

from moe_gateway.http.bodies import Body, BodyRefused, LargeBody, split_body
from moe_gateway.http.content_encoding import decode_body, may_have_encoding, take_encoding
from moe_gateway.http.replies import RequestOutcome
from moe_gateway.http.routes import Route
from moe_gateway.request.body_worker import ANSWER, QUESTION, ROUTES, read_answer
from moe_gateway.request.context import ClientRequest
from moe_gateway.request.form import parse_form
from moe_gateway.request.parsing import MOST_KEYED_BYTES, Parsed, parse_body
from moe_gateway.request.reading import read_request

# Keys of this much of a prompt are computed at a time, about 0.4 ms.
_KEYED_SLICE_BYTES = 512 * DEFAULT_BLOCK_BYTES
WORKER = ("-P", "-m", "moe_gateway.request.body_worker")
# A parser that takes longer than this for one body, at most 32 MiB by default, has stopped.
PARSE_TIMEOUT_S = 30.0
# Bodies that are decoded at a time, each in a thread: more would take the processor from the event loop.
DECODED_AT_ONCE = 2

log = logging.getLogger("moeserving.gateway")


def needs_reader(request: ClientRequest) -> bool:
    """Whether a body is large, or may be compressed."""
    if isinstance(request.body, LargeBody):
        return True
    return not request.is_plain and may_have_encoding(request.headers)


class BodyReader:
    """Decodes and parses bodies: at most `DECODED_AT_ONCE` are decoded at a time, and large ones parsed in turn."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._decoding = asyncio.Semaphore(DECODED_AT_ONCE)
        self._is_closed = False

    async def read(
        self, request: ClientRequest, route: Route, most_bytes: int, is_wanted: Callable[[], bool] = lambda: True
    ) -> Parsed:
        """Returns the fields of a request's body, and leaves the body decoded in the request.

        Args:
            request: whose body and headers are replaced where the body is compressed.
            route: of the request.
            most_bytes: largest size of a decoded body.
            is_wanted: whether somebody still waits for the body; asked when its turn comes, also in another thread.

        Raises:
            BadBody: the body cannot be dispatched.
            BodyRefused: it cannot be decoded or parsed, or nobody waits for it.
        """

        def is_needed() -> bool:
            return not self._is_closed and is_wanted()

        if may_have_encoding(request.headers):
            encodings, request.headers = take_encoding(request.headers)
            if encodings:
                async with self._decoding:
                    _insist(is_needed)
                    request.body = await asyncio.to_thread(_decode, request.body, encodings, most_bytes, is_needed)
        if route.names_response or isinstance(request.body, bytes):
            return read_request(route, request)
        if route.is_form:
            async with self._decoding:
                _insist(is_needed)
                return await asyncio.to_thread(parse_form, request.headers, request.body.join())
        return await self._read_large(request.body, route, is_needed)

    async def _read_large(self, body: LargeBody, route: Route, is_needed: Callable[[], bool]) -> Parsed:
        async with self._turn:
            _insist(is_needed)
            parsed = await self._parse(body, route)
        keys: list[int] = []
        prompt, previous = parsed.prompt[:MOST_KEYED_BYTES], 0
        for start in range(0, len(prompt), _KEYED_SLICE_BYTES):
            keys += block_keys(prompt[start : start + _KEYED_SLICE_BYTES], previous=previous)
            previous = keys[-1] if keys else 0
            await asyncio.sleep(0)
        size = parsed.prompt_bytes or len(parsed.prompt)
        return parsed._replace(prompt=b"", prompt_bytes=size, keys=tuple(keys))

    async def _parse(self, body: LargeBody, route: Route) -> Parsed:
        """Has the process parse a body.

        A process that served before may have ended for another reason, so the body is tried in a new one too. A body
        that ends a new process is not parsed here: it could end the gateway as well.
        """
        while True:
            is_new = self._process is None or self._process.returncode is not None
            try:
                process = await self._running()
            except OSError as error:
                log.warning("a large body is parsed in the gateway's own process", extra={"reason": repr(error)})
                return parse_body(route, body.join(), bounds_answer=True)
            try:
                async with asyncio.timeout(PARSE_TIMEOUT_S):
                    head, prompt = await _ask(process, body, route)
            except TimeoutError:
                self._drop_process()
                raise _unread(body, f"it took longer than {PARSE_TIMEOUT_S:g} s") from None
            except (OSError, asyncio.IncompleteReadError):
                self._drop_process()
                if is_new:
                    raise _unread(body, "the process that parses large bodies ended over it") from None
            except BaseException:
                # The next answer of this process would be that to this body.
                self._drop_process()
                raise
            else:
                return read_answer(head, prompt)

    async def _running(self) -> Process:
        """The process that parses.

        Raises:
            OSError: it cannot be started.
            BodyRefused: the gateway ends.
        """
        if self._is_closed:
            raise BodyRefused(RequestOutcome.GATEWAY_ENDED, "the gateway ends")
        process = self._process
        if process is None or process.returncode is not None:
            process = await asyncio.create_subprocess_exec(sys.executable, *WORKER, stdin=PIPE, stdout=PIPE)
            if self._is_closed:
                await _end(process)
                raise BodyRefused(RequestOutcome.GATEWAY_ENDED, "the gateway ends")
            self._process = process
        return process

    def _drop_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            task = asyncio.create_task(_end(process))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def close(self) -> None:
        """Ends the process that parses; later bodies are refused."""
        self._is_closed = True
        self._drop_process()
        await asyncio.gather(*self._ending)


async def _end(process: Process) -> None:
    """Kills a process and waits until it and its pipes are closed."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ProcessLookupError):
        process.kill()
    process.stdin.close()
    with suppress(OSError):
        await process.stdin.wait_closed()
    with suppress(OSError):
        await process.stdout.read()
    await process.wait()


def _insist(is_needed: Callable[[], bool]) -> None:
    if not is_needed():
        raise BodyRefused(RequestOutcome.CLIENT_GONE, "nobody waits for the body")


async def _ask(process: Process, body: LargeBody, route: Route) -> tuple[bytes, bytes]:
    """The two parts of the process's answer to a body.

    Raises:
        OSError: the process takes no more.
        IncompleteReadError: it ended within its answer.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    for part in (QUESTION.pack(ROUTES.index(route), len(body)), *body.parts):
        if process.stdin.is_closing():
            # A write would be a RuntimeError in uvloop.
            raise BrokenPipeError
        process.stdin.write(part)
        await process.stdin.drain()
    head_bytes, prompt_bytes = ANSWER.unpack(await process.stdout.readexactly(ANSWER.size))
    return await process.stdout.readexactly(head_bytes), await process.stdout.readexactly(prompt_bytes)


def _unread(body: LargeBody, reason: str) -> BodyRefused:
    log.warning("a large body was not parsed", extra={"reason": reason, "body_bytes": len(body)})
    return BodyRefused(RequestOutcome.BAD_REQUEST, f"the body of {len(body)} bytes was not parsed: {reason}")


def _decode(body: Body, encodings: list[bytes], most_bytes: int, is_needed: Callable[[], bool]) -> Body:
    whole = body.join() if isinstance(body, LargeBody) else body
    return split_body(decode_body(whole, encodings, most_bytes, is_needed))
