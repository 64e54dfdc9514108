"""One real vLLM engine with one seat, under its agent; the last tests kill it and drain it, so their order matters."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import openai
import psutil
import pytest
from moe_contract.serving_routes import CORE

from tests.vllm import official_clients as clients
from tests.vllm.conftest import request, run_javascript
from tests.vllm.load_tools import Measured, check_aiperf, check_bench_serve, make_hub


@pytest.fixture(scope="module")
def agent(start_agents: Any) -> Any:
    return start_agents(1, "--max-num-seqs=1")[0]


@pytest.mark.smoke
def test_an_engine_starts_and_answers_a_chat(agent):
    state = agent.state()
    assert state["phase"] == "ready"
    assert state["accepting"]
    assert state["engine"]["max_model_len"] == 2048
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True}
    status, answer = agent.engine("POST", "/v1/chat/completions", body)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.smoke
def test_the_signal_moves_with_the_work(agent):
    before = agent.state()["ranks"][0]["step"]
    agent.complete([5] * 100, 60)
    idle = agent.wait_for("idle", lambda state: state["ranks"][0]["running"] == 0, 60)["ranks"][0]
    assert idle["step"] >= before + 60
    assert (idle["waiting"], idle["decode_tokens"], idle["kv_usage"], idle["age_s"]) == (0, 0, 0.0, 0.0)
    assert idle["step_time"]["base_s"] + idle["step_time"]["decode_s"] > 0.0


def core_of(agent: Any) -> psutil.Process:
    server = psutil.Process(agent.state()["engine"]["pid"])
    (core,) = [child for child in server.children(recursive=True) if "EngineCore" in " ".join(child.cmdline())]
    return core


@pytest.mark.smoke
def test_the_core_answers_for_itself_while_it_is_idle(agent):
    """What the agent asks an idle engine: `/health` speaks for the HTTP server alone."""
    core = core_of(agent)
    assert agent.engine("GET", CORE) == (200, {"answers": True})
    core.suspend()
    try:
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(agent.engine, "GET", CORE)
            assert urllib.request.urlopen(f"{agent.url}/health", timeout=60).status == 200
            assert not answer.done()
            core.resume()
            assert answer.result(120) == (200, {"answers": True})
    finally:
        core.resume()


@pytest.mark.smoke
def test_official_clients_get_through_the_gateway_what_they_get_from_the_engine(agent, start_gateway):
    gateway = start_gateway([agent])
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    for name in ("chat", "chat_stream", "completions", "errors"):
        check = clients.OPENAI[name]
        assert check(clients.open_openai(gateway.url)) == check(clients.open_openai(agent.url)), name
    for name in ("message", "message_stream", "counted_tokens", "message_errors"):
        inspect = clients.ANTHROPIC[name]
        assert inspect(clients.open_anthropic(gateway.url)) == inspect(clients.open_anthropic(agent.url)), name
    names = ("chatStream", "responsesStream", "messageStream", "countedTokens", "messageErrors")
    through, direct = run_javascript(gateway.url, *names), run_javascript(agent.url, *names)
    assert through == direct
    assert not [name for name, value in through.items() if isinstance(value, dict)]


@pytest.mark.smoke
def test_a_load_tool_the_gateway_and_the_engine_measure_the_same_requests(agent, start_gateway, tiny_model, tmp_path):
    gateway = start_gateway([agent])
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    check_bench_serve(agent, gateway, tiny_model, tmp_path)


@pytest.mark.smoke
def test_a_load_tool_of_the_field_sees_no_failure(agent, start_gateway, tiny_model, tmp_path):
    gateway = start_gateway([agent])
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    hub = make_hub(tiny_model, tmp_path / "hub")
    check_aiperf(agent, gateway, hub, tmp_path / "report", "chat")


LATE = [
    ("/v1/completions", {"prompt": "late " * 100}),
    ("/v1/completions", {"prompt": "late " * 100, "stream": True}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "late " * 100}]}),
    ("/v1/responses", {"input": "late " * 100}),
]


@pytest.mark.smoke
def test_a_request_that_is_too_late_is_taken_out_of_vllms_queue_and_costs_nothing(agent, start_gateway):
    """One request has the only seat; those behind it end at their deadlines, and the engine computes none of them."""
    gateway = start_gateway([agent])
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    before = Measured.read(gateway, agent)
    with ThreadPoolExecutor(len(LATE) + 1) as pool:
        busy = pool.submit(agent.complete, [5] * 10, 1500)
        agent.wait_for("busy", lambda state: state["ranks"][0]["running"] == 1, 60)
        rows = [pool.submit(ask_late, gateway, path, fields) for path, fields in LATE]
        agent.wait_for("waiting requests", lambda state: state["ranks"][0]["waiting"] == len(LATE), 60)
        for row in rows:
            status, answer = row.result(120)
            assert status == 504
            assert "X-Request-Timeout passed before the answer began" in json.dumps(answer)
        agent.wait_for("an empty queue", lambda state: state["ranks"][0]["waiting"] == 0, 60)
        assert agent.state()["ranks"][0]["running"] == 1
        assert not busy.done()
        assert busy.result(300)["usage"]["completion_tokens"] == 1500
    measured = Measured.read(gateway, agent).since(before)
    assert (measured.engine_tokens, measured.engine_ttft.count) == (1500, 1)


def ask_late(gateway: Any, path: str, fields: dict[str, Any]) -> tuple[int, Any]:
    body = {"model": "tiny", "max_tokens": 4, "max_output_tokens": 4, **fields}
    return request("POST", gateway.url + path, body, {"X-Request-Timeout": "0.8"})


def test_a_request_may_carry_a_priority(agent):
    assert agent.complete([7] * 10, 2, priority=-3)["usage"]["completion_tokens"] == 2


def test_admin_routes_are_not_found_at_the_engines_port(agent):
    for path in (
        "/scale_elastic_ep",
        "/pause",
        "/sleep",
        "/collective_rpc",
        "/reset_prefix_cache",
        "/load_lora_adapter",
    ):
        status, answer = agent.engine("POST", path, {})
        assert status == 404
        assert answer["error"]["code"] == 404
    assert agent.engine("GET", "/version")[0] == 200


async def order_of_service(agent: Any, *, settings: dict[str, Any], salt: int) -> list[str]:
    """The order in which a long job and three short ones, submitted in this order to a busy engine, are answered."""
    status, answer = agent.control("PUT", "/v1/config", {"request": settings})
    assert status == 200, answer
    served: list[str] = []
    async with aiohttp.ClientSession(agent.url) as session:

        async def ask(name: str, prompt_tokens: int, tokens: int) -> None:
            prompt = [salt + len(name), *range(100, 99 + prompt_tokens)]
            body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}
            async with session.post("/v1/completions", json=body) as reply:
                assert reply.status == 200, await reply.text()
                await reply.read()
            served.append(name)

        async def waiting(count: int) -> None:
            async with asyncio.timeout(60):
                while (await asyncio.to_thread(agent.state))["ranks"][0]["waiting"] < count:
                    await asyncio.sleep(0.01)

        tasks = [asyncio.create_task(ask("busy", 10, 600))]
        await asyncio.sleep(0.3)
        for count, (name, size) in enumerate([("long", 1500), ("a", 40), ("bb", 30), ("ccc", 20)], start=1):
            tasks.append(asyncio.create_task(ask(name, size, 1)))
            await waiting(count)
        await asyncio.gather(*tasks)
    return served


@pytest.mark.smoke
async def test_the_order_of_service_is_switched_while_the_engine_runs(agent):
    """One second of waiting makes up for ten tokens here, so that a busy machine ages nothing past 1,500."""
    sjf = {"policy": "sjf", "ageing_rate": 10.0, "ageing_horizon_s": 1000.0}
    assert await order_of_service(agent, settings=sjf, salt=1) == ["busy", "ccc", "bb", "a", "long"]
    assert await order_of_service(agent, settings={"policy": "fcfs"}, salt=11) == ["busy", "long", "a", "bb", "ccc"]
    assert agent.state()["config"]["request"]["policy"] == "fcfs"


def test_the_error_of_a_core_that_dies_within_a_stream_reaches_the_official_client(agent):
    """vLLM's server outlives its core for a moment, and ends the stream with an error, which the middleware marks."""
    restarts = agent.state()["engine"]["restarts"]
    asked = clients.CHAT | {"max_tokens": 1500}
    stream = clients.open_openai(agent.url).chat.completions.create(**asked, extra_body=clients.LONG, stream=True)
    events = iter(stream)
    next(events)
    core_of(agent).kill()
    with pytest.raises(openai.APIError):
        list(events)
    agent.wait_for("down", lambda state: state["engine"]["restarts"] == restarts + 1, 60)
    agent.wait_ready()


