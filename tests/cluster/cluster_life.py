"""Up, down and status of a test cluster, for the command and the fixtures.

The state folder is the cluster's identity: `cluster.json` in it, written before anything starts, says what was begun.
Whatever ended in between, `down` finds the processes by their mark and the rest from that file.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_node
from cluster_api import ApiCluster, Endpoints
from cluster_binaries import cache_folder, locate_all
from cluster_node import NodeCluster
from cluster_problem import ClusterProblem
from cluster_processes import Processes
from filelock import FileLock

CLASSES: dict[str, type[ApiCluster]] = {"api": ApiCluster, "node": NodeCluster}


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """`cluster` is None when there is none; `down` are its parts that do not run."""

    cluster: ApiCluster | None
    running: tuple[str, ...] = ()
    down: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        return self.cluster is not None and not self.down


def default_state_dir(level: str) -> Path:
    state_home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state_home) / "moeserving-test-cluster" / level


def up(level: str, state_dir: Path, *, tied: bool = False) -> ApiCluster:
    """The cluster in this folder: the one that runs, or a new one. Remains of a broken one are removed first.

    A `tied` cluster ends with this process, however that ends.
    """
    state_dir = state_dir.absolute()
    locate_all(CLASSES[level].programs)
    with lock():
        check_ours(state_dir)
        present = status(state_dir)
        if present.cluster and present.is_whole:
            if present.cluster.level != level:
                raise ClusterProblem(
                    f"{state_dir}: a cluster of level {present.cluster.level} is up there; see --state-dir"
                )
            return present.cluster
        clear(state_dir)
        cluster = CLASSES[level].new(state_dir, tied=tied)
        record = cluster.record()
        write_record(state_dir, record | {"ready": False})
        cluster.start()
        write_record(state_dir, record | {"ready": True})
        return cluster


def down(state_dir: Path) -> bool:
    """Ends the cluster and removes its traces; False when there was nothing."""
    state_dir = state_dir.absolute()
    with lock():
        check_ours(state_dir)
        return clear(state_dir)


def clear(state_dir: Path) -> bool:
    """Removes all of the cluster in this folder; False when there was nothing."""
    processes = Processes(state_dir=state_dir)
    if not state_dir.exists() and not any(processes.all()):
        return False
    processes.kill_all()
    record = read_record(state_dir)
    cluster_node.remove_traces(state_dir, record.get("made", []), record.get("number"))
    if state_dir.exists():
        shutil.rmtree(state_dir)
    return True


def status(state_dir: Path) -> Status:
    """What runs of the cluster in this folder."""
    state_dir = state_dir.absolute()
    record = read_record(state_dir)
    if not record.get("ready"):
        return Status(cluster=None)
    cluster = CLASSES[record["level"]](state_dir, Endpoints(**record["endpoints"]))
    running = cluster.processes.running()
    return Status(
        cluster=cluster,
        running=tuple(part for part in cluster.parts if part in running),
        down=tuple(part for part in cluster.parts if part not in running),
    )


def write_record(state_dir: Path, record: dict[str, object]) -> None:
    state_dir.mkdir(parents=True, exist_ok=True)
    path = record_path(state_dir)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=1))
    fresh.rename(path)


def read_record(state_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(record_path(state_dir).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def record_path(state_dir: Path) -> Path:
    return state_dir / "cluster.json"


def check_ours(state_dir: Path) -> None:
    """A folder with other things in it is not ours to remove."""
    if state_dir.exists() and any(state_dir.iterdir()) and not any(state_dir.glob("cluster.*")):
        raise ClusterProblem(f"{state_dir}: not empty, and no test cluster; name another --state-dir")


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One cluster starts or ends at a time on this machine."""
    path = cache_folder() / "cluster.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield
