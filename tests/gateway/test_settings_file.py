"""Settings laid over the gateway's file at its start, and the tokens that are read anew while it runs."""

import json

import pytest
from moe_contract.gateway_config import Group, load_gateway_config
from moe_contract.input_errors import InvalidInput
from moe_operator.api.resource import MoEServing
from moe_operator.plan import pods
from moe_operator.plan.names import Names

from tests.gateway.clients import put

DISCOVERY = {"groups": [{"service": "old"}], "ranks": 2}


@pytest.fixture
def write(tmp_path):
    """Writes the gateway's file, and the settings file when there is a document or text for it."""

    def writer(settings=None, **sections):
        path, laid = tmp_path / "gateway.json", tmp_path / "settings.json"
        document = {"listen": {"port": 1}, "admin": {"port": 2}, "token_file": "t", "settings_file": str(laid)}
        path.write_text(json.dumps(document | sections))
        if settings is not None:
            laid.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return path

    return writer


def test_the_settings_file_is_laid_over_field_by_field(write):
    own = {"dispatch": {"policy": "roundRobin", "stickiness_s": 0.7}, "request": {"policy": "fcfs"}}
    path = write({"dispatch": {"policy": "leastRequests"}, "request": {"ageing_rate": 7.0}}, **own)
    found = load_gateway_config(path)
    assert (found.dispatch.policy, found.dispatch.stickiness_s) == ("leastRequests", 0.7)
    assert (found.request.policy, found.request.ageing_rate) == ("fcfs", 7.0)


@pytest.mark.parametrize("settings", [None, {}])
def test_without_settings_the_file_stands_alone(write, settings):
    found = load_gateway_config(write(settings, dispatch={"policy": "roundRobin"}, discovery=DISCOVERY))
    assert (found.dispatch.policy, found.discovery.groups) == ("roundRobin", (Group(service="old"),))


def test_groups_of_the_settings_stand_for_those_of_the_file(write):
    settings = {"groups": [{"service": "stable", "weight": 90}, {"service": "canary", "weight": 10}]}
    found = load_gateway_config(write(settings, discovery=DISCOVERY)).discovery
    assert found.groups == (Group(service="stable", weight=90), Group(service="canary", weight=10))
    assert found.ranks == 2


@pytest.mark.parametrize(
    ("settings", "sections", "message"),
    [
        ("{", {}, "not JSON"),
        ([1], {}, "a JSON object is needed, got list"),
        ({"dispach": {}}, {}, "dispach: unknown field; nearest known: dispatch"),
        ({"engines": []}, {}, "engines: unknown field"),
        ({"request": {"policy": "sjff"}}, {}, "request.policy: unknown 'sjff'; known: fcfs, priority, sjf"),
        ({"dispatch": None}, {}, "dispatch: "),
        ({"groups": [{"service": "a", "weight": 101}]}, {"discovery": DISCOVERY}, "groups[0].weight: "),
        ({"groups": [{"service": "a"}] * 2}, {"discovery": DISCOVERY}, "groups: service named twice: a"),
        ({"groups": []}, {}, "groups: there are none: the engines are a fixed list here"),
    ],
)
def test_bad_settings_are_reported_with_their_path(write, tmp_path, settings, sections, message):
    with pytest.raises(InvalidInput) as refused:
        load_gateway_config(write(settings, **sections))
    assert str(refused.value).startswith(f"settings_file: {tmp_path / 'settings.json'}: {message}")
    assert "\n" not in str(refused.value)


def test_settings_that_cannot_be_read_are_reported(write, tmp_path):
    with pytest.raises(InvalidInput) as refused:
        load_gateway_config(write(settings_file=str(tmp_path)))
    assert str(refused.value) == f"settings_file: cannot read {tmp_path}: Is a directory"


def test_engines_are_listed_or_found_but_not_both(write):
    engines = [{"name": "a", "url": "http://h"}]
    with pytest.raises(InvalidInput, match="engines: the engines are found by discovery"):
        load_gateway_config(write(engines=engines, discovery=DISCOVERY))
    with pytest.raises(InvalidInput, match="groups: service named twice: old"):
        load_gateway_config(write(discovery=DISCOVERY | {"groups": DISCOVERY["groups"] * 2}))


def test_what_the_operator_writes_is_taken(write):
    document = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    resource = MoEServing.model_validate(document | {"spec": {"model": {"uri": "hf://org/tiny"}}})
    groups = (Group(service="tiny-engine", weight=95), Group(service="tiny-engine-canary", weight=5))
    planned = pods.build_gateway_config(resource, Names("tiny")).model_dump(
        mode="json", exclude_defaults=True, exclude={"settings_file"}
    )
    found = load_gateway_config(write(pods.build_gateway_file(resource, groups), **planned))
    assert (found.discovery.groups, found.model) == (groups, "tiny")


# Tokens.


async def test_tokens_are_rotated_under_a_running_gateway(make_engine, serve, tmp_path):
    served = await serve(await make_engine())

    async def statuses(*tokens):
        return [(await put(served, {}, token))[0] for token in tokens]

    path = tmp_path / "token"
    path.write_text("newest\n\n  older \r\n")
    assert await statuses("newest", "older", "a-token", "", "newest\tolder") == [200, 200, 401, 401, 401]
    path.write_text("next\nnewest\n")
    assert await statuses("next", "newest", "older") == [200, 200, 401]


@pytest.mark.parametrize("text", [None, "", " \n\n"])
async def test_a_token_file_that_is_gone_or_empty_lets_nobody_in_and_breaks_nothing(make_engine, serve, tmp_path, text):
    served = await serve(await make_engine())
    path = tmp_path / "token"
    path.unlink() if text is None else path.write_text(text)
    assert [(await put(served, {}, token))[0] for token in ("a-token", "", None)] == [401] * 3
    path.write_text("again")
    assert (await put(served, {}, "again"))[0] == 200
