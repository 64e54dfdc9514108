"""Starts a deployment: from a resource to a supervisor that runs. Called by `moeserving up`.

Everything that can be refused is refused before the first file is written; the lock is taken before that and handed on
to the supervisor, so that two starts of one name never meet.
"""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from moe_contract.addresses import authority, http_url
from moe_contract.api_keys import read_keys
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api import MoEServing, dump_resource, parse_resource, resource_document, set_field
from moe_operator.local import launcher, machine
from moe_operator.local.failure import Failure
from moe_operator.local.folder import Folder, take_lock, write_whole
from moe_operator.local.model import check_model
from moe_operator.local.prometheus import add_prometheus, find_prometheus
from moe_operator.local.record import (
    AGENT,
    GATEWAY,
    ProcessRecord,
    Record,
    SiteRecord,
    find_process,
    leftovers,
    load_record,
    save_record,
)
from moe_operator.plan import LocalPlan, LocalSite, plan_local, ports_needed

# A file in the user's folder that is named like a module must not take its place.
PYTHON = (sys.executable, "-P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What runs as agent and as gateway; `--config FILE` follows."""

    agent: tuple[str, ...] = field(default_factory=lambda: (*PYTHON, "-m", "moe_agent"))
    gateway: tuple[str, ...] = field(default_factory=lambda: (*PYTHON, "-m", "moe_gateway"))


def name_resource(resource: MoEServing, name: str | None, port: int | None) -> MoEServing:
    """The resource under the name and port of the command line, which win over the file.

    Raises:
        InvalidInput: the name or port is none.
    """
    document = resource_document(resource)
    if name is not None:
        document = {**document, "metadata": {**document["metadata"], "name": name}}
    if port is not None:
        document = set_field(document, f"gateway.port={port}")
    return parse_resource(document)


def start(
    resource: MoEServing,
    folder: Folder,
    programs: Programs,
    *,
    tied: bool,
    secrets_dir: Path | None = None,
    metrics: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts the supervisor; `tied` ends it, with a drain, when this process ends.

    `secrets_dir` has the files of the gateway's Secrets; with `metrics` a Prometheus scrapes the processes.

    Raises:
        InvalidInput: the machine lacks what the resource needs, a port is taken, or the name is served already.
        Failure: the folder cannot be used.
    """
    prometheus = find_prometheus() if metrics else ""
    check_model(resource)
    check_port(resource, folder)
    folder.make()
    lock = take_lock(folder.lock)
    if lock is None:
        raise InvalidInput([_already_up(folder)])
    try:
        clean(folder)
        check_port_free(resource)
        site = find_site(resource, folder, secrets_dir)
        plan = plan_local(resource, site)
        check_secrets(plan)
        write_files(resource, folder, plan)
        record = build_record(resource, folder, site, plan, programs)
        save_record(folder, add_prometheus(record, folder, prometheus) if metrics else record)
        return _spawn(folder, lock, tied=tied)
    finally:
        os.close(lock)


def check_port(resource: MoEServing, folder: Folder) -> None:
    """Refuses a port that another program has; a running deployment of this name is named as the reason instead."""
    if not folder.state.exists():
        check_port_free(resource)


def check_port_free(resource: MoEServing) -> None:
    """Refuses a named port on which somebody listens."""
    port = resource.spec.gateway.port
    if port is not None and not machine.is_port_free(port):
        message = f"{port} is taken on {machine.HOST}; choose another, or none for a free one"
        raise InvalidInput([InputError("spec.gateway.port", message)])


def clean(folder: Folder) -> None:
    """Ends what a supervisor that was killed left behind. The lock is held, so nobody else looks after it.

    Its processes were asked to end when it did; they get the time to end their streams.
    """
    record = load_record(folder)
    if record is None:
        return
    _, alive = psutil.wait_procs(leftovers(record), timeout=record.drain_timeout_s)
    for process in alive:
        process.terminate()
    _, alive = psutil.wait_procs(alive, timeout=5.0)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=5.0)
    folder.page.unlink(missing_ok=True)
    folder.state.unlink(missing_ok=True)


def find_site(resource: MoEServing, folder: Folder, secrets_dir: Path | None = None) -> LocalSite:
    """This machine, with free ports chosen."""
    taken = [port] if (port := resource.spec.gateway.port) else []
    engine = resource.spec.engine
    bases = engine.count if engine.roles.apart else 0
    ports = machine.find_free_ports(ports_needed(resource) - bases, without=taken)
    site = SiteRecord(
        ports=ports + machine.find_free_ranges(bases, engine.parallelism.data, without=(*taken, *ports)),
        cpus=machine.count_cpus(),
        memory_bytes=machine.memory_bytes(),
        gpus=machine.find_gpus(),
        host=machine.HOST,
        secrets_dir=None if secrets_dir is None else secrets_dir.absolute(),
    )
    return site_of(folder, site)


def site_of(folder: Folder, site: SiteRecord) -> LocalSite:
    """A machine, as it is or as it was when the deployment started, with the deployment's own files."""
    return LocalSite(
        state_dir=folder.path,
        token_file=folder.token,
        ports=site.ports,
        cpus=site.cpus,
        memory_bytes=site.memory_bytes,
        gpus=site.gpus,
        host=site.host,
        secrets_dir=site.secrets_dir,
    )


def check_secrets(plan: LocalPlan) -> None:
    """Refuses keys that are not valid, and certificates that are not there, before a gateway fails on them."""
    auth, tls = plan.gateway.auth, plan.gateway.tls
    if auth is not None:
        read_keys(auth.key_dirs)
    if tls is None:
        return
    files = [tls.cert_dir / "tls.crt", tls.cert_dir / "tls.key"]
    if tls.client_ca_dir is not None:
        files.append(tls.client_ca_dir / "ca.crt")
    if missing := [InputError("spec.gateway.tls", f"no file {path}") for path in files if not path.is_file()]:
        raise InvalidInput(missing)


def write_files(resource: MoEServing, folder: Folder, plan: LocalPlan) -> None:
    """Token, resource in force, and the processes' configuration."""
    write_whole(folder.token, secrets.token_urlsafe(32) + "\n")
    write_whole(folder.resource, dump_resource(resource))
    for path, text in build_configs(folder, plan).items():
        write_whole(path, text)


def build_configs(folder: Folder, plan: LocalPlan) -> Mapping[Path, str]:
    """Configuration files by path, as text."""
    agents = {folder.config(f"{AGENT}{index}"): agent for index, agent in enumerate(plan.agents)}
    configs: dict[Path, Any] = {folder.config(GATEWAY): plan.gateway, **agents}
    return {path: config.model_dump_json(indent=1) + "\n" for path, config in configs.items()}


def build_record(resource: MoEServing, folder: Folder, site: LocalSite, plan: LocalPlan, programs: Programs) -> Record:
    """The record of a deployment of which nothing runs yet."""
    listen, admin = plan.gateway.listen, plan.gateway.admin
    assert listen is not None
    agents = [
        _build_row(folder, f"{AGENT}{index}", programs.agent, http_url(agent.listen.host, agent.listen.port))
        for index, agent in enumerate(plan.agents)
    ]
    return Record(
        name=folder.name,
        endpoint=f"{'http' if plan.gateway.tls is None else 'https'}://{authority(listen.host, listen.port)}",
        served_name=plan.agents[0].engine.served_name,
        drain_timeout_s=plan.agents[0].engine.drain_timeout_s,
        site=SiteRecord(
            ports=site.ports,
            cpus=site.cpus,
            memory_bytes=site.memory_bytes,
            gpus=site.gpus,
            host=site.host,
            secrets_dir=site.secrets_dir,
        ),
        processes=(_build_row(folder, GATEWAY, programs.gateway, http_url(admin.host, admin.port)), *agents),
        ready_changed=time.time(),
    )


def _build_row(folder: Folder, name: str, program: tuple[str, ...], url: str) -> ProcessRecord:
    return ProcessRecord(name=name, command=(*program, "--config", str(folder.config(name))), url=url)


def _spawn(folder: Folder, lock: int, *, tied: bool) -> subprocess.Popen[bytes]:
    command = [*PYTHON, "-m", "moe_operator.local", str(folder.root), folder.name]
    if tied:
        command = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *command]
    with folder.log("supervisor").open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C at the terminal reaches `up` alone, which asks the supervisor to drain.
            start_new_session=True,
            pass_fds=(lock,),
        )


def _already_up(folder: Folder) -> InputError:
    record = load_record(folder)
    if record is None or find_process(record.supervisor) is None:
        return InputError(folder.name, "is being started or stopped by another command; nothing was changed")
    words = "is stopping" if record.draining else f"is served already at {record.endpoint}"
    return InputError(folder.name, f"{words}; nothing was changed (moeserving status, set, down {folder.name})")


def require_running(folder: Folder) -> Record:
    """The record of a deployment that runs.

    Raises:
        Failure: it does not, or its supervisor was killed.
    """
    record = load_record(folder)
    if record is None:
        raise Failure(f"{folder.name}: not running")
    if find_process(record.supervisor) is not None:
        return record
    lock = take_lock(folder.lock)
    if lock is None:
        raise Failure(f"{folder.name}: is just being started; ask again in a moment")
    try:
        if number := len(leftovers(record)):
            raise Failure(f"{folder.name}: its supervisor was killed; {number} of its processes are still ending")
        clean(folder)
    finally:
        os.close(lock)
    raise Failure(f"{folder.name}: not running: its supervisor was killed, what it left was cleaned up")
