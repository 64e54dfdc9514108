"""The scenario file: refused documents with their messages, and every shipped scenario."""

import copy
from pathlib import Path

import pytest
import yaml
from moe_contract.input_errors import InvalidInput
from moe_scheduling.request.order import RequestPolicy
from moe_tools.simulator.rank import OURS, STOCK
from moe_tools.simulator.scenario import build_simulation, load_scenario, parse_scenario
from moe_tools.simulator.signals import SignalKind

SHIPPED = sorted((Path(__file__).parents[3] / "bench" / "scenarios").glob("*.yaml"))
SMALLEST = {"cost": {"preset": "h100-qwen3-30b-a3b"}, "engines": {"ranks": 2}}


def changed(path, value):
    document = copy.deepcopy(SMALLEST)
    *sections, last = path.split(".")
    place = document
    for name in sections:
        place = place.setdefault(name, {})
    place[last] = value
    return document


def problems(document):
    with pytest.raises(InvalidInput) as caught:
        build_simulation(parse_scenario(document, Path()))
    return [str(problem) for problem in caught.value.errors]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_scenario_is_read(path):
    simulation = build_simulation(load_scenario(path))
    assert len(simulation.trace) == yaml.safe_load(path.read_text())["workload"]["count"]


def test_there_are_shipped_scenarios():
    assert len(SHIPPED) >= 3


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cost.preset", "h100-gpt2", "cost.preset: unknown 'h100-gpt2'; known: a100-qwen3-30b-a3b"),
        (
            "cost.linear",
            {"baseS": 1, "prefillS": 0, "decodeS": 0},
            "cost.preset: exactly one of preset, linear and fitted is needed",
        ),
        ("engines.servers", 0, "engines.servers: input should be greater than or equal to 1, got 0"),
        ("engines.scheduler", "sjff", "engines.scheduler: unknown 'sjff'; known: ordered, stock, or a class"),
        ("engines.scheduler", "no.such.Class", None),
        ("engines.maxNumBatchedTokens", 100, "engines.maxNumBatchedTokens: must be at least maxNumSeqs"),
        ("cost.redundantExperts", 1, "cost.redundantExperts: the 129 slots of a layer must divide evenly by ranks (2)"),
        ("cost.placement", "anywhere", "cost.placement: unknown 'anywhere'; known: even, initial, planned, vllm"),
        ("engines.kvBlocks", 10, "engines.maxModelLen: 32768 tokens do not fit into 10 KV blocks of 16"),
        ("engines.rank", 2, "engines.rank: unknown field; nearest known: ranks"),
        ("scheduling.request.policy", "sjff", "scheduling.request.policy: unknown 'sjff'; known: "),
        ("scheduling.engine.stickiness", "1 second", "scheduling.engine.stickiness: a duration such as"),
        ("gateways.rival", "nobody", "gateways.rival: unknown 'nobody'; known: cacheAware, consistentHash"),
        ("workload.shape", "round", "workload.shape: unknown 'round'; known: average"),
        ("workload.rate", 0, "workload.rate: input should be greater than 0, got 0"),
        ("workload.trace", "no-such-file.csv", "no-such-file.csv: cannot be read"),
        ("failures", [{"server": 1, "after": "1s"}], "failures[0].server: there are servers 0 to 0"),
        ("signals.period", "0s", "signals.period: a duration from 1ms to 1h is needed"),
    ],
)
def test_what_is_wrong_is_reported_by_its_path(path, value, message):
    if message is None:
        # The class is looked for when the engines are made.
        build_simulation(parse_scenario(changed(path, value), Path()))
        return
    assert any(message in line for line in problems(changed(path, value))), problems(changed(path, value))


@pytest.mark.parametrize("document", [None, [], "text", 3])
def test_what_is_no_mapping_is_refused(document):
    assert problems(document)[0].startswith("a mapping of fields is needed")


def test_a_cost_is_needed():
    assert problems({}) == ["cost: required, but absent"]


def test_vllms_own_scheduler_publishes_nothing():
    document = changed("engines.scheduler", "stock") | {"signals": {"source": "agent"}}
    assert problems(document) == ["signals.source: vLLM's own scheduler publishes nothing: scrape or none"]


def test_a_trace_is_found_beside_its_scenario(tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"arrival_s": 0, "prompt_tokens": 10, "output_tokens": 3}\n')
    path = tmp_path / "scenario.yaml"
    path.write_text("cost: {preset: h100-qwen3-30b-a3b}\nengines: {ranks: 2}\nworkload: {trace: trace.jsonl}\n")
    assert len(build_simulation(load_scenario(path)).trace) == 1


def test_the_settings_of_the_resource_reach_the_simulation():
    document = changed("scheduling", {"request": {"policy": "fcfs"}, "engine": {"staleAfter": "3s"}})
    simulation = build_simulation(parse_scenario(document, Path()))
    assert simulation.request.policy is RequestPolicy.FCFS
    assert simulation.dispatch.stale_after_s == 3.0
    assert simulation.scheduler == OURS


def test_a_rival_and_stock_engines_come_by_name():
    document = changed("engines.scheduler", "stock") | {"gateways": {"rival": "vllmInternal", "count": 2}}
    simulation = build_simulation(parse_scenario(document, Path()))
    assert (simulation.scheduler, simulation.dispatch, simulation.gateways) == (STOCK, "vllmInternal", 2)


def test_signals_and_failures_are_in_seconds():
    document = SMALLEST | {
        "signals": {"source": "scrape", "period": "250ms", "losses": [{"after": "1s", "server": 0}]},
        "failures": [{"server": 0, "after": "2s", "startup": "1m"}],
    }
    simulation = build_simulation(parse_scenario(document, Path()))
    assert simulation.signals.source is SignalKind.SCRAPE
    assert not simulation.signals.arrives("engine-0", 1.5)
    assert simulation.signals.arrives("engine-0", 0.5)
    assert simulation.failures[0].startup_s == 60.0
