"""`state.json`: what the supervisor says about the deployment. It is the file's only writer once it runs."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
from moe_contract.addresses import LOOPBACK
from pydantic import TypeAdapter, ValidationError

from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, write_whole

GATEWAY = "gateway"
AGENT = "agent-"
PROMETHEUS = "prometheus"
SUPERVISOR = "supervisor"


class Life(StrEnum):
    """What a supervised process is doing."""

    RUNNING = "running"
    BACKOFF = "backoff"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """A process by its id and start time (seconds since 1970, as psutil counts), since ids are used again."""

    pid: int
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """One supervised process.

    Attributes:
        name: `gateway`, `agent-0` and so on, or `prometheus`.
        command: what runs.
        url: where it answers about itself.
        process: the living process; None while there is none.
        restarts: times that it was started again.
        last_exit: how it last ended by itself; empty when it never did.
    """

    name: str
    command: tuple[str, ...]
    url: str
    life: Life = Life.STOPPED
    process: Alive | None = None
    restarts: int = 0
    last_exit: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """The machine as it was planned with, so that a change is planned for the same one."""

    ports: tuple[int, ...]
    cpus: int
    memory_bytes: int
    gpus: tuple[str, ...]
    host: str = LOOPBACK
    secrets_dir: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The whole file.

    Attributes:
        endpoint: URL for clients.
        served_name: what clients put into `model`.
        drain_timeout_s: time that running streams have when the deployment stops.
        draining: whether it is stopping.
        ready: whether the gateway accepted requests when it was last asked.
        ready_changed: when `ready` last changed (seconds since 1970).
        supervisor: None until it has begun.
    """

    name: str
    endpoint: str
    served_name: str
    drain_timeout_s: float
    site: SiteRecord
    processes: tuple[ProcessRecord, ...]
    supervisor: Alive | None = None
    draining: bool = False
    ready: bool = False
    ready_changed: float

    @property
    def gateway(self) -> ProcessRecord:
        """The record of the gateway's process."""
        return next(row for row in self.processes if row.name == GATEWAY)

    @property
    def agents(self) -> tuple[ProcessRecord, ...]:
        """The agents' rows, in the order of their numbers."""
        return tuple(row for row in self.processes if row.name.startswith(AGENT))


_RECORD = TypeAdapter(Record)


def save_record(folder: Folder, record: Record) -> None:
    """Writes the file as a whole."""
    write_whole(folder.state, json.dumps(record_document(record), indent=1) + "\n")


def record_document(record: Record) -> dict[str, Any]:
    """The record as a JSON document."""
    return dict(_RECORD.dump_python(record, mode="json"))


def load_record(folder: Folder) -> Record | None:
    """The record; None when there is no deployment.

    Raises:
        Failure: the file is not one of ours.
    """
    try:
        return _RECORD.validate_json(folder.state.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Failure(f"{folder.state}: cannot be read: {error.strerror}") from None
    except ValidationError:
        raise Failure(f"{folder.state}: is not a state of this version; remove it if nothing runs") from None


def identify(pid: int) -> Alive:
    """The process that has this id now; one that is gone already matches none later."""
    try:
        return Alive(pid=pid, started=psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return Alive(pid=pid, started=0.0)


def find_process(alive: Alive | None) -> psutil.Process | None:
    """The process, if it is still that one and not only waits to be reaped."""
    if alive is None:
        return None
    try:
        process = psutil.Process(alive.pid)
        same = abs(process.create_time() - alive.started) < 0.5
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def leftovers(record: Record) -> list[psutil.Process]:
    """Processes of the record that are still alive."""
    return [process for row in record.processes if (process := find_process(row.process)) is not None]
