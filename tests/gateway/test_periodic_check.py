"""The gateway's periodic check: what goes wrong with one part of it delays no other part."""

import logging
from types import SimpleNamespace

import pytest
from moe_gateway.endpoint_picker.server import EndpointPicker

from tests.gateway.messages import OK, post, prompt
from tests.gateway.peers import never
from tests.gateway.picker_messages import make_parts
from tests.gateway.waiting import until


def fail(*_arguments):
    raise KeyError("one that nobody expects")


@pytest.mark.parametrize("part", ["dispatcher.tick", "_reload_access", "_check_picker"])
async def test_a_check_that_fails_delays_no_other(make_engine, serve, monkeypatch, caplog, part):
    served = await serve(await make_engine(never))
    owner, _, name = f"gateway.{part}".rpartition(".")
    monkeypatch.setattr(served.gateway.dispatcher if "dispatcher" in owner else served.gateway, name, fail)
    with caplog.at_level(logging.ERROR, "moeserving.gateway"):
        answer = await served.ask(post(prompt(), extra=b"X-Request-Timeout: 0.2\r\n"))
    assert (answer.status, answer.json["error"]["code"]) == (504, "deadline_exceeded")
    assert "a periodic check failed" in caplog.text
    await until(lambda: served.in_flight == 0)


async def test_a_proxys_request_whose_check_fails_ends_alone(caplog):
    parts, seen = make_parts(), []
    broken = SimpleNamespace(check=fail, abort=lambda: seen.append("aborted"))
    other = SimpleNamespace(check=lambda now_s: seen.append("checked"), abort=fail)
    parts.open = [broken, other]
    with caplog.at_level(logging.ERROR, "moeserving.gateway"):
        EndpointPicker(parts, lambda: True).check(0.0)
    assert sorted(seen) == ["aborted", "checked"]
    assert "the check of a proxy's request failed" in caplog.text


async def test_an_ordinary_check_says_nothing(make_engine, serve, caplog):
    served = await serve(await make_engine())
    with caplog.at_level(logging.ERROR, "moeserving.gateway"):
        served.gateway._check_once(served.gateway.clock())
        assert (await served.ask(post(prompt()))).json == OK
    assert caplog.text == ""
