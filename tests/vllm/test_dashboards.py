"""Every query of the dashboards, asked of a real Prometheus that scrapes a real deployment."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_debian import require
from moe_tools.tiny import ensure_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((ROOT / "charts/moeserving/dashboards").glob("*.json"))]
PATIENCE_S = 300.0
# Panels that have nothing to show here, by what their metrics come from.
WITHOUT = {
    "Conditions": "the operator",
    "Roles": "fixed or moving roles",
    "Split requests": "fixed or moving roles",
    "Changes of roles": "fixed or moving roles",
    "Rate of the transfers": "fixed or moving roles",
}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus' address; a deployment with an expert group that has answered some requests."""
    require({"prometheus": "prometheus"})
    folder = tmp_path_factory.mktemp("dashboards")
    resource = yaml.safe_load((ROOT / "manifests/local-cpu-experts.yaml").read_text())
    resource["metadata"]["name"] = "tiny"
    resource["spec"]["model"] = {"uri": f"file://{ensure_tiny_model(folder / 'model', show_progress=False)}"}
    # Decisions come within the test.
    resource["spec"]["scheduling"]["expert"] |= {"interval": 100, "window": 50}
    resource["spec"]["scheduling"]["engine"] = {"targets": {"ttft": "5s", "interToken": "1s"}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(resource))
    place = ["--state-dir", str(folder / "state")]
    moeserving = [str(Path(sys.executable).with_name("moeserving"))]
    subprocess.run([*moeserving, "up", "-f", str(folder / "tiny.yaml"), "--detach", "--metrics", *place], check=True)
    try:
        status = json.loads(subprocess.check_output([*moeserving, "status", "tiny", "--json", *place]))
        for number in range(20):
            ask(status["endpoint"], number)
        yield next(row["url"] for row in status["processes"] if row["name"] == "prometheus")
    finally:
        subprocess.run([*moeserving, "down", "tiny", *place], check=True)


def ask(endpoint: str, number: int) -> None:
    """A streamed completion; one in ten asks for a model that is not there."""
    model = "other" if number % 10 == 9 else "model"
    body = json.dumps({"model": model, "prompt": f"{number} words", "max_tokens": 24, "stream": True}).encode()
    request = urllib.request.Request(f"{endpoint}/v1/completions", body, {"Content-Type": "application/json"})
    if model == "other":
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(request, timeout=120)
        return
    with urllib.request.urlopen(request, timeout=120) as answer:
        answer.read()


def query(prometheus: str, text: str) -> list[Any]:
    """The series that a query of a panel gives now."""
    for name, value in {"$namespace": "local", "$resource": "tiny", "$__rate_interval": "30s"}.items():
        text = text.replace(name, value)
    words = urllib.parse.urlencode({"query": text})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query?{words}", timeout=30) as answer:
        return list(json.load(answer)["data"]["result"])


def panels() -> Iterator[Any]:
    for dashboard in DASHBOARDS:
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                yield pytest.param(panel, id=panel["title"])


@pytest.mark.parametrize("panel", list(panels()))
def test_a_panel_has_data(prometheus: str, panel: Any) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not any(query(prometheus, target["expr"]) for target in panel["targets"]):
        if panel["title"] in WITHOUT:
            return
        assert time.monotonic() < give_up_s, [target["expr"] for target in panel["targets"]]
        time.sleep(1)


def test_the_variables_find_the_resource(prometheus: str) -> None:
    assert {row["metric"]["namespace"] for row in query(prometheus, "moeserving_gateway_held_requests")} == {"local"}
    assert {row["metric"]["pod"] for row in query(prometheus, "moeserving_gateway_held_requests")} == {"tiny-gateway-0"}
