"""`moeserving up --metrics`: a real Prometheus beside fakes of agent and gateway."""

import json
import time
import urllib.request
from pathlib import Path

import pytest
from cluster_debian import require
from local_place import Place, lives
from moe_contract.input_errors import InvalidInput
from moe_operator.local.prometheus import build_config, find_prometheus
from moe_operator.local.record import ProcessRecord

PATIENCE_S = 60.0


@pytest.fixture
def place(tmp_path: Path):
    made = Place(tmp_path, replicas=2)
    yield made
    made.kill()


def rows(**urls: str) -> list[ProcessRecord]:
    return [ProcessRecord(name=name.replace("_", "-"), command=(), url=url) for name, url in urls.items()]


def test_each_process_is_scraped_under_the_labels_that_the_dashboards_look_for():
    config = build_config(
        "tiny", rows(gateway="http://127.0.0.1:1", agent_0="http://127.0.0.1:2", agent_1="http://[::1]:3")
    )
    assert config["scrape_configs"][0]["static_configs"] == [
        {"targets": ["127.0.0.1:1"], "labels": {"namespace": "local", "pod": "tiny-gateway-0"}},
        {"targets": ["127.0.0.1:2"], "labels": {"namespace": "local", "pod": "tiny-engine-0"}},
        {"targets": ["[::1]:3"], "labels": {"namespace": "local", "pod": "tiny-engine-1"}},
    ]


def test_a_machine_without_prometheus_is_said_how_to_get_it_and_nothing_starts(monkeypatch, place):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InvalidInput, match="apt-get install prometheus"):
        find_prometheus()
    assert "Prometheus is not installed" in place.up("--metrics", code=2)
    assert not place.state.exists()


def test_it_scrapes_all_processes_is_in_the_status_and_ends_with_the_deployment(place):
    require({"prometheus": "prometheus"})
    place.up("--metrics")
    row = place.process("prometheus")
    assert {"name": "prometheus", "url": row["url"]}.items() <= place.status()["processes"][-1].items()
    assert len(place.status()["engines"]) == 2
    assert fetch_pods(row["url"], until=3) == {"a-gateway-0", "a-engine-0", "a-engine-1"}
    place.run("logs", "-p", "prometheus")
    place.run("down")
    assert not lives(row["process"])


def fetch_pods(url: str, until: int) -> set[str]:
    """The pods of its targets, once there are that many; it takes a moment to listen."""
    give_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/api/v1/targets", timeout=10) as answer:
                targets = json.load(answer)["data"]["activeTargets"]
        except OSError:
            targets = []
        if len(targets) == until:
            return {target["labels"]["pod"] for target in targets}
        assert time.monotonic() < give_up_s, targets
        time.sleep(0.2)
