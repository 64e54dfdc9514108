"""TLS on the port for clients: real clients, certificates of clients, and certificates that are replaced."""

import asyncio
import logging
import socket
import ssl
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
from cluster_certificates import pem_of
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from moe_contract.access_config import Tls
from moe_contract.input_errors import InputError, InvalidInput
from moe_gateway.access import tls as tls_module
from moe_gateway.access.tls import build_context

from tests.gateway.certificates import make_authority, private_pem
from tests.gateway.clients import get
from tests.gateway.messages import SSE_END, SSE_HEAD, event, post, prompt
from tests.gateway.waiting import until

AUTHORITY, OTHERS = make_authority(), make_authority("others")


@pytest.fixture
def secure(make_engine, serve, tmp_path):
    """Starts a gateway with TLS; with `client_ca` clients need certificates of that authority."""

    async def start(script=None, *, client_ca=None, **sections):
        tls = {"cert_dir": str(AUTHORITY.issue(tmp_path / "cert"))}
        if client_ca is not None:
            (tmp_path / "clients").mkdir()
            (tmp_path / "clients" / "ca.crt").write_bytes(client_ca.pem)
            tls["client_ca_dir"] = str(tmp_path / "clients")
        engine = await (make_engine() if script is None else make_engine(script))
        return engine, await serve(engine, tls=tls, **sections)

    return start


def client_context(folder: Path | None = None) -> ssl.SSLContext:
    """A client's context, with the certificate of this folder."""
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    if folder is not None:
        context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return context


def url_of(served) -> str:
    return served.url.replace("http:", "https:")


async def serial_of(served) -> int:
    """The serial number of the certificate that a new connection gets."""
    client = await served.connect(ssl=client_context(), server_hostname="localhost")
    data = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    client.writer.close()
    return x509.load_der_x509_certificate(data).serial_number


def serial_in(folder: Path) -> int:
    return x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes()).serial_number


async def test_openais_client_and_httpx_are_served(secure):
    engine, served = await secure()
    async with httpx.AsyncClient(verify=client_context(), base_url=url_of(served)) as client:
        answers = [await client.post("/v1/completions", json=prompt()) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200] * 3
        async with openai.AsyncOpenAI(api_key="x", base_url=url_of(served) + "/v1", http_client=client) as official:
            await official.completions.create(model="tiny", prompt="hello")
    assert len(engine.requests) == 4


async def test_curl_streams_and_its_offer_of_http2_is_declined(secure, tmp_path):
    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a") + event("b") + SSE_END)

    _, served = await secure(stream)
    address = url_of(served) + "/v1/completions"
    command = [
        "curl",
        "-sSN",
        "--http2",
        "--cacert",
        str(tmp_path / "cert" / "ca.crt"),
        "-d",
        '{"stream": true}',
        address,
    ]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, check=True)
    assert done.stdout.endswith(b"data: [DONE]\n\n")


async def test_the_admin_port_stays_plain_for_probes_and_scrapers(secure):
    _, served = await secure()
    assert (await get(served, "/readyz"))[0] == 200
    assert (await get(served, "/metrics"))[0] == 200


async def test_large_bodies_pass_both_ways(secure):
    async def echo(request, writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(request.body), request.body))

    _, served = await secure(echo)
    text = "x" * 3_000_000
    async with httpx.AsyncClient(verify=client_context()) as client:
        answer = await client.post(url_of(served) + "/v1/completions", json=prompt(text))
    assert answer.json() == prompt(text)


async def test_a_client_without_a_certificate_is_refused_where_one_is_needed(secure, tmp_path):
    engine, served = await secure(client_ca=OTHERS)
    mine, wrong = OTHERS.issue(tmp_path / "mine"), AUTHORITY.issue(tmp_path / "wrong")
    for context in (client_context(), client_context(wrong)):
        async with httpx.AsyncClient(verify=context) as client:
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.WriteError, httpx.RemoteProtocolError)):
                await client.post(url_of(served) + "/v1/completions", json=prompt())
    async with httpx.AsyncClient(verify=client_context(mine)) as client:
        assert (await client.post(url_of(served) + "/v1/completions", json=prompt())).status_code == 200
    assert len(engine.requests) == 1


async def test_a_client_authority_that_was_replaced_is_trusted_no_more(secure, tmp_path):
    _, served = await secure(client_ca=OTHERS)
    mine = OTHERS.issue(tmp_path / "mine")
    context = client_context(mine)
    async with httpx.AsyncClient(verify=context) as client:
        assert (await client.get(url_of(served) + "/health")).status_code == 200
    before = served.gateway._listener._server
    (tmp_path / "clients" / "ca.crt").write_bytes(AUTHORITY.pem)
    await until(lambda: served.gateway._listener._server is not before, "the reload")
    async with httpx.AsyncClient(verify=context) as client:
        with pytest.raises(httpx.TransportError):
            await client.get(url_of(served) + "/health")


async def test_new_connections_get_a_replaced_certificate_and_open_ones_go_on(secure, tmp_path):
    ends = asyncio.Event()

    async def stream(_request, writer):
        writer.write(SSE_HEAD + event("a"))
        await ends.wait()
        writer.write(event("b") + SSE_END)

    engine, served = await secure(stream)
    assert await serial_of(served) == serial_in(tmp_path / "cert")
    client = await served.connect(ssl=client_context(), server_hostname="localhost")
    client.send(post(prompt(stream=True)))
    await until(lambda: engine.requests)
    before = served.gateway._listener._server
    AUTHORITY.issue(tmp_path / "cert")
    await until(lambda: served.gateway._listener._server is not before, "the reload")
    assert await serial_of(served) == serial_in(tmp_path / "cert")
    ends.set()
    assert b'"b"' in (await client.answer()).body
    client.send(post(prompt(stream=True)))
    assert (await client.answer()).status == 200


