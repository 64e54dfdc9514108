"""The MoEServing resource: what it takes, what it refuses and how it says so, and its way to YAML and back."""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.input_errors import InvalidInput
from moe_operator.api import (
    dump_resource,
    engine_settings,
    expert_settings,
    load_resource,
    parse_resource,
    request_settings,
    resource_document,
    set_field,
)
from moe_operator.api.document import parse_document
from moe_scheduling.engine.choice import EngineSettings
from moe_scheduling.expert.decision import ExpertMode, ExpertSettings
from moe_scheduling.request.order import RequestPolicy, RequestSettings

MINIMAL: dict[str, Any] = {
    "apiVersion": "moeserving.dev/v1alpha1",
    "kind": "MoEServing",
    "metadata": {"name": "tiny"},
    "spec": {"model": {"uri": "hf://org/tiny-moe"}},
}


def with_spec(**sections: Any) -> dict[str, Any]:
    return {**MINIMAL, "spec": {**MINIMAL["spec"], **sections}}


def refusal(document: object) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        parse_resource(document)
    return [str(problem) for problem in caught.value.errors]


def test_the_model_uri_alone_is_enough_and_all_else_has_the_defaults_of_the_core() -> None:
    spec = parse_resource(MINIMAL).spec
    assert request_settings(spec.scheduling.request, spec.scheduling.engine) == RequestSettings()
    assert engine_settings(spec.scheduling.engine) == EngineSettings()
    assert expert_settings(spec.scheduling.expert) == ExpertSettings()
    assert spec.engine.replicas == 1
    assert spec.model.served_name == "tiny-moe"


# Switches of the engine's scheduler that ablations turn off; no field of the resource sets them.
INTERNAL_SETTINGS = {"yield_prefills", "cut_prefills", "defer_scheduling", "kv_growth_blocks"}


def test_every_setting_of_the_core_can_be_set() -> None:
    request = {
        "policy": "priority", "ageingRate": 2.5, "ageingHorizon": "1m", "priorityStep": "0s",
        "fairnessHorizon": "3s", "outputWeight": 1.5,
    }  # fmt: skip
    engine = {"policy": "roundRobin", "stickiness": "0s", "staleAfter": "50ms", "saturation": "1.5s"}
    engine["targets"] = {"ttft": "2s", "interToken": "40ms"}
    expert = {
        "mode": "active", "interval": 500, "window": 200, "moveBudget": 64, "maxStall": "20ms", "hysteresis": 0.25
    }  # fmt: skip
    spec = parse_resource(with_spec(scheduling={"request": request, "engine": engine, "expert": expert})).spec
    given_expert = expert_settings(spec.scheduling.expert)
    assert given_expert == ExpertSettings(
        mode=ExpertMode.ACTIVE,
        interval_steps=500,
        window_steps=200,
        move_budget=64,
        max_stall_s=0.02,
        hysteresis=0.25,
    )
    given_request = request_settings(spec.scheduling.request, spec.scheduling.engine)
    given_engine = engine_settings(spec.scheduling.engine)
    assert given_request == RequestSettings(
        policy=RequestPolicy.PRIORITY,
        ageing_rate=2.5,
        ageing_horizon_s=60,
        priority_step_s=0,
        fairness_horizon_s=3,
        inter_token_s=0.04,
        output_weight=1.5,
    )
    assert asdict(given_engine) == {
        "policy": "roundRobin",
        "stickiness_s": 0.0,
        "stale_after_s": 0.05,
        "saturation_s": 1.5,
        "targets": {"ttft_s": 2.0, "inter_token_s": 0.04, "answer_weight": 1.0, "ttft_growth": 0.5},
    }
    for default, chosen in (
        (RequestSettings(), given_request),
        (EngineSettings(), given_engine),
        (ExpertSettings(), given_expert),
    ):
        unchanged = [name for name, value in asdict(chosen).items() if asdict(default)[name] == value]
        unchanged = [name for name in unchanged if name not in INTERNAL_SETTINGS]
        assert unchanged == [], "a setting of the core has no field here"


