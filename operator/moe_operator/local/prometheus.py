"""A Prometheus of the deployment's own, which scrapes its gateway and agents: `moeserving up --metrics`."""

import shutil
from collections.abc import Sequence
from dataclasses import replace

import yaml
from moe_contract.addresses import authority
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.local import machine
from moe_operator.local.folder import Folder, write_whole
from moe_operator.local.record import AGENT, GATEWAY, PROMETHEUS, ProcessRecord, Record

PROGRAM = "prometheus"
# Old samples are removed; the dashboards look at the last hour.
KEPT = "24h"
# Of the labels that a cluster's scrape sets, and by which the dashboards find a resource.
NAMESPACE = "local"
_EVERY = "5s"


def find_prometheus() -> str:
    """Returns the path of the installed program.

    Raises:
        InvalidInput: it is not installed.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        message = (
            "Prometheus is not installed: `apt-get install prometheus` on Debian and Ubuntu, `brew install prometheus` "
            "on a Mac, or put the program of prometheus.io/download into PATH; or start without --metrics"
        )
        raise InvalidInput([InputError("--metrics", message)])
    return program


def add_prometheus(record: Record, folder: Folder, program: str) -> Record:
    """The record with a Prometheus that scrapes its other processes; writes its configuration."""
    config, data = folder.path / "prometheus.yml", folder.path / "prometheus"
    (port,) = machine.find_free_ports(1, without=record.site.ports)
    address = authority(record.site.host, port)
    write_whole(config, yaml.safe_dump(build_config(record.name, record.processes), sort_keys=False))
    command = (
        program,
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--storage.tsdb.retention.time={KEPT}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    )
    return replace(
        record, processes=(*record.processes, ProcessRecord(name=PROMETHEUS, command=command, url=f"http://{address}"))
    )


def build_config(name: str, processes: Sequence[ProcessRecord]) -> dict[str, object]:
    """Prometheus' configuration, as a document: a target for each process, with the labels of a cluster's scrape."""
    targets = [
        {"targets": [row.url.removeprefix("http://")], "labels": {"namespace": NAMESPACE, "pod": _pod(name, row.name)}}
        for row in processes
    ]
    return {
        "global": {"scrape_interval": _EVERY, "scrape_timeout": _EVERY},
        "scrape_configs": [{"job_name": "moeserving", "static_configs": targets}],
    }


def _pod(name: str, process: str) -> str:
    """The name that the process would have as a pod, but for the parts that are drawn."""
    return f"{name}-gateway-0" if process == GATEWAY else f"{name}-engine-{process.removeprefix(AGENT)}"
