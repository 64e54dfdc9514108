"""The condition `Disaggregated`: by the transfers that arrived, never by the resource."""

from typing import Any

import pytest
from moe_contract.agent_state import AgentState, EngineProcess
from moe_contract.engine_process import NO_CONNECTOR
from moe_contract.kv_transfer import KvTransferState
from moe_operator.api import parse_resource
from moe_operator.autoscale.signal import NOT_ASKED, States
from moe_operator.kubernetes.conditions import ConditionInputs, build_conditions, is_bad, summarise
from moe_operator.kubernetes.exit_cause import explain_exit
from moe_operator.kubernetes.kinds import DEPLOYMENT, LEADER_WORKER_SET
from moe_operator.kubernetes.store import Key
from moe_operator.kubernetes.takeover import read_takeover, share_out, with_old_workload, with_takeover
from moe_operator.kubernetes.transfers import Traffic, TransferWatch, has_pair, is_apart, judge_transfers
from moe_operator.plan import Observed
from moe_scheduling.engine.disaggregation import EngineRole

KEY = Key("ns", "a")
MOVED = Traffic(moved=True)


def engine(
    transfers: int = 0,
    failed: int = 0,
    *,
    role: str = "unified",
    peers: str = "one",
    phase: str = "ready",
    last_exit: str = "",
) -> AgentState:
    transfer = KvTransferState(role=EngineRole(role), peers=peers, transfers=transfers, failed=failed)
    return AgentState(phase=phase, engine=EngineProcess(last_exit=last_exit), kv_transfer=transfer)


# 1. Traffic.


def test_counters_that_rise_are_traffic_for_a_minute():
    watch = TransferWatch()
    assert not watch.observe(KEY, {"e": engine(5)}, 0.0).moved, "of old transfers nobody knows when they were"
    assert watch.observe(KEY, {"e": engine(6)}, 15.0) == MOVED
    assert watch.observe(KEY, {"e": engine(6)}, 75.0) == MOVED
    assert not watch.observe(KEY, {"e": engine(6)}, 75.1).moved


def test_an_engine_that_starts_anew_counts_from_zero():
    watch = TransferWatch()
    watch.observe(KEY, {"e": engine(50)}, 0.0)
    assert not watch.observe(KEY, {"e": engine(0)}, 10.0).moved
    assert watch.observe(KEY, {"e": engine(3)}, 20.0).moved


def test_what_an_engine_did_counts_though_it_has_gone():
    watch = TransferWatch()
    watch.observe(KEY, {"e": engine(0)}, 0.0)
    watch.observe(KEY, {"e": engine(1)}, 10.0)
    assert watch.observe(KEY, {}, 60.0).moved
    assert not watch.observe(KEY, {}, 71.0).moved


def test_failures_are_seen_apart_and_resources_too():
    watch = TransferWatch()
    watch.observe(KEY, {"e": engine(1, 0)}, 0.0)
    assert watch.observe(KEY, {"e": engine(1, 2)}, 10.0) == Traffic(failed=True)
    assert watch.observe(Key("ns", "b"), {"e": engine(1, 2)}, 10.0) == Traffic()
    watch.forget(KEY)
    assert watch.observe(KEY, {"e": engine(9, 9)}, 11.0) == Traffic()


def test_engines_that_take_no_part_are_no_traffic():
    state = AgentState(phase="ready")
    assert TransferWatch().observe(KEY, {"e": state}, 0.0) == Traffic()


def test_a_pass_that_asked_nobody_keeps_the_verdict_and_the_counters():
    watch, both = TransferWatch(), {"a": engine(0), "b": engine(1)}
    watch.judge(KEY, States(engines=both), None, 0.0)
    said = watch.judge(KEY, States(engines=both | {"b": engine(5)}), None, 15.0)
    (kept,) = (row for row in conditions(said) if row.type == "Disaggregated")
    assert kept.reason == "Transferring"
    assert watch.judge(KEY, NOT_ASKED, kept, 90.0) == said
    verdict = watch.judge(KEY, States(engines=both | {"b": engine(50)}), kept, 92.0)
    assert verdict == said, "transfers that arrived meanwhile are seen by the counters of before"


def test_without_a_verdict_of_before_a_pass_that_asked_nobody_has_none():
    watch = TransferWatch()
    assert watch.judge(KEY, NOT_ASKED, None, 0.0) is None
    (row,) = (row for row in conditions(judge_transfers({}, Traffic())) if row.type == "Disaggregated")
    assert watch.judge(KEY, NOT_ASKED, row.model_copy(update={"reason": "OfAnotherRelease"}), 0.0) is None


