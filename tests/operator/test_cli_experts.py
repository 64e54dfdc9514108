"""`moeserving experts` against a deployment that runs, here and through kubectl, with fakes of the agents."""

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experts_documents import decided, experts, in_brief
from fake_fleet import KUBECTL_HEAD, Fleet, run
from moe_contract.experts_state import ExpertsState
from moe_contract.input_errors import InvalidInput
from moe_operator.cli import experts as command
from moe_operator.experts import reach
from moe_operator.experts.planned import plan_document
from moe_operator.experts.reach import Cluster, find_engines
from moe_scheduling.expert.decision import ExpertSettings

# Where the fake's own candidate puts the experts.
CANDIDATE = [[0, 2, 3, 1, 2, 3]] * 2


def say(verb: str, *rest: str, code: int = 0) -> str:
    return run("experts", verb, *rest, code=code)


class Served(Fleet):
    """By default two ranks of each engine share experts."""

    def __init__(self, root: Path, *, replicas: int, parallelism: dict[str, Any] | None = None) -> None:
        super().__init__(root, replicas=replicas, parallelism=parallelism or {"data": 2, "expert": True})

    def say(self, verb: str, *rest: str, code: int = 0) -> str:
        return say(verb, "a", *self.local, *rest, code=code)

    def set(self, *assignments: str, code: int = 0) -> str:
        return run("set", "a", *assignments, *self.local, code=code)

    def status(self) -> dict[str, Any]:
        return json.loads(run("status", "a", "--json", *self.local))

    def documents(self) -> dict[str, Any]:
        return json.loads(self.say("show", "--json"))

    def placement(self, engine: str) -> tuple[int, list[list[int]]]:
        placement = self.documents()[engine]["placement"]
        return placement["version"], placement["physical_to_logical"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("experts"), replicas=2)
    yield made
    made.end()


def read(document: dict[str, Any]) -> ExpertsState:
    return ExpertsState.model_validate(document)


def test_show_has_the_load_by_rank_the_hottest_and_the_decisions_of_each_engine(served: Served) -> None:
    said = served.say("show")
    for engine in ("a-engine-0", "a-engine-1"):
        assert f"{engine}  mode dryRun, 2 layers, 4 experts and 2 copies over 2 ranks on 1 node" in said
    assert "balance 1.60 (busiest rank over the mean; worst layer 1.70) over 1000 steps, 48% of tokens to other" in said
    # Layer 0: 130 tokens on rank 0 (70 + 50 + half of 10), 15 on rank 1.
    assert "    0   1.79  0.21" in said
    assert "layer 0 expert 0: 2.00 on rank 0" in said
    assert "dryRun" in said
    assert "42 experts moved since the start" in said


def test_one_engine_of_several_is_chosen_by_name(served: Served) -> None:
    assert list(json.loads(served.say("show", "--json", "--engine", "a-engine-1"))) == ["a-engine-1"]
    said = served.say("show", "--engine", "b", code=2)
    assert said == "--engine: unknown 'b'; known: a-engine-0, a-engine-1\n"
    assert served.say("apply", "--yes", code=2) == "--engine: name one; known: a-engine-0, a-engine-1\n"


def test_the_engines_own_plan_is_applied_and_rolled_back(served: Served) -> None:
    engine = ("--engine", "a-engine-0")
    version, before = served.placement("a-engine-0")
    said = served.say("apply", *engine, "--yes")
    assert "a-engine-0: 4 experts move, balance 1.59 -> 1.09 under the load of the last 1000 steps" in said
    assert f"placement {version + 1}: applied (by hand)" in said
    assert served.placement("a-engine-0") == (version + 1, CANDIDATE)
    assert served.placement("a-engine-1") == (version, before), "the other engine stays as it was"
    said = served.say("apply", *engine, "--yes", code=1)
    assert "no plan of its own at the moment; make one with `moeserving experts plan NAME --json FILE`" in said
    assert f"placement {version + 2}: rolledBack" in served.say("rollback", *engine, "--yes")
    assert served.placement("a-engine-0") == (version + 2, before)


