"""The whole on a real node: Helm, the operator in a pod, vLLM on the CPU in pods, clients through the Service."""

import asyncio
import copy
import itertools
import json
import threading
import time
from typing import Any

import aiohttp
import pytest
from cluster_problem import ClusterProblem
from deployed import OPERATOR_NAMESPACE, Kubectl, Serving, chat, chat_once, helm, is_ready, wait_for

pytestmark = pytest.mark.timeout(1500)
# A user that the images do not know, as OpenShift assigns them.
STRANGER = 1_000_710_000


class Load:
    """Chats from a thread until `stop`, `clients` at a time with a pause after each; keeps the outcome of each."""

    def __init__(self, url: str, clients: int, tokens: int = 48, repeats: int = 8, pause_s: float = 0.0) -> None:
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self._pause_s = pause_s
        self._url, self._clients, self._tokens, self._repeats = url, clients, tokens, repeats
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    async def _run(self) -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(self._client(session, number) for number in range(self._clients)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        for turn in itertools.count():
            if self._end.is_set():
                return
            text = f"{number} {turn}: what does os.path.join do? " * self._repeats
            try:
                status, body = await chat(session, self._url, text, max_tokens=self._tokens, stream=True)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.broken.append(repr(error))
                continue
            self.statuses.append(status)
            if status == 200 and "data: [DONE]" not in body:
                self.broken.append(body[-300:])
            await asyncio.sleep(self._pause_s)


class LongStream(threading.Thread):
    """One stream of many sequences, which takes a minute and more; `chunks` counts what came."""

    def __init__(self, url: str, seconds: float) -> None:
        super().__init__()
        self.chunks, self.status, self.ended, self.error = 0, 0, False, ""
        self.seconds = 0.0
        self._url, self._least_s = url, seconds
        self.start()

    def run(self) -> None:
        started_s = time.monotonic()
        try:
            asyncio.run(self._read())
        except Exception as error:  # reported by the test
            self.error = repr(error)
        self.seconds = time.monotonic() - started_s

    async def _read(self) -> None:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Tell a long story."}],
            "max_tokens": 3500,
            "n": 16,
            "ignore_eos": True,
            "stream": True,
        }
        timeout = aiohttp.ClientTimeout(total=900)
        async with (
            aiohttp.ClientSession(read_bufsize=1 << 22) as session,
            session.post(f"{self._url}/v1/chat/completions", json=body, timeout=timeout) as answer,
        ):
            self.status = answer.status
            async for line in answer.content:
                self.chunks += line.startswith(b"data: ")
                self.ended |= line.startswith(b"data: [DONE]")


@pytest.mark.smoke
def test_ten_lines_of_yaml_become_a_chat(serving: Serving) -> None:
    serving.apply()
    serving.wait_ready()
    status, body = chat_once(serving.url, "What does os.path.join do?")
    assert status == 200
    assert json.loads(body)["choices"][0]["message"]["content"]
    shown = serving.kubectl("get", "moes", serving.name)
    headings = ["NAME", "READY", "ENGINES", "DESIRED", "BALANCE", "TTFT", "AGE", "STATUS"]
    assert shown.splitlines()[0].split() == headings
    row = shown.splitlines()[1].split()
    assert (row[:4], row[-1]) == ([serving.name, "True", "1", "1"], "Serving")
    _change_of_the_ageing_rate_restarts_no_pod(serving)


def _change_of_the_ageing_rate_restarts_no_pod(serving: Serving) -> None:
    before = {pod["metadata"]["uid"] for component in ("engine", "gateway") for pod in serving.pods(component)}
    serving.apply(scheduling={"request": {"ageingRate": 123}})

    def in_force() -> bool:
        states = [agent_state(pod) for pod in serving.pods("engine")]
        return all(state["config"]["request"]["ageing_rate"] == 123 for state in states)

    wait_for("the engines have the new ageing rate", in_force, 30)
    after = [pod for component in ("engine", "gateway") for pod in serving.pods(component)]
    assert {pod["metadata"]["uid"] for pod in after} == before
    assert all(row["restartCount"] == 0 for pod in after for row in pod["status"]["containerStatuses"])


