"""Groups of engines get their weights of the requests, such as a canary beside the stable revision."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.gateway_config import Discovery, EngineAddress, GatewayConfig, Group
from moe_gateway.engines.dispatcher import Dispatcher
from moe_gateway.engines.load_report import least_wait_s
from moe_scheduling.engine.choice import DispatchPolicy, EngineSettings, Hold, Job, Refuse, RefuseReason, Send
from moe_scheduling.request.order import RequestSettings
from moe_scheduling.signals import EngineSignal, Target

from tests.gateway.clients import get, put
from tests.gateway.fake_api import engine_slice
from tests.gateway.messages import OK, post, prompt

STABLE, CANARY = "tiny-engine", "tiny-engine-canary"
NOW_S = 100.0


def fleet(weights, engines, **settings):
    """A dispatcher with this many engines in each group, all of which accept."""
    groups = tuple(Group(service=name, weight=weight) for name, weight in weights.items())
    listen = {"port": 1}
    config = GatewayConfig.model_validate(
        {"listen": listen, "admin": listen, "token_file": "t", "discovery": Discovery(groups=groups)}
    )
    dispatcher = Dispatcher(config)
    dispatcher.set_policies(EngineSettings(**settings), RequestSettings(), NOW_S)
    names = {f"{group}-{number}": group for group, total in engines.items() for number in range(total)}
    dispatcher.set_engines([EngineAddress(name=name, url="http://h") for name in names])
    dispatcher.set_offers(names, names, NOW_S)
    for name in names:
        dispatcher.set_ready(name, True, NOW_S)
    return dispatcher


def send(dispatcher, job=None, session=None):
    """The group that the next request goes to, which then ends at once; None where it has to wait."""
    decision = dispatcher.choose(job or Job(10), NOW_S)
    if not isinstance(decision, Send):
        return None
    in_flight = dispatcher.send(job or Job(10), (), session, decision, NOW_S)
    dispatcher.settle(in_flight, NOW_S)
    return dispatcher.engines[decision.target.server].group


def shares(dispatcher, requests):
    return Counter(send(dispatcher) for _ in range(requests))


@pytest.mark.parametrize("weight", [0, 1, 10, 50, 99, 100])
@pytest.mark.parametrize("policy", DispatchPolicy)
def test_a_canary_gets_its_weight_of_the_requests(weight, policy):
    dispatcher = fleet({STABLE: 100 - weight, CANARY: weight}, {STABLE: 3, CANARY: 1}, policy=policy)
    expected = {STABLE: 5 * (100 - weight), CANARY: 5 * weight}
    assert shares(dispatcher, 500) == {group: requests for group, requests in expected.items() if requests}


@given(st.lists(st.integers(0, 100), min_size=1, max_size=3).filter(any), st.sampled_from(DispatchPolicy))
def test_any_weights_are_kept_exactly_over_a_round(weights, policy):
    named = {f"g{number}": weight for number, weight in enumerate(weights)}
    dispatcher = fleet(named, dict.fromkeys(named, 2), policy=policy)
    assert shares(dispatcher, sum(weights)) == Counter(named) - Counter()


@pytest.mark.parametrize("weights", [{STABLE: 50, CANARY: 50}, {STABLE: 75, CANARY: 25}, {STABLE: 1, CANARY: 2}])
@pytest.mark.parametrize("policy", DispatchPolicy)
def test_within_a_group_equals_take_turns_whatever_the_weights(weights, policy):
    dispatcher = fleet(weights, {STABLE: 2, CANARY: 3}, policy=policy)
    got = Counter()
    for _ in range(1200):
        decision = dispatcher.choose(Job(10), NOW_S)
        got[decision.target.server] += 1
    for group, engines in ((STABLE, 2), (CANARY, 3)):
        part = [requests for name, requests in got.items() if dispatcher.engines[name].group == group]
        assert (len(part), max(part) - min(part) <= 1) == (engines, True)


def test_a_group_without_an_accepting_engine_cedes_its_share():
    dispatcher = fleet({STABLE: 90, CANARY: 10}, {STABLE: 2, CANARY: 1})
    dispatcher.set_ready(f"{CANARY}-0", False, NOW_S)
    assert shares(dispatcher, 50) == {STABLE: 50}
    dispatcher.set_ready(f"{CANARY}-0", True, NOW_S)
    for number in range(2):
        dispatcher.set_ready(f"{STABLE}-{number}", False, NOW_S)
    assert shares(dispatcher, 50) == {CANARY: 50}


def test_a_group_of_weight_0_gets_nothing_even_when_it_is_alone():
    dispatcher = fleet({STABLE: 100, CANARY: 0}, {STABLE: 1, CANARY: 1})
    dispatcher.set_ready(f"{STABLE}-0", False, NOW_S)
    assert dispatcher.choose(Job(10), NOW_S) == Refuse(RefuseReason.NO_ENGINE)
    assert (dispatcher.accepting, least_wait_s(dispatcher, NOW_S)) == (False, None)


def test_a_group_that_is_saturated_or_failed_the_request_cedes_it():
    dispatcher = fleet({STABLE: 100, CANARY: 1}, {STABLE: 1, CANARY: 1}, saturation_s=1.0)
    loaded = Target(f"{STABLE}-0")
    assert dispatcher.choose(Job(10), NOW_S, tried={loaded}).target == Target(f"{CANARY}-0")
    dispatcher.observe(loaded, EngineSignal(waiting_prefill_tokens=10**6), NOW_S, NOW_S)
    assert shares(dispatcher, 10) == {CANARY: 10}
    dispatcher.observe(Target(f"{CANARY}-0"), EngineSignal(waiting_prefill_tokens=10**6), NOW_S, NOW_S)
    assert isinstance(dispatcher.choose(Job(10), NOW_S), Hold)


def test_a_session_stays_in_its_group_until_that_gets_nothing_any_more():
    dispatcher = fleet({STABLE: 50, CANARY: 50}, {STABLE: 1, CANARY: 1})
    homes = {}
    for number in range(8):
        session = str(number % 4)
        group = send(dispatcher, Job(10, session_target=homes.get(session, (None, None))[1]), session)
        assert homes.setdefault(session, (group, Target(f"{group}-0")))[0] == group
    dispatcher.set_groups([Group(service=STABLE, weight=100), Group(service=CANARY, weight=0)], NOW_S)
    assert {send(dispatcher, Job(10, session_target=home)) for _, home in homes.values()} == {STABLE}


def test_other_weights_count_from_the_next_request_on():
    dispatcher = fleet({STABLE: 100, CANARY: 0}, {STABLE: 2, CANARY: 1})
    for weight in (0, 25, 50, 100, 0):
        dispatcher.set_groups([Group(service=STABLE, weight=100 - weight), Group(service=CANARY, weight=weight)], NOW_S)
        assert shares(dispatcher, 100)[CANARY] == weight


# A gateway that runs.


def counts(*engines):
    return [len(engine.requests) for engine in engines]


async def test_weights_are_changed_while_the_gateway_runs(make_engine, api, discover):
    stable, canary = await make_engine(), await make_engine()
    api.put(engine_slice(stable, STABLE))
    api.put(engine_slice(canary, CANARY))
    served = await discover({STABLE: 100, CANARY: 0})
    await served.takes(stable, canary)
    for _ in range(4):
        assert (await served.ask(post(prompt()))).json == OK
    assert counts(stable, canary) == [4, 0]
    groups = [{"service": STABLE, "weight": 50}, {"service": CANARY, "weight": 50}]
    status, document = await put(served, {"groups": groups})
    assert (status, document["groups"]) == (200, groups)
    for _ in range(4):
        assert (await served.ask(post(prompt()))).json == OK
    assert counts(stable, canary) == [6, 2]
    # The Services are the same, and so are their endpoints.
    assert (api.lists, api.watches) == (1, 1)
    rows = {row["name"]: row["group"] for row in (await get(served, "/v1/state"))[1]["engines"]}
    assert rows == {stable.name: STABLE, canary.name: CANARY}


async def test_a_group_that_is_added_is_looked_for_and_one_that_is_taken_out_is_forgotten(make_engine, api, discover):
    stable, canary = await make_engine(), await make_engine()
    api.put(engine_slice(stable, STABLE))
    api.put(engine_slice(canary, CANARY))
    served = await discover({STABLE: 100})
    await served.takes(stable)
    await put(served, {"groups": [{"service": STABLE}, {"service": CANARY, "weight": 10}]})
    await served.takes(stable, canary)
    await put(served, {"groups": [{"service": CANARY}]})
    await served.takes(canary)
    await put(served, {"groups": []})
    await served.takes()
    assert served.gateway.ready
    assert served.gateway.dispatcher.engines == {}


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        ({"groups": [{"service": STABLE, "weight": 101}]}, "groups[0].weight", "less than or equal to 100"),
        ({"groups": [{"service": STABLE, "weight": -1}]}, "groups[0].weight", "greater than or equal to 0"),
        ({"groups": [{"weight": 1}]}, "groups[0].service", "required"),
        ({"groups": [{"servce": STABLE}]}, "groups[0].servce", "nearest known: service"),
        ({"groups": [{"service": STABLE}] * 2}, "groups", f"service named twice: {STABLE}"),
        ({"engines": []}, "engines", "the engines are found by discovery"),
    ],
)
async def test_a_bad_change_of_groups_is_named_and_changes_nothing(api, discover, body, path, message):
    served = await discover({STABLE: 100})
    before = served.gateway.in_force
    status, document = await put(served, {"dispatch": {"policy": "roundRobin"}} | body)
    assert status == 422
    assert any(row["path"] == path and message in row["message"] for row in document["errors"]), document
    assert served.gateway.in_force is before


async def test_a_fixed_list_has_no_groups(make_engine, serve):
    served = await serve(await make_engine())
    status, document = await put(served, {"groups": []})
    assert (status, document["errors"][0]["path"]) == (422, "groups")
