"""Fails when vLLM's interface, which is not public, moves under the plugin."""

import inspect
import json
import re
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moe_agent.vllm import version
from moe_agent.vllm.options import list_options
from moe_agent.vllm.version import (
    UnsupportedVersion,
    check_runs_here,
    check_version,
    describe_here,
    find_version,
    minor_of,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def vllm_loaded(virtual_engines: Any) -> None:
    """The session's fixture loads vLLM once, with its own warnings aside."""


def test_the_doctor_knows_the_options_of_vllms_server():
    """Written by `python -m moe_agent.vllm.options`; without a vLLM it is all that the doctor has."""
    known = json.loads((ROOT / "operator/moe_operator/doctor/vllm_options.json").read_text())
    release = minor_of(find_version())
    assert sorted(name for name, releases in known.items() if release in releases) == list_options()


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


def test_the_policy_of_vllm_decides_what_a_preemption_does_and_nothing_else():
    """Our scheduler sets `policy` while it runs, so a further use would be a surprise.

    Twice it chooses the victim; in 0.33 decoding requests also go on after one that has preempted itself.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    uses = {"0.32": 2, "0.33": 3}[minor_of(find_version())]
    assert inspect.getsource(Scheduler).count("self.policy") == 3 + uses
    assert inspect.getsource(Scheduler.schedule).count("self.policy == SchedulingPolicy.PRIORITY") == uses


def test_the_installed_version_is_supported():
    check_version()


@pytest.mark.parametrize("found", ["0.32.0", "0.32.4", "0.33.0", "0.33.0+cpu", "0.33.1", "0.33.0rc1"])
def test_releases_of_the_supported_versions_are_accepted(monkeypatch, found):
    monkeypatch.setattr(version, "find_version", lambda: found)
    check_version()


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.34.0+cpu", "0.3", "0.320.0", "1.32.0", "dev"])
def test_another_version_is_refused_by_name(monkeypatch, found):
    monkeypatch.setattr(version, "find_version", lambda: found)
    supported = r"fits vLLM 0\.32\.\* and 0\.33\.\* and no other: install moeserving\[gpu\]"
    with pytest.raises(
        UnsupportedVersion, match=rf"^vLLM {re.escape(found)} is installed; moe_agent\.vllm {supported}"
    ):
        check_version()


@pytest.mark.parametrize(
    ("found", "target", "devices", "runs"),
    [
        ("0.33.0", "", (), False),
        ("0.33.0", "cuda", (), False),
        ("0.33.0", "", ("nvidiactl",), True),
        ("0.33.0", "", ("kfd",), True),
        ("0.33.0", "", ("nvidia3",), True),
        ("0.33.0", "", ("dri/renderD129",), True),
        ("0.33.0", "", ("vfio/17",), True),
        ("0.33.0", "", ("accel2",), True),
        ("0.33.0", "", ("vfio/vfio", "dri/card0", "nvidia-caps"), False),
        ("0.33.0", "CPU", (), True),
        ("0.33.0+cpu", "", (), True),
        ("0.34.0+cpu", "", (), False),
    ],
)
def test_a_build_for_gpus_is_refused_where_there_is_none(monkeypatch, tmp_path, found, target, devices, runs):
    def no_cpu_distribution(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(version, "find_version", lambda: found)
    monkeypatch.setattr(version, "version", no_cpu_distribution)
    monkeypatch.setattr(version, "_DEVICE_FOLDER", tmp_path)
    monkeypatch.setattr(version, "entry_points", lambda group: [])
    monkeypatch.setenv("VLLM_TARGET_DEVICE", target)
    for name in devices:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with nullcontext() if runs else pytest.raises(UnsupportedVersion, match=r"0\.32\.\* and 0\.33\.\*.*install moes"):
        check_runs_here()


@pytest.mark.parametrize(("cpu", "device"), [(True, "CPUs"), (False, "GPUs")])
def test_the_installed_version_is_described_with_its_device(monkeypatch, cpu, device):
    monkeypatch.setattr(version, "is_cpu_build", lambda: cpu)
    monkeypatch.setattr(version, "_has_accelerator", lambda: True)
    assert describe_here() == f"vLLM {find_version()}, on {device}"


def test_a_node_without_a_server_finds_what_it_starts_vllm_with():
    from moe_agent.vllm.headless import find_environment_setup, make_arg_parser, run_headless

    assert callable(find_environment_setup())
    assert list(inspect.signature(run_headless).parameters) == ["args"]
    assert callable(make_arg_parser)


def test_the_scheduler_has_the_counts_that_an_admission_restores(make_engine):
    scheduler = make_engine(stock=True).scheduler
    assert type(scheduler.deferred_waiting) is set
    assert type(scheduler.prefill_capacity_bound) is bool


def test_vllms_client_of_the_core_says_whether_it_is_dead():
    from vllm.v1.engine.async_llm import AsyncLLM

    assert isinstance(inspect.getattr_static(AsyncLLM, "errored"), property)


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
