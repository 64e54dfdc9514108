"""Each route of the installed vLLM is served to users, kept for the engine's port, or closed on purpose."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.vllm.middleware import is_serving_path
from moe_contract.serving_routes import CLOSED, ENGINE_ONLY, Route

LISTS = ({route.path.decode() for route in Route}, set(ENGINE_ONLY), set(CLOSED))


def unused_model_config() -> Any:
    """As much of a model's configuration as the routes of embedding models ask for."""
    return SimpleNamespace(get_pooling_task=lambda tasks: "embed")


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """Puts back the process's logging after a block: vLLM's application sets it up for a process of its own."""
    root, known = logging.getLogger(), list(logging.Logger.manager.loggerDict.values())
    loggers = [row for row in known if isinstance(row, logging.Logger)]
    before = [(row, row.disabled, row.level, row.propagate, list(row.handlers)) for row in (root, *loggers)]
    threshold = logging.Logger.manager.disable
    try:
        yield
    finally:
        logging.disable(threshold)
        for row, row.disabled, level, row.propagate, row.handlers in before:
            row.setLevel(level)


@pytest.fixture(scope="module")
def paths(virtual_engines: Any) -> dict[str, set[str]]:
    """The methods of every route that the installed vLLM can mount, by path: all tasks, flags and developer mode."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), kept_logging():
        warnings.simplefilter("ignore")
        for variable in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            patch.setenv(variable, "1")
        from vllm.entrypoints.cli.serve import make_arg_parser
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.serve.profile.api_router import router as profile
        from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
            ["--enable-scale-out", "--enable-fault-tolerance", "--enable-tokenizer-info-endpoint"]
        )
        tasks = (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS)
        app = build_app(arguments, tasks, unused_model_config())
    found: dict[str, set[str]] = {}
    for route in (*app.routes, *profile.routes):
        found.setdefault(route.path, set()).update(getattr(route, "methods", None) or ())
    return found


def test_every_route_of_vllm_stands_in_exactly_one_list(paths):
    assert len(paths) > 60
    assert {path: sum(path in rows for rows in LISTS) for path in paths} == dict.fromkeys(paths, 1)


def test_every_served_route_is_one_of_vllms_with_its_method(paths):
    for route in Route:
        if route is not Route.MODEL:
            assert route.method.decode() in paths[route.path.decode()]


def test_the_lists_share_no_path():
    assert len(set.union(*LISTS)) == sum(map(len, LISTS))


@pytest.mark.parametrize("path", sorted(CLOSED))
def test_what_is_closed_does_not_pass_at_the_engines_port(path):
    assert not is_serving_path(path.replace("{adapter_name}", "x"))
    assert CLOSED[path]


@pytest.mark.parametrize("path", sorted(LISTS[0] | LISTS[1]))
def test_what_is_served_and_what_the_agent_asks_passes_there(path):
    assert is_serving_path(path.replace("{response_id}", "resp_1").replace("{model}", "tiny"))
