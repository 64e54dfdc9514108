"""Commands on a deployment that runs: `down`, `status`, `logs`, `set`."""

import asyncio
import sys
import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from moe_contract.input_errors import InputError, InvalidInput, unknown_choice

from moe_operator.api import status_document
from moe_operator.cli.output import AsJson, Output, OutputFormat, choose_format, is_document, print_document
from moe_operator.cli.place import Name, StateDir, errors_shown, find_folder, tell_idle
from moe_operator.cli.stopping import describe_stop
from moe_operator.cli.validate import one_line
from moe_operator.local.folder import Folder
from moe_operator.local.record import PROMETHEUS, find_process, load_record
from moe_operator.local.stop import request_stop, stop_leftovers, wait_stopped
from moe_operator.progress import stderr_line


def down(name: Name = None, state_dir: StateDir = None) -> None:
    """Stop a deployment once its streams have ended.

    Ctrl-C forces it.
    """
    with errors_shown():
        folder = find_folder(name, state_dir)
        record = load_record(folder)
        supervisor = record.supervisor if record else None
        if find_process(supervisor) is None:
            if stop_leftovers(folder):
                typer.echo(f"{folder.name}: its supervisor was killed; what it left was cleaned up")
            return
        typer.echo(f"{folder.name}: stopping, running streams end first (Ctrl-C stops at once)")
        if record is not None and not record.draining:
            request_stop(supervisor)
        line, began_s = stderr_line(), time.monotonic()

        def show() -> None:
            if record is not None:
                line.show(*asyncio.run(describe_stop(record, time.monotonic() - began_s)))

        try:
            wait_stopped(supervisor, show)
        except KeyboardInterrupt:
            request_stop(supervisor)
            wait_stopped(supervisor)
        line.close()
        typer.echo(f"{folder.name}: stopped")


def status(
    name: Name = None,
    state_dir: StateDir = None,
    output: Output = OutputFormat.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show engines, policies in force, restarts."""
    from rich.console import Console

    from moe_operator.cli.table import render_status
    from moe_operator.local.observation import fetch_observation
    from moe_operator.local.report import build_processes, build_status
    from moe_operator.local.start import require_running

    with errors_shown():
        seen = asyncio.run(fetch_observation(require_running(find_folder(name, state_dir))))
        built = build_status(seen, datetime.now(UTC))
        form = choose_format(output, as_json=as_json)
        if is_document(form):
            document = {"name": seen.record.name, **status_document(built), "processes": build_processes(seen)}
            print_document(document, form)
        else:
            Console(soft_wrap=not sys.stdout.isatty()).print(render_status(seen, built))


def logs(
    name: Name = None,
    state_dir: StateDir = None,
    process: Annotated[
        str | None,
        typer.Option(
            "--process", "-p", help="gateway, supervisor, agent-N, engine-N or prometheus.", show_default="all"
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow new lines, until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines of each log.")] = 50,
) -> None:
    """Show logs, also of a deployment that has stopped."""
    from moe_operator.local import logs as log_files

    with errors_shown():
        folder = find_folder(name, state_dir, stopped=True)
        known = known_processes(folder)
        if process is not None and process not in known:
            raise InvalidInput([unknown_choice("--process", process, known)])
        chosen = {row: folder.log(row) for row in ([process] if process else known)}
        width = 0 if process else max(map(len, chosen))
        if follow:
            try:
                for row, line in log_files.follow(chosen, lines):
                    _show_line(row, line, width)
            except KeyboardInterrupt:
                return
        for row, path in chosen.items():
            for line in log_files.read_tail(path, lines):
                _show_line(row, line, width)


def set_fields(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="[NAME] PATH=VALUE...", help="Such as scheduling.request.policy=fcfs, below spec."),
    ],
    state_dir: StateDir = None,
) -> None:
    """Change policies of a running deployment.

    Either every named setting takes effect, or none.
    """
    from moe_operator.local.change import apply_changes

    with errors_shown():
        name = None if "=" in arguments[0] else arguments[0]
        assignments = arguments[0 if name is None else 1 :]
        if not assignments:
            raise InvalidInput([_nothing_to_set()])
        folder = find_folder(name, state_dir)
        changed = apply_changes(folder, assignments)
        words = ", ".join(one_line(text) for text in assignments)
        typer.echo(f"{folder.name}: {words}" + ("" if changed.changed else " (held already)"))
        tell_idle(changed.resource)


def known_processes(folder: Folder) -> list[str]:
    """Processes that have a log or a configuration, in a fixed order."""
    agents = sorted(path.stem for path in folder.path.glob("agent-*.json"))
    engines = [name.replace("agent", "engine") for name in agents]
    metrics = [PROMETHEUS] if folder.log(PROMETHEUS).exists() else []
    return ["supervisor", "gateway", *agents, *engines, *metrics]


def _nothing_to_set() -> InputError:
    return InputError("", "PATH=VALUE is needed, such as scheduling.request.policy=fcfs")


def _show_line(process: str, line: str, width: int) -> None:
    typer.echo(f"{process:{width}} | {line}" if width else line)
    sys.stdout.flush()