@given(
    request=st.fixed_dictionaries(
        {
            "policy": st.sampled_from(["sjf", "fcfs", "priority"]),
            "ageingRate": st.floats(0, 1e9, exclude_min=True) | st.integers(1, 10**9),
            "ageingHorizon": st.sampled_from(["0s", "24h"]),
            "priorityStep": st.sampled_from(["0s", "24h"]),
            "fairnessHorizon": st.sampled_from(["0s", "24h"]),
        }
    ),
    engine=st.fixed_dictionaries(
        {
            "policy": st.sampled_from(["predicted", "roundRobin", "leastRequests"]),
            "stickiness": st.sampled_from(["0s", "24h"]),
            "staleAfter": st.sampled_from(["1ms", "24h"]),
            "saturation": st.sampled_from(["1ms", "24h", None]),
            "targets": st.fixed_dictionaries(
                {name: st.sampled_from(["1ms", "24h", None]) for name in ("ttft", "interToken")}
            ),
        }
    ),
    expert=st.fixed_dictionaries(
        {
            "mode": st.sampled_from(["off", "observe", "dryRun", "active"]),
            "interval": st.sampled_from([1, 10**9]),
            "window": st.sampled_from([1, 10**9]),
            "moveBudget": st.sampled_from([0, 10**9]),
            "maxStall": st.sampled_from(["1ms", "1m"]),
            "hysteresis": st.sampled_from([0, 0.5, 1000]),
        }
    ),
)
def test_what_the_resource_takes_the_core_takes(
    request: dict[str, Any], engine: dict[str, Any], expert: dict[str, Any]
) -> None:
    sections = {"request": request, "engine": engine, "expert": expert}
    scheduling = parse_resource(with_spec(scheduling=sections)).spec.scheduling
    assert expert_settings(scheduling.expert).mode == expert["mode"]
    assert request_settings(scheduling.request, scheduling.engine).ageing_rate == request["ageingRate"]
    assert engine_settings(scheduling.engine).policy == engine["policy"]


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        ("engine", "staleAfter"),
        ("engine", "saturation"),
        ("request", "ageingRate"),
        ("expert", "interval"),
        ("expert", "window"),
        ("expert", "maxStall"),
    ],
)
def test_what_the_core_refuses_at_zero_the_resource_refuses(layer: str, name: str) -> None:
    zero = 0 if name in ("ageingRate", "interval", "window") else "0s"
    (line,) = refusal(with_spec(scheduling={layer: {name: zero}}))
    assert line.startswith(f"spec.scheduling.{layer}.{name}: ")


@pytest.mark.parametrize(
    "field", ["prefillHold", "firstTokenWeight", "cutPrefills", "yieldPrefills", "scheduleLate", "kvGrowthBlocks"]
)
def test_a_field_that_was_removed_is_refused_with_the_fields_that_are_known(field: str) -> None:
    (line,) = refusal(with_spec(scheduling={"request": {field: 0}}))
    assert line.startswith(f"spec.scheduling.request.{field}: unknown field; ")
    assert line.endswith("known: ageingHorizon, ageingRate, fairnessHorizon, outputWeight, policy, priorityStep")


