"""Fails when vLLM's interface, which is not public, moves under the plugin."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.vllm import version
from moe_agent.vllm.version import UnsupportedVersion, check_version


@pytest.fixture(scope="module", autouse=True)
def vllm_loaded(virtual_engines: Any) -> None:
    """The session's fixture loads vLLM once, with its own warnings aside."""


def test_the_queue_implements_exactly_vllms_abstract_methods():
    from moe_agent.vllm.request_queue import OrderedRequestQueue
    from vllm.v1.core.sched.request_queue import RequestQueue

    assert RequestQueue.__abstractmethods__ == {
        "__bool__",
        "__iter__",
        "__len__",
        "add_request",
        "peek_request",
        "pop_request",
        "prepend_request",
        "prepend_requests",
        "remove_request",
        "remove_requests",
    }
    assert not inspect.isabstract(OrderedRequestQueue)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("schedule", ["self", "throttle_prefills"]),
        ("add_request", ["self", "request"]),
        ("update_from_output", ["self", "scheduler_output", "model_runner_output"]),
        ("finish_requests", ["self", "request_ids", "finished_status"]),
        ("_preempt_request", ["self", "request", "timestamp", "drop_stale_output"]),
        ("_reserve_prefill_lookahead", ["self", "request", "num_computed_tokens", "num_new_tokens"]),
        ("get_request_counts", ["self"]),
        ("get_kv_cache_usage", ["self"]),
    ],
)
def test_the_scheduler_has_the_methods_that_are_extended_or_called(method, parameters):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert list(inspect.signature(getattr(AsyncScheduler, method)).parameters) == parameters


def test_the_scheduler_has_the_attributes_that_are_read(make_engine):
    scheduler = make_engine(stock=True).scheduler
    assert type(scheduler.running) is list
    assert type(scheduler._inflight_prefills) is set
    assert type(scheduler.requests) is dict
    assert scheduler.parallel_config.data_parallel_index == 0
    assert scheduler.parallel_config.data_parallel_size == 1
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() > 0
    assert len(scheduler.kv_cache_config.kv_cache_groups) == 1
    names = {"block_size", "kv_holding_waiting", "max_num_active_reqs", "max_num_scheduled_tokens", "policy", "waiting"}
    assert names | {"num_waiting_for_streaming_input"} <= vars(scheduler).keys()


def test_a_request_has_the_attributes_that_are_read(make_engine):
    request = make_engine(stock=True).add("one", 20)
    names = {
        "arrival_time",
        "block_hashes",
        "is_prefill_chunk",
        "num_computed_tokens",
        "num_tokens",
        "priority",
        "request_id",
        "status",
    }
    assert all(hasattr(request, name) for name in names)


def test_vllm_asks_of_every_chunk_how_long_it_may_be_and_leaves_out_what_may_have_nothing():
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    running, _, waiting = source.partition("# Next, schedule the WAITING requests.")
    for part in (running, waiting):
        assert part.count("self._reserve_prefill_lookahead(") == 1
        assert part.index("if num_new_tokens == 0:", part.index("self._reserve_prefill_lookahead(")) > 0


def test_the_policy_of_vllm_decides_the_victim_of_a_preemption_and_nothing_else():
    """Our scheduler sets `policy` while it runs, so a further use would be a surprise."""
    from vllm.v1.core.sched.scheduler import Scheduler

    assert inspect.getsource(Scheduler).count("self.policy") == 5
    assert inspect.getsource(Scheduler.schedule).count("self.policy == SchedulingPolicy.PRIORITY") == 2


def test_the_installed_version_is_supported():
    check_version()


def test_another_version_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(version, "find_version", lambda: "0.33.1")
    with pytest.raises(UnsupportedVersion, match=r"vLLM 0\.33\.1 is installed; moe_agent\.vllm fits vLLM 0\.32\.\*"):
        check_version()


def test_a_dead_engine_says_what_the_gateway_knows_it_by():
    from moe_gateway.engines.engine_death import says_engine_is_dead
    from starlette.responses import JSONResponse
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError

    said = create_error_response(EngineDeadError()).model_dump()
    assert says_engine_is_dead(JSONResponse(said).body)
    assert says_engine_is_dead(f"data: {json.dumps(said)}\n\n".encode())


def test_vllm_marks_the_ids_that_come_from_a_body_and_no_others():
    """By the `_` after them `tenant_of` distinguishes them; chats have one only where they are several in one body."""
    import vllm

    served = Path(vllm.__file__).parent / "entrypoints" / "openai"
    assert 'sub_request_id = f"{request_id}_{sub_request}"' in (served / "responses" / "serving.py").read_text()
    assert 'request_id_item = f"{request_id}-{i}"' in (served / "completion" / "serving.py").read_text()
    chats = (served / "chat_completion" / "serving.py").read_text()
    assert 'request_id if len(engine_inputs) == 1 else f"{request_id}_{i}"' in chats


@pytest.mark.parametrize(("header", "priority"), [("7", 7), ("-3", -3), ("urgent", 4), (None, 4)])
def test_vllm_reads_a_priority_in_the_header_that_the_gateway_knows(header, priority):
    from moe_gateway.http.rare_headers import PRIORITY
    from starlette.datastructures import Headers
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    headers = Headers({} if header is None else {PRIORITY.decode(): header})
    found = GenerateBaseServing._get_priority(SimpleNamespace(priority=4), SimpleNamespace(headers=headers))
    assert found == priority


def test_the_routes_on_which_vllm_reads_that_header():
    import vllm

    served = Path(vllm.__file__).parent / "entrypoints"
    reading = {str(path.relative_to(served)) for path in served.rglob("*.py") if "._get_priority(" in path.read_text()}
    assert reading == {f"openai/{name}/serving.py" for name in ("chat_completion", "completion", "responses")}
    # Messages are served as chats, with the request itself.
    messages = (served / "anthropic" / "serving.py").read_text()
    assert "self.create_chat_completion(chat_req, raw_request)" in messages
    # Audio has neither; its ids contain the gateway's.
    audio = (served / "speech_to_text" / "base" / "serving.py").read_text()
    assert "self._base_request_id(raw_request)" in audio
    assert "priority" not in audio
