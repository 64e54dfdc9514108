"""Faults survived, in one life: nothing is stuck, no engine is counted twice, no claim is lost, each is reported."""

import random
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from controlled import ControlledCluster
from faults import FAULTS, Life, prometheus_listening, render_table
from fresh_operator import connect
from moe_operator.kubernetes import waits
from moe_operator.kubernetes.store import Key

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("size", ["smoke", pytest.param("full", marks=pytest.mark.long)])
async def test_after_each_fault_of_a_long_life_the_resource_is_whole(
    controlled_cluster: ControlledCluster,
    place: str,
    size: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Of pods on lost nodes the grace period is the longest part; their kubelet never comes.
    monkeypatch.setattr(waits, "POD_MARGIN", timedelta(seconds=3))
    monkeypatch.setattr(waits, "HELD", timedelta(seconds=3))
    chance = random.Random(0)
    wanted = [fault for fault in FAULTS for _ in range(getattr(fault, size))]
    chance.shuffle(wanted)
    kubeconfig = controlled_cluster.kubeconfig
    async with connect(kubeconfig) as server, aiohttp.ClientSession() as session, prometheus_listening() as prometheus:
        life = Life(
            cluster=controlled_cluster,
            server=server,
            session=session,
            prometheus=prometheus,
            key=Key(place, "tiny"),
            chance=chance,
        )
        await life.begin()
        for fault in wanted:
            await life.do(fault)
        assert life.reported == {fault.name: getattr(fault, size) if fault.condition else 0 for fault in FAULTS}
        await life.end()
    assert life.counts == {fault.name: getattr(fault, size) for fault in FAULTS}
    with capsys.disabled():
        print(f"\n{render_table(life.counts)}")


def test_the_documentation_shows_the_table_of_the_full_run() -> None:
    assert render_table({fault.name: fault.full for fault in FAULTS}) in DOCS.read_text("utf-8")
