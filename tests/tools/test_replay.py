"""The replay against a real server on a real socket."""

import asyncio
import dataclasses
import json
from itertools import pairwise

import pytest
from aiohttp import web
from moe_contract.input_errors import InvalidInput
from moe_tools.prompts import PromptMaker
from moe_tools.replay import AnsweredRequest, FailedRequest, Load, replay, replay_closed
from moe_tools.report import build_document, render_caption, render_summary, summarise
from moe_tools.server import discover_model, fetch_token_pool
from moe_tools.streaming import ServerAddress
from moe_tools.traces import TraceRequest


def requests_at(*arrivals: float, prompt: int = 20, output: int = 5) -> list[TraceRequest]:
    return [TraceRequest(arrival_s=arrival, prompt_tokens=prompt, output_tokens=output) for arrival in arrivals]


def load_on(server, timeout_s: float = 20.0) -> Load:
    pool = tuple(range(1000))
    return Load(
        endpoint=ServerAddress.parse(server.url), model="mock", prompts=PromptMaker(pool, 1), timeout_s=timeout_s
    )


async def test_every_request_is_sent_once_with_exactly_its_lengths(server):
    wanted = [(7, 1), (400, 3), (16, 9), (17, 2)]
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=prompt, output_tokens=output) for prompt, output in wanted]
    run = await replay(trace, load_on(server))
    asked = sorted((len(body["prompt"]), body["max_tokens"]) for body in server.asked)
    assert asked == sorted(wanted)
    assert [(row.prompt_tokens, row.output_tokens) for row in run.answered] == wanted
    assert all(body["ignore_eos"] and body["stream"] and body["model"] == "mock" for body in server.asked)


async def test_arrivals_do_not_wait_for_answers(server):
    server.first_token_s = 0.6
    run = await replay(requests_at(0.0, 0.01, 0.02, 0.03, 0.04), load_on(server))
    assert server.most_in_flight == 5
    assert not run.failed


async def test_requests_are_sent_in_the_order_of_the_trace(server):
    await replay(
        [TraceRequest(arrival_s=0.05 * n, prompt_tokens=10 + n, output_tokens=1) for n in range(5)], load_on(server)
    )
    assert [len(body["prompt"]) for body in server.asked] == [10, 11, 12, 13, 14]


async def test_time_per_output_token_counts_tokens_not_events(server):
    server.token_gap_s, server.tokens_per_event = 0.05, 2
    (row,) = (await replay(requests_at(0.0, output=6), load_on(server))).answered
    # Three events, two gaps of 50 ms at the least, five tokens after the first.
    assert row.tpot_s == pytest.approx((row.last_token_s - row.ttft_s) / 5)
    assert row.last_token_s - row.ttft_s >= 0.09
    assert row.ttft_s <= row.last_token_s <= row.end_s


async def test_an_answer_of_one_token_has_no_time_per_output_token(server):
    (row,) = (await replay(requests_at(0.0, output=1), load_on(server))).answered
    assert row.tpot_s is None
    assert "TPOT" not in summarise(await replay(requests_at(0.0, output=1), load_on(server))).metrics


async def test_times_count_from_the_moment_a_request_was_due(server):
    server.first_token_s = 0.1
    run = await replay(requests_at(0.0, 0.2), load_on(server))
    assert all(row.ttft_s >= max(0.1, row.lateness_s) for row in run.answered)
    assert run.wall_s >= 0.3


async def test_errors_are_counted_by_kind(server):
    async def misbehave(request: web.Request, body: dict) -> web.StreamResponse | None:
        match len(body["prompt"]):
            case 1:
                return web.json_response({"error": {"message": "busy"}}, status=429)
            case 2:
                return web.json_response({"error": {"message": "nobody there"}}, status=503)
            case 3:
                response = await begin(request)
                await response.write(b'data: {"error": {"message": "engine died"}}\n\ndata: [DONE]\n\n')
                return response
            case 4:
                response = await begin(request)
                await response.write(b'data: {"choices": [{"text": "x"}]}\n\n')
                request.transport.abort()
                return response
            case 5:
                await asyncio.sleep(5)
            case 6:
                response = await begin(request)
                await response.write(b"data: [DONE]\n\n")
                return response
        return None

    server.misbehave = misbehave
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=n, output_tokens=2) for n in (1, 1, 2, 3, 4, 5, 6, 7)]
    run = await replay(trace, load_on(server, timeout_s=1.0))
    summary = summarise(run)
    assert summary.errors == {
        "HTTP 429": 2,
        "HTTP 503": 1,
        "error event": 1,
        "cut stream": 1,
        "timeout": 1,
        "no tokens": 1,
    }
    assert summary.answered == 1
    assert "2 x HTTP 429" in render_caption(summary)


