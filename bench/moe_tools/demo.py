"""`make demo`: the product's main job on this machine, from nothing to a measured comparison.

It makes the tiny model, serves it on two engines from the sample resource, asks a question, and measures our scheduling
beside vLLM's own order on a piece of a trace. State lies in the checkout's `.cache/demo`, so that it meets no other
deployment; the deployment is taken down at the end, however the end comes.
"""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput

from moe_tools.compare_command import Effort, measure_pairs
from moe_tools.comparison import compare_metrics, render_comparison
from moe_tools.deployment import Deployment
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.replay_command import Source, check_source
from moe_tools.server import call_json, discover_model, run_async
from moe_tools.streaming import Endpoint
from moe_tools.tiny import ensure_tiny_model, read_report
from moe_tools.tiny.report import render_report

SAMPLE = Path("manifests") / "local-cpu.yaml"
NEIGHBOUR_TRACE = Path("..") / "shared" / "traces" / "azure_llm_2023_conv.csv"
QUESTION = "What does os.path.join do?"
ANSWER_TOKENS = 60
READY_TIMEOUT_S = 300.0
FALLBACK_SHAPE = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is served, and where."""

    checkout: Path
    manifest: Path
    deployment: Deployment
    port: int

    @property
    def url(self) -> str:
        """The gateway's."""
        return f"http://127.0.0.1:{self.port}"


def run_demo(*, trace: Path | None, manifest: Path | None, effort: Effort, seed: int) -> None:
    """The whole story. A step that fails ends it after the deployment is down."""
    say = ProgressPrinter()
    scene = set_scene(manifest)
    source = choose_source(scene.checkout, trace, seed, say)
    check_source(source)
    if manifest is None:
        make_model(scene.checkout / ".cache" / "models" / "tiny", say)
    with stopped_by_signals(), served(scene, say, wait_ready):
        say(f"asking: {QUESTION}")
        say(f"answer: {run_async(ask(scene.url, QUESTION))}")
        pairs, _ = run_async(measure_pairs(scene.deployment, scene.url, None, source, effort, say))
    say.console.print(render_comparison(compare_metrics(pairs), pairs))


def set_scene(manifest: Path | None, place: str = "demo") -> Scene:
    """Finds the checkout, reads the deployment's name, picks a free port; the state is in the folder `place`."""
    checkout = find_checkout()
    path = (manifest or checkout / SAMPLE).absolute()
    state_dir = checkout / ".cache" / place
    return Scene(
        checkout=checkout,
        manifest=path,
        deployment=Deployment(name=read_name(path), state_dir=state_dir),
        port=free_port(),
    )


def find_checkout() -> Path:
    """The folder with the samples: the working folder, or the one this file is installed from."""
    candidates = (Path.cwd(), Path(__file__).resolve().parents[2])
    for folder in candidates:
        if (folder / SAMPLE).is_file():
            return folder
    raise InvalidInput([InputError(str(SAMPLE), "not found: run this in a checkout of MoEServing")])


def read_name(manifest: Path) -> str:
    """`metadata.name`; everything else about the resource is for `moeserving up` to judge."""
    import yaml

    try:
        document: Any = yaml.safe_load(manifest.read_text("utf-8"))
        return str(document["metadata"]["name"])
    except OSError as error:
        raise InvalidInput([InputError(str(manifest), f"cannot be read: {error.strerror}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise InvalidInput([InputError(str(manifest), "is not a resource with a metadata.name")]) from None


def choose_source(checkout: Path, trace: Path | None, seed: int, say: ProgressPrinter) -> Source:
    """The trace asked for, else one that lies beside the checkout, else a generated shape."""
    neighbour = checkout / NEIGHBOUR_TRACE
    if trace or neighbour.is_file():
        path = trace or neighbour.resolve()
        say(f"requests: the trace {path}")
        return Source(trace=path, seed=seed)
    say(f"requests: the generated shape '{FALLBACK_SHAPE}' (no trace found; name one with --trace or MOESERVING_TRACE)")
    return Source(shape=FALLBACK_SHAPE, limit=2000, seed=seed)


def make_model(directory: Path, say: ProgressPrinter) -> None:
    """Makes the model, or finds it."""
    say("model: a Mixture-of-Experts model of 9 M parameters, trained here in about a minute, or found from before")
    ensure_tiny_model(directory)
    for line in render_report(read_report(directory) or {}).splitlines():
        say(f"  {line}")


@contextmanager
def served(scene: Scene, say: ProgressPrinter, wait: Callable[[str], None]) -> Iterator[None]:
    """Up before, down after, whatever happens between. `wait` returns when the URL serves."""
    up = [*scene.deployment.arguments("up")[:2], "-f", str(scene.manifest), "--detach", "--port", str(scene.port)]
    place = ["--state-dir", str(scene.deployment.state_dir)]
    say(f"starting the engines and the gateway: moeserving {' '.join(up[1:])}")
    try:
        if subprocess.run([*up, *place], check=False).returncode != 0:
            raise InvalidInput([InputError(str(scene.manifest), "moeserving up failed; its own words are above")])
        wait(scene.url)
        say(f"serving at {scene.url}")
        yield
    finally:
        say("stopping: moeserving down")
        scene.deployment.down()


def wait_ready(url: str) -> None:
    """Waits until the gateway lists its model."""
    run_async(wait_until_ready(url))


async def wait_until_ready(url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Until the gateway lists its model."""
    endpoint = Endpoint.parse(url)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + timeout_s
    while True:
        try:
            await discover_model(endpoint)
            return
        except InvalidInput:
            if loop.time() > give_up_s:
                raise
        await asyncio.sleep(0.5)


async def ask(url: str, question: str) -> str:
    """One chat question; the answer's text in one line."""
    endpoint = Endpoint.parse(url)
    served_model = await discover_model(endpoint)
    body = {
        "model": served_model.name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": ANSWER_TOKENS,
        "min_tokens": ANSWER_TOKENS // 4,
        "temperature": 0.5,
        "seed": 1,
    }
    answer = await call_json(endpoint, "POST", "/v1/chat/completions", body)
    return " ".join(str(answer["choices"][0]["message"]["content"]).split())


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """A polite request to end becomes a KeyboardInterrupt, so that what was started is stopped."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