async def test_no_connection_is_lost_while_certificates_are_replaced(secure, tmp_path):
    _, served = await secure()
    listener, done = served.gateway._listener, asyncio.Event()

    async def replace() -> None:
        for number in range(10):
            AUTHORITY.issue(tmp_path / "cert")
            await listener.reload(served.gateway.clock() + 100.0 * number)
            await asyncio.sleep(0)
        done.set()

    async def ask() -> int:
        count = 0
        async with httpx.AsyncClient(
            verify=client_context(), limits=httpx.Limits(max_keepalive_connections=0)
        ) as client:
            while not done.is_set() or not count:
                assert (await client.get(url_of(served) + "/health")).status_code == 200
                count += 1
        return count

    *counts, _ = await asyncio.gather(ask(), ask(), ask(), replace())
    assert min(counts) > 0


async def test_files_that_do_not_fit_change_nothing(secure, tmp_path, caplog):
    _, served = await secure()
    serial = await serial_of(served)
    (tmp_path / "cert" / "tls.key").write_bytes(pem_of(ec.generate_private_key(ec.SECP256R1())))
    with caplog.at_level(logging.ERROR):
        await until(lambda: "those before stay in use" in caplog.text, "an error in the log")
    assert "KEY_VALUES_MISMATCH" in caplog.records[-1].reason
    assert await serial_of(served) == serial


async def test_what_is_no_tls_ends_and_is_not_counted_as_a_connection(secure):
    _, served = await secure()
    client = await served.connect()
    client.send(post(prompt()))
    # An alert of TLS, and nothing of HTTP.
    assert b"HTTP" not in await client.rest()
    silent = await served.connect()
    assert served.gateway._connections == set()
    draining = asyncio.ensure_future(served.gateway.drain())
    await asyncio.wait_for(draining, 5.0)
    silent.reset()


async def test_a_handshake_that_does_not_end_is_ended(secure):
    _, served = await secure(limits={"header_timeout_s": 0.2})
    client = await served.connect()
    assert await client.ended()


def settings(folder: Path, **changes) -> Tls:
    return Tls(cert_dir=folder, **changes)


def test_files_that_cannot_be_used_are_named(tmp_path):
    folder = AUTHORITY.issue(tmp_path / "cert")
    build_context(settings(folder))
    with pytest.raises(InvalidInput, match=r"tls.client_ca_dir: cannot read .*ca.crt"):
        build_context(settings(folder, client_ca_dir=tmp_path))
    with pytest.raises(InvalidInput, match=r"tls.cert_dir: cannot read .*tls.crt or its key: No such file"):
        build_context(settings(tmp_path / "nowhere"))
    (folder / "tls.key").write_bytes(private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"))
    with pytest.raises(InvalidInput, match=r"tls.cert_dir: .*the key is encrypted"):
        build_context(settings(folder))
    (folder / "tls.key").write_bytes(b"nothing")
    with pytest.raises(InvalidInput, match=r"tls.cert_dir: .*tls.crt: not usable: "):
        build_context(settings(folder))
    (folder / "ca.crt").write_bytes(b"nothing")
    AUTHORITY.issue(tmp_path / "other")
    with pytest.raises(InvalidInput, match=r"tls.client_ca_dir: .*ca.crt: not usable: "):
        build_context(settings(tmp_path / "other", client_ca_dir=folder))


@pytest.mark.parametrize("place", ["listen", "read"])
async def test_a_reload_that_failed_once_is_tried_again(secure, tmp_path, monkeypatch, caplog, place):
    _, served = await secure()
    listener, failures = served.gateway._listener, [None] * 3
    listener._settings, settings = None, listener._settings
    fails = OSError(24, "Too many open files")
    if place == "read":
        fails = InvalidInput([InputError("tls.cert_dir", "cannot read: Too many open files")])

    def once(real):
        def do(*arguments):
            if failures:
                failures.pop()
                raise fails
            return real(*arguments)

        return do

    if place == "listen":
        monkeypatch.setattr(listener, "_serve", once(listener._serve))
    else:
        monkeypatch.setattr(tls_module, "build_context", once(tls_module.build_context))
    before = listener._server
    AUTHORITY.issue(tmp_path / "cert")
    listener._settings = settings
    for number in range(1, 4):
        await listener.reload(served.gateway.clock() + 1000.0 * number)
        assert listener._server is before
    assert caplog.text.count("were not reloaded") == 1
    await listener.reload(served.gateway.clock() + 4000.0)
    assert await serial_of(served) == serial_in(tmp_path / "cert")


async def test_a_silent_client_that_the_loop_has_not_taken_keeps_no_other_from_its_end(secure, monkeypatch):
    monkeypatch.setattr(tls_module, "LAST_HANDSHAKE_S", 3600.0)
    _, served = await secure(limits={"header_timeout_s": 3600})
    idle = await served.connect(ssl=client_context(), server_hostname="localhost")
    idle.send(post(prompt()))
    await idle.answer()
    with socket.create_connection(("127.0.0.1", served.config.listen.port)):
        draining = asyncio.ensure_future(served.gateway.drain())
        assert await idle.ended()
        assert not draining.done()
    await asyncio.wait_for(draining, 60)