def test_a_plan_in_a_file_is_applied(served: Served, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"physical_to_logical": [[0, 1, 3, 2, 3, 1]] * 2, "moves": 2}))
    served.say("apply", "--engine", "a-engine-1", "--plan", str(plan), "--yes")
    assert served.placement("a-engine-1")[1] == [[0, 1, 3, 2, 3, 1]] * 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: no such file or directory"),
        ("{", "is not JSON"),
        ("[]", "has no physical_to_logical; `moeserving experts plan --json` writes it"),
        ('{"physical_to_logical": [[0, 1, 2, 3, 0, 1]]}', "2 layers of 6 slots are needed"),
        ('{"physical_to_logical": [[0, 1, 2, 2, 0, 1], [0, 1, 2, 3, 0, 1]]}', "in each every expert from 0 to 3"),
        ('{"physical_to_logical": [["x"]]}', "2 layers of 6 slots are needed"),
    ],
)
def test_a_plan_that_the_group_cannot_have_is_refused_before_anything_is_sent(
    served: Served, tmp_path: Path, text: str | None, words: str
) -> None:
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    before = served.placement("a-engine-1")
    said = served.say("apply", "--engine", "a-engine-1", "--plan", str(plan), "--yes", code=2)
    assert words in said
    assert said.count("\n") == 1
    assert served.placement("a-engine-1") == before