def agent_state(pod: Any) -> Any:
    """What an engine's agent says."""

    async def fetch() -> Any:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{pod['status']['podIP']}:8080/v1/state") as answer,
        ):
            return await answer.json()

    return asyncio.run(fetch())


def test_the_number_of_engines_follows_the_load_and_cuts_no_stream(serving: Serving) -> None:
    serving.apply(
        autoscaling={
            "minReplicas": 1,
            "maxReplicas": 2,
            "interval": "1s",
            "targets": {"queueWait": "200ms", "kvUsage": None},
            "scaleDown": {"stabilizationWindow": "10s"},
        }
    )
    serving.wait_ready()
    with Load(serving.url, clients=96) as load:
        wait_for("the load asks for a second engine", lambda: len(serving.pods("engine")) == 2, 120)
        wait_for("both engines are ready", lambda: len(serving.ready_engines()) == 2, 300)
    assert load.statuses
    assert set(load.statuses) == {200}
    assert load.broken == []
    stream = LongStream(serving.url, 60)
    wait_for("one engine is let go", lambda: len(serving.pods("engine")) == 1, 240)
    stream.join()
    assert (stream.status, stream.error, stream.ended) == (200, "", True)
    assert stream.seconds > 60, "the stream was to be a long one"


def test_a_pod_that_is_deleted_ends_its_streams_first(serving: Serving) -> None:
    serving.apply()
    serving.wait_ready()
    stream = LongStream(serving.url, 60)
    wait_for("the stream runs", lambda: stream.chunks > 20, 60)
    victim = serving.pods("engine")[0]["metadata"]["name"]
    serving.kubectl("delete", "pod", victim, "--wait=false")
    wait_for("another engine takes its place", serving.ready_engines, 300)
    assert chat_once(serving.url, "And now?")[0] == 200
    stream.join()
    assert (stream.status, stream.error, stream.ended) == (200, "", True)


def test_no_engine_runs_while_idle_and_the_next_request_wakes_one(serving: Serving) -> None:
    serving.apply(
        autoscaling={"minReplicas": 0, "maxReplicas": 1, "interval": "1s", "idleAfter": "10s"},
        gateway={"hold": {"requests": 3, "timeout": "5m"}},
    )
    serving.wait_ready()
    assert chat_once(serving.url, "First")[0] == 200
    wait_for("the last engine is let go", lambda: not serving.pods("engine"), 120)
    wait_for("the status says so", lambda: serving.condition("Ready").get("reason") == "ScaledToZero", 60)
    answers: list[tuple[int, str]] = []
    threads = [threading.Thread(target=lambda: answers.append(chat_once(serving.url, "Wake up"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for("the requests wake an engine", lambda: serving.pods("engine"), 60)
    refused = _post_beyond_the_hold(serving.url)
    assert refused[0] == 503
    assert int(refused[1]) >= 1
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200, 200, 200]


def _post_beyond_the_hold(url: str) -> tuple[int, str]:
    async def post() -> tuple[int, str]:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "One too many"}]}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/chat/completions", json=body) as answer,
        ):
            return answer.status, answer.headers.get("Retry-After", "")

    return asyncio.run(post())


def test_other_arguments_roll_the_engines_under_load_without_a_failed_request(serving: Serving) -> None:
    serving.apply()
    serving.wait_ready()
    before = {pod["metadata"]["uid"] for pod in serving.pods("engine")}
    with Load(serving.url, clients=4) as load:
        arguments = serving.spec["engine"]["args"]
        serving.apply(engine={"args": [*arguments, "--max-num-batched-tokens=1024"]})

        def rolled() -> bool:
            pods = serving.pods("engine")
            return len(pods) == 1 and pods[0]["metadata"]["uid"] not in before and is_ready(pods[0])

        wait_for("the new engine alone serves", rolled, 420)
        time.sleep(5)
    assert len(load.statuses) > 20
    assert set(load.statuses) == {200}
    assert load.broken == []