@pytest.mark.parametrize("policy", ["gimbal", "powerOfTwo", "vllmInternal"])
def test_a_policy_that_was_removed_is_refused_with_the_policies_that_are_known(policy: str) -> None:
    (line,) = refusal(with_spec(scheduling={"engine": {"policy": policy}}))
    assert line == (f"spec.scheduling.engine.policy: unknown {policy!r}; known: leastRequests, predicted, roundRobin")


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            {"scheduling": {"request": {"policy": "sjff"}}},
            "spec.scheduling.request.policy: unknown 'sjff'; known: fcfs, priority, sjf",
        ),
        (
            {"gateway": {"tenantHeader": "host"}},
            "spec.gateway.tenantHeader: host cannot name a tenant: the gateway takes none of accept-encoding, "
            "connection, content-length, expect, host, keep-alive, proxy-authorization, proxy-connection, te, trailer, "
            "transfer-encoding, upgrade, x-data-parallel-rank, x-request-id over",
        ),
        (
            {"enginee": {}},
            "spec.enginee: unknown field; nearest known: engine; "
            "known: autoscaling, commonMetadata, disruption, engine, gateway, metrics, model, networkPolicy, paused, "
            "scheduling",
        ),
        (
            {"scheduling": {"request": {"ageing_rate": 1}}},
            "spec.scheduling.request.ageing_rate: unknown field; nearest known: ageingRate; "
            "known: ageingHorizon, ageingRate, fairnessHorizon, outputWeight, policy, priorityStep",
        ),
        ({"engine": {"replicas": "2"}}, "spec.engine.replicas: input should be a valid integer, got '2'"),
        ({"engine": {"replicas": True}}, "spec.engine.replicas: input should be a valid integer, got True"),
        ({"engine": {"replicas": -1}}, "spec.engine.replicas: input should be greater than or equal to 0, got -1"),
        ({"engine": []}, "spec.engine: a mapping of fields is needed, got []"),
        ({"engine": {"runtime": "cpu"}}, "spec.engine.runtime: unknown 'cpu'; known: vllm, vllm-cpu"),
        ({"engine": {"args": ["--a", 3]}}, "spec.engine.args[1]: input should be a valid string, got 3"),
        (
            {"engine": {"args": ["--tensor_parallel_size=2"]}},
            "spec.engine.args[0]: --tensor-parallel-size is set by spec.engine.parallelism.tensor, not by an argument",
        ),
        (
            {"engine": {"args": ["--port", "1"]}},
            "spec.engine.args[0]: --port is set by the deployment, not by an argument",
        ),
        (
            {"engine": {"env": {"MOESERVING_RUN_DIR": "/"}}},
            "spec.engine.env: a variable's name is letters, digits and underscores, not a digit first, "
            "and not MOESERVING_RUN_DIR",
        ),
        (
            {"engine": {"parallelism": {"expert": True}}},
            "spec.engine.parallelism.expert: expert parallelism needs more than one rank: tensor or data above 1",
        ),
        (
            {"scheduling": {"expert": {"redundantExperts": 2}}},
            "spec.scheduling.expert.redundantExperts: copies of experts need engine.parallelism.expert",
        ),
        (
            {"scheduling": {"expert": {"mode": "on"}}},
            "spec.scheduling.expert.mode: unknown 'on'; known: active, dryRun, observe, off",
        ),
        (
            {"scheduling": {"expert": {"mode": False}}},
            'spec.scheduling.expert.mode: "off" needs quotes: YAML reads a bare off as false',
        ),
        (
            {"engine": {"args": ["--enable-eplb"]}},
            "spec.engine.args[0]: --enable-eplb is set by spec.engine.parallelism.expert, not by an argument",
        ),
        (
            {"engine": {"args": ["--eplb_config.use_async=false"]}},
            "spec.engine.args[0]: --eplb-config is set by spec.scheduling.expert, not by an argument",
        ),
        (
            {"engine": {"resources": {"cpu": 2}}},
            "spec.engine.resources.cpu: CPUs are set for the runtime vllm-cpu alone",
        ),
        (
            {"engine": {"resources": {"kvCacheMemory": 1.5}}},
            "spec.engine.resources.kvCacheMemory: a quantity such as 4Gi is needed, got 1.5",
        ),
        (
            {"engine": {"resources": {"kvCacheMemory": "1k"}}},
            "spec.engine.resources.kvCacheMemory: a quantity from 1Mi to 1Ti is needed, got '1k'",
        ),
        (
            {"engine": {"drainTimeout": 10}},
            "spec.engine.drainTimeout: a duration such as 500ms, 10s or 1m30s is needed, got 10",
        ),
        ({"engine": {"drainTimeout": "0s"}}, "spec.engine.drainTimeout: a duration from 1s to 24h is needed, got '0s'"),
        (
            {"scheduling": {"request": {"ageingRate": float("nan")}}},
            "spec.scheduling.request.ageingRate: input should be a finite number, got nan",
        ),
        (
            {"scheduling": {"request": {"ageingRate": "fast {error}"}}},
            "spec.scheduling.request.ageingRate: input should be a valid number, got 'fast {error}'",
        ),
        ({"model": {"uri": None}}, "spec.model.uri: required, but absent"),
        ({"model": {"uri": "gs://models/a"}}, "spec.model.uri: unknown scheme 'gs'; known: file, hf, pvc, s3"),
        (
            {"model": {"uri": "Qwen/Qwen3-30B-A3B"}},
            "spec.model.uri: a URI such as hf://org/name, file:///folder or s3://bucket/folder is needed, "
            "got 'Qwen/Qwen3-30B-A3B'",
        ),
        (
            {"model": {"uri": "file:///a", "revision": "main"}},
            "spec.model.revision: a revision needs a uri that starts with hf://",
        ),
        (
            {"model": {"uri": "s3://a/b", "cache": {"path": "/c"}}},
            "spec.model.cache: a cache needs a uri that starts with hf://",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_path_value_and_choices(section: dict[str, Any], line: str) -> None:
    assert refusal(with_spec(**section)) == [line]


def test_all_mistakes_are_reported_at_once_in_the_order_of_their_paths() -> None:
    lines = refusal(with_spec(model={}, gateway={"port": 0}, engine={"replica": 2, "drainTimeout": "x"}))
    assert [line.partition(":")[0] for line in lines] == [
        "spec.engine.drainTimeout",
        "spec.engine.replica",
        "spec.gateway.port",
        "spec.model.uri",
    ]


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (None, "a mapping with apiVersion, kind, metadata and spec is needed, got nothing"),
        ([MINIMAL], "a mapping with apiVersion, kind, metadata and spec is needed, got a list"),
        ("text", "a mapping with apiVersion, kind, metadata and spec is needed, got 'text'"),
        ({**MINIMAL, "kind": "Pod", "x": 1}, "kind: unknown 'Pod'; known: MoEServing"),
        ({**MINIMAL, "apiVersion": "v1"}, "apiVersion: unknown 'v1'; known: moeserving.dev/v1alpha1"),
        ({**MINIMAL, "metadata": {}}, "metadata.name: required, but absent"),
        ({key: MINIMAL[key] for key in ("apiVersion", "metadata", "spec")}, "kind: required, but absent"),
    ],
)
def test_what_is_no_moeserving_is_reported_so(document: object, line: str) -> None:
    assert refusal(document) == [line]


