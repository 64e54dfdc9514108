"""A deployment from `up` to `down` through the command line, with fakes of agent and gateway as real processes."""

import json
import os
import signal
import socket
import stat
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_place import TIMEOUT_S, Place, lives

CHUNKS = [str(number) for number in range(20)]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path, replicas=2)
    yield made
    made.kill()


@pytest.fixture
def served(place: Place) -> Place:
    place.up()
    return place


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One deployment for the tests that leave everything as it was."""
    made = Place(tmp_path_factory.mktemp("shared"), replicas=2)
    made.up()
    yield made
    made.kill()


def eventually(holds: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)


def open_stream(record: dict[str, Any]) -> Any:
    return urllib.request.urlopen(f"{record['endpoint']}/stream", timeout=TIMEOUT_S)


def fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        return json.load(answer)


def order_in_force(place: Place) -> list[str]:
    rows = place.record()["processes"]
    return [fetch(f"{row['url']}/v1/state")["config"]["request"]["policy"] for row in rows]


def test_a_deployment_comes_up_reports_itself_and_goes_down(place: Place) -> None:
    said = place.up()
    record = place.record()
    assert f"a: ready at {record['endpoint']}" in said
    assert f"curl {record['endpoint']}/v1/chat/completions" in said
    assert '"model": "model"' in said
    assert stat.S_IMODE((place.state / "a" / "token").stat().st_mode) == 0o600
    status = place.status()
    assert (status["replicas"], status["readyReplicas"], status["endpoint"]) == (2, 2, record["endpoint"])
    assert status["policies"] == {"request": "sjf", "engine": "predicted"}
    assert [(row["type"], row["status"]) for row in status["conditions"]] == [("Ready", "True")]
    assert status["engines"][0] | {"lastExit": ""} == {
        "name": "a-engine-0", "phase": "ready", "restarts": 0, "lastExit": "",
        "running": 2, "waiting": 1, "kvUsage": 0.25, "troubledRanks": [],
    }  # fmt: skip
    assert "a-engine-1" in place.run("status")
    assert "a: stopped" in place.run("down")
    assert not (place.state / "a" / "state.json").exists()
    assert not (place.state / "a" / "token").exists()
    assert not any(lives(row) for row in [record["supervisor"], *(row["process"] for row in record["processes"])])


def test_a_second_up_says_so_and_changes_nothing(shared: Place) -> None:
    before = shared.record()
    said = shared.up("--port", str(before["site"]["ports"][0]), code=2)
    assert said.startswith(f"a: is served already at {before['endpoint']}; nothing was changed")
    # Whether it is ready just now may change by itself.
    of_the_moment = {"ready", "ready_changed"}
    assert {**shared.record(), **dict.fromkeys(of_the_moment)} == {**before, **dict.fromkeys(of_the_moment)}


def test_a_taken_port_is_refused_and_leaves_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = place.up("--port", str(port), code=2)
    assert said.startswith(f"spec.gateway.port: {port} is taken on 127.0.0.1")
    assert said.count("\n") == 1
    assert not place.state.exists()


def test_a_missing_model_folder_is_reported_with_the_way_to_make_one(place: Place) -> None:
    place.file.write_text(place.file.read_text().replace("file://model", "file://nowhere"))
    said = place.up(code=2)
    assert "no such folder" in said
    assert "moeserving model tiny" in said


def test_a_killed_process_is_started_again_and_seen_in_status(served: Place) -> None:
    served.run("set", "scheduling.request.policy=fcfs")
    for name in ("gateway", "agent-0"):
        before = served.process(name)
        os.kill(before["process"]["pid"], signal.SIGKILL)
        eventually(lambda name=name: served.process(name)["restarts"] == 1, f"{name} restarts")
    eventually(lambda: served.status()["readyReplicas"] == 2, "all ready again")
    rows = {row["name"]: row for row in served.status()["processes"]}
    assert {name: (row["restarts"], row["lastExit"]) for name, row in rows.items()} == {
        "gateway": (1, "killed by SIGKILL"), "agent-0": (1, "killed by SIGKILL"), "agent-1": (0, ""),
    }  # fmt: skip
    eventually(lambda: served.status()["conditions"][0]["status"] == "True", "gateway ready again")
    assert order_in_force(served) == ["fcfs"] * 3, "what restarts begins with the settings in force"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_a_running_stream_end(place: Place, number: signal.Signals) -> None:
    with place.foreground() as command:
        with open_stream(place.record()) as stream:
            first = stream.readline()
            command.send_signal(number)
            assert (first + stream.read()).decode().split() == CHUNKS
        assert command.wait(TIMEOUT_S) == 0
    assert not (place.state / "a" / "state.json").exists()
    logs = place.run("logs", "a", "--process", "supervisor")
    assert logs.index("stopping") < logs.index("stopped")


def test_down_lets_a_running_stream_end(served: Place) -> None:
    with open_stream(served.record()) as stream:
        first = stream.readline()
        served.run("down", "a")
        assert (first + stream.read()).decode().split() == CHUNKS


def test_a_killed_up_takes_its_deployment_down_with_a_drain(place: Place) -> None:
    with place.foreground() as command:
        with open_stream(place.record()) as stream:
            command.kill()
            assert stream.read().decode().split() == CHUNKS
        eventually(lambda: not (place.state / "a" / "state.json").exists(), "the supervisor stops")


def test_after_a_killed_supervisor_its_processes_end_and_the_state_is_cleaned(served: Place) -> None:
    record = served.record()
    os.kill(record["supervisor"]["pid"], signal.SIGKILL)
    rows = [row["process"] for row in record["processes"]]
    eventually(lambda: not any(lives(row) for row in rows), "the processes end with their supervisor", 4 * TIMEOUT_S)
    assert "its supervisor was killed" in served.run("status", code=1)
    assert not (served.state / "a" / "state.json").exists()
    served.up()
    os.kill(served.record()["supervisor"]["pid"], signal.SIGKILL)
    assert "cleaned up" in served.run("down")
    served.up()
    served.run("down")


def test_set_reaches_every_process_and_is_kept(served: Place) -> None:
    served.run("set", "a", "scheduling.request.policy=fcfs", "scheduling.engine.policy=roundRobin")
    assert order_in_force(served) == ["fcfs"] * 3
    assert served.status()["policies"] == {"request": "fcfs", "engine": "roundRobin"}
    assert "policy: fcfs" in (served.state / "a" / "moeserving.yaml").read_text()


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "scheduling.request.policy=sjff",
            "spec.scheduling.request.policy: unknown 'sjff'; known: fcfs, priority, sjf",
        ),
        (
            "engine.replicas=3",
            "spec.engine.replicas: cannot change while it runs; change the file, then `moeserving down a`",
        ),
        ("gateway.hold.timeout=3s", "spec.gateway.hold.timeout: cannot change while it runs"),
        ("model.name=b", "spec.model.name: cannot change while it runs"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_whole(shared: Place, assignment: str, said: str) -> None:
    before = (shared.state / "a" / "moeserving.yaml").read_text()
    assert shared.run("set", "scheduling.request.policy=fcfs", assignment, code=2).startswith(said)
    assert order_in_force(shared) == ["sjf"] * 3
    assert (shared.state / "a" / "moeserving.yaml").read_text() == before


@pytest.mark.parametrize("peer", ["agent-1", "gateway"])
def test_when_one_process_refuses_the_others_are_put_back(shared: Place, peer: str) -> None:
    folder = shared.state / "a"
    before = {path.name: path.read_text() for path in (*folder.glob("*.json"), folder / "moeserving.yaml")}
    refuse = folder / f"{peer}.json.refuse"
    refuse.touch()
    said = shared.run("set", "scheduling.request.policy=fcfs", code=1)
    refuse.unlink()
    assert said == f"nothing was changed: {peer} refused: request: not today\n"
    assert order_in_force(shared) == ["sjf"] * 3
    assert {path.name: path.read_text() for path in (*folder.glob("*.json"), folder / "moeserving.yaml")} == before


def test_when_one_process_cannot_be_reached_the_others_are_put_back(served: Place) -> None:
    row = served.process("agent-0")
    (served.state / "a" / "agent-0.json.crash").touch()
    os.kill(row["process"]["pid"], signal.SIGKILL)
    eventually(lambda: served.process("agent-0")["restarts"] > 0, "the agent is down")
    said = served.run("set", "scheduling.request.policy=fcfs", code=1)
    assert said == "nothing was changed: agent-0 cannot be reached\n"
    (served.state / "a" / "agent-0.json.crash").unlink()
    eventually(lambda: served.status()["readyReplicas"] == 2, "it is back")
    assert order_in_force(served) == ["sjf"] * 3


def test_a_process_that_does_not_come_up_ends_the_start_with_its_last_lines(place: Place) -> None:
    folder = place.state / "a"
    folder.mkdir(parents=True)
    (folder / "agent-1.json.crash").touch()
    said = place.up(code=1)
    assert "a: agent-1 does not come up: exit status 1; stopping" in said
    assert "  | ValueError: no such thing" in said
    assert not (folder / "state.json").exists()


def test_an_interrupt_while_engines_start_stops_them(place: Place) -> None:
    folder = place.state / "a"
    folder.mkdir(parents=True)
    (folder / "agent-0.json.starting").touch()
    arguments = place.arguments("up", "-f", str(place.file), "--detach")
    # How far a start is stands on stderr.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        assert command.stdout is not None
        assert any("engine-0 loading weights 3 of 8 files" in line for line in command.stdout)
        command.send_signal(signal.SIGINT)
        assert command.wait(TIMEOUT_S) == 130
    assert not (folder / "state.json").exists()


def test_logs_are_shown_by_process_and_kept_after_the_stop(served: Place) -> None:
    assert served.run("logs", "--process", "gateway") == "gateway serves\n"
    assert "agent-1    | agent serves" in served.run("logs")
    said = served.run("logs", "--process", "gatewy", code=2)
    assert said == "--process: unknown 'gatewy'; known: agent-0, agent-1, engine-0, engine-1, gateway, supervisor\n"
    served.run("down")
    assert served.run("logs", "-n", "1", "--process", "gateway") == "gateway drains\n"


def test_followed_logs_show_what_is_added(served: Place) -> None:
    arguments = served.arguments("logs", "-f", "--process", "gateway")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stdout.readline() == "gateway serves\n"
        served.run("down")
        assert command.stdout.readline() == "gateway drains\n"
        command.send_signal(signal.SIGINT)
        assert command.wait(TIMEOUT_S) == 0


def test_a_reader_that_has_enough_of_the_logs_is_no_error(place: Place) -> None:
    folder = place.state / "a"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "supervisor.log").write_text("a line\n" * 50_000)
    arguments = place.arguments("logs", "-n", "50000", "--process", "supervisor")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        assert command.stdout.readline() == "a line\n"
        command.stdout.close()
        assert command.stderr.read() == ""
        assert command.wait(TIMEOUT_S) == 1


def test_a_name_that_is_not_there_is_reported_with_those_that_are(served: Place) -> None:
    for verb in ("down", "status"):
        assert served.run(verb, "b", code=2) == "NAME: no deployment 'b' on this machine; known: a\n"
    served.up("--name", "c")
    assert served.run("status", code=2) == "NAME: several deployments run on this machine, name one; known: a, c\n"
    served.run("down", "c")
    served.run("down")
    assert "no deployment runs on this machine; `moeserving up -f FILE` starts one" in served.run("down", code=2)
