"""The fleet's signal out of Prometheus, for resources that name one: through prometheus-api-client.

Queries look at the pods of one resource by namespace and name of the pod, the labels that every usual scrape
configuration sets. What has no sample, or an old one, is not known.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from moe_contract.proxies import is_within_cluster
from moe_scheduling.engine.disaggregation import EngineRole
from moe_scheduling.fleet.size import FleetSignal
from prometheus_api_client import PrometheusConnect
from prometheus_api_client.exceptions import PrometheusApiClientException
from requests import Session
from requests.exceptions import RequestException
from urllib3.util.retry import Retry

from moe_operator.autoscale.signal import Fleet
from moe_operator.plan.names import Names

TIMEOUT_S = 5
# Four scrapes of the monitors that the plan makes: with fewer a rate has gaps.
WINDOW = "1m"

# Of `build_queries`: what says how much of the fleet is known, and how old it is.
_OF_SAMPLES = ("age_s", "gateways", "held", "in_flight")

log = logging.getLogger("moeserving.operator")

_GATEWAY = "moeserving_gateway"
_ENGINE = "moeserving_engine"


def build_queries(namespace: str, names: Names) -> dict[str, str]:
    """The query of each field of the signal."""
    gateway = _pods_of(namespace, names.gateway)
    engine = _pods_of(namespace, f"({names.engine}|{names.canary})")
    ttft = f"{_GATEWAY}_ttft_seconds"
    return {
        "wait_s": f"min({_GATEWAY}_wait_seconds{gateway})",
        "kv_usage": f"avg(max by (pod) ({_ENGINE}_kv_usage_ratio{engine}))",
        "ttft_s": f"sum(rate({ttft}_sum{gateway}[{WINDOW}])) / sum(rate({ttft}_count{gateway}[{WINDOW}]))",
        "tokens_per_s": f"sum(rate({_ENGINE}_computed_tokens_total{engine}[{WINDOW}]))",
        "arrivals_per_s": f"sum(rate({_GATEWAY}_arrivals_total{gateway}[{WINDOW}]))",
        "held": f"sum({_GATEWAY}_held_requests{gateway})",
        "held_since_s": f"max({_GATEWAY}_held_seconds{gateway})",
        "in_flight": f"sum({_GATEWAY}_in_flight_requests{gateway})",
        "gateways": f"count({_GATEWAY}_held_requests{gateway})",
        # Age of the newest sample: Prometheus itself goes on answering with old ones for five minutes.
        "age_s": f"time() - min(timestamp({_GATEWAY}_held_requests{gateway}))",
    }


def _pods_of(namespace: str, name: str) -> str:
    """The selector of the pods of a workload; `name` is a regular expression."""
    # A pod's name has one or two words more than that of what made it; with more it is another resource's.
    return f'{{namespace="{namespace}",pod=~"{name}(-[a-z0-9]+){{1,2}}"}}'


def build_role_queries(namespace: str, names: Names, role: EngineRole, inter_token_s: float | None) -> dict[str, str]:
    """The query of each field of the signal of the engines of one fixed role, as `build_role_signal` has them."""
    engine = _pods_of(namespace, names.of_role(role))
    whole = build_queries(namespace, names)
    whole["tokens_per_s"] = f"sum(rate({_ENGINE}_computed_tokens_total{engine}[{WINDOW}]))"
    if role is EngineRole.PREFILL:
        waiting = f"({_ENGINE}_waiting_prefill_tokens{engine} + {_ENGINE}_running_prefill_tokens{engine})"
        del whole["kv_usage"]
        return whole | {"wait_s": f"min({_of_engines(engine, waiting, _step_time(engine, 'prefill_token'))})"}
    del whole["wait_s"], whole["ttft_s"]
    usage = f"{_ENGINE}_kv_usage_ratio{engine}"
    whole["kv_usage"] = f"avg(max by (pod) ({_accepting(engine, usage)}))"
    if inter_token_s is None:
        return whole
    base, request = _step_time(engine, "base"), _step_time(engine, "decode_request")
    left = f"({inter_token_s:g} - {base})"
    # An agent of an older release has no such term.
    root = f"({_step_time(engine, 'decode_root')} or 0 * {base})"
    # One over the square of x, where request * x^2 + root * x = left, as in `decode_load`. Where a step takes longer
    # whatever decodes in it, more engines change nothing.
    rooted = f"({root} + sqrt({root} ^ 2 + 4 * {request} * {left}))"
    part = f"(({rooted} / (2 * ({left} > 0))) ^ 2 or 0 * ({left} <= 0))"
    return whole | {"decode_load": f"avg({_of_engines(engine, f'{_ENGINE}_decode_tokens{engine}', part)})"}


def _step_time(engine: str, term: str) -> str:
    return f"{_ENGINE}_step_{term}_seconds{engine}"


def _of_engines(engine: str, tokens: str, each: str) -> str:
    """The greatest product of tokens and their price over the ranks of each engine that accepts requests.

    A rank without tokens has 0, also without a price; one with tokens and without a price has what is not known, Inf.
    """
    product = f"({tokens} * {each} or {tokens} == 0 or {tokens} * Inf)"
    return f"max by (pod) ({_accepting(engine, product)})"


def _accepting(engine: str, value: str) -> str:
    return f"{value} and on (pod) {_ENGINE}_accepting{engine} == 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a source of signals says.

    Attributes:
        signal: of the whole fleet; None when a part of it is not known.
        held: requests that it knows to be held, of however few gateways.
        held_at_s: time of the oldest sample of `held`, on the operator's monotonic clock.
    """

    signal: FleetSignal | None = None
    held: int = 0
    held_at_s: float = -math.inf

    def asks(self, since_s: float) -> bool:
        """Whether requests were held at `since_s` or later."""
        return self.held > 0 and self.held_at_s >= since_s


