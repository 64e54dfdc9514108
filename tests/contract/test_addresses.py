"""Addresses of both families: real sockets on loopback, and machines that lack one family."""

import socket
from collections.abc import Callable

import pytest
from moe_contract import addresses
from moe_contract.addresses import (
    ANY,
    LOOPBACK,
    LOOPBACK_IPV6,
    authority,
    bind_socket,
    http_url,
    is_address,
    is_bindable,
    local_host,
    loopback,
    present_host,
)

HAS_IPV6 = socket.has_dualstack_ipv6() and is_bindable(LOOPBACK_IPV6)
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6 on loopback")


def connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5.0).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        pytest.param(ANY, {LOOPBACK, LOOPBACK_IPV6}, marks=needs_ipv6),
        pytest.param(LOOPBACK_IPV6, {LOOPBACK_IPV6}, marks=needs_ipv6),
        ("0.0.0.0", {LOOPBACK}),
        (LOOPBACK, {LOOPBACK}),
    ],
)
def test_a_server_is_reached_in_the_families_of_its_host(host: str, reached: set[str]) -> None:
    with bind_socket(host, 0) as server:
        server.listen()
        port = server.getsockname()[1]
        assert {known for known in (LOOPBACK, LOOPBACK_IPV6) if connects(known, port)} == reached
        assert connects(local_host(host), port), "a process of this machine reaches it"


@pytest.mark.parametrize("first", [LOOPBACK, pytest.param(LOOPBACK_IPV6, marks=needs_ipv6)])
def test_a_port_that_is_taken_in_one_family_is_taken(first: str) -> None:
    with bind_socket(first, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_bindable(ANY, port)
        with pytest.raises(OSError, match="in use"):
            bind_socket(ANY, port)
    assert is_bindable(ANY, port)


def test_a_machine_without_ipv6_listens_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind_socket(ANY, 0) as server:
        server.listen()
        assert server.family is socket.AF_INET
        assert connects(LOOPBACK, server.getsockname()[1])
    assert present_host(ANY) == "0.0.0.0"
    assert local_host(present_host(ANY)) == LOOPBACK
    assert present_host("::1") == "::1", "an address that somebody wrote stays"


def test_a_machine_without_ipv4_uses_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "is_bindable", lambda host, port=0: host != LOOPBACK)
    assert (loopback(), local_host(ANY)) == (LOOPBACK_IPV6, LOOPBACK_IPV6)


@pytest.mark.parametrize(
    ("host", "text"), [("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80"), ("a.test", "a.test:80")]
)
def test_urls_have_brackets_around_ipv6(host: str, text: str) -> None:
    assert (authority(host, 80), http_url(host, 80)) == (text, f"http://{text}")


@pytest.mark.parametrize(("text", "wanted"), [("::", True), ("10.0.0.1", True), ("localhost", False), ("", False)])
def test_an_address_is_no_name(text: str, wanted: bool) -> None:
    assert is_address(text) is wanted


@pytest.mark.parametrize("bind", [lambda: bind_socket("192.0.2.1", 0), lambda: bind_socket("no.such.name.invalid", 0)])
def test_an_address_that_this_machine_does_not_have_is_an_error(bind: Callable[[], socket.socket]) -> None:
    with pytest.raises(OSError, match=r"\S"):
        bind()
