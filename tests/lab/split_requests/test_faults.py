"""The faults of a run with roles, and the way to an engine that can spoil its answers."""

import asyncio
import contextlib
import json
from collections import Counter

import pytest
from moe_lab.soak.processes import free_ports
from moe_lab.split_requests.engine_figures import read_samples
from moe_lab.split_requests.faults import SplitFault, name_idle_faults, plan_faults
from moe_lab.split_requests.interceptor import Interceptor
from typer.testing import CliRunner

ANSWER = b'{"kv_transfer_params":{"remote_engine_id":"0a-b","remote_port":1}}'


def test_each_kind_comes_equally_often_and_in_the_order_of_the_requests():
    faults = plan_faults(1, 1000, 2, 2)
    kinds = [fault.kind for fault in faults]
    assert {kind: kinds.count(kind) for kind in SplitFault} == dict.fromkeys(SplitFault, 2)
    due = [fault.after for fault in faults]
    assert due == sorted(due)
    assert 0 < due[0] < due[-1] < 1000
    assert faults == plan_faults(1, 1000, 2, 2) != plan_faults(2, 1000, 2, 2)
    assert {fault.victim for fault in faults} <= {0, 1}


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def talk(port: int, question: bytes = b"ask") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(question)
        return await reader.read(1000)
    except ConnectionResetError:
        return b""
    finally:
        await end(writer)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    question = await reader.read(100)
    writer.write(ANSWER if question == b"ask" else b"nothing of blocks")
    await end(writer)


async def test_answers_pass_are_spoilt_or_come_late():
    port, engine = free_ports(2)
    way = Interceptor(engine)
    server = await asyncio.start_server(answer, "127.0.0.1", engine)
    async with server, way.serving(port):
        assert await talk(port) == ANSWER
        way.spoils = True
        spoilt = json.loads(await talk(port))["kv_transfer_params"]
        assert (spoilt["remote_engine_id"], spoilt["remote_port"], way.spoilt) == ("1a-b", 1, 1)
        way.spoils = False
        way.hold(1)
        # Such as a list of models, for which gateways ask engines all the time.
        assert (await talk(port, b"poll"), way.held) == (b"nothing of blocks", 0)
        late = asyncio.create_task(talk(port))
        while not way.held:
            await asyncio.sleep(0.01)
        assert await talk(port) == ANSWER
        assert not late.done()
        way.let_go()
        assert await late == ANSWER


@pytest.mark.parametrize(
    ("kinds", "spoilt", "held", "named"),
    [
        ([], 0, 0, []),
        (list(SplitFault), 1, 2, []),
        (list(SplitFault), 0, 2, [SplitFault.TRANSFERS_FAIL]),
        ([SplitFault.LEASES_END], 0, 0, [SplitFault.LEASES_END]),
        ([SplitFault.TRANSFERS_FAIL, SplitFault.LEASES_END], 0, 0, [SplitFault.TRANSFERS_FAIL, SplitFault.LEASES_END]),
    ],
)
def test_a_fault_that_no_answer_met_is_named(kinds, spoilt, held, named):
    said = name_idle_faults(Counter(kinds), spoilt=spoilt, held=held)
    assert said == [f"no answer met the fault {kind.value!r}" for kind in named]


async def test_an_engine_that_does_not_listen_closes_at_once():
    port, engine = free_ports(2)
    async with Interceptor(engine).serving(port):
        assert await talk(port) == b""


def test_samples_are_summed_over_their_labels():
    text = '# HELP a b\na{x="1"} 2.0\na{x="2"} 3\nb 1e-3\n'
    assert read_samples(text) == {"a": 5.0, "b": 0.001}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--roles", "--pairs", "3"], "--pairs: does not go with --roles"),
        (["--transfers", "30"], "--transfers: goes with --roles alone"),
    ],
)
def test_options_of_the_other_run_are_refused(arguments, said):
    from moe_lab.serving.__main__ import app

    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 2
    assert said in answer.output
