"""`python tests/cluster`: real Kubernetes clusters for the tests, made and removed without a trace."""

import functools
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import cluster_binaries
import cluster_life
import typer
from cluster_problem import ClusterProblem

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Level(StrEnum):
    api = "api"
    node = "node"


LevelOption = Annotated[
    Level,
    typer.Option(help="api: API server and etcd. node: also a node that runs pods; needs root."),
]
StateDirOption = Annotated[Path | None, typer.Option(help="Folder of its state. Default: one for each level.")]


def plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*arguments: object, **options: object) -> None:
        try:
            command(*arguments, **options)
        except ClusterProblem as problem:
            print(problem, file=sys.stderr)
            raise typer.Exit(1) from None

    return wrapped


@app.command()
@plain_errors
def up(level: LevelOption = Level.api, state_dir: StateDirOption = None) -> None:
    """Start a cluster and print its kubeconfig."""
    folder = state_dir or cluster_life.default_state_dir(level)
    if cluster_life.status(folder).is_whole:
        print("already up", file=sys.stderr)
    print(cluster_life.up(level, folder).kubeconfig)


@app.command()
@plain_errors
def down(level: LevelOption = Level.api, state_dir: StateDirOption = None) -> None:
    """End a cluster and remove all that it left, however it ended."""
    folder = state_dir or cluster_life.default_state_dir(level)
    print("down" if cluster_life.down(folder) else "nothing was up", file=sys.stderr)


@app.command()
@plain_errors
def status(level: LevelOption = Level.api, state_dir: StateDirOption = None) -> None:
    """Tell what runs; the exit status is 0 when all does."""
    folder = state_dir or cluster_life.default_state_dir(level)
    state = cluster_life.status(folder)
    if not state.cluster:
        print(f"{folder}: no cluster", file=sys.stderr)
        raise typer.Exit(1)
    print(f"{state.cluster.level} {state.cluster.kubeconfig}")
    for part in state.cluster.parts:
        print(f"{part} {'down' if part in state.down else 'running'}")
    raise typer.Exit(0 if state.is_whole else 1)


@app.command()
@plain_errors
def binaries(
    names: Annotated[list[str] | None, typer.Argument(help="Programs; default: those of the level.")] = None,
    level: LevelOption = Level.api,
) -> None:
    """Find or build the programs; prints the folder that has them (several: as a PATH)."""
    wanted = names or list(cluster_life.CLASSES[level].programs)
    print(":".join(str(folder) for folder in cluster_binaries.folders(wanted)))


if __name__ == "__main__":
    app()
