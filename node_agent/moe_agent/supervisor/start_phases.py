"""How far an engine's start is, by the lines that vLLM logs, and how much of its model is downloaded.

Read by the agent alone, which publishes it as `StartProgress`; nothing is read once the engine is ready.
"""

import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from moe_contract.agent_state import StartProgress
from moe_contract.quantities import describe_bytes, describe_time

# Phase, and how far it is, by what a line of the log has, vLLM 0.32 and 0.33; the newest line that has one decides.
_PHASES = (
    (r"Loading [\w ]*checkpoint shards:\s+\d+% Completed \| (\d+)/(\d+)", "loading weights", "{} of {} files"),
    (r"Capturing CUDA graphs[^:]*:\s+\d+%\|[^|]*\| (\d+)/(\d+)", "capturing graphs", "{} of {}"),
    (r"non-default args: ", "reading the model's configuration", ""),
    (r"Resolved architecture: (\w+)", "starting the engine core", "of {}"),
    (r"Initializing a V1 LLM engine", "setting up devices", ""),
    (r"Starting to load model", "loading weights", ""),
    (r"Time spent downloading weights", "loading weights", ""),
    (r"Loading weights took", "weights are loaded", ""),
    (r"for vLLM's torch.compile|Dynamo bytecode transform time|Compiling a graph for", "compiling", ""),
    (r"Warming up model for the compilation", "compiling", ""),
    (r"Available KV cache memory", "measuring room for the KV cache", ""),
    (r"KV cache size: ([\d,]+) tokens", "making the KV cache", "of {} tokens"),
    (r"Graph capturing finished", "graphs are captured", ""),
    (r"init engine \(profile, create kv cache", "starting the HTTP server", ""),
    (r"Application startup complete", "answers soon", ""),
)
_KNOWN = re.compile("|".join(f"(?P<p{number}>{pattern})" for number, (pattern, _, _) in enumerate(_PHASES)))
FIRST_PHASE = ("loading Python packages", "")
_MOST_BYTES = 1024 * 1024
# All phases stand near the beginning of their lines; other lines may be as long as a chat template.
_MOST_LINE = 1000
# The end of a line that is not complete yet may have a phase: bars are rewritten in place.
_MOST_REST = 4096
LOOK_EVERY_S = 1.0

Phase = tuple[str, str]


def find_phase(text: str) -> Phase | None:
    """Phase and progress of the newest known line of a log; None where none is known. Pure."""
    found = None
    for line in re.split(r"[\r\n]+", text):
        found = _KNOWN.search(line[:_MOST_LINE]) or found
    if found is None:
        return None
    number = next(index for index in range(len(_PHASES)) if found[f"p{index}"] is not None)
    pattern, phase, progress = _PHASES[number]
    match = re.search(pattern, found[f"p{number}"])
    return phase, progress.format(*(match.groups() if match else ()))


class StartLog:
    """Follows the log of one engine from now on.

    Args:
        path: of the log; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._rest, self._phase = path, "", FIRST_PHASE
        self._position = path.stat().st_size if path.exists() else 0

    def read_phase(self) -> Phase:
        """The present phase and its progress."""
        try:
            size = self._path.stat().st_size
            if size < self._position:
                self._position, self._rest = 0, ""
            with self._path.open("rb") as file:
                file.seek(max(self._position, size - _MOST_BYTES))
                text = self._rest + file.read().decode(errors="replace")
                self._position = file.tell()
        except OSError:
            return self._phase
        self._phase = find_phase(text) or self._phase
        self._rest = text[-_MOST_REST:].rpartition("\n")[2]
        return self._phase


# A download that does not grow for this time has ended, or hangs, which the phase then says no more.
_STILL_S = 10.0
_RATE_WINDOW_S = 20.0
# A larger model than this has no true index.
_MOST_TOTAL = 10**15


class Download:
    """The part of a model of the Hugging Face hub that is in this machine's cache.

    Args:
        folder: `models--ORG--NAME` of the cache; it may not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._looks: deque[tuple[float, int]] = deque()
        self._grown_s: float | None = None
        # The index of a large model has megabytes: it is read once.
        self._total: int | None = None

    def describe(self, now_s: float) -> str:
        """`1.2 GB of 3.1 GB, 45 MB/s, about 42 s left`; empty while nothing comes.

        Args:
            now_s: monotonic time.
        """
        size = sum_sizes(self._folder / "blobs")
        if self._looks and size > self._looks[-1][1]:
            self._grown_s = now_s
        self._looks.append((now_s, size))
        while now_s - self._looks[0][0] > _RATE_WINDOW_S:
            self._looks.popleft()
        if self._grown_s is None or now_s - self._grown_s > _STILL_S:
            return ""
        first_s, first = self._looks[0]
        rate = max(0.0, (size - first) / (now_s - first_s)) if now_s > first_s else 0.0
        if self._total is None:
            self._total = read_total(self._folder)
        return describe_download(size, self._total, rate)


