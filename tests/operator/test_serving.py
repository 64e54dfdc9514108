"""Whether clients reach a gateway, and gateways an engine: what `Ready` waits for."""

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from moe_operator.autoscale.signal import States
from moe_operator.kubernetes.serving import GatewayEndpoints, any_ready, find_blind_gateways, sees_engines
from moe_operator.kubernetes.store import Key
from pods import agent, gateway, pod, states

Document = dict[str, Any]
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEY = Key("ns", "tiny")


def endpoints(*ready: bool | None) -> Document:
    return {"endpoints": [{"conditions": {} if value is None else {"ready": value}} for value in ready]}


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        ([], False),
        ([{}], False),
        ([{"endpoints": None}], False),
        ([endpoints(False)], False),
        ([endpoints(False), endpoints(False, True)], True),
        ([endpoints(None)], True),
        ([{"endpoints": [{"addresses": ["10.0.0.1"]}]}], True),
    ],
)
def test_an_endpoint_counts_unless_it_says_that_it_is_not_ready(slices: list[Document], expected: bool) -> None:
    assert any_ready(slices) is expected


class Slices:
    """Stands in for the API server's EndpointSlices; notes what was asked."""

    def __init__(self) -> None:
        self.rows: list[Document] = []
        self.asked: list[str] = []
        self.calls: Counter[Any] = Counter()

    async def select(self, kind: Any, namespace: str, *, labels: str = "", fields: str = "") -> list[Document]:
        self.asked.append(labels)
        return self.rows


def front(uid: str, *, ready: bool = True) -> Document:
    found = pod(f"tiny-gateway-{uid}", "gateway", ready=ready)
    found["metadata"]["uid"] = uid
    return found


async def test_endpoints_are_asked_for_until_there_is_one_and_again_when_other_gateways_are_ready() -> None:
    slices = Slices()
    service = GatewayEndpoints(slices)  # type: ignore[arg-type]
    assert not await service.has_ready(KEY, "tiny", [front("a", ready=False), pod()])
    assert slices.asked == [], "without a ready gateway the answer is known"
    assert not await service.has_ready(KEY, "tiny", [front("a")])
    slices.rows = [endpoints(True)]
    for _ in range(3):
        assert await service.has_ready(KEY, "tiny", [front("a")])
    assert slices.asked == ["kubernetes.io/service-name=tiny"] * 2
    slices.rows = []
    assert not await service.has_ready(KEY, "tiny", [front("b")]), "another pod is another endpoint"
    service.forget(KEY)
    assert not await service.has_ready(KEY, "tiny", [front("a")])


def test_a_gateway_that_does_not_answer_says_nothing_of_engines() -> None:
    row = {"name": "e", "accepting": True}
    assert sees_engines([]) is None
    assert sees_engines([gateway(accepting=False)]) is False
    assert sees_engines([gateway(accepting=False, engines=[row])]) is True
    assert sees_engines([gateway(accepting=False), gateway(accepting=True)]) is True


def since(found: Document, seconds: float) -> Document:
    found["status"]["conditions"][0]["lastTransitionTime"] = (NOW - timedelta(seconds=seconds)).isoformat()
    return found


@pytest.mark.parametrize(
    ("engine_s", "gateway_s", "accepting", "count"),
    [(61, 61, False, 1), (59, 61, False, 0), (61, 59, False, 0), (61, 61, True, 0)],
)
def test_a_gateway_is_blind_when_it_sees_no_engine_that_is_ready_for_a_minute(
    engine_s: float, gateway_s: float, accepting: bool, count: int
) -> None:
    pods = [since(pod(), engine_s), since(front("a"), gateway_s), since(front("b"), 999)]
    answers = states({"tiny-gateway-a": gateway(accepting=accepting), "tiny-engine-a": agent()})
    findings = find_blind_gateways(pods, answers, NOW)
    assert [(row.reason, row.pod) for row in findings] == [("EnginesNotSeen", "tiny-gateway-a")] * count
    assert find_blind_gateways(pods, States(), NOW) == [], "silence is no blindness"
