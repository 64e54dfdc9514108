"""HorizontalPodAutoscalers of others: which of them scale what the operator scales, and how often it looks."""

from typing import Any

import pytest
from moe_contract.api_server import ApiError, Kind
from moe_operator.api.reasons import Reason
from moe_operator.autoscale.autoscaler import Outcome
from moe_operator.kubernetes.kinds import AUTOSCALER
from moe_operator.kubernetes.other_autoscalers import AGE_S, OtherAutoscalers, find_rivals
from test_roles import Document, resource

FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}
RANGES = {"roles": {"prefill": {"maxReplicas": 2}, "decode": {"maxReplicas": 3}}}
OUTCOME = Outcome(replicas=3, reason="hold", limited=(Reason.TOO_FEW_REPLICAS, "more"))


def autoscaler(name: str, kind: str, target: str) -> Document:
    return {"metadata": {"name": name}, "spec": {"scaleTargetRef": {"kind": kind, "name": target}}}


ALL = [
    autoscaler("itself", "MoEServing", "a"),
    autoscaler("whole", "Deployment", "a-engine"),
    autoscaler("groups", "LeaderWorkerSet", "a-engine"),
    autoscaler("prefill", "Deployment", "a-engine-prefill"),
    autoscaler("decode", "Deployment", "a-engine-decode"),
    autoscaler("a-gateway", "Deployment", "a-gateway"),
    autoscaler("neighbour", "Deployment", "b-engine"),
    autoscaler("kind", "StatefulSet", "a-engine"),
    {"metadata": {"name": "empty"}},
]


@pytest.mark.parametrize(
    ("engine", "spec", "expected"),
    [
        ({"roles": FIXED}, {"autoscaling": RANGES}, ["decode", "itself", "prefill"]),
        ({}, {"autoscaling": {"targets": {"kvUsage": 0.8}}}, ["groups", "itself", "whole"]),
        ({}, {"autoscaling": {"mode": "external"}}, []),
        ({"roles": FIXED}, {}, []),
        ({}, {}, []),
    ],
)
def test_those_count_that_write_what_the_operator_writes(engine, spec, expected):
    found = [*find_rivals(resource(engine=engine, **spec), ALL)]
    assert [text.split()[1] for text in found] == expected
    assert all("delete it" in text for text in found)


class FakeApi:
    """Autoscalers of the namespace `ns`; counts the lists."""

    def __init__(self, found: list[Document], status: int | None = None) -> None:
        self.found, self.status, self.lists = found, status, 0

    async def select(self, kind: Kind, namespace: str) -> list[Document]:
        assert (kind, namespace) == (AUTOSCALER, "ns")
        self.lists += 1
        if self.status is not None:
            raise ApiError(self.status, "refused")
        return self.found


def others(api: Any, now_s: list[float]) -> OtherAutoscalers:
    return OtherAutoscalers(api, lambda: now_s[0])


async def test_the_condition_names_the_autoscaler_before_any_other_limit():
    api, wanted = FakeApi(ALL), resource(engine={"roles": FIXED}, autoscaling=RANGES)
    found = await others(api, [0.0]).judge("ns", wanted, OUTCOME)
    assert found.limited is not None
    assert found.limited[0] is Reason.OTHER_AUTOSCALER
    assert "prefill scales Deployment a-engine-prefill too" in found.limited[1]
    assert found.replicas == OUTCOME.replicas


async def test_they_are_listed_anew_after_a_while_and_only_where_the_operator_scales():
    api, now_s = FakeApi(ALL), [0.0]
    looks, wanted = others(api, now_s), resource(autoscaling={"targets": {"kvUsage": 0.8}})
    assert await looks.judge("ns", resource(), OUTCOME) == OUTCOME
    assert api.lists == 0
    for _ in range(3):
        await looks.judge("ns", wanted, OUTCOME)
    assert api.lists == 1
    api.found, now_s[0] = [], AGE_S
    assert await looks.judge("ns", wanted, OUTCOME) == OUTCOME
    looks.forget("ns")
    await looks.judge("ns", wanted, OUTCOME)
    assert api.lists == 3


@pytest.mark.parametrize("status", [403, 404])
async def test_without_the_right_to_list_them_none_is_known(status):
    api, wanted = FakeApi(ALL, status), resource(autoscaling={"targets": {"kvUsage": 0.8}})
    looks = others(api, [0.0])
    for _ in range(2):
        assert await looks.judge("ns", wanted, OUTCOME) == OUTCOME
    assert api.lists == 1


async def test_a_refusal_stands_in_the_log_once_until_the_right_has_come_and_gone(caplog):
    api, now_s = FakeApi([], 403), [0.0]
    looks, wanted = others(api, now_s), resource(autoscaling={"targets": {"kvUsage": 0.8}})
    for status, warnings in ((403, 1), (403, 1), (None, 1), (403, 2)):
        api.status = status
        await looks.judge("ns", wanted, OUTCOME)
        assert len(caplog.records) == warnings
        now_s[0] += AGE_S


async def test_another_failure_is_one_of_the_pass():
    wanted = resource(autoscaling={"targets": {"kvUsage": 0.8}})
    with pytest.raises(ApiError):
        await others(FakeApi(ALL, 500), [0.0]).judge("ns", wanted, OUTCOME)