def describe_download(size: int, total: int | None, rate: float) -> str:
    """The words of a download: bytes, of how many where that is known, bytes/s, time left. Pure."""
    whole = f" of {describe_bytes(total)}" if total is not None and total >= size else ""
    left = f", about {describe_time((total - size) / rate)} left" if whole and total is not None and rate > 0 else ""
    return f"{describe_bytes(size)}{whole}, {describe_bytes(rate)}/s{left}"


def sum_sizes(folder: Path) -> int:
    """Bytes of the files in a folder, of those that are not complete too; 0 without the folder."""
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            # One that is complete gets another name.
            with suppress(OSError):
                total += path.stat().st_size
    return total


def read_total(folder: Path) -> int | None:
    """Bytes of a model's weights, by the index that lies beside them; None before that is there.

    The index comes with the model, and may say anything.
    """
    for path in folder.glob("snapshots/*/*.safetensors.index.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            total = int(json.loads(path.read_bytes())["metadata"]["total_size"])
            if 0 < total <= _MOST_TOTAL:
                return total
    return None


def find_model_cache(model: str, environment: Mapping[str, str]) -> Path | None:
    """The folder of a model in the hub's cache; None for one from elsewhere.

    Args:
        model: folder, id on the hub, or `s3://` address.
        environment: of the engine.
    """
    if model.startswith("/") or "://" in model:
        return None
    home = Path(environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "huggingface"
    hub = environment.get("HF_HUB_CACHE") or Path(environment.get("HF_HOME") or home) / "hub"
    return Path(hub) / f"models--{model.replace('/', '--')}"


class StartWatch:
    """How far the start of an engine is, looked at once in `LOOK_EVERY_S` at most.

    Args:
        log: the engine's log.
        cache: folder of the model in the hub's cache; None where it does not come from there.
        clock: monotonic seconds.

    Attributes:
        version: rises whenever the words change.
    """

    def __init__(self, log: Path, cache: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._cache, self._clock = log, cache, clock
        self.version = 0
        self.begin()

    def begin(self) -> None:
        """A start begins: what the log has until now is of another one."""
        self._log = StartLog(self._path)
        self._download = None if self._cache is None else Download(self._cache)
        self._looked_s = self._since_s = self._clock()
        self._phase = FIRST_PHASE
        self.version += 1

    def look(self) -> None:
        """Reads the log and the cache, where it is time."""
        now_s = self._clock()
        if now_s - self._looked_s < LOOK_EVERY_S:
            return
        self._looked_s = now_s
        phase = self._log.read_phase()
        if self._download is not None and (progress := self._download.describe(now_s)):
            phase = ("downloading", progress)
        if phase != self._phase:
            self._since_s = self._since_s if phase[0] == self._phase[0] else now_s
            self._phase = phase
            self.version += 1

    def progress(self) -> StartProgress:
        """How far the start is, with its age as of now."""
        self.look()
        phase, progress = self._phase
        return StartProgress(phase=phase, progress=progress, age_s=round(self._clock() - self._since_s, 1))
