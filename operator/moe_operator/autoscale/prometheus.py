"""The fleet's signal out of Prometheus, for resources that name one: through prometheus-api-client.

Queries look at the pods of one resource by namespace and name of the pod, the labels that every usual scrape
configuration sets. What has no sample, or an old one, is not known.
"""

import asyncio
import logging
import math
import os
import time
from typing import Any
from urllib.parse import urlsplit

from moe_contract.proxies import is_within_cluster
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

log = logging.getLogger("moeserving.operator")

_GATEWAY = "moeserving_gateway"
_ENGINE = "moeserving_engine"


def build_queries(namespace: str, names: Names) -> dict[str, str]:
    """The query of each field of the signal."""
    # A pod's name has one or two words more than that of what made it; with more it is another resource's.
    gateway = f'{{namespace="{namespace}",pod=~"{names.gateway}(-[a-z0-9]+){{1,2}}"}}'
    engine = f'{{namespace="{namespace}",pod=~"({names.engine}|{names.canary})(-[a-z0-9]+){{1,2}}"}}'
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
        # Age of the newest sample: Prometheus itself goes on answering with old ones for five minutes.
        "age_s": f"time() - min(timestamp({_GATEWAY}_held_requests{gateway}))",
    }


async def fetch_signal(url: str, key: tuple[str, str], fleet: Fleet) -> FleetSignal | None:
    """The signal; None when Prometheus gives no answer or knows no gateway of the resource.

    Requests that are held are asked of the gateways too: waking the first engine cannot wait for a scrape.
    """
    try:
        values = await asyncio.to_thread(_query, url, build_queries(key[0], Names(key[1])))
    except (PrometheusApiClientException, RequestException, ValueError, KeyError) as error:
        log.warning("%s/%s: no signal from Prometheus: %s", *key, error)
        return None
    age_s = values.pop("age_s")
    if age_s is None:
        return None
    held = max(int(values.pop("held") or 0), sum(state.held for state in fleet.gateways))
    in_flight = int(values.pop("in_flight") or 0)
    return FleetSignal(observed_s=time.monotonic() - max(0.0, age_s), held=held, in_flight=in_flight, **values)


def _query(url: str, queries: dict[str, str]) -> dict[str, Any]:
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