def test_an_engine_that_is_killed_comes_back_on_its_port_with_the_settings_in_force(agent):
    status, _ = agent.control("PUT", "/v1/config", {"request": {"policy": "priority"}})
    assert status == 200
    before = agent.state()["engine"]
    os.kill(before["pid"], signal.SIGKILL)
    down = agent.wait_for("down", lambda state: state["engine"]["restarts"] == before["restarts"] + 1, 60)
    assert not down["accepting"]
    assert down["ranks"] == []
    assert down["engine"]["last_exit"] == "killed by SIGKILL"
    after = agent.wait_ready()
    assert after["engine"]["pid"] != before["pid"]
    assert after["engine"]["url"] == before["url"]
    assert after["config"]["request"]["policy"] == "priority"
    assert agent.complete([9] * 10, 3)["usage"]["completion_tokens"] == 3


@pytest.mark.smoke
async def test_a_drain_lets_the_running_stream_end_whole(agent):
    tokens = 300
    body = {"model": "tiny", "prompt": [3] * 10, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    async with aiohttp.ClientSession() as session, session.post(f"{agent.url}/v1/completions", json=body) as answer:
        lines = answer.content
        received = [await lines.readline()]
        status, drained = await asyncio.to_thread(agent.control, "POST", "/v1/drain")
        assert (status, drained["accepting"]) == (202, False)
        state = await asyncio.to_thread(agent.state)
        assert (state["phase"], state["accepting"]) == ("draining", False)
        received += [line async for line in lines]
    chunks = [line.removeprefix(b"data: ").strip() for line in received if line.startswith(b"data: ")]
    assert chunks[-1] == b"[DONE]"
    assert json.loads(chunks[-2])["choices"][0]["finish_reason"] == "length"
    stopped = await asyncio.to_thread(agent.wait_for, "stopped", lambda state: state["phase"] == "stopped", 60)
    assert stopped["engine"]["pid"] is None
    with pytest.raises(OSError, match="refused"):
        await asyncio.to_thread(agent.engine, "GET", "/health")


@pytest.mark.smoke
def test_the_agent_of_a_drained_engine_ends_on_the_first_signal(agent):
    begun_s = time.monotonic()
    assert agent.process.stop() == 0
    assert time.monotonic() - begun_s < 60