def test_names_of_services_and_a_user_without_a_home_keep_no_engine_from_starting(serving: Serving) -> None:
    """The kubelet itself sets variables for Services of these names where a pod does not ask for none."""
    serving.name = "vllm"
    for name in ("master", "ray", "vllm-port"):
        serving.kubectl("create", "service", "clusterip", name, "--tcp=80")
    serving.apply(engine={"podTemplate": as_a_stranger(serving.pod_template)})
    serving.wait_ready()
    assert chat_once(serving.url, "What does os.path.join do?")[0] == 200
    (engine,) = serving.pods("engine")
    name = engine["metadata"]["name"]
    assert serving.kubectl("exec", name, "--", "id", "-u").strip() == str(STRANGER)
    variables = serving.kubectl("exec", name, "--", "env").splitlines()
    assert not [row for row in variables if row.startswith(("MASTER_", "RAY_", "VLLM_PORT", "VLLM_SERVICE"))]
    with pytest.raises(ClusterProblem, match="Read-only file system"):
        serving.kubectl("exec", name, "--", "touch", "/etc/written")


def as_a_stranger(pod_template: dict[str, Any]) -> dict[str, Any]:
    """The pod template with a user that no passwd file knows, on a root file system that is read-only."""
    template = copy.deepcopy(pod_template)
    spec, (engine,) = template["spec"], template["spec"]["containers"]
    del engine["env"]
    spec["securityContext"] = {"runAsUser": STRANGER, "runAsGroup": STRANGER, "runAsNonRoot": True}
    engine["securityContext"] = {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    # On this machine the interpreter may lie below a folder that is root's own.
    spec["volumes"].append({"name": "entrance", "emptyDir": {}})
    engine["volumeMounts"].append({"name": "entrance", "mountPath": "/root"})
    return template


def test_what_is_wrong_stands_in_the_conditions(serving: Serving) -> None:
    serving.apply(engine={"image": "registry.invalid/no/such:image"})
    wrong_image = wait_for(
        "the image is named",
        lambda: (found := serving.condition("Degraded")).get("reason") == "ImageCannotBePulled" and found,
        90,
    )
    assert "registry.invalid/no/such:image" in wrong_image["message"]
    serving.spec = {}
    serving.apply(model={"uri": "hf://org/gated", "tokenSecret": {"name": "absent"}})
    missing = wait_for(
        "the secret is named",
        lambda: (found := serving.condition("Degraded")).get("reason") == "SecretMissing" and found,
        90,
    )
    assert 'secret "absent" not found' in missing["message"]


def test_more_than_the_nodes_have_is_reported(serving: Serving) -> None:
    serving.apply(engine={"runtime": "vllm", "parallelism": {"tensor": 8}, "resources": None})
    condition = wait_for(
        "the missing GPUs are named",
        lambda: (found := serving.condition("Degraded")).get("reason") == "Unschedulable" and found,
        60,
    )
    assert "nvidia.com/gpu: 8" in condition["message"]


def test_a_deleted_resource_leaves_nothing(serving: Serving) -> None:
    serving.apply()
    serving.wait_ready()
    serving.kubectl("delete", "moes", serving.name, "--timeout=240s")
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,pdb,networkpolicies,pvc,endpointslices"
    wait_for(
        "no child is left",
        lambda: not serving.kubectl.items(kinds, "app.kubernetes.io/managed-by=moeserving"),
        120,
    )


def test_helm_uninstall_leaves_nothing(operator: Kubectl, node_cluster: Any) -> None:
    helm(node_cluster, "uninstall", "moeserving", "--namespace", OPERATOR_NAMESPACE, "--wait")
    selector = "app.kubernetes.io/instance=moeserving"
    kinds = "all,configmaps,secrets,serviceaccounts,roles,rolebindings,clusterroles,clusterrolebindings,networkpolicies"
    wait_for("nothing of the chart is left", lambda: not operator.items(kinds, selector), 60)
