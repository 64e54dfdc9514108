"""Tenants in vLLM's real scheduler: which is charged, which is served next, and none of that where it is off."""

from types import SimpleNamespace

import pytest
from moe_contract.tenancy import tenant_of
from moe_scheduling.request.order import RequestSettings
from moe_tools.modelless import foreign_warnings

FLOOD, SMALL = "aaaaaaaa", "bbbbbbbb"


def of(tenant: str, name: str) -> str:
    """An id as vLLM makes it of the gateway's."""
    return f"cmpl-{name}.t{tenant}-0-9f8e7d6c"


def order(engine) -> list[str]:
    return [name.split("-")[1].split(".")[0] for name in engine.first_token_order]


def test_vllm_keeps_the_gateways_id_within_its_own():
    with foreign_warnings():
        from vllm.entrypoints.serve.engine.serving import BaseServing
        from vllm.sampling_params import SamplingParams
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.engine.parallel_sampling import ParentRequest

    header = SimpleNamespace(headers={"X-Request-Id": f"mine.t{FLOOD}"})
    request_id = f"cmpl-{BaseServing._base_request_id(header, 'its own')}-0"
    request = SimpleNamespace(request_id=request_id, external_req_id=None, params=SamplingParams(n=2))
    InputProcessor.assign_request_id(request)
    assert request.request_id != request_id
    assert tenant_of(request.request_id) == FLOOD
    child, _ = ParentRequest(request).get_child_info(1)
    assert child != request.request_id
    assert tenant_of(child) == FLOOD


@pytest.mark.parametrize(
    ("horizon_s", "place"), [(8.0, 6), (0.0, 20)], ids=["tenants distinguished", "tenants not distinguished"]
)
def test_a_flood_does_not_hold_up_the_other_tenant(make_engine, settings, horizon_s, place):
    settings.put(policy="sjf", ageing_rate=1000.0, fairness_horizon_s=horizon_s)
    engine = make_engine(max_num_seqs=1, step_tokens=1024)
    for number in range(20):
        engine.add(of(FLOOD, f"f{number:02}"), 1000, arrival_s=number / 100)
    engine.step()
    engine.add(of(SMALL, "small"), 1000, arrival_s=1.0)
    engine.run()
    assert len(order(engine)) == 21
    assert order(engine).index("small") <= place
    assert horizon_s or order(engine).index("small") == 20


@pytest.mark.parametrize("policy", ["priority", "sjf"])
@pytest.mark.parametrize(("suffix", "place"), [("p-40", 1), ("p40", 20), ("", 20)], ids=["urgent", "batch", "no class"])
def test_a_class_in_the_id_orders_a_request_of_a_route_without_a_field_for_it(
    make_engine, settings, policy, suffix, place
):
    settings.put(policy=policy, priority_step_s=1.0)
    engine = make_engine(max_num_seqs=1, step_tokens=1024)
    for number in range(20):
        engine.add(of(FLOOD, f"f{number:02}"), 1000, arrival_s=number / 100)
    engine.step()
    engine.add(f"transcribe-late.t{FLOOD}{suffix}-9f8e7d6c", 1000, arrival_s=1.0)
    engine.run()
    assert order(engine).index("late") == place


@pytest.mark.parametrize("weight", [0.0, 2.0, 5.0])
def test_prompts_are_charged_as_they_are_computed_and_answers_at_their_end(make_engine, settings, weight):
    settings.put(policy="sjf", ageing_rate=1000.0, ageing_horizon_s=0.0, fairness_horizon_s=8.0, output_weight=weight)
    engine = make_engine(max_num_seqs=1, step_tokens=256, kv_blocks=2000)
    queue = engine.scheduler.waiting
    engine.add(of(FLOOD, "long"), 3000, out=500)
    for tenant in (FLOOD, SMALL):
        engine.add(of(tenant, "waits"), 10, arrival_s=0.1)
    no_lag_s, computed_s = 0.25 * 8.0, 0.0
    while computed_s < 2.5:
        engine.step()
        computed_s = sum(sum(row.values()) for row in engine.schedules) / 1000
        assert queue._queue.lag_s(FLOOD) == pytest.approx(max(0.0, computed_s - no_lag_s))
    while of(FLOOD, "long") not in engine.finished_order:
        before = queue._queue.lag_s(FLOOD)
        engine.step()
    assert queue._queue.lag_s(FLOOD) - before == pytest.approx(weight * 500 / 1000, abs=0.02)
    engine.run()


def test_an_aborted_request_is_charged_what_it_was_answered(make_engine, settings):
    settings.put(policy="sjf", ageing_rate=1.0, fairness_horizon_s=8000.0)
    engine = make_engine(max_num_seqs=1, step_tokens=256)
    engine.add(of(FLOOD, "running"), 10, out=2000)
    for tenant in (FLOOD, SMALL):
        engine.add(of(tenant, "waits"), 10, arrival_s=0.1)
    for _ in range(1500):
        engine.step()
    before = engine.scheduler.waiting._queue.lag_s(FLOOD)
    engine.abort(of(FLOOD, "running"))
    weight = RequestSettings().output_weight
    answered = 1500 * weight
    assert engine.scheduler.waiting._queue.lag_s(FLOOD) == pytest.approx(10 + answered - 2000, abs=2 * weight)
    assert before == 0.0
    engine.run()


@pytest.mark.parametrize(("its", "first"), [(FLOOD, "long"), (SMALL, "short")])
def test_a_prompt_in_chunks_counts_with_its_tenants_lag(make_engine, settings, its, first):
    """The short one comes too late to overtake by its size; by the lag of the flooding tenant it does."""
    settings.put(policy="sjf", ageing_rate=1000.0, ageing_horizon_s=0.0, fairness_horizon_s=4.0, kv_growth_blocks=0)
    engine = make_engine(max_num_seqs=4, step_tokens=256, kv_blocks=2000)
    engine.add(of(FLOOD, "long"), 3500)
    # Both tenants wait once, so that the queue distinguishes them; then the charges count.
    engine.add(of(SMALL, "early"), 10)
    for _ in range(8):
        engine.step()
    engine.add(of(its, "short"), 200, arrival_s=0.5)
    engine.run()
    rest = [name for name in order(engine) if name != "early"]
    assert rest[0] == first


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_orders_of_vllm_know_no_tenants(make_engine, settings, policy):
    settings.put(policy=policy, ageing_rate=1000.0, fairness_horizon_s=8.0)
    engine = make_engine(max_num_seqs=1, step_tokens=1024)
    for number in range(10):
        engine.add(of(FLOOD, f"f{number}"), 1000, arrival_s=number / 100)
    engine.step()
    engine.add(of(SMALL, "small"), 1000, arrival_s=1.0)
    engine.run()
    assert order(engine)[-1] == "small"


def test_one_tenant_is_scheduled_as_without_tenants(make_engine, settings):
    steps = []
    for horizon_s in (0.0, 8.0):
        settings.put(policy="sjf", fairness_horizon_s=horizon_s)
        engine = make_engine(max_num_seqs=4, step_tokens=256, kv_blocks=200)
        for number in range(40):
            engine.add(of(FLOOD, f"r{number}"), 10 + number * 97 % 500, out=5, arrival_s=number / 50)
            engine.step()
        engine.run()
        assert not engine.scheduler.waiting._queue.charges
        steps.append(engine.schedules)
    assert steps[0] == steps[1]
