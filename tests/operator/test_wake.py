"""Sources that fall silent: a request that anybody knows of wakes the model, and silence never ends the last engine.

The table is every combination of what Prometheus says (absent, up, empty, away, stale, NaN, without one of the
gateways), how many of two ready gateways answer, and whether one holds a request.
"""

import math
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe_contract.gateway_state import GatewayState
from moe_operator.api import MoEServing, parse_resource
from moe_operator.autoscale import source
from moe_operator.autoscale.autoscaler import Autoscaler
from moe_operator.autoscale.prometheus import Reading, read_values
from moe_operator.autoscale.settings import fleet_settings
from moe_operator.autoscale.signal import Fleet, asks, build_signal
from moe_operator.plan import Observed
from pods import gateway, pod, states

NOW_S = 10_000.0
IDLE_AFTER_S = 60.0
QUIET: dict[str, Any] = {"held": 0, "in_flight": 0, "arrivals_per_s": 0.0, "ttft_s": None}
HOLDS = QUIET | {"held": 2, "held_since_s": 1.0}


def resource(*, prometheus: bool, url: str = "http://prometheus.test") -> MoEServing:
    spec: dict[str, Any] = {
        "model": {"uri": "hf://org/a"},
        "autoscaling": {"minReplicas": 0, "maxReplicas": 3, "idleAfter": f"{IDLE_AFTER_S:.0f}s", "interval": "5s"},
    }
    if prometheus:
        spec["metrics"] = {"prometheus": {"url": url}}
    header = {"apiVersion": "moeserving.dev/v1alpha1", "kind": "MoEServing", "metadata": {"name": "tiny"}}
    return parse_resource(header | {"spec": spec})


def values(held: float | None, *, age_s: float | None = 2.0, gateways: float | None = 2.0) -> dict[str, float | None]:
    """What Prometheus answers to the queries."""
    unknown = dict.fromkeys(("wait_s", "kv_usage", "ttft_s", "tokens_per_s", "held_since_s"))
    in_flight = None if held is None else 0.0
    return {
        **unknown,
        "arrivals_per_s": in_flight,
        "held": held,
        "in_flight": in_flight,
        "age_s": age_s,
        "gateways": gateways,
    }


# What Prometheus says while gateways hold this number of requests; None is one that gives no answer.
PROMETHEUS = {
    "up": values,
    "empty": lambda _: values(None, age_s=None, gateways=None),
    "away": lambda _: None,
    "stale": lambda held: values(held, age_s=500.0),
    "nan": lambda _: values(None),
    "partial": lambda held: values(held, gateways=1.0),
    "unscraped": lambda _: values(0.0, gateways=1.0),
}


@dataclass(frozen=True)
class Row:
    """One combination: `answers` has the state of each of the two ready gateways that answers."""

    prometheus: str
    answers: tuple[GatewayState, ...]
    held: int

    @property
    def fleet(self) -> Fleet:
        silent = 2 - len(self.answers)
        return Fleet(gateways=self.answers, engines={}, silent=silent, ready=2, observed_s=NOW_S)

    @property
    def reading(self) -> Reading:
        if self.prometheus == "absent":
            return Reading(signal=build_signal(self.fleet))
        answer = PROMETHEUS[self.prometheus](float(self.held))
        return Reading() if answer is None else read_values(answer, self.fleet, NOW_S)

    @property
    def is_known_to_hold(self) -> bool:
        """Whether anybody who can be heard knows of the request."""
        fresh = self.prometheus in ("up", "partial") and self.held > 0
        return fresh or any(state.held for state in self.answers)

    @property
    def is_known_to_be_idle(self) -> bool:
        """Whether the named source has fresh news of every gateway, and nobody knows of a request."""
        source_is_whole = self.prometheus == "up" or (self.prometheus == "absent" and len(self.answers) == 2)
        return source_is_whole and not self.is_known_to_hold


def rows() -> list[Row]:
    found = []
    for prometheus in ("absent", *PROMETHEUS):
        for pattern in ("", "q", "h", "qq", "qh", "hh"):
            answers = tuple(gateway(**(HOLDS if letter == "h" else QUIET)) for letter in pattern)
            found += [Row(prometheus, answers, held) for held in ((2,) if "h" in pattern else (0, 2))]
    return found


