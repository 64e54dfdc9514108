"""Two real engines with fixed roles, as the plan of a resource starts them: one computes prompts, the other decodes.

Requests go through both by hand, in the two phases of vLLM's NixlConnector.
"""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from moe_operator.api import parse_resource
from moe_operator.local import machine
from moe_operator.plan import LocalSite, plan_local, ports_needed

from tests.vllm.conftest import TOKEN, Process, request

START_TIMEOUT_S = 900.0
TOKENS = 16
LEASE_S = 8.0
FIRST_PHASE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Engine:
    """An agent with its engine, from a planned configuration."""

    def __init__(self, folder: Path, index: int, config: Any) -> None:
        self.config, path = config, folder / f"agent-{index}.json"
        path.write_text(config.model_dump_json())
        self.process = Process("moe_agent", path, folder / f"agent-{index}.log")

    def state(self) -> Any:
        return request("GET", f"http://127.0.0.1:{self.config.listen.port}/v1/state")[1]

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> Any:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0} | more
        status, answer = request("POST", f"http://127.0.0.1:{self.config.engine.port}/v1/completions", body)
        assert status == 200, answer
        return answer


def resource(model: Path) -> Any:
    return parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "tiny"},
            "spec": {
                "model": {"uri": f"file://{model}", "name": "tiny"},
                "engine": {
                    "runtime": "vllm-cpu",
                    "roles": {"mode": "fixed", "prefill": 1, "decode": 1},
                    "resources": {"cpu": 1, "kvCacheMemory": "128Mi"},
                    "args": ["--max-model-len=2048", "--dtype=float32", "--enforce-eager"],
                },
            },
        }
    )


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[list[Engine]]:
    folder, wanted = tmp_path_factory.mktemp("apart"), resource(tiny_model)
    (folder / "token").write_text(TOKEN)
    ports = machine.find_free_ports(ports_needed(wanted))
    site = LocalSite(
        state_dir=folder, token_file=folder / "token", ports=ports, cpus=2, memory_bytes=machine.memory_bytes()
    )
    configs = [with_lease(config) for config in plan_local(wanted, site).agents]
    started = [Engine(folder, index, config) for index, config in enumerate(configs)]
    try:
        for engine in started:
            wait_ready(engine)
        yield started
    finally:
        statuses = [engine.process.stop() for engine in started]
    assert statuses == [0, 0]


def with_lease(config: Any) -> Any:
    """The configuration of an agent with a lease for which a test can wait."""
    transfer = config.engine.kv_transfer.model_copy(update={"lease_s": LEASE_S})
    return config.model_copy(update={"engine": config.engine.model_copy(update={"kv_transfer": transfer})})


def wait_ready(engine: Engine) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        engine.process.check()
        try:
            if engine.state()["phase"] == "ready":
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError((engine.config.run_dir / "engine.log").read_text()[-3000:])


def ask_both(prefill: Engine, decode: Engine, prompt: list[int]) -> Any:
    """The answer of the engine that decodes, with the blocks of the one that computed the prompt."""
    first = prefill.complete(prompt, 1, kv_transfer_params=FIRST_PHASE)
    assert first["kv_transfer_params"]["do_remote_prefill"]
    return decode.complete(prompt, TOKENS, kv_transfer_params=first["kv_transfer_params"], return_token_ids=True)


def test_both_say_that_they_fit_each_other(engines):
    states = [engine.state()["kv_transfer"] for engine in engines]
    assert [state["role"] for state in states] == ["prefill", "decode"]
    assert states[0]["peers"] == states[1]["peers"] != ""
    assert states[0]["token_bytes"] == states[1]["token_bytes"] > 0
    assert [state["transfers"] for state in states] == [0, 0]


def test_two_engines_answer_as_one_does(engines):
    prefill, decode = engines
    draw = random.Random(7)
    prompts = [[draw.randrange(10, 200) for _ in range(length)] for length in (5, 130, 700)]
    for prompt in prompts:
        alone = prefill.complete(prompt, TOKENS, return_token_ids=True)
        together = ask_both(prefill, decode, prompt)
        assert together["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
        assert together["usage"]["prompt_tokens"] == len(prompt)


def test_the_agent_of_the_engine_that_decodes_counts_what_arrived(engines):
    prefill, decode = engines
    before = decode.state()["kv_transfer"]["transfers"]
    ask_both(prefill, decode, [9] * 300)
    state = decode.state()["kv_transfer"]
    assert state["transfers"] > before
    assert state["bytes_per_s"] > 0
    assert (state["failed"], prefill.state()["kv_transfer"]["transfers"]) == (0, 0)


def test_blocks_that_cannot_be_fetched_are_computed_anew(engines):
    prefill, decode = engines
    prompt = [11] * 200
    alone = prefill.complete(prompt, TOKENS, return_token_ids=True)
    first = prefill.complete(prompt, 1, kv_transfer_params=FIRST_PHASE)
    wrong = first["kv_transfer_params"] | {"remote_engine_id": "another_dp0"}
    answer = decode.complete(prompt, TOKENS, kv_transfer_params=wrong, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


def fill(engine: Engine, draw: random.Random) -> None:
    """Has an engine use each of its blocks for another prompt."""
    for _ in range(20):
        engine.complete([draw.randrange(10, 200) for _ in range(1900)], 1)


def test_blocks_that_are_held_no_more_are_computed_anew(engines):
    prefill, decode = engines
    draw = random.Random(11)
    prompt = [draw.randrange(10, 200) for _ in range(700)]
    first = prefill.complete(prompt, 1, kv_transfer_params=FIRST_PHASE)["kv_transfer_params"]
    time.sleep(max(0.0, first["moeserving_held_until_s"] - time.time()) + 2.0)
    fill(prefill, draw)
    before = decode.state()["kv_transfer"]["failed"]
    late = decode.complete(prompt, TOKENS, kv_transfer_params=first, return_token_ids=True)
    alone = prefill.complete(prompt, TOKENS, return_token_ids=True)
    assert late["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]
    assert decode.state()["kv_transfer"]["failed"] == before + 1


def test_the_engines_keep_their_processors(engines):
    for engine in engines:
        server = psutil.Process(engine.state()["engine"]["pid"])
        for process in (server, *server.children(recursive=True)):
            assert process.cpu_affinity() == psutil.Process().cpu_affinity()
