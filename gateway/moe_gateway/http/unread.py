"""Bytes that a client has sent and the event loop has not read yet."""

import array
import asyncio
import fcntl
import termios


def has_unread(transport: asyncio.BaseTransport) -> bool:
    """Whether the kernel holds bytes of this connection: closing it now would reset it, and lose a request.

    A busy loop reads late, so that an idle connection may have a request without the loop's knowledge.
    """
    socket = transport.get_extra_info("socket")
    if socket is None or socket.fileno() < 0:
        return False
    count = array.array("i", [0])
    try:
        fcntl.ioctl(socket.fileno(), termios.FIONREAD, count)
    except OSError:
        return False
    return count[0] > 0
