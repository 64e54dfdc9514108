"""The field's load tools run against the gateway in front of a real engine: no request fails."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import Gateway
from tests.vllm.load_tools import (
    REQUESTS,
    TOOLS,
    Measured,
    Times,
    check_aiperf,
    check_bench_serve,
    compare_times,
    failed,
    make_hub,
    run_tool,
)

pytestmark = pytest.mark.load_tools


@pytest.fixture(scope="module")
def agent(start_agent: Any, tiny_model: Path) -> Any:
    """An engine that keeps responses, so that a client may continue them by their ids."""
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    return start_agent("engine", tiny_model, env=environment)


@pytest.fixture(scope="module")
def gateway(agent: Any, tmp_path_factory: Any) -> Any:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), [agent], 1, {}, {})
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    yield gateway
    assert gateway.process.stop() == 0


@pytest.fixture(scope="module")
def hub(tiny_model: Path, tmp_path_factory: Any) -> Path:
    return make_hub(tiny_model, tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses", "messages"])
def test_aiperf(agent, gateway, hub, tmp_path, endpoint):
    check_aiperf(agent, gateway, hub, tmp_path, endpoint)


def test_guidellm(agent, gateway, hub, tiny_model, tmp_path):
    before, failures = Measured.read(gateway, agent), failed(gateway)
    asked = ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    data = ["--data", "kind=synthetic_text,prompt_tokens=60,output_tokens=8"]
    tokenizer = ["--tokenizer", f"kind=huggingface_auto,model={tiny_model}"]
    more = ["--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console-interactive"]
    backend = ["--backend", f"kind=openai_http,target={gateway.url},model=tiny"]
    run_tool([str(TOOLS / "guidellm/bin/guidellm"), "run", *backend, *asked, *data, *tokenizer, *more], hub)
    report = json.loads((tmp_path / "report.json").read_text())
    metrics = report["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    assert failed(gateway) == failures
    ttft = Times(REQUESTS, metrics["time_to_first_token_ms"]["successful"]["mean"] / 1000 * REQUESTS)
    itl_s = metrics["inter_token_latency_ms"]["successful"]["mean"] / 1000
    compare_times("guidellm", ttft, itl_s, Measured.read(gateway, agent).since(before))


def test_guidellm_continues_responses_that_the_engine_keeps(gateway, hub, tiny_model, tmp_path):
    """`server_history`: each turn names the response before it, and sends no text of it."""
    conversations, turns = 3, 3
    before = failed(gateway)
    asked = [
        "--profile",
        "kind=concurrent,streams=2",
        "--constraint",
        f"kind=max_requests,count={conversations * turns}",
    ]
    data = ["--data", f"kind=synthetic_text,prompt_tokens=40,output_tokens=8,turns={turns}"]
    tokenizer = ["--tokenizer", f"kind=huggingface_auto,model={tiny_model}"]
    more = ["--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console-interactive"]
    served = f"kind=openai_http,target={gateway.url},model=tiny,request_format=/v1/responses,server_history=true"
    run_tool([str(TOOLS / "guidellm/bin/guidellm"), "run", "--backend", served, *asked, *data, *tokenizer, *more], hub)
    report = json.loads((tmp_path / "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (conversations * turns, 0)
    assert failed(gateway) == before


@pytest.mark.parametrize("kind", ["completion", "chat", "anthropic_messages"])
def test_inference_perf(agent, gateway, hub, tiny_model, tmp_path, kind):
    program = TOOLS / "inference-perf/bin/inference-perf"
    if not program.exists():
        pytest.skip("inference-perf needs Python 3.12, which `make` has not found")
    config = {
        "api": {"type": kind, "streaming": True},
        "data": {"type": "mock"},
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": REQUESTS // 2}], "num_workers": 1},
        "server": {"type": "vllm", "model_name": "tiny", "base_url": gateway.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(tiny_model)},
        "storage": {"local_storage": {"path": str(tmp_path / "report")}},
    }
    (tmp_path / "config.yml").write_text(json.dumps(config))
    before, failures = Measured.read(gateway, agent), failed(gateway)
    run_tool([str(program), "-c", str(tmp_path / "config.yml")], hub)
    measured = Measured.read(gateway, agent).since(before)
    report = json.loads((tmp_path / "report/summary_lifecycle_metrics.json").read_text())
    assert (report["successes"]["count"], report["failures"]["count"]) == (REQUESTS, 0)
    assert failed(gateway) == failures
    latency = report["successes"]["latency"]
    if kind == "anthropic_messages":
        # inference-perf 0.7.0 takes the times of tokens from `choices`, which Anthropic's events have not.
        assert latency["time_to_first_token"] is None
        assert measured.gateway_ttft.count == measured.engine_ttft.count == REQUESTS
        return
    ttft = Times(REQUESTS, latency["time_to_first_token"]["mean"] * REQUESTS)
    compare_times(f"inference-perf, {kind}", ttft, latency["inter_token_latency"]["mean"], measured)


def test_vllm_bench_serve_finds_the_model_by_itself(agent, gateway, tiny_model, tmp_path):
    check_bench_serve(agent, gateway, tiny_model, tmp_path)