def decide(row: Row, replicas: int, *, idle: bool) -> int:
    """Engines after a decision; with `idle` after a time without requests in which all was known."""
    now_s = NOW_S - 2.0 * IDLE_AFTER_S
    autoscaler = Autoscaler(lambda: now_s)
    section = resource(prometheus=False).spec.autoscaling
    assert section is not None
    settings = fleet_settings(section)
    engines = {f"engine-{number}" for number in range(replicas)}
    if idle:
        while now_s < NOW_S - 5.0:
            quiet = Fleet(gateways=(gateway(**QUIET),), engines={}, silent=0, ready=1, observed_s=now_s)
            number = autoscaler.decide(replicas, engines, set(), build_signal(quiet), settings).replicas
            if number != replicas:
                break
            now_s += 5.0
    now_s = NOW_S
    asked = asks(row.answers) or row.reading.asks(NOW_S - settings.stale_after_s)
    return autoscaler.decide(replicas, engines, set(), row.reading.signal, settings, asked=asked).replicas


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.prometheus}-{len(row.answers)}-{row.held}")
def test_a_request_that_anybody_knows_of_wakes_the_model_and_nothing_else_does(row: Row) -> None:
    assert decide(row, 0, idle=False) == (1 if row.is_known_to_hold else 0)


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.prometheus}-{len(row.answers)}-{row.held}")
def test_the_last_engine_ends_only_where_every_gateway_is_known_to_be_idle(row: Row) -> None:
    assert decide(row, 1, idle=True) == (0 if row.is_known_to_be_idle else 1)


anything = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6))


@given(
    st.fixed_dictionaries(dict.fromkeys((*values(0.0),), anything)),
    st.lists(st.integers(0, 3), max_size=2),
    st.integers(0, 3),
)
def test_whatever_prometheus_answers_is_a_reading_that_never_hides_what_gateways_hold(
    answer: dict[str, float | None], held: list[int], silent: int
) -> None:
    gateways = tuple(gateway(**QUIET | {"held": count}) for count in held)
    fleet = Fleet(gateways=gateways, engines={}, silent=silent, ready=len(held) + silent, observed_s=NOW_S)
    reading = read_values(answer, fleet, NOW_S)
    if reading.signal is not None:
        assert reading.signal.held >= sum(held)
        assert reading.signal.observed_s <= NOW_S
        assert (answer["gateways"] or 0.0) > fleet.ready - 1, "a gateway that was not scraped is not known"
    assert reading.held_at_s <= NOW_S
    if answer["age_s"] is None:
        assert reading == Reading()


def test_a_sample_that_is_no_number_is_unknown_and_not_zero() -> None:
    fleet = Fleet(gateways=(), engines={}, silent=2, ready=2, observed_s=NOW_S)
    assert read_values(values(0.0), fleet, NOW_S).signal is not None
    assert read_values(values(0.0) | {"in_flight": None}, fleet, NOW_S).signal is None
    assert read_values(values(0.0) | {"held": None}, fleet, NOW_S).signal is None


async def test_a_gateway_that_holds_requests_wakes_the_model_without_waiting_for_prometheus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*_: object) -> Reading:
        raise AssertionError("Prometheus was asked")

    monkeypatch.setattr(source, "fetch_reading", never)
    pods = [pod("tiny-gateway-a", "gateway"), pod("tiny-gateway-b", "gateway", ready=False)]
    by_pod = states({"tiny-gateway-b": gateway(**HOLDS)})
    async with aiohttp.ClientSession() as session:
        observed = Observed(tokens=("t",), replicas=0)
        sources, wanted = source.Sources(session), resource(prometheus=True)
        outcome = await sources.decide(("ns", "tiny"), wanted, observed, pods, by_pod)
    assert (outcome.replicas, outcome.reason) == (1, "wake"), "the one that holds is not ready, the ready one is silent"


async def test_a_prometheus_that_is_away_does_not_end_the_last_engine() -> None:
    pods, by_pod = [pod(), pod("tiny-gateway-a", "gateway")], states({"tiny-gateway-a": gateway(**QUIET)})
    wanted = resource(prometheus=True, url="http://127.0.0.1:1")
    async with aiohttp.ClientSession() as session:
        observed = Observed(tokens=("t",), replicas=1)
        outcome = await source.Sources(session).decide(("ns", "tiny"), wanted, observed, pods, by_pod)
    assert outcome.replicas == 1
    assert outcome.limited is not None
    assert outcome.limited[0] == "NoSignal"


def test_an_infinite_age_is_no_time() -> None:
    assert Reading().held_at_s == -math.inf
    assert not Reading(held=3).asks(0.0)