def test_engines_that_were_asked_and_are_silent_are_no_pair():
    status, reason, _ = TransferWatch().judge(KEY, States(), None, 0.0)
    assert (status.value, reason.value) == ("False", "NoPeers")


# 2. The verdict.


@pytest.mark.parametrize(
    ("engines", "traffic", "expected"),
    [
        ([engine(), engine()], MOVED, ("True", "Transferring")),
        ([engine(), engine()], Traffic(moved=True, failed=True), ("True", "Transferring")),
        ([engine(), engine()], Traffic(), ("False", "NoTransfers")),
        ([engine(), engine()], Traffic(failed=True), ("False", "TransfersFailing")),
        ([engine()], Traffic(), ("False", "NoPeers")),
        ([], Traffic(), ("False", "NoPeers")),
        ([engine(), engine(peers="")], Traffic(), ("False", "NoPeers")),
        ([engine(), engine(phase="starting")], Traffic(), ("False", "NoPeers")),
        ([engine(role="prefill"), engine(role="prefill")], Traffic(), ("False", "NoPeers")),
        ([engine(role="prefill"), engine(role="decode")], Traffic(), ("False", "NoTransfers")),
        ([engine(), engine(peers="two")], Traffic(), ("False", "PeersDiffer")),
        ([engine(), engine(), engine(peers="two")], Traffic(), ("False", "NoTransfers")),
        (
            [engine(role="prefill"), engine(role="decode", peers="two"), engine(role="decode", peers="two")],
            Traffic(),
            ("False", "PeersDiffer"),
        ),
        (
            [engine(), engine(phase="backoff", last_exit=f"{NO_CONNECTOR}, which is not here")],
            Traffic(),
            ("False", "ConnectorMissing"),
        ),
        ([AgentState(phase="ready"), AgentState(phase="ready")], Traffic(), ("False", "NoPeers")),
    ],
)
def test_the_verdict_names_what_keeps_blocks_from_moving(engines, traffic, expected):
    status, reason, message = judge_transfers({f"e-{at}": state for at, state in enumerate(engines)}, traffic)
    assert (status.value, reason.value) == expected
    assert message


def test_a_pair_is_one_that_computes_and_another_that_decodes():
    prefill, decode = (KvTransferState(role=EngineRole(role), peers="p") for role in ("prefill", "decode"))
    assert has_pair([prefill, decode])
    assert not has_pair([decode, decode])
    assert not has_pair([prefill])


def test_a_missing_connector_is_a_cause_of_its_own():
    assert explain_exit(f"{NO_CONNECTOR}, which is not installed here").reason.value == "ConnectorMissing"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, False),
        ({"engine": {"roles": {"mode": "unified"}}}, False),
        ({"engine": {"roles": {"mode": "auto"}}}, True),
        ({"engine": {"roles": {"mode": "fixed"}}}, True),
        ({"engine": {"roles": "auto"}}, False),
        ({"engine": None}, False),
    ],
)
def test_the_condition_is_of_resources_whose_engines_should_exchange_blocks(spec, expected):
    assert is_apart({"spec": spec}) is expected


def conditions(verdict: Any) -> Any:
    from datetime import UTC, datetime

    inputs = ConditionInputs(desired=2, engines=2, ready=2, gateways=1, seen=True, transfers=verdict)
    return build_conditions(inputs, {}, datetime.now(UTC))


def test_what_needs_a_person_is_in_the_summary():
    missing = judge_transfers({"e": engine(phase="backoff", last_exit=NO_CONNECTOR)}, Traffic())
    idle = judge_transfers({"e": engine(), "f": engine()}, Traffic())
    assert "Disaggregated" not in {row.type for row in conditions(None)}
    assert summarise(conditions(missing)).startswith("ConnectorMissing")
    assert summarise(conditions(idle)) == "Serving"
    assert [is_bad(row) for row in conditions(missing) if row.type == "Disaggregated"] == [True]


# 3. From engines of all roles to engines of fixed ones, and back.


class Objects:
    """A store of some objects, by kind and name."""

    def __init__(self, *objects: Any) -> None:
        self._objects = {(kind, document["metadata"]["name"]): document for kind, document in objects}

    def get(self, key: Key, kind: Any, name: str) -> Any:
        return self._objects.get((kind, name))


