"""`moeserving drain` refuses the last engine of a fixed role that takes requests."""

import json
import os
from pathlib import Path

import pytest
from moe_contract.agent_state import READY, AgentState
from moe_contract.input_errors import InvalidInput
from moe_contract.kv_transfer import KvTransferState
from moe_operator.cli.drain import check_drain, find_limit_s
from moe_scheduling.engine.disaggregation import EngineRole

PREFILL, DECODE, UNIFIED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.UNIFIED


def state(role: EngineRole | None, *, accepting: bool = True) -> AgentState:
    transfer = None if role is None else KvTransferState(role=role)
    return AgentState(phase=READY if accepting else "draining", accepting=accepting, kv_transfer=transfer)


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_the_last_engine_of_a_role_is_refused_with_the_role_and_the_way_to_force_it(role):
    other = DECODE if role is PREFILL else PREFILL
    states = {"a": state(role), "b": state(role, accepting=False), "c": state(other), "d": None}
    with pytest.raises(InvalidInput) as refused:
        check_drain("a", states, force=False)
    said = str(refused.value)
    assert f"a is the last engine of the role {role.value} that takes requests; nothing was changed" in said
    assert "--force" in said
    check_drain("a", states, force=True)


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_one_that_drains_already_is_asked_again_without_force(role):
    states = {"a": state(role, accepting=False), "b": state(DECODE if role is PREFILL else PREFILL)}
    check_drain("a", states, force=False)


@pytest.mark.parametrize(
    "states",
    [
        {"a": state(PREFILL), "b": state(PREFILL), "c": state(DECODE)},
        {"a": state(UNIFIED), "b": state(UNIFIED)},
        {"a": state(UNIFIED), "b": state(DECODE)},
        {"a": state(None), "b": state(None)},
        {"a": None, "b": state(DECODE)},
    ],
    ids=["another of the role", "roles by load", "a unified one beside a role", "no roles", "no answer"],
)
def test_others_are_drained(states):
    check_drain("a", states, force=False)


def test_the_last_of_all_is_refused_as_such():
    with pytest.raises(InvalidInput, match="a is the last engine that takes requests"):
        check_drain("a", {"a": state(PREFILL), "b": state(DECODE, accepting=False)}, force=False)


def test_the_time_that_streams_have_is_read_from_the_resource_as_the_cluster_gives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = {
        "apiVersion": "moeserving.dev/v1alpha1",
        "kind": "MoEServing",
        "metadata": {"name": "tiny", "namespace": "prod", "uid": "0-1", "resourceVersion": "7", "generation": 1},
        "spec": {"model": {"uri": "hf://org/a"}, "engine": {"drainTimeout": "7m"}},
        "status": {"conditions": [], "aFieldOfALaterRelease": True},
    }
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(live)}\nEND\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert find_limit_s("tiny", None, "prod", None) == 420
