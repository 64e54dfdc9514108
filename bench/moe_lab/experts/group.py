"""The product's real expert group on this machine: planned from the sample, run by `moeserving up`, directed over its
agent.

The bench uses the protocol `RunningGroup`; tests put another implementation in its place.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_contract.experts_state import ExpertsState, Slots
from moe_contract.input_errors import InputError, InvalidInput
from moe_operator.api import load_resource
from moe_operator.experts.calls import fetch_experts, fetch_settings, send_directive
from moe_operator.experts.reach import Agent, Reached, reach_local
from moe_operator.local.folder import Folder
from moe_operator.local.model import check_model
from moe_scheduling.expert.decision import ExpertSettings
from moe_tools.deployment import Deployment, DeploymentPlan, find_checkout, plan_deployment, served, wait_ready
from moe_tools.progress_printer import ProgressPrinter
from moe_tools.server import call_json
from moe_tools.streaming import ServerAddress

SAMPLE = Path("manifests") / "local-cpu-experts.yaml"
MODEL = Path(".cache") / "models" / "tiny"
PLACE = "bench-experts"
# A and B of a pair have the same prompts: the second must not find the first's in a cache.
NO_PREFIX_CACHE = "--no-enable-prefix-caching"
# Each rank has the same number of requests whatever the gateway has learnt: nothing but the experts differs.
EVENLY = {"engine": {"policy": "roundRobin"}}


class RunningGroup(Protocol):
    """An expert group that runs."""

    async def look(self) -> ExpertsState:
        """What the group says of its experts."""
        ...

    async def read_steps(self) -> int:
        """Steps since the start, of the rank that made most."""
        ...

    async def apply(self, slots: Slots) -> None:
        """Asks for a placement; it moves with the next steps."""
        ...

    async def set(self, settings: Sequence[str]) -> None:
        """Changes settings given as `PATH=VALUE`, as `moeserving set` does."""
        ...

    async def read_settings(self) -> ExpertSettings:
        """The settings of moving that are in force."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalGroup:
    """The one engine of a deployment on this machine."""

    deployment: Deployment
    reached: Reached

    @property
    def _agent(self) -> Agent:
        return self.reached.agents[0]

    async def look(self) -> ExpertsState:
        """Returns the experts' state of the group's engine."""
        return (await fetch_experts(self.reached))[self._agent.engine]

    async def read_steps(self) -> int:
        """Returns the greatest step number of the engine's ranks."""
        state = await call_json(ServerAddress.parse(self._agent.url), "GET", "/v1/state")
        return max(int(row["step"]) for row in state["ranks"])

    async def apply(self, slots: Slots) -> None:
        """Asks the engine for a placement, `[layer][slot]`; returns before it is in force."""
        body = {"action": "apply", "physical_to_logical": [list(row) for row in slots]}
        await send_directive(self._agent, self.reached.tokens, body)

    async def set(self, settings: Sequence[str]) -> None:
        """Changes settings of the deployment, given as `PATH=VALUE`."""
        await self.deployment.set(settings)

    async def read_settings(self) -> ExpertSettings:
        """Returns the expert settings in force at the agent."""
        return await fetch_settings(self._agent)


def plan_group(model: Path | None, *, interval_steps: int, window_steps: int) -> DeploymentPlan:
    """Writes the resource into the checkout's `.cache/bench-experts`: the sample, with this model, only observing.

    Raises:
        InvalidInput: the folder has no model, or the group cannot have it.
    """
    checkout = find_checkout()
    folder = checkout / ".cache" / PLACE
    path = folder / SAMPLE.name
    document = edit_sample(read_sample(checkout), (model or checkout / MODEL).absolute(), interval_steps, window_steps)
    _write(path, document)
    resource = load_resource(path)
    check_model(resource)
    return plan_deployment(path, PLACE)


def read_sample(checkout: Path) -> dict[str, Any]:
    """The sample of an expert group on CPUs."""
    import yaml

    document: dict[str, Any] = yaml.safe_load((checkout / SAMPLE).read_text("utf-8"))
    return document


def edit_sample(document: dict[str, Any], model: Path, interval_steps: int, window_steps: int) -> dict[str, Any]:
    """The sample with what the bench needs. Pure; the given document stays as it is."""
    spec = document["spec"]
    expert = spec["scheduling"]["expert"] | {"mode": "observe", "interval": interval_steps, "window": window_steps}
    engine = spec["engine"] | {"args": [*spec["engine"]["args"], NO_PREFIX_CACHE]}
    changed = {"model": {"uri": f"file://{model}"}, "engine": engine, "scheduling": {**EVENLY, "expert": expert}}
    return document | {"spec": spec | changed}


def _write(path: Path, document: dict[str, Any]) -> None:
    import yaml

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    except OSError as error:
        raise InvalidInput([InputError(str(path), f"cannot be written: {error.strerror}")]) from None


@contextlib.contextmanager
def standing(plan: DeploymentPlan, say: ProgressPrinter) -> Iterator[LocalGroup]:
    """Starts the group and gives it when it serves; stops it, however the block ends.

    Raises:
        InvalidInput: `moeserving up` fails.
        Failure: it has ended again.
    """
    with served(plan, say, wait_ready):
        assert plan.deployment.state_dir is not None
        folder = Folder(root=plan.deployment.state_dir, name=plan.deployment.name)
        yield LocalGroup(deployment=plan.deployment, reached=reach_local(folder))
