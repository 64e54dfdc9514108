"""SGLang's order on vLLM's real scheduler: wait over uncached tokens, and by arrival where many wait."""

import pytest
from moe_lab.experiments.variants import HRRN_SCHEDULER
from moe_tools.simulator.costs import LinearCost
from moe_tools.simulator.rank import EngineLimits
from moe_tools.simulator.simulation import Simulation, load_vllm, simulate
from moe_tools.traces import TraceRequest

# One seat, and steps of half a second whatever they compute.
ONE_SEAT = EngineLimits(max_num_seqs=1, max_num_batched_tokens=1024, kv_blocks=2000, max_model_len=8192)
HALF_A_SECOND = LinearCost(base_s=0.5, prefill_s=0.0, decode_s=0.0)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def maker():
    return load_vllm()


def one(prompt_tokens, arrival_s, output_tokens=1, **values):
    return TraceRequest(arrival_s=arrival_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, **values)


def serve(maker, trace):
    """The indexes of all requests but the first, which holds the seat for twenty seconds, as they were served."""
    first = one(10, 0.0, output_tokens=40)
    outcome = simulate(
        Simulation(
            trace=[first, *trace],
            cost=HALF_A_SECOND,
            limits=ONE_SEAT,
            scheduler=HRRN_SCHEDULER,
            dispatch="vllmInternal",
            async_scheduling=False,
        ),
        maker,
    )
    assert outcome.figures.failed == 0
    return [row.index for row in sorted(outcome.requests, key=lambda row: row.first_token_s)][1:]


@pytest.mark.parametrize(
    ("trace", "order"),
    [
        # Waits of 19, 18 and 17 s: the fewest tokens have the greatest ratio.
        ([one(900, 1.0), one(300, 2.0), one(100, 3.0)], [3, 2, 1]),
        # 19 s for 200 tokens against 1 s for 100: what has waited goes before what is shorter.
        ([one(200, 1.0), one(100, 19.0)], [1, 2]),
        # Equal sizes go by arrival.
        ([one(100, 1.0), one(100, 2.0), one(100, 3.0)], [1, 2, 3]),
    ],
)
def test_the_greatest_ratio_of_wait_and_tokens_is_served_first(maker, trace, order):
    assert serve(maker, trace) == order


def test_tokens_in_the_prefix_cache_are_no_service(maker):
    held = [one(1024, 0.0, blocks=(1, 2)), one(200, 2.0), one(1040, 2.0, blocks=(1, 2))]
    # The first of them fills the cache, before the one that holds the seat comes.
    outcome = simulate(
        Simulation(
            trace=[held[0], one(10, 1.0, output_tokens=40), *held[1:]],
            cost=HALF_A_SECOND,
            limits=ONE_SEAT,
            scheduler=HRRN_SCHEDULER,
            dispatch="vllmInternal",
        ),
        maker,
    )
    short, cached = outcome.requests[2:]
    assert cached.cached_tokens == 1024
    assert cached.first_token_s < short.first_token_s


def test_where_more_wait_than_are_ranked_the_order_is_that_of_arrival(maker):
    # Importing vLLM warns, unless it is loaded already.
    from moe_tools.simulator.hrrn import MOST_RANKED

    trace = [one(900 - number, 1.0 + number / 100) for number in range(MOST_RANKED + 2)]
    order = serve(maker, trace)
    # The first two leave 128, which are ranked: then the shortest, which came last, goes first.
    assert order[:3] == [1, 2, MOST_RANKED + 2]
