"""`moeserving up`: start a deployment, and watch it."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from moe_operator.api import load_resource
from moe_operator.cli.place import StateDir, errors_shown, root_of, tell_idle
from moe_operator.cli.validate import File
from moe_operator.local.folder import Folder
from moe_operator.local.start import Programs, name_resource, start
from moe_operator.plan.ignored import find_ignored


def up(
    context: typer.Context,
    file: File,
    name: Annotated[str | None, typer.Option("--name", help="Name in place of metadata.name.")] = None,
    state_dir: StateDir = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="Port for clients.", show_default="a free one")
    ] = None,
    secrets: Annotated[
        Path | None,
        typer.Option(
            "--secrets",
            envvar="MOESERVING_SECRETS",
            help="Folder with a folder of files for each Secret of `gateway.auth` and `gateway.tls`.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Also start Prometheus, where it is installed, which keeps the metrics.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open its live page once it is ready.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return when it is ready; `down` stops it.")] = False,
) -> None:
    """Serve a file on this machine until Ctrl-C (or `down`)."""
    from moe_operator.cli.watch import Watch

    with errors_shown():
        resource = name_resource(load_resource(file), name, port)
        for path in find_ignored(resource):
            typer.echo(f"{path}: without effect on one machine", err=True)
        tell_idle(resource)
        folder = Folder(root=root_of(state_dir), name=resource.metadata.name)
        programs = context.obj if isinstance(context.obj, Programs) else Programs()
        process = start(resource, folder, programs, tied=not detach, secrets_dir=secrets, metrics=metrics)
        status = asyncio.run(Watch(folder, process, detach=detach, open_page=open_page).run())
    raise typer.Exit(status)
