"""HTTP clients of the node agent and of the gateway's admin port: routes, time-outs, tokens and errors in one place.

Used by the operator, the command line and the supervisor of one machine. Every call raises a `PeerError` when it has no
usable answer; its text is a phrase that follows the peer's name, such as "cannot be reached".
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import aiohttp

from moe_contract.agent_state import AgentState, read_agent_state
from moe_contract.control_tokens import authorization
from moe_contract.experts_state import ExpertsState, read_experts
from moe_contract.gateway_state import GatewayState, read_gateway_state
from moe_contract.input_errors import read_error_document
from moe_contract.request_record import RequestRecord, read_request_record
from moe_contract.routes import (
    CHANGE_TIMEOUT_S,
    CONFIG,
    CONNECT_TIMEOUT_S,
    DRAIN,
    EXPERTS,
    EXPERTS_TIMEOUT_S,
    METRICS,
    READ_TIMEOUT_S,
    READYZ,
    REQUESTS,
    RESUME,
    STATE,
    UI,
)


class PeerError(Exception):
    """A peer gave no usable answer."""


class Unreachable(PeerError):
    """No connection, a broken one, or no answer in time."""


class Unreadable(PeerError):
    """An answer that this version does not understand."""


class Refused(PeerError):
    """An answer with an error status.

    Attributes:
        status: of the answer.
        reason: the rows of the error document, or the status.
    """

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.reason = status, explain_refusal(status, body)
        super().__init__(f"refused: {self.reason}")


def explain_refusal(status: int, body: bytes) -> str:
    """The errors in an answer's body as one line, or its status where it has none."""
    try:
        return ", ".join(map(str, read_error_document(json.loads(body))))
    except ValueError:
        return f"status {status}"


class _Client:
    """Calls of one peer over a session that the caller owns."""

    def __init__(self, session: aiohttp.ClientSession, url: str, *, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._session, self._url, self._timeout_s = session, url, timeout_s

    async def metrics(self) -> str:
        """The text of the Prometheus metrics."""
        return (await self._call("GET", METRICS)).decode(errors="replace")

    async def is_ready(self) -> bool:
        """Whether `/readyz` answers 200; False without an answer."""
        try:
            await self._call("GET", READYZ)
        except PeerError:
            return False
        return True

    async def put_settings(self, settings: Mapping[str, Any], tokens: Sequence[str]) -> None:
        """Changes the settings in force."""
        await self._control("PUT", CONFIG, settings, tokens, CHANGE_TIMEOUT_S)

    async def _control(
        self, method: str, route: str, body: Mapping[str, Any], tokens: Sequence[str], timeout_s: float
    ) -> bytes:
        """Calls a control route with the first token, and with the next one after a 401.

        While a token is being replaced a peer may know only the old one yet.
        """
        if not tokens:
            raise PeerError("cannot be changed: no control token")
        for token in tokens[:-1]:
            try:
                return await self._call(method, route, body=body, token=token, timeout_s=timeout_s)
            except Refused as error:
                if error.status != HTTPStatus.UNAUTHORIZED:
                    raise
        return await self._call(method, route, body=body, token=tokens[-1], timeout_s=timeout_s)

    async def _call(
        self,
        method: str,
        route: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        token: str | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """The body of a 2xx answer."""
        limit_s = timeout_s or self._timeout_s
        timeout = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_TIMEOUT_S)
        headers = {} if token is None else authorization(token)
        json_body = None if body is None else dict(body)
        try:
            async with self._session.request(
                method,
                self._url + route,
                params=params,
                json=json_body,
                headers=headers,
                timeout=timeout,
                # A stranger at an old address could lead a proof of identity on to the right pod.
                allow_redirects=False,
            ) as answer:
                text = await answer.read()
        except aiohttp.ConnectionTimeoutError:
            raise Unreachable("cannot be reached") from None
        except TimeoutError:
            raise Unreachable(f"gave no answer within {limit_s:g} s") from None
        except (aiohttp.ClientError, OSError):
            raise Unreachable("cannot be reached") from None
        if not 200 <= answer.status < 300:
            raise Refused(answer.status, text)
        return text


class AgentClient(_Client):
    """Calls of a node agent.

    Args:
        session: to send with.
        url: of the agent.
        timeout_s: bound on each reading call.
    """

    async def state(self) -> AgentState:
        """Returns the answer of `GET /v1/state`.

        Raises:
            PeerError: it cannot be reached, refuses, or answers what this version cannot read.
        """
        text = await self._call("GET", STATE)
        try:
            return read_agent_state(text)
        except ValueError:
            raise Unreadable("says of its engine what this version does not understand") from None

    async def experts(self, *, brief: bool = False) -> ExpertsState | None:
        """`GET /v1/experts`; None on an engine without an expert group.

        Args:
            brief: without placements and load of each expert, which are megabytes for a large model.
        """
        return await self._experts({"brief": "1"} if brief else None)

    async def heat(self) -> ExpertsState | None:
        """`GET /v1/experts?heat=1`, the brief form with the load as bytes; of an older agent without."""
        return await self._experts({"brief": "1", "heat": "1"})

    async def _experts(self, params: Mapping[str, str] | None) -> ExpertsState | None:
        try:
            text = await self._call("GET", EXPERTS, params=params)
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        try:
            return read_experts(text)
        except ValueError:
            raise Unreadable("says of its experts what this version does not understand") from None

    async def drain(self, tokens: Sequence[str]) -> None:
        """`POST /v1/drain`: the engine takes nothing new, and ends once its streams are over; the agent stays."""
        await self._control("POST", DRAIN, {}, tokens, CHANGE_TIMEOUT_S)

    async def resume(self, tokens: Sequence[str]) -> None:
        """`POST /v1/resume`: an engine that was drained starts again, once its streams are over."""
        await self._control("POST", RESUME, {}, tokens, CHANGE_TIMEOUT_S)

    async def send_directive(self, directive: Mapping[str, Any], tokens: Sequence[str]) -> int:
        """`POST /v1/experts`; the number of the directive."""
        text = await self._control("POST", EXPERTS, directive, tokens, EXPERTS_TIMEOUT_S)
        try:
            return int(json.loads(text)["version"])
        except (ValueError, KeyError, TypeError):
            raise Unreadable("answered a directive with what this version does not understand") from None


class GatewayClient(_Client):
    """Calls of a gateway's admin port; arguments as `AgentClient`."""

    async def state(self) -> GatewayState:
        """Returns the answer of `GET /v1/state`.

        Raises:
            PeerError: it cannot be reached, refuses, or answers what this version cannot read.
        """
        text = await self._call("GET", STATE)
        try:
            return read_gateway_state(text)
        except ValueError:
            raise Unreadable("says of itself what this version does not understand") from None

    async def live_page(self) -> bytes:
        """The file with which the live page begins; it needs no key.

        Raises:
            PeerError: the gateway cannot be reached, or refuses: it serves no page, or has none built.
        """
        return await self._call("GET", f"{UI}/")

    async def request(self, request_id: str) -> RequestRecord | None:
        """`GET /v1/requests/{id}`; None where the gateway does not know the request.

        Raises:
            PeerError: it cannot be reached, refuses, or answers what this version cannot read.
        """
        try:
            text = await self._call("GET", f"{REQUESTS}/{quote(request_id, safe='')}")
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        try:
            return read_request_record(text)
        except ValueError:
            raise Unreadable("says of a request what this version does not understand") from None
