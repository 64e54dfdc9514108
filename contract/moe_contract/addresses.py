"""Addresses to listen on and to call, of both address families: the one place that names an address by hand.

Every process that listens does so by `bind_socket`, so that one host, `::`, means all addresses of both families, and
of IPv4 alone on a machine without IPv6.
"""

import socket
from ipaddress import ip_address

# All addresses of this machine, of both families; and those of IPv4 alone.
ANY, ANY_IPV4 = "::", "0.0.0.0"
LOOPBACK, LOOPBACK_IPV6 = "127.0.0.1", "::1"


def is_address(text: str) -> bool:
    """Whether `text` is an IP address rather than a host name."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def authority(host: str, port: int) -> str:
    """`HOST:PORT` as URLs have it, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def http_url(host: str, port: int) -> str:
    """`http://HOST:PORT`, an IPv6 address in brackets."""
    return f"http://{authority(host, port)}"


def present_host(host: str) -> str:
    """The host to listen on here: `::` becomes IPv4's `0.0.0.0` on a machine whose sockets cannot serve both."""
    return ANY_IPV4 if host == ANY and not socket.has_dualstack_ipv6() else host


def local_host(host: str) -> str:
    """The address by which a process of this machine reaches a server that listens on `host`."""
    if host not in (ANY, ANY_IPV4):
        return host
    return LOOPBACK if host == ANY_IPV4 or is_bindable(LOOPBACK) else LOOPBACK_IPV6


def loopback() -> str:
    """The loopback address of this machine: IPv4's where there is one, else IPv6's."""
    return LOOPBACK if is_bindable(LOOPBACK) else LOOPBACK_IPV6


def is_bindable(host: str, port: int = 0) -> bool:
    """Whether a server could listen there now."""
    try:
        bind_socket(host, port).close()
    except (OSError, OverflowError):
        return False
    return True


def bind_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that is bound and does not listen yet; `::` takes connections of both families.

    Raises:
        OSError: the address is taken, not this machine's, or not allowed.
    """
    host = present_host(host)
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = rows[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != ANY)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound
