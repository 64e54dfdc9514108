"""The listening port with TLS: certificates that were replaced are taken up without a restart.

A new certificate makes a new `SSLContext` and a new server on the same listening socket; then the old server closes its
copy of that socket. So no connection is lost, a pair that does not fit changes nothing, and a client authority that was
taken away is trusted no more. Connections that are open stay.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

from moe_contract.access_config import Tls
from moe_contract.input_errors import InputError, InvalidInput

from moe_gateway.access.folders import sign_folders

RELOAD_PERIOD_S = 1.0
# Of a connection that was made just before the gateway began to end, in seconds.
LAST_HANDSHAKE_S = 2.0
CERTIFICATE, KEY, CLIENT_CA = "tls.crt", "tls.key", "ca.crt"

log = logging.getLogger("moeserving.gateway")


def build_context(settings: Tls) -> ssl.SSLContext:
    """The context of the certificates that are there now.

    Raises:
        InvalidInput: a file cannot be read, or certificate and key are none or do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    certificate, key = settings.cert_dir / CERTIFICATE, settings.cert_dir / KEY
    _load("tls.cert_dir", certificate, lambda: context.load_cert_chain(certificate, key, password=_refuse_password))
    if settings.client_ca_dir is not None:
        authorities = settings.client_ca_dir / CLIENT_CA
        _load("tls.client_ca_dir", authorities, lambda: context.load_verify_locations(authorities))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load(field: str, path: Path, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise InvalidInput([InputError(field, f"{path}: not usable: {error.reason or error}")]) from None
    except OSError as error:
        raise InvalidInput([InputError(field, f"cannot read {path} or its key: {error.strerror}")]) from None
    except ValueError as error:
        raise InvalidInput([InputError(field, f"{path}: {error}")]) from None


def _refuse_password() -> str:
    raise ValueError("the key is encrypted; one without a password is needed")


class ServingPort:
    """The server of a port, with TLS or without.

    Args:
        make_protocol: makes the protocol of a connection.
        settings: certificates; None: plain HTTP.
        handshake_timeout_s: time for a TLS handshake.

    Raises:
        InvalidInput: the certificates cannot be used.
    """

    def __init__(
        self, make_protocol: Callable[[], asyncio.BaseProtocol], settings: Tls | None, handshake_timeout_s: float
    ) -> None:
        self._make_protocol = make_protocol
        self._settings = settings
        self._handshake_timeout_s = handshake_timeout_s
        self._context = None if settings is None else build_context(settings)
        self._signature = self._sign()
        self._refused: object = None
        self._looked_s = 0.0
        self._server: asyncio.AbstractServer | None = None
        self._socket: socket.socket | None = None
        self._backlog = 0
        self._is_closed = False

    async def start(self, bound: socket.socket, backlog: int) -> None:
        """Listens on a socket that is bound.

        Raises:
            OSError: the port is taken.
        """
        self._socket, self._backlog = bound, backlog
        self._server = await self._serve(self._context)

    async def _serve(self, context: ssl.SSLContext | None) -> asyncio.AbstractServer:
        assert self._socket is not None
        return await asyncio.get_running_loop().create_server(
            self._make_protocol,
            sock=self._socket.dup(),
            backlog=self._backlog,
            ssl=context,
            ssl_handshake_timeout=None if context is None else self._handshake_timeout_s,
        )

    async def reload(self, now_s: float) -> None:
        """Takes up certificates that were replaced; those in use stay where the new ones cannot be used."""
        if self._settings is None or now_s - self._looked_s < RELOAD_PERIOD_S:
            return
        self._looked_s, signature = now_s, self._sign()
        if signature == self._signature or self._server is None or self._is_closed:
            return
        try:
            context = build_context(self._settings)
            server = await self._serve(context)
        except (InvalidInput, OSError) as error:
            # They are read again, for the cause may be the process: too many open files. It is logged once.
            if self._refused != (refused := (signature, str(error))):
                log.error("certificates were not reloaded, those before stay in use", extra={"reason": str(error)})
            self._refused = refused
            return
        self._signature, self._context = signature, context
        before, self._server = self._server, server
        before.close()
        log.info("certificates were reloaded")
        if self._is_closed:
            self._server.close()

    def _sign(self) -> object:
        settings = self._settings
        if settings is None:
            return None
        folders = (settings.cert_dir, settings.client_ca_dir)
        return sign_folders(folder for folder in folders if folder is not None)

    async def drain(self) -> None:
        """Takes the connections that wait in the kernel, and no more: closing alone would reset them.

        Returns when they are open. A TLS handshake among them has `LAST_HANDSHAKE_S`.
        """
        waiting = self._take_waiting()
        self.close()
        loop = asyncio.get_running_loop()
        timeout_s = None if self._context is None else min(LAST_HANDSHAKE_S, self._handshake_timeout_s)
        opening = (
            loop.connect_accepted_socket(self._make_protocol, taken, ssl=self._context, ssl_handshake_timeout=timeout_s)
            for taken in waiting
        )
        await asyncio.gather(*opening, return_exceptions=True)

    def _take_waiting(self) -> list[socket.socket]:
        """The connections that a client sees as open and the event loop has not taken yet."""
        waiting: list[socket.socket] = []
        if self._socket is None or self._is_closed:
            return waiting
        self._socket.setblocking(False)
        while True:
            try:
                taken, _ = self._socket.accept()
            except ConnectionAbortedError:  # its client has gone; others wait behind it
                continue
            except OSError:
                return waiting
            taken.setblocking(False)
            waiting.append(taken)

    def close(self) -> None:
        """Takes no more connections; those that are open stay."""
        self._is_closed = True
        if self._server is not None:
            self._server.close()
        if self._socket is not None:
            self._socket.close()
