"""`moeserving plan`: what a file would make in a cluster, or start on one machine. Touches neither."""

import os
import secrets
from pathlib import Path
from typing import Annotated

import psutil
import typer
import yaml
from moe_contract.input_errors import InputError, InvalidInput

from moe_operator.api import MoEServing, load_resource
from moe_operator.api.object_names import namespace_problem
from moe_operator.cli import advice
from moe_operator.cli.validate import File, input_errors_shown
from moe_operator.plan import (
    ClusterPlan,
    Defaults,
    LocalPlan,
    LocalSite,
    Observed,
    plan_cluster,
    plan_local,
    ports_needed,
)

FIRST_SHOWN_PORT = 8000


def plan(
    file: File,
    namespace: Annotated[
        str | None, typer.Option("--namespace", "-n", help="Namespace of the objects.", show_default="the file's")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Show the processes on one machine instead.")] = False,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="With --local: CPUs of the machine.", show_default="this one's")
    ] = None,
    gpus: Annotated[int, typer.Option(min=0, max=4096, help="With --local: GPUs of the machine.")] = 0,
    advise: advice.Advise = False,
    trace: advice.Trace = None,
    trace_format: advice.TraceFormat = None,
    shape: advice.Shape = None,
    rate: advice.Rate = None,
    requests: advice.Requests = None,
    answer_tokens: advice.AnswerTokens = None,
    cost: advice.Cost = None,
    ttft: advice.Ttft = None,
    inter_token: advice.InterToken = None,
    seed: advice.Seed = None,
    output: advice.Output = None,
) -> None:
    """Show the Kubernetes objects that the operator would make, as YAML in an order that can be applied.

    The control token is a new one each time. Monitors, whose kinds a cluster may lack, are among them where
    `spec.metrics` labels or annotates them. With --local: the agents and the gateway on one machine. With --advise:
    the shapes that fit as many GPUs, simulated.
    """
    options = advice.name_options(
        trace=trace, format=trace_format, shape=shape, rate=rate, requests=requests, answer_tokens=answer_tokens,
        cost=cost, ttft=ttft, inter_token=inter_token, seed=seed, output=output,
    )  # fmt: skip
    if advise:
        advice.advise(file, options)
        return
    with input_errors_shown():
        advice.refuse_options(options)
        resource = load_resource(file)
        if local:
            text = "# Ports and the state folder are chosen at the start; those shown are examples.\n"
            text += render_local(plan_local(resource, _example_site(_example_ports(resource), cpus, gpus)))
        else:
            place = namespace or resource.metadata.namespace or "default"
            if problem := namespace_problem(place):
                raise InvalidInput([InputError("--namespace", problem)])
            observed = Observed(tokens=(secrets.token_urlsafe(32),), has_service_monitors=_asks_for_monitors(resource))
            text = render_cluster(plan_cluster(resource, place, observed, Defaults()))
    typer.echo(text, nl=False)


def _asks_for_monitors(resource: MoEServing) -> bool:
    return bool(resource.spec.metrics.labels or resource.spec.metrics.annotations)


def _example_ports(resource: MoEServing) -> tuple[int, ...]:
    """Ports in a row; the last ones, for exchanges of KV blocks, with room for the data-parallel ranks of an engine."""
    engine = resource.spec.engine
    needed, bases = ports_needed(resource), engine.count if engine.roles.apart else 0
    first_base = FIRST_SHOWN_PORT + needed - bases
    last = first_base + bases * engine.parallelism.data
    return (*range(FIRST_SHOWN_PORT, first_base), *range(first_base, last, engine.parallelism.data))


def _example_site(ports: tuple[int, ...], cpus: int | None, gpus: int) -> LocalSite:
    return LocalSite(
        state_dir=Path("STATE_DIR"),
        token_file=Path("STATE_DIR/token"),
        ports=ports,
        cpus=cpus or len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(str(index) for index in range(gpus)),
        secrets_dir=Path("SECRETS_DIR"),
    )


def render_cluster(wanted: ClusterPlan) -> str:
    """The YAML documents of a cluster's plan."""
    return yaml.dump_all(wanted.objects, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def render_local(wanted: LocalPlan) -> str:
    """The YAML of a machine's plan, as the configuration files would hold it."""
    document = {
        "agents": [agent.model_dump(mode="json") for agent in wanted.agents],
        "gateway": wanted.gateway.model_dump(mode="json"),
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that stands in several places out in each of them."""

    def ignore_aliases(self, data: object) -> bool:
        return True
