"""Rivals: each rule on a table of cases, and what all of them must never do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_scheduling.signals import EngineSignal, Target
from moe_tools.simulator.rivals import RIVALS
from moe_tools.simulator.workload import SimRequest

NAMES = sorted(RIVALS)


class FakeWire:
    """Takes down what a router does."""

    def __init__(self):
        self.sent, self.refused = [], []

    def send(self, request, target):
        request.attempts += 1
        self.sent.append(target.server)

    def refuse(self, request, reason):
        request.failure = reason
        self.refused.append(reason)


def request(index, *, prompt_tokens=1000, **values):
    return SimRequest(index=index, arrival_s=0.0, prompt_tokens=prompt_tokens, output_tokens=4, **values)


def make(name, engines=3, gateways=1):
    wire = FakeWire()
    targets = [Target(f"e{number}") for number in range(engines)]
    router = RIVALS[name].make(wire, targets, 0, gateways=gateways, seed=1)
    for target in targets:
        router.set_ready(target.server, True, 0.0)
    return router, wire


def see(router, server, **signal):
    router.observe(Target(server), EngineSignal(**signal), 0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_no_engine_is_a_refusal(name):
    router, wire = make(name)
    for number in range(3):
        router.set_ready(f"e{number}", False, 0.0)
    router.arrive(request(1), 0.0)
    assert (wire.sent, len(wire.refused)) == ([], 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_that_is_not_ready_gets_nothing(name):
    router, wire = make(name)
    router.set_ready("e1", False, 0.0)
    for index in range(30):
        router.arrive(request(index), 0.0)
    assert set(wire.sent) <= {"e0", "e2"}


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_request_goes_to_another_engine_once(name):
    router, wire = make(name)
    row = request(1)
    router.arrive(row, 0.0)
    router.failed(row, 1.0)
    assert len(wire.sent) == 2
    assert wire.sent[0] != wire.sent[1]
    router.failed(row, 2.0)
    assert (len(wire.sent), wire.refused) == (2, ["its engine failed"])


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_stream_is_not_sent_again(name):
    router, wire = make(name)
    row = request(1)
    router.arrive(row, 0.0)
    row.first_token_s = 0.5
    router.answered(row, 0.5)
    router.failed(row, 1.0)
    assert (len(wire.sent), wire.refused) == (1, ["its engine failed"])


@given(st.sampled_from(NAMES), st.lists(st.integers(0, 3), max_size=60))
def test_what_was_settled_leaves_nothing_behind(name, moves):
    router, _ = make(name)
    rows, count = [], 0
    for move in moves:
        if move == 0 and rows:
            row = rows.pop(0)
            row.first_token_s = row.finished_s = 1.0
            router.answered(row, 1.0)
            router.settled(row, 1.0)
        else:
            row = request(count, prompt_tokens=move * 300 + 1, session=f"s{move}")
            count += 1
            router.arrive(row, 0.0)
            rows.append(row)
    assert sum(router.in_flight.values()) == len(rows)
    for row in rows:
        row.first_token_s = row.finished_s = 1.0
        router.answered(row, 2.0)
        router.settled(row, 2.0)
    assert not any(router.in_flight.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_choices(name):
    def choices():
        router, wire = make(name)
        for index in range(50):
            router.arrive(request(index, prompt_tokens=100 + index, session=f"s{index % 7}"), 0.0)
        return wire.sent

    assert choices() == choices()


def test_round_robin_goes_round():
    router, wire = make("roundRobin")
    for index in range(6):
        router.arrive(request(index), 0.0)
    assert wire.sent == ["e0", "e1", "e2"] * 2


def test_vllm_counts_what_it_sent_since_the_last_statistics():
    router, wire = make("vllmInternal")
    for server, running in (("e0", 5), ("e1", 5), ("e2", 3)):
        see(router, server, running=running)
    for index in range(3):
        router.arrive(request(index), 0.0)
    assert wire.sent[:2] == ["e2", "e2"]
    assert wire.sent[2] in ("e0", "e1", "e2")


def test_vllm_shuns_a_queue_on_a_full_cache():
    router, wire = make("vllmInternal", engines=2)
    see(router, "e0", running=1, waiting=2, kv_usage=0.9)
    see(router, "e1", running=4)
    router.arrive(request(1), 0.0)
    # 3 + 2 * 6 * 0.4 = 7.8 against 4.
    assert wire.sent == ["e1"]


def test_vllm_counts_its_own_for_each_gateway_and_believes_old_statistics():
    router, wire = make("vllmInternal", engines=2, gateways=4)
    see(router, "e0", running=1)
    see(router, "e1", running=3)
    router.arrive(request(1), 1000.0)
    # 4 gateways send as much: 1 + 4 against 3.
    router.arrive(request(2), 1000.0)
    assert wire.sent == ["e0", "e1"]


def test_of_two_the_one_with_fewer_in_flight_is_taken():
    router, wire = make("powerOfTwo", engines=2)
    rows = [request(index) for index in range(40)]
    for row in rows:
        router.arrive(row, 0.0)
    assert wire.sent.count("e0") == wire.sent.count("e1") == 20
    for row, server in zip(rows, list(wire.sent), strict=True):
        if server == "e1":
            router.settled(row, 1.0)
    for index in range(20):
        router.arrive(request(100 + index), 1.0)
    assert wire.sent[40:] == ["e1"] * 20


def test_a_session_stays_under_consistent_hash_and_moves_only_when_it_must():
    router, wire = make("consistentHash", engines=5)
    for index in range(40):
        router.arrive(request(index, session=f"s{index % 10}"), 0.0)
    homes = dict(zip((f"s{index % 10}" for index in range(40)), wire.sent, strict=True))
    assert all(homes[f"s{index % 10}"] == server for index, server in enumerate(wire.sent))
    gone = homes["s0"]
    router.set_ready(gone, False, 0.0)
    for index in range(10):
        router.arrive(request(100 + index, session=f"s{index}"), 0.0)
    moved = {f"s{index}" for index, server in enumerate(wire.sent[40:]) if server != homes[f"s{index}"]}
    assert moved == {session for session, server in homes.items() if server == gone}


def test_cache_aware_follows_the_prefix_until_the_fleet_is_unbalanced():
    router, wire = make("cacheAware", engines=2)
    for index in range(70):
        router.arrive(request(index, prompt_tokens=1024, pieces=(1, 2)), 0.0)
    assert set(wire.sent[:65]) == {wire.sent[0]}
    assert wire.sent[65] != wire.sent[0]


def test_gimbal_goes_down_its_cascade():
    router, wire = make("gimbal")
    for server, use in (("e0", 0.95), ("e1", 0.5), ("e2", 0.45)):
        see(router, server, kv_usage=use)
    router.arrive(request(1, prompt_tokens=2900, session="a"), 0.0)
    home = wire.sent[0]
    assert home in ("e1", "e2")
    router.arrive(request(2, prompt_tokens=200, session="a"), 0.0)
    # 3,100 tokens there and none at the other: the load decides before the session does.
    router.arrive(request(3, prompt_tokens=10, session="a"), 0.0)
    assert wire.sent[1] == home
    assert wire.sent[2] != home
    see(router, "e1", kv_usage=0.8)
    router.arrive(request(4), 0.0)
    assert wire.sent[3] == "e2"


def test_the_load_of_gimbal_is_all_that_is_in_flight_and_nothing_that_engines_tell():
    router, wire = make("gimbal", engines=2)
    first = request(1, prompt_tokens=4000, session="a")
    router.arrive(first, 0.0)
    home, other = wire.sent[0], {"e0": "e1", "e1": "e0"}[wire.sent[0]]
    first.first_token_s = 1.0
    router.answered(first, 1.0)
    see(router, home)
    see(router, other, waiting_prefill_tokens=9000)
    router.arrive(request(2, prompt_tokens=10, session="a"), 2.0)
    assert wire.sent[1] == other
    first.finished_s = 3.0
    router.settled(first, 3.0)
    router.arrive(request(3, prompt_tokens=10, session="a"), 3.0)
    # Now nothing but the session decides, which was at the other last.
    assert wire.sent[2] == other


def test_llm_d_prefers_the_short_queue_and_the_held_prefix():
    router, wire = make("llmD", engines=2)
    see(router, "e0", waiting=5)
    router.arrive(request(1, prompt_tokens=512, pieces=(1,)), 0.0)
    assert wire.sent == ["e1"]
    see(router, "e0", waiting=0)
    # Queues are equal: the whole prompt held at e1 is worth 3.
    router.arrive(request(2, prompt_tokens=512, pieces=(1,)), 0.0)
    assert wire.sent == ["e1", "e1"]


def teach(router, wire, *, second_s_per_token=0.001):
    """Serves sixty requests one after the other, each as long as the tokens that were sent before it say."""
    for index in range(60):
        row = request(1000 + index, prompt_tokens=100 + 50 * (index % 20))
        router.arrive(row, float(index))
        row.first_token_s = index + second_s_per_token * row.prompt_tokens
        router.answered(row, row.first_token_s)
        row.finished_s = row.first_token_s
        router.settled(row, row.finished_s)
    wire.sent.clear()


def test_predicted_latency_decides_as_the_scorers_until_its_model_is_known():
    router, wire = make("predictedLatency", engines=2)
    see(router, "e0", waiting=5)
    router.arrive(request(1, prompt_tokens=512, pieces=(1,)), 0.0)
    see(router, "e0", waiting=0)
    router.arrive(request(2, prompt_tokens=512, pieces=(1,)), 0.0)
    assert (router.model.is_known, wire.sent) == (False, ["e1", "e1"])
    with pytest.raises(ValueError, match="fewer than 50 samples"):
        router.model.predict_s((1.0,))


def test_predicted_latency_learns_seconds_from_tokens():
    router, wire = make("predictedLatency", engines=2)
    teach(router, wire)
    assert router.model.is_known
    features = (1.0, 0.0, 2000, 2000.0, 0, 0, 0.0, 0, 0)
    assert router.model.predict_s(features) == pytest.approx(2.0, rel=0.01)


def test_predicted_latency_stays_where_the_prompt_is_held():
    router, wire = make("predictedLatency", engines=4)
    teach(router, wire)
    router.arrive(request(1, prompt_tokens=5120, pieces=tuple(range(10))), 100.0)
    home = wire.sent[0]
    for index in range(2, 12):
        router.arrive(request(index, prompt_tokens=5120, pieces=tuple(range(10))), 100.0)
    assert wire.sent == [home] * 11


def test_dynamo_weighs_a_held_prefix_against_active_blocks():
    router, wire = make("dynamo", engines=2)
    first = request(1, prompt_tokens=512, pieces=(1,))
    router.arrive(first, 0.0)
    home = wire.sent[0]
    # There: 32 uncached and 32 active blocks of the first; held here it would be 64 + 32, elsewhere 64.
    router.arrive(request(2, prompt_tokens=512, pieces=(1,)), 0.0)
    assert wire.sent[1] != home
    first.first_token_s = first.finished_s = 1.0
    router.answered(first, 1.0)
    router.settled(first, 1.0)
    router.arrive(request(3, prompt_tokens=512, pieces=(1,)), 1.0)
    assert wire.sent[2] == home
