"""`moeserving up --metrics`: a real Prometheus beside fakes of agent and gateway."""

import json
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from cluster_debian import require
from local_place import Place, lives
from moe_contract.input_errors import InvalidInput
from moe_operator.local.prometheus import build_config, find_prometheus
from moe_operator.local.record import ProcessRecord
from moe_operator.local.report import FAILURES_TO_GIVE_UP

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


def test_one_that_does_not_start_is_a_warning_and_the_deployment_serves(tmp_path, monkeypatch, place):
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\necho 'lock DB directory: resource temporarily unavailable' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    starting = place.state / "a" / "agent-0.json.starting"
    starting.parent.mkdir(parents=True)
    starting.touch()
    arguments = place.arguments("up", "-f", str(place.file), "--metrics", "--detach")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        assert command.stdout is not None
        warning = next(line for line in command.stdout if line.startswith("warning: "))
        assert "prometheus does not run: exit status 1; requests are served without it" in warning
        while place.process("prometheus")["restarts"] < FAILURES_TO_GIVE_UP:
            time.sleep(0.1)
        starting.unlink()
        assert any("a: ready at" in line for line in command.stdout)
        assert command.wait(PATIENCE_S) == 0
    assert "resource temporarily unavailable" in place.run("logs", "-p", "prometheus")


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