async def fetch_reading(
    url: str, key: tuple[str, str], fleet: Fleet, queries: Mapping[str, str] | None = None
) -> Reading:
    """What Prometheus knows: nothing when it gives no answer or has no gateway of the resource.

    The signal is None while it has not every ready gateway: what the others hold and send is not known. Requests that
    are held are asked of the gateways too: waking the first engine cannot wait for a scrape.
    """
    try:
        values = await asyncio.to_thread(_query, url, queries or build_queries(key[0], Names(key[1])))
    except (PrometheusApiClientException, RequestException, ValueError, KeyError) as error:
        log.warning("%s/%s: no signal from Prometheus: %s", *key, error)
        return Reading()
    reading = read_values(values, fleet, time.monotonic())
    if reading.signal is None:
        log.warning("%s/%s: no signal from Prometheus: it lacks a ready gateway", *key)
    return reading


def read_values(values: Mapping[str, float | None], fleet: Fleet, now_s: float) -> Reading:
    """What the answers to `build_queries` say. Pure."""
    known = {name: value for name, value in values.items() if name not in _OF_SAMPLES}
    age_s, gateways, held, in_flight = (values.get(name) for name in _OF_SAMPLES)
    if age_s is None:
        return Reading()
    observed_s = now_s - max(0.0, age_s)
    reading = Reading(held=_count(held), held_at_s=observed_s)
    if held is None or in_flight is None or _count(gateways) < fleet.ready:
        return reading
    total = max(_count(held), sum(state.held for state in fleet.gateways))
    signal = FleetSignal(observed_s=observed_s, held=total, in_flight=_count(in_flight), **known)
    return replace(reading, signal=signal)


def _count(value: float | None) -> int:
    return 0 if value is None else max(0, math.ceil(value))


def _query(url: str, queries: Mapping[str, str]) -> dict[str, Any]:
    # Without tries anew, which would hold the pass for seconds: the next pass is one.
    with Session() as session:
        if is_within_cluster(urlsplit(url).hostname or ""):
            # It is not behind the proxy that is set for others; the bundle of authorities in the environment counts.
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        prometheus = PrometheusConnect(url=url, timeout=TIMEOUT_S, retry=Retry(total=0), session=session)
        return {name: _value(prometheus.custom_query(query)) for name, query in queries.items()}


def _value(rows: list[dict[str, Any]]) -> float | None:
    if not rows:
        return None
    value = float(rows[0]["value"][1])
    return value if math.isfinite(value) else None