@pytest.mark.parametrize("name", ["Tiny", "-a", "a_b", "a" * 64, "0a", "a/b", "", "../up", "a\n"])
def test_a_name_that_cannot_name_a_folder_or_an_object_is_refused(name: str) -> None:
    assert [line.partition(":")[0] for line in refusal({**MINIMAL, "metadata": {"name": name}})] == ["metadata.name"]


def test_the_cpu_runtime_may_spread_experts_too() -> None:
    engine = {"runtime": "vllm-cpu", "parallelism": {"data": 2, "expert": True}}
    spec = parse_resource(with_spec(engine=engine, scheduling={"expert": {"redundantExperts": 2}})).spec
    assert spec.engine.parallelism.expert
    assert spec.scheduling.expert.redundant_experts == 2


def test_null_means_absent() -> None:
    document = with_spec(engine=None, gateway={"port": None}, scheduling={"request": {"policy": None}})
    assert parse_resource(document) == parse_resource(MINIMAL)


def test_writing_and_reading_gives_an_equal_resource() -> None:
    resource = parse_resource(
        with_spec(engine={"replicas": 2, "args": ["--x"], "resources": {"kvCacheMemory": 1 << 30}})
    )
    assert parse_resource(parse_document(dump_resource(resource), "dump")) == resource
    assert parse_resource(resource_document(resource)) == resource


def test_a_dump_has_what_was_set_and_no_defaults() -> None:
    assert parse_document(dump_resource(parse_resource(MINIMAL)), "dump") == MINIMAL


def test_a_relative_file_uri_is_resolved_against_the_folder_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "manifests" / "a.yaml"
    path.parent.mkdir()
    relative = with_spec(model={"uri": "file://../models/tiny"})
    path.write_text(dump_resource(parse_resource(relative)))
    assert load_resource(path).spec.model.uri == f"file://{tmp_path}/models/tiny"


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("scheduling.request.policy=fcfs", ("scheduling", "request", "policy"), "fcfs"),
        ("engine.replicas=3", ("engine", "replicas"), 3),
        ("scheduling.expert.mode=off", ("scheduling", "expert", "mode"), "off"),
        ("engine.env.THREADS=4", ("engine", "env", "THREADS"), "4"),
        ("engine.env.FLAG=on", ("engine", "env", "FLAG"), "on"),
        ("engine.env.EMPTY=", ("engine", "env", "EMPTY"), ""),
        ("engine.env.QUERY=a=b", ("engine", "env", "QUERY"), "a=b"),
        ("engine.args=[--a, --b]", ("engine", "args"), ["--a", "--b"]),
        ("gateway.hold.timeout=1m30s", ("gateway", "hold", "timeout"), "1m30s"),
        ("model.name=1984", ("model", "name"), "1984"),
    ],
)
def test_a_field_is_set_by_path(assignment: str, path: tuple[str, ...], value: object) -> None:
    before = deepcopy(MINIMAL)
    section: Any = set_field(MINIMAL, assignment)["spec"]
    for part in path:
        section = section[part]
    assert section == value
    assert before == MINIMAL, "the given document stays as it was"


def test_setting_null_takes_a_field_back() -> None:
    changed = set_field(with_spec(gateway={"port": 8000}), "gateway.port=null")
    assert parse_resource(changed).spec.gateway.port is None


@pytest.mark.parametrize(
    ("assignment", "line"),
    [
        (
            "scheduling.request.policy=sjff",
            "spec.scheduling.request.policy: unknown 'sjff'; known: fcfs, priority, sjf",
        ),
        ("nonsense", "PATH=VALUE is needed, such as scheduling.request.policy=fcfs, got 'nonsense'"),
        (
            "engine..replicas=1",
            "PATH=VALUE is needed, such as scheduling.request.policy=fcfs, got 'engine..replicas=1'",
        ),
        ("model.uri.x=1", "spec.model.uri: has no field 'x'"),
        ("engine.replicas=two", "spec.engine.replicas: input should be a valid integer, got 'two'"),
        (
            "gatway.port=1",
            "spec.gatway: unknown field; nearest known: gateway; "
            "known: autoscaling, commonMetadata, disruption, engine, gateway, metrics, model, networkPolicy, paused, "
            "scheduling",
        ),
        ("engine.replicas=[", "spec.engine.replicas: input should be a valid integer, got '['"),
        ("model.uri=null", "spec.model.uri: required, but absent"),
    ],
)
def test_a_bad_assignment_is_refused_in_one_line(assignment: str, line: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        set_field(MINIMAL, assignment)
    assert str(caught.value) == line
