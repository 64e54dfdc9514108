"""`moeserving explain`: the gateway's record of a request, on one machine and in a cluster."""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.engine_process import ADMIN_PORT
from moe_contract.request_record import AttemptRecord, RequestRecord, TargetTerms, write_request_record
from moe_operator.cli import gateways as gateways_module
from moe_operator.cli.command import app
from moe_operator.cli.explanation import REASONS, find_cause, render_record
from moe_scheduling.engine.choice import SendReason
from rich.console import Console
from typer.testing import CliRunner

TERMS = (
    TargetTerms(name="a-1", requests=1, uncached_tokens=40, fresh=True, predicted_s=0.02),
    TargetTerms(name="a-0", rank=1, requests=7, ahead_tokens=900, uncached_tokens=8, wait_s=1.5, predicted_s=1.5),
)
ATTEMPT = AttemptRecord(name="a-1", reason="least_predicted", after_s=0.001, predicted_s=0.02, targets=TERMS)
RECORD = RequestRecord(
    request_id="r-1", route="chat", model="tiny", prompt_tokens=40, attempts=(ATTEMPT,), status=200, duration_s=0.5
)


class Gateway(ThreadingHTTPServer):
    """The admin port of a gateway that remembers these requests."""

    def __init__(self, *records: RequestRecord) -> None:
        self.records = {record.request_id: record for record in records}
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def do_GET(self) -> None:
        record = self.server.records.get(self.path.removeprefix("/v1/requests/"))
        body = b"{}" if record is None else write_request_record(record)
        self.send_response(404 if record is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def gateways() -> Iterator[list[Gateway]]:
    """Two gateways, of which the second remembers the request."""
    running = [Gateway(), Gateway(RECORD)]
    for server in running:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield running
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def kubectl(gateways: list[Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kubectl on the PATH that knows the gateways as running pods, beside one that is not."""
    ports = {f"gateway-{number}": server.server_port for number, server in enumerate(gateways)}
    pods = [{"metadata": {"name": name}, "status": {"phase": "Running"}} for name in ports]
    pods.append({"metadata": {"name": "gone"}, "status": {"phase": "Failed"}})
    script = tmp_path / "kubectl"
    script.write_text(
        f"""#!{sys.executable}
import json, sys, time
if "get" in sys.argv:
    wanted = "app.kubernetes.io/instance=a,app.kubernetes.io/component=gateway" in sys.argv
    print(json.dumps({{"items": {pods} if wanted else []}}))
else:
    name, port = sys.argv[-2].removeprefix("pod/"), sys.argv[-1]
    assert port == ":{ADMIN_PORT}", port
    print("Forwarding from 127.0.0.1:" + str({ports}[name]) + " -> {ADMIN_PORT}", flush=True)
    time.sleep(600)
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["explain", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_in_a_cluster_the_gateway_that_knows_the_request_is_found(kubectl: None) -> None:
    assert json.loads(run("r-1", "a", "-n", "models", "--json")) == json.loads(write_request_record(RECORD))
    assert "no gateway knows it" in run("r-2", "a", "-n", "models", code=1)
    assert "no gateway runs there" in run("r-1", "b", "-n", "models", code=1)
    assert run("r-1", "-n", "models", code=2).startswith("NAME: name the deployment")


def test_on_one_machine_its_gateway_is_asked(gateways: list[Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{gateways[1].server_port}"
    monkeypatch.setattr(gateways_module, "find_folder", lambda name, state_dir, in_cluster: SimpleNamespace(name=name))
    monkeypatch.setattr(
        gateways_module, "require_running", lambda _folder: SimpleNamespace(gateway=SimpleNamespace(url=url))
    )
    assert "> a-1" in run("r-1")
    assert "wait for KV" in run("r-1", "-o", "wide")
    assert (
        yaml.safe_load(run("r-1", "-o", "yaml"))
        == json.loads(run("r-1", "-o", "json"))
        == json.loads(run("r-1", "--json"))
    )
    gateways[1].shutdown()
    gateways[1].server_close()
    assert run("r-1", code=1) == f"the gateway at {url} cannot be reached\n"


def text_of(record: RequestRecord) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(render_record(record))
    return capture.get()


def test_the_chosen_engine_stands_first_with_its_terms() -> None:
    first, second, _, chosen, other, last = text_of(RECORD).splitlines()
    assert first == "r-1  chat, model tiny, about 40 prompt tokens"
    assert second.startswith("1. after 1.0 ms to a-1, since it had the least predicted time to first token; ")
    assert chosen.split() == [
        ">",
        "a-1",
        "1",
        "0",
        "tokens",
        "40",
        "tokens",
        "fresh",
        "0.0",
        "ms",
        "0.0",
        "ms",
        "20.0",
        "ms",
    ]
    assert other.split() == [
        "a-0",
        "rank",
        "1",
        "7",
        "900",
        "tokens",
        "8",
        "tokens",
        "stale",
        "0.0",
        "ms",
        "1.50",
        "s",
        "1.50",
        "s",
    ]
    assert last == "ended after 500.0 ms with status 200, in one piece, so when its first token was there is not known"


def test_in_80_columns_no_row_of_an_engine_is_cut_or_wrapped() -> None:
    name = "olmoe-engine-7d9f8b6c5d-x2x4z"
    row = TargetTerms(name=name, rank=1, requests=128, ahead_tokens=190000, uncached_tokens=32768, wait_s=1.5)
    console = Console(width=80)
    with console.capture() as capture:
        attempts = (replace(ATTEMPT, targets=(row,)),)
        console.print(render_record(RequestRecord(request_id="r", route="chat", attempts=attempts), wide=False))
    (line,) = [line for line in capture.get().splitlines() if "190000" in line]
    assert line.split() == [
        "olmoe-en…5d-x2x4z",
        "rank",
        "1",
        "128",
        "190000",
        "32768",
        "stale",
        "1.50",
        "s",
        "0.0",
        "ms",
    ]


def test_a_request_that_was_never_sent_says_how_it_ended() -> None:
    record = RequestRecord(request_id="r", route="chat", status=429, problem="the hold queue is full", duration_s=0.0)
    assert text_of(record).splitlines()[1:] == [
        "it was sent to no engine",
        "ended after 0.0 ms with status 429: the hold queue is full",
    ]


def test_a_stream_that_went_on_at_another_engine_says_how() -> None:
    again = AttemptRecord(name="a-0", reason="least_predicted", after_s=2.0, continued="prefix")
    record = RequestRecord(request_id="r", route="chat", attempts=(ATTEMPT, again), status=200, duration_s=3.0)
    text = " ".join(text_of(record).split())
    assert "2. after 2.00 s to a-0, where the stream went on after the tokens that the client had, since it" in text


WAITED = replace(TERMS[1], name="a-1", rank=0, predicted_s=1.6)


def waited(ttft_s: float = 2.0, **changes: object) -> RequestRecord:
    """A request that waits behind others at `a-1` for most of its predicted 1.6 s."""
    attempt = replace(ATTEMPT, after_s=0.1, predicted_s=1.6, targets=(WAITED, TERMS[0]))
    return replace(RECORD, attempts=(attempt,), ttft_s=ttft_s, duration_s=9.0, **changes)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (waited(),
         "the longest part, 1.50 s (75 %): it waited behind 900 prompt tokens of other requests, as predicted"),
        (waited(ttft_s=9.0), "the longest part, 7.30 s (81 %): longer than its engine's step times predict"),
        (replace(waited(), attempts=(replace(waited().attempts[0], targets=()),)),
         "the longest part, 1.60 s (80 %): as predicted, the prompts before it and its own"),
        (replace(waited(), attempts=(replace(waited().attempts[0], targets=(replace(WAITED, kv_s=1.4),)),)),
         "the longest part, 1.50 s (75 %): it waited for KV blocks, as predicted"),
        (replace(waited(), attempts=(replace(waited().attempts[0], targets=(replace(WAITED, wait_s=0.0),)),)),
         "the longest part, 1.60 s (80 %): its own prompt was computed, 8 tokens that no cache had"),
        (replace(waited(), attempts=(replace(waited().attempts[0], after_s=1.9),)),
         "the longest part, 1.90 s (95 %): it was held in the gateway until an engine could take it"),
        (replace(waited(), attempts=(ATTEMPT, replace(waited().attempts[0], after_s=1.9))),
         "the longest part, 1.90 s (95 %): it was at engines that failed it, or waited for another"),
    ],
    ids=["queue", "not predicted", "no terms", "KV blocks", "own prompt", "held", "failed"],
)  # fmt: skip
def test_it_says_on_what_most_of_the_wait_was_spent(record: RequestRecord, words: str) -> None:
    assert f"first token after {record.ttft_s:.2f} s; {words}" in " ".join(text_of(record).split())


PREFILL = AttemptRecord(name="p", reason="prefill", after_s=0.1, predicted_s=0.8)
DECODE = AttemptRecord(name="d", reason="decode", after_s=1.1, predicted_s=0.2)


def test_an_engine_that_computed_the_prompt_for_another_has_failed_nothing() -> None:
    text = " ".join(text_of(replace(waited(), attempts=(PREFILL, DECODE))).split())
    assert "1. after 100.0 ms to p, since it computes prompts for others; prompt predicted 800.0 ms later" in text
    assert "2. after 1.10 s to d, since it goes on from a prompt that was computed elsewhere; first token" in text
    assert "the longest part, 1.00 s (50 %): its prompt was computed at p" in text
    assert "failed" not in text


def test_an_engine_where_a_stream_went_on_has_no_part_in_the_wait() -> None:
    later = AttemptRecord(name="a-0", reason="least_predicted", after_s=3.0, predicted_s=0.1, continued="prefix")
    before = waited()
    text = " ".join(text_of(replace(before, attempts=(*before.attempts, later))).split())
    assert "the longest part, 1.50 s (75 %): it waited behind 900 prompt tokens" in text


def test_a_request_without_a_first_token_blames_nothing() -> None:
    assert "the longest part" not in text_of(replace(RECORD, duration_s=None, status=None))
    assert "the longest part" not in text_of(RECORD)


@given(st.lists(st.floats(0.0, 1e3), min_size=6, max_size=6), st.booleans(), st.booleans())
def test_the_part_that_is_named_is_never_longer_than_the_wait(
    times: list[float], has_terms: bool, is_split: bool
) -> None:
    ttft_s, after_s, predicted_s, wait_s, kv_s, later_s = times
    terms = (TargetTerms(name="a-1", wait_s=wait_s, kv_s=kv_s, predicted_s=predicted_s),) if has_terms else ()
    last = AttemptRecord(name="a-1", reason="turn", after_s=after_s, predicted_s=predicted_s, targets=terms)
    attempts = (PREFILL, replace(last, reason="decode", after_s=after_s + later_s)) if is_split else (last,)
    cause = find_cause(replace(RECORD, attempts=attempts, ttft_s=ttft_s))
    assert cause is None or 0.0 < cause.seconds <= ttft_s + 1e-9


def test_each_reason_of_a_choice_has_words_here_and_on_the_live_page() -> None:
    """Of the reasons that the gateway records for an attempt."""
    page = (Path(__file__).parents[2] / "gateway/ui/src/words.ts").read_text()
    table = page[page.index("const REASONS") : page.index("};", page.index("const REASONS"))]
    assert (
        {reason.value for reason in SendReason} == set(REASONS) == set(re.findall(r"^  (\w+): \"", table, re.MULTILINE))
    )
