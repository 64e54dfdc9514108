"""A deployment on this machine, handled through the `moeserving` command as a user would.

`DeploymentPlan` names the model, the engines and their folder; `served` keeps it running for the length of a block.
Called by the demo and by the benches on real engines. The state of a deployment that a tool starts lies in the
checkout's `.cache`, so that it meets no deployment of the user's.
"""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from moe_contract.input_errors import InputError, InvalidInput

from moe_tools.progress_printer import ProgressPrinter
from moe_tools.server import discover_model, run_async
from moe_tools.streaming import ServerAddress

COMMAND = Path(sys.executable).with_name("moeserving")
SAMPLE = Path("manifests") / "local-cpu.yaml"
READY_TIMEOUT_S = 300.0
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A running deployment by its name. `state_dir` None: where `moeserving` keeps its state by default."""

    name: str
    state_dir: Path | None = None

    def arguments(self, verb: str, *rest: str) -> list[str]:
        """The command line of a verb on this deployment."""
        place = ["--state-dir", str(self.state_dir)] if self.state_dir else []
        return [str(COMMAND), verb, self.name, *rest, *place]

    async def set(self, settings: Sequence[str]) -> None:
        """Runs `moeserving set`.

        Raises:
            InvalidInput: the command refuses; the message has its output.
        """
        process = await asyncio.create_subprocess_exec(
            *self.arguments("set", *settings), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise InvalidInput([InputError(f"moeserving set {self.name}", output.decode("utf-8", "replace").strip())])

    def down(self) -> int:
        """Runs `moeserving down`; returns its exit status."""
        return subprocess.run(self.arguments("down"), check=False).returncode


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentPlan:
    """The resource to serve, the folder of its state and the gateway's port."""

    checkout: Path
    manifest: Path
    deployment: Deployment
    port: int

    @property
    def url(self) -> str:
        """Address of the gateway on this machine."""
        return f"http://127.0.0.1:{self.port}"


def plan_deployment(manifest: Path | None, folder: str) -> DeploymentPlan:
    """Reads the deployment's name from the manifest (None: the sample) and picks a free port.

    Args:
        manifest: the resource.
        folder: name of the state's folder in the checkout's `.cache`.

    Raises:
        InvalidInput: there is no checkout, or the manifest has no name.
    """
    checkout = find_checkout()
    path = (manifest or checkout / SAMPLE).absolute()
    return DeploymentPlan(
        checkout=checkout,
        manifest=path,
        deployment=Deployment(name=read_name(path), state_dir=checkout / ".cache" / folder),
        port=free_port(),
    )


def find_checkout() -> Path:
    """The folder with the samples: the working folder, or the one this file is installed from.

    Raises:
        InvalidInput: neither has them.
    """
    candidates = (Path.cwd(), Path(__file__).resolve().parents[2])
    for folder in candidates:
        if (folder / SAMPLE).is_file():
            return folder
    raise InvalidInput([InputError(str(SAMPLE), "not found: run this in a checkout of MoEServing")])


def read_name(manifest: Path) -> str:
    """`metadata.name` of a manifest; `moeserving up` validates the rest.

    Raises:
        InvalidInput: the file cannot be read or has no name.
    """
    import yaml

    try:
        document: Any = yaml.safe_load(manifest.read_text("utf-8"))
        return str(document["metadata"]["name"])
    except OSError as error:
        raise InvalidInput([InputError(str(manifest), f"cannot be read: {error.strerror}")]) from None
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError):
        raise InvalidInput([InputError(str(manifest), "is not a resource with a metadata.name")]) from None


@contextmanager
def served(plan: DeploymentPlan, say: ProgressPrinter, wait: Callable[[str], None]) -> Iterator[None]:
    """Runs `moeserving up` before the block and `moeserving down` after it, however the block ends.

    Args:
        plan: the deployment.
        say: gets a line for each stage.
        wait: returns when the URL serves.

    Raises:
        InvalidInput: `moeserving up` fails.
    """
    up = [*plan.deployment.arguments("up")[:2], "-f", str(plan.manifest), "--detach", "--port", str(plan.port)]
    state = ["--state-dir", str(plan.deployment.state_dir)]
    shown = plan.manifest.relative_to(Path.cwd()) if plan.manifest.is_relative_to(Path.cwd()) else plan.manifest
    say(f"starting the engines and the gateway: moeserving up -f {shown} --detach --port {plan.port}")
    try:
        if subprocess.run([*up, *state], check=False).returncode != 0:
            raise InvalidInput([InputError(str(plan.manifest), "moeserving up failed; its output is above")])
        wait(plan.url)
        say(f"serving at {plan.url}")
        yield
    finally:
        say("stopping: moeserving down")
        plan.deployment.down()


def wait_ready(url: str) -> None:
    """Returns when the gateway lists its model."""
    run_async(wait_until_ready(url))


async def wait_until_ready(url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Returns when the gateway lists its model.

    Raises:
        InvalidInput: it does not within `timeout_s`; the message is that of the last attempt.
    """
    endpoint = ServerAddress.parse(url)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + timeout_s
    while True:
        try:
            await discover_model(endpoint)
            return
        except InvalidInput:
            if loop.time() > give_up_s:
                raise
        await asyncio.sleep(_POLL_S)


def free_port() -> int:
    """A port that no process listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt within the block, so that everything started is stopped."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