def test_a_plan_is_made_here_from_what_the_engine_says_and_touches_nothing(served: Served, tmp_path: Path) -> None:
    before = served.placement("a-engine-1")
    file = tmp_path / "plan.json"
    said = served.say("plan", "--engine", "a-engine-1", "--json", str(file))
    assert said.startswith("a-engine-1, load of the last 1000 steps:\nbalance    1.")
    assert "the engine would " in said
    plan = json.loads(file.read_text())
    assert plan["balance_after"] <= plan["balance_before"]
    assert plan["gate"].partition(": ")[0] in ("move", "stay")
    assert plan["seconds"] > 0
    assert served.placement("a-engine-1") == before
    assert served.say("plan", "--engine", "a-engine-1") == said, "the same load, the same words"
    served.say("apply", "--engine", "a-engine-1", "--plan", str(file), "--yes")
    assert served.placement("a-engine-1")[1] == plan["physical_to_logical"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": {"steps": 0}}, "load: nothing was recorded yet: that takes `scheduling.expert.window` steps"),
        ({"load": {"steps": 9, "tokens": [[[1.0]]]}}, "load: nothing was recorded yet"),
        ({"costs": None}, "costs: nothing was measured yet"),
        ({"costs": {"token_s": 0.0}}, "costs: nothing was measured yet"),
    ],
)
def test_a_plan_without_what_it_needs_says_what_is_missing(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        plan_document(read(experts(**changes)), ExpertSettings())


def test_nothing_is_moved_where_nobody_can_be_asked(served: Served) -> None:
    before = served.placement("a-engine-1")
    assert "--yes: is needed where nobody can be asked" in served.say("rollback", "--engine", "a-engine-1", code=2)
    assert served.placement("a-engine-1") == before


def test_an_idle_engine_has_taken_it_and_says_that_it_moves_nothing_yet(served: Served) -> None:
    idle = served.folder.root / "a" / "agent-1.json.idle"
    idle.touch()
    said = served.say("rollback", "--engine", "a-engine-1", "--yes", "--timeout", "0.5", code=1)
    idle.unlink()
    assert "not carried out within 0.5 s; an engine without requests makes no steps" in said


def test_where_nothing_was_moved_nothing_is_rolled_back_and_nobody_waits(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = read(experts())
    first = document.model_copy(update={"placement": document.placement.model_copy(update={"version": 1})})

    async def fetch(*_: Any, **__: Any) -> dict[str, ExpertsState]:
        return {"a-engine-0": first}

    monkeypatch.setattr(command, "fetch_experts", fetch)
    said = served.say("rollback", "--engine", "a-engine-0", "--yes", code=1)
    assert said == "a-engine-0: nothing was moved since the engine's start, so there is nothing to roll back\n"


def test_affinity_is_recorded_when_it_is_asked_for_and_said_to_have_no_use_in_an_engine(served: Served) -> None:
    engine = ("--engine", "a-engine-1")
    assert served.documents()["a-engine-1"]["affinity"] is None
    said = served.say("show", "--affinity", *engine)
    assert "the same tokens take (640 tokens of 64 passes of the first rank)" in said
    assert said.splitlines()[2].split() == ["0", "1", "3", "50", "2.50"]
    assert "No decision uses this" in said
    assert served.say("show", "--affinity", code=2) == "--engine: name one; known: a-engine-0, a-engine-1\n"


def test_affinity_of_an_engine_that_records_nothing_says_why(served: Served) -> None:
    idle = served.folder.root / "a" / "agent-1.json.idle"
    idle.touch()
    said = served.say("show", "--affinity", "--engine", "a-engine-1", "--timeout", "0.5", code=1)
    idle.unlink()
    assert "a-engine-1: no pass was recorded within 0.5 s. An engine without requests makes none" in said
    assert "passes outside CUDA graphs" in said


def test_a_wrong_token_and_the_mode_off_are_refused(served: Served) -> None:
    token = served.folder.root / "a" / "token"
    right = token.read_text()
    token.write_text("wrong\n")
    assert "a-engine-0 refused: Authorization: needed" in served.say(
        "rollback", "--engine", "a-engine-0", "--yes", code=1
    )
    token.write_text(f"newer\n{right}")
    served.say("rollback", "--engine", "a-engine-0", "--yes")
    token.write_text(right)
    served.set("scheduling.expert.mode=off")
    said = served.say("rollback", "--engine", "a-engine-0", "--yes", code=1)
    served.set("scheduling.expert.mode=dryRun")
    assert "refused: the mode is off" in said.replace(": : ", ": ")


def test_the_mode_changes_while_it_runs_and_shows_in_the_status(served: Served) -> None:
    served.set("scheduling.expert.mode=active", "scheduling.expert.maxStall=10ms")
    assert {document["mode"] for document in served.documents().values()} == {"active"}
    status = served.status()
    assert (status["experts"]["mode"], status["experts"]["balance"]) == ("active", 1.6)
    assert "experts: mode active, not balanced" in run("status", "a", *served.local)
    said = served.set("scheduling.expert.redundantExperts=2", code=2)
    assert said.startswith("spec.scheduling.expert.redundantExperts: cannot change while it runs")
    served.set("scheduling.expert.mode=dryRun")


def test_pictures_are_drawn_of_one_engine(served: Served, tmp_path: Path) -> None:
    png, svg = tmp_path / "a.png", tmp_path / "a.svg"
    served.say("show", "--engine", "a-engine-0", "--png", str(png), "--svg", str(svg))
    assert png.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in svg.read_bytes()
    assert "name one" in served.say("show", "--png", str(png), code=2)
    nowhere = str(tmp_path / "nowhere" / "a.png")
    assert "cannot be written" in served.say("show", "--engine", "a-engine-0", "--png", nowhere, code=1)


def test_a_picture_without_matplotlib_names_what_to_install(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = served.say("show", "--engine", "a-engine-0", "--png", "a.png", code=1)
    assert said == "a picture needs matplotlib: pip install 'moeserving[bench]'\n"


KUBECTL = (
    KUBECTL_HEAD
    + """
if words[:2] == ["get", "pods"]:
    assert options["--selector"] == "app.kubernetes.io/instance=a,app.kubernetes.io/component=engine", options
    print(json.dumps({{"items": {pods}}}))
elif words[:2] == ["get", "secret"]:
    assert words[2] == "a-control", words
    print(json.dumps({{"data": {{"token": "{token}"}}}}))
else:
    pod = words[1].removeprefix("pod/")
    if pod == "gone":
        sys.exit("error: unable to forward port because pod is not running")
    print("Forwarding from 127.0.0.1:" + {ports}[pod] + " -> 8080")
    time.sleep(600)
"""
)


def pod(name: str, **changes: Any) -> dict[str, Any]:
    ports = [{"name": "engine", "containerPort": 8000}, {"name": "agent", "containerPort": 8080}]
    return {
        "metadata": {"name": name, "labels": {}},
        "spec": {"containers": [{"name": "engine", "ports": ports}]},
        "status": {"phase": "Running"},
    } | changes


@pytest.fixture
def kubectl(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl on the PATH that knows the same two agents as pods."""
    ports = {f"pod-{index}": row.url.rpartition(":")[2] for index, row in enumerate(served.record().agents)}
    token = base64.b64encode(served.folder.token.read_bytes()).decode()
    script = tmp_path / "kubectl"
    text = KUBECTL.format(python=sys.executable, pods=[pod(name) for name in ports], token=token, ports=ports)
    script.write_text(text)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return script


def test_in_a_cluster_the_way_leads_through_kubectl(served: Served, kubectl: Path) -> None:
    assert list(json.loads(say("show", "a", "-n", "ns", "--json"))) == ["pod-0", "pod-1"]
    version, _ = served.placement("a-engine-0")
    assert f"pod-0: placement {version + 1}: rolledBack" in say(
        "rollback", "a", "-n", "ns", "--engine", "pod-0", "--yes"
    )
    assert served.placement("a-engine-0")[0] == version + 1


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("Forwarding from 127.0.0.1:4711 -> 8080\n", "127.0.0.1:4711"),
        ("Forwarding from [::1]:4711 -> 8080\n", "[::1]:4711"),
        ("error: no pod\n", None),
    ],
)
def test_kubectl_forwards_from_the_loopback_address_of_either_family(line: str, address: str | None) -> None:
    found = reach._FORWARDING.match(line)
    assert (None if found is None else found[1]) == address


def test_what_kubectl_refuses_is_shown_in_its_last_line(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert say("show", "a", "-n", "other", code=1) == "kubectl: Error from server (Forbidden): not there\n"
    text = kubectl.read_text()
    kubectl.write_text(text.replace("'name': 'pod-1'", "'name': 'gone'"))
    said = say("show", "a", "-n", "ns", code=1)
    assert said == "kubectl: no way to the pod gone: error: unable to forward port because pod is not running\n"
    kubectl.write_text(text.replace("Running", "Pending"))
    assert say("show", "a", "-n", "ns", code=1) == "a: no engine runs there; see `kubectl get moes a`\n"
    assert say("show", "-n", "ns", code=2).startswith("NAME: name the deployment")
    monkeypatch.setenv("PATH", str(kubectl.parent / "nothing"))
    assert say("show", "a", "--context", "c", code=1).startswith("kubectl is missing")


def test_of_a_replica_on_several_nodes_the_first_is_asked() -> None:
    worker = {"leaderworkerset.sigs.k8s.io/worker-index": "1"}
    leader = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    pods = [
        pod("b-1", metadata={"name": "b-1", "labels": worker}),
        pod("b", metadata={"name": "b", "labels": leader}),
        pod("ends", metadata={"name": "ends", "labels": {}, "deletionTimestamp": "now"}),
        pod("bare", spec={"containers": [{"name": "engine"}]}),
    ]
    assert find_engines(pods) == {"b": 8080}


def test_the_command_for_kubectl_names_only_what_was_named() -> None:
    assert Cluster().command("get") == ["kubectl", "get"]
    assert Cluster(namespace="n", context="c").command("get") == [
        "kubectl",
        "--namespace",
        "n",
        "--context",
        "c",
        "get",
    ]


def test_a_change_without_load_says_that_its_worth_is_unknown() -> None:
    unknown = "4 experts move; its gain is not known, no load is recorded"
    assert command.describe_change(read(experts(load={"steps": 0})), CANDIDATE) == unknown
    with pytest.raises(InvalidInput):
        command.describe_change(read(experts()), [[0]])


def test_a_deployment_without_an_expert_group_says_so(tmp_path: Path) -> None:
    alone = Served(tmp_path, replicas=1, parallelism={"data": 2})
    try:
        said = alone.say("show", code=1)
    finally:
        alone.end()
    assert said == "a: no engine has an expert group; see spec.engine.parallelism.expert\n"


def test_the_brief_form_has_no_plan() -> None:
    assert read(in_brief(decided("dryRun", physical_to_logical=CANDIDATE))).newest.physical_to_logical is None  # type: ignore[union-attr]
