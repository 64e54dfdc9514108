"""The field's load tools run against the gateway in front of a real engine: no request fails."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.conftest import Gateway
from tests.vllm.load_tools import REQUESTS, check_bench_serve, failed, run_tool

pytestmark = pytest.mark.load_tools
TOOLS = Path(__file__).parents[2] / ".cache/load-tools"


@pytest.fixture(scope="module")
def agent(start_agents: Any) -> Any:
    return start_agents(1)[0]


@pytest.fixture(scope="module")
def gateway(agent: Any, tmp_path_factory: Any) -> Any:
    gateway = Gateway(tmp_path_factory.mktemp("gateway"), [agent], 1, {}, {})
    gateway.wait_for("an engine", lambda state: state["engines"][0]["accepting"])
    yield gateway
    assert gateway.process.stop() == 0


@pytest.fixture(scope="module")
def hub(tiny_model: Path, tmp_path_factory: Any) -> Path:
    """A cache of Hugging Face's hub with the model's tokenizer as `moeserving/tiny`, since aiperf takes no path."""
    home = tmp_path_factory.mktemp("hub")
    folder = home / "hub/models--moeserving--tiny"
    shutil.copytree(tiny_model, folder / "snapshots/one")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("one")
    return home


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses", "messages"])
def test_aiperf(gateway, hub, tmp_path, endpoint):
    before = failed(gateway)
    asked = ["--isl", "60", "--osl", "8", "--request-count", str(REQUESTS), "--concurrency", "2"]
    where = ["--url", gateway.url, "--endpoint-type", endpoint, "--session-header", "X-Session-Affinity"]
    more = ["--tokenizer", "moeserving/tiny", "--ui", "none", "--output-artifact-dir", str(tmp_path)]
    run_tool([str(TOOLS / "aiperf/bin/aiperf"), "profile", "-m", "tiny", "--streaming", *where, *asked, *more], hub)
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    assert not report.get("error_summary")
    assert report["time_to_first_token"]["avg"] < report["request_latency"]["avg"]
    assert failed(gateway) == before


def test_guidellm(gateway, hub, tiny_model, tmp_path):
    before = failed(gateway)
    asked = ["--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}"]
    data = ["--data", "kind=synthetic_text,prompt_tokens=60,output_tokens=8"]
    tokenizer = ["--tokenizer", f"kind=huggingface_auto,model={tiny_model}"]
    more = ["--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console-interactive"]
    backend = ["--backend", f"kind=openai_http,target={gateway.url},model=tiny"]
    run_tool([str(TOOLS / "guidellm/bin/guidellm"), "run", *backend, *asked, *data, *tokenizer, *more], hub)
    report = json.loads((tmp_path / "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (REQUESTS, 0)
    assert failed(gateway) == before


def test_vllm_bench_serve_finds_the_model_by_itself(agent, gateway, tiny_model, tmp_path):
    check_bench_serve(agent, gateway, tiny_model, tmp_path)