def workload(name: str, replicas: int) -> Any:
    return {"metadata": {"name": name}, "spec": {"replicas": replicas}}


def pods(count: int, role: str = "") -> list[Any]:
    labels = {"moeserving.dev/revision": "stable", "app.kubernetes.io/component": "engine"}
    labels |= {"moeserving.dev/role": role} if role else {}
    ready = [{"type": "Ready", "status": "True"}]
    return [
        {"metadata": {"name": f"e{role}-{at}", "labels": labels}, "spec": {}, "status": {"conditions": ready}}
        for at in range(count)
    ]


def takeover(
    roles: Any, store: Objects, present: list[Any], model: Any = None, claims: tuple[str, ...] = (), **engine: Any
) -> Any:
    resource = parse_resource(
        {
            "apiVersion": "moeserving.dev/v1alpha1",
            "kind": "MoEServing",
            "metadata": {"name": "a"},
            "spec": {"model": {"uri": "hf://o/a"} | (model or {}), "engine": {"roles": roles, **engine}},
        }
    )
    observed = Observed(uid="u", tokens=("t",), one_node_claims=frozenset(claims))
    kinds = {DEPLOYMENT, LEADER_WORKER_SET}
    return read_takeover(store, KEY, resource, observed, present, kinds)  # type: ignore[arg-type]


FIXED = {"mode": "fixed", "prefill": 1, "decode": 2}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(3, 0, (1, 3)), (3, 1, (2, 2)), (3, 2, (3, 1)), (3, 3, None), (0, 0, None), (2, 0, (1, 2))],
)
def test_engines_of_fixed_roles_take_over_one_by_one(old, new, expected):
    store = Objects((DEPLOYMENT, workload("a-engine", 3)))
    found = takeover(FIXED, store, [*pods(old), *pods(new, "decode")])
    got = None if found is None else (found.new_replicas, min(found.old_replicas, old))
    assert got == expected


def test_without_old_engines_there_is_no_takeover():
    assert takeover(FIXED, Objects(), pods(3)) is None
    assert takeover(FIXED, Objects((DEPLOYMENT, workload("a-engine", 3))), pods(3), update="inPlace") is None


VOLUMES = [{"name": "v", "persistentVolumeClaim": {"claimName": "mine"}}]


@pytest.mark.parametrize(
    ("model", "engine", "claims"),
    [
        ({"cache": {"path": "/c", "size": "10Gi", "accessMode": "ReadWriteOnce"}}, {}, ()),
        ({"cache": {"path": "/c", "claim": "mine"}}, {}, ("mine",)),
        ({"uri": "pvc://mine/m"}, {}, ("mine",)),
        ({}, {"podTemplate": {"spec": {"volumes": VOLUMES}}}, ("mine",)),
    ],
)
@pytest.mark.parametrize("roles", [FIXED, {"mode": "auto"}])
def test_engines_that_share_one_node_go_before_those_of_other_roles_come(model, engine, claims, roles):
    names = ("a-engine",) if roles == FIXED else ("a-engine-prefill", "a-engine-decode")
    store = Objects(*((DEPLOYMENT, workload(name, 3)) for name in names))
    present = pods(3) if roles == FIXED else pods(3, "decode")
    assert takeover(roles, store, present, model, claims, **engine) is None
    if claims:
        assert takeover(roles, store, present, model, ("other",), **engine) is not None


def test_engines_of_all_roles_take_over_from_both():
    store = Objects((DEPLOYMENT, workload("a-engine-prefill", 1)), (DEPLOYMENT, workload("a-engine-decode", 2)))
    present = [*pods(1, "prefill"), *pods(2, "decode"), *pods(1)]
    found = takeover({"mode": "auto"}, store, present, replicas=3)
    assert (found.new_replicas, found.old_replicas, found.ready) == (2, 2, 1)
    assert [row["metadata"]["name"] for row in with_old_workload([], found)] == ["a-engine-prefill", "a-engine-decode"]
    assert with_takeover(Observed(tokens=("t",)), found).first_replicas == 2
    assert "1 of 3" in found.text


@pytest.mark.parametrize(
    ("present", "total", "expected"),
    [([1, 2], 3, [1, 2]), ([1, 2], 2, [1, 1]), ([1, 2], 1, [0, 1]), ([4, 1], 0, [0, 0]), ([5], 2, [2])],
)
def test_the_larger_workload_gives_up_first(present, total, expected):
    assert share_out(present, total) == expected
