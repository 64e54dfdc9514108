"""How far the engines of a deployment are on their way to readiness, in one line."""

import os
import re
import time
from collections.abc import Mapping

from moe_operator.api import load_resource
from moe_operator.api.status import EnginePhase
from moe_operator.local.folder import Folder
from moe_operator.local.start_phases import Download, StartLog, find_model_cache


class StartWatch:
    """Reads the engines' logs, and the cache into which a model is downloaded.

    Args:
        folder: of the deployment.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._logs: dict[str, StartLog] = {}
        self._download: Download | None = None
        spec = load_resource(folder.resource).spec if folder.resource.exists() else None
        if spec is not None:
            cache = find_model_cache(spec.model.uri, os.environ | dict(spec.engine.env))
            self._download = None if cache is None else Download(cache)

    def describe(self, phases: Mapping[str, str], elapsed_s: float) -> tuple[str, str]:
        """The line, and what of it changes with a phase and not with its numbers.

        Args:
            phases: of each engine, by its name.
            elapsed_s: since the start.
        """
        download = "" if self._download is None else self._download.describe(time.monotonic())
        words = {name: self._describe_engine(name, phase, download) for name, phase in phases.items()}
        said = join_phases(self._folder.name, words)
        return f"{self._folder.name}: {elapsed_s:.0f} s: {said}", re.sub(r"[\d.,]+", "", said)

    def _describe_engine(self, name: str, phase: str, download: str) -> str:
        if phase == EnginePhase.UNKNOWN:
            return "waits for its agent"
        if phase != EnginePhase.STARTING:
            return phase
        if name not in self._logs:
            self._logs[name] = StartLog(self._folder.log(name.removeprefix(f"{self._folder.name}-")))
        return download or self._logs[name].read_phase()


def join_phases(deployment: str, phases: Mapping[str, str]) -> str:
    """`engine-0 ready, engine-1 compiling`, and `2 engines: compiling` where all are at the same point. Pure."""
    different = set(phases.values())
    if len(phases) > 1 and len(different) == 1:
        return f"{len(phases)} engines: {different.pop()}"
    return ", ".join(f"{name.removeprefix(f'{deployment}-')} {phase}" for name, phase in phases.items())