async def test_an_answer_of_another_length_is_an_error(server):
    server.extra_tokens = 1
    (failure,) = (await replay(requests_at(0.0, output=5), load_on(server))).failed
    assert (failure.kind, failure.detail) == ("wrong length", "6 tokens instead of 5")


async def test_a_server_that_is_gone_is_an_error_of_each_request():
    load = Load(endpoint=ServerAddress.parse("http://127.0.0.1:9"), model="m", prompts=PromptMaker((1, 2), 0))
    run = await replay(requests_at(0.0, 0.0), load)
    assert [failure.kind for failure in run.failed] == ["no connection", "no connection"]


async def test_something_that_does_not_speak_http_is_an_error():
    async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        await writer.drain()
        writer.close()

    other = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with other:
        port = other.sockets[0].getsockname()[1]
        load = Load(endpoint=ServerAddress.parse(f"http://127.0.0.1:{port}"), model="m", prompts=PromptMaker((1, 2), 0))
        run = await replay(requests_at(0.0), load)
        assert [failure.kind for failure in run.failed] == ["no HTTP"]
        with pytest.raises(InvalidInput, match="nothing that is HTTP"):
            await discover_model(load.endpoint)


async def test_a_run_tells_of_each_outcome_once(server):
    seen: list[AnsweredRequest | FailedRequest] = []
    run = await replay(requests_at(0.0, 0.0, 0.0), load_on(server), seen.append)
    assert sorted(row.index for row in seen) == [0, 1, 2]
    assert set(seen) == set(run.outcomes)


async def test_closed_loop_keeps_the_concurrency_and_counts_completions(server):
    server.first_token_s = 0.05
    run, rate = await replay_closed(requests_at(*[0.0] * 500, output=1), load_on(server), 4, duration_s=1.0)
    assert server.most_in_flight == 4
    assert len(run.outcomes) == len(server.asked)
    assert 0 < rate < 4 / 0.05 * 1.1


async def test_closed_loop_ends_with_its_requests(server):
    run, rate = await replay_closed(requests_at(0.0, 0.0, 0.0), load_on(server), 8, duration_s=30.0)
    assert len(run.answered) == 3
    assert rate > 0


async def test_the_document_keeps_every_row_and_survives_json(server):
    async def fail_first(_: web.Request, body: dict) -> web.StreamResponse | None:
        return web.json_response({}, status=500) if len(body["prompt"]) == 3 else None

    server.misbehave = fail_first
    trace = [TraceRequest(arrival_s=0.0, prompt_tokens=n, output_tokens=3) for n in (3, 4, 5)]
    run = await replay(trace, load_on(server))
    document = json.loads(json.dumps(build_document(run, summarise(run), {"label": "ours"})))
    assert [row["outcome"] for row in document["rows"]] == ["failed", "answered", "answered"]
    assert document["rows"][1]["ttft_s"] > 0
    assert document["summary"]["metrics"]["TTFT"]["p99"]["count"] == 2
    assert document["environment"]["packages"]["moeserving"]
    assert document["settings"] == {"label": "ours"}


async def test_the_table_orders_its_percentiles(server):
    run = await replay(requests_at(*[0.0] * 20, output=3), load_on(server))
    summary = summarise(run)
    for estimates in summary.metrics.values():
        values = [estimates[name].value for name in ("p50", "p90", "p99")]
        assert all(low <= high for low, high in pairwise(values))
        assert all(row.low <= row.value <= row.high for row in estimates.values())
    assert render_summary(summary, "t").row_count == len(summary.metrics) == 3


async def test_the_server_names_its_model_and_longest_length(server):
    endpoint = ServerAddress.parse(server.url + "/v1")
    assert dataclasses.astuple(await discover_model(endpoint)) == ("mock", 1000)
    with pytest.raises(InvalidInput, match="model: unknown 'other'; known: mock"):
        await discover_model(endpoint, "other")


async def test_the_pool_is_text_in_the_servers_own_tokens(server):
    pool = await fetch_token_pool(ServerAddress.parse(server.url), "mock")
    assert len(pool) > 100_000
    assert "Python" in "".join(map(chr, pool))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://h:80", "http://h:80"),
        ("https://h/base/v1/", "https://h:443/base"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_url_is_taken_with_and_without_its_version(url, shown):
    assert str(ServerAddress.parse(url)) == shown


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h", "http://", "http://h:99999", "http://h:x"])
def test_a_url_that_cannot_be_meant_is_reported(url):
    with pytest.raises(InvalidInput, match=r"^url: "):
        ServerAddress.parse(url)


async def begin(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    return response
