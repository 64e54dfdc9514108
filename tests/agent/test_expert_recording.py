"""Counts of a rank's load, and the window over them: exact, of real tokens alone, steady under a steady load."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.experts.document import experts_path
from moe_agent.experts.load import STRONGEST, Affinity, LoadWindow
from moe_agent.experts.sync_round import RoundAction, SyncRound
from moe_agent.shared_memory.expert_record import ExpertRecordReader, ExpertRecordWriter, ExpertState
from moe_agent.vllm.load_recorder import LoadRecorder
from moe_kernels.expert_load import map_and_record

LAYERS, EXPERTS, TOP_K, MOST_TOKENS = 3, 5, 2, 6


class Rank:
    """The counters of a rank as vLLM's balancer has them, with a recorder, and passes as routers make them."""

    def __init__(self) -> None:
        # Two slots more than experts.
        self.expert_load_pass = torch.ones((LAYERS, EXPERTS + 2), dtype=torch.int32)
        self.enabled = torch.tensor(True)
        self.recorder = LoadRecorder(self, self.enabled, EXPERTS)

    def run(self, ids: np.ndarray, real: int) -> None:
        """Runs a pass with ids [layer, token, place]."""
        self.route(ids, real)
        self.recorder.end_pass()

    def route(self, ids: np.ndarray, real: int) -> None:
        slots, copies = torch.arange(EXPERTS)[:, None], torch.ones(EXPERTS, dtype=torch.int64)
        for layer in range(LAYERS):
            given = (torch.from_numpy(ids[layer]), self.expert_load_pass[layer], slots, copies, self.enabled)
            map_and_record(*given, torch.tensor(real))


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[np.ndarray, int]]:
    """Passes of ids [layer, token, place], and how many of the tokens are real."""
    made = []
    for _ in range(draw(st.integers(1, 12))):
        tokens, seed = draw(st.integers(1, MOST_TOKENS)), draw(st.integers(0, 2**32 - 1))
        ids = np.random.default_rng(seed).integers(0, EXPERTS, (LAYERS, tokens, TOP_K)).astype(np.int32)
        made.append((ids, draw(st.integers(0, tokens))))
    return made


@given(rows=passes())
def test_the_counts_equal_a_count_by_hand(rows):
    rank, expected = Rank(), Counter()
    rank.recorder.switch(True)
    for ids, real in rows:
        rank.run(ids, real)
        expected.update((layer, int(expert)) for layer in range(LAYERS) for expert in ids[layer, :real].ravel())
    counts, count = rank.recorder.take()
    assert {place: n for place, n in np.ndenumerate(counts.numpy()) if n} == dict(expected)
    assert count == len(rows)


ONE_PASS = np.zeros((LAYERS, 2, TOP_K), np.int32)


def test_what_was_taken_is_forgotten():
    rank = Rank()
    rank.recorder.switch(True)
    for _ in range(3):
        rank.run(ONE_PASS, 2)
    counts, passes = rank.recorder.take()
    assert (int(counts.sum()), passes) == (3 * LAYERS * 2 * TOP_K, 3)
    counts, passes = rank.recorder.take()
    assert (int(counts.sum()), passes) == (0, 0)


def test_switched_off_nothing_is_counted_and_what_was_counted_before_is_forgotten():
    rank = Rank()
    rank.run(ONE_PASS, 2)
    rank.recorder.switch(True)
    assert int(rank.recorder.take()[0].sum()) == 0
    rank.run(ONE_PASS, 2)
    rank.recorder.switch(False)
    assert not rank.enabled
    rank.recorder.switch(True)
    counts, passes = rank.recorder.take()
    assert (int(counts.sum()), passes) == (0, 0)


def test_a_dummy_pass_counts_nothing():
    rank = Rank()
    with rank.recorder.paused():
        assert not rank.enabled
    rank.recorder.switch(True)
    with rank.recorder.paused():
        rank.route(ONE_PASS, 2)
    assert rank.enabled
    assert int(rank.recorder.take()[0].sum()) == 0


class Event:
    """A device's event, of which it is seen whether the work before it was waited for."""

    def __init__(self) -> None:
        self.waited = False

    def record(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


@pytest.mark.parametrize(("on_cpu", "events"), [(True, 0), (False, 1)])
def test_the_thread_reads_the_routing_of_a_pass_after_the_device_has_made_it(
    monkeypatch, virtual_engines, on_cpu, events
):
    """vLLM computes in a stream of its own, which the thread's stream does not wait for."""
    from moe_agent.vllm import expert_group

    made, handed = [], []
    monkeypatch.setattr(torch.cuda, "Event", lambda: made.append(Event()) or made[-1])
    group = object.__new__(expert_group.ExpertGroup)
    group.on_cpu = on_cpu
    group._shape = SimpleNamespace(layers=LAYERS)
    group._coordinator = SimpleNamespace(wants_routing=True, add_routing=handed.append)
    group._hand_over_routing([torch.full((2, TOP_K), layer) for layer in range(LAYERS)])
    assert [event.waited for event in made] == [False] * events
    assert handed[0]()[:, 0, 0].tolist() == list(range(LAYERS))
    assert [event.waited for event in made] == [True] * events


@pytest.mark.parametrize("beside_first", [True, False])
def test_a_rank_on_another_node_than_the_coordinator_has_taken_all_settings_of_its_agent(
    tmp_path, monkeypatch, virtual_engines, beside_first
):
    from moe_agent.vllm import expert_group

    monkeypatch.setattr(expert_group, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    if beside_first:
        experts_path(tmp_path).touch()
    group = object.__new__(expert_group.ExpertGroup)
    group._rank, group._run_dir = 1, tmp_path
    group._record = ExpertRecordWriter(tmp_path, 1, ExpertState())
    with ExpertRecordReader(tmp_path, 1) as reader:
        group._publish_to_scheduler(
            SyncRound(
                next_in=8,
                action=RoundAction.NONE,
                recording=True,
                config_version=3,
                version=1,
                layers=0,
                balance=1.25,
                pressures=(0.5, 1.5),
            )
        )
        state = reader.read()
    assert (state.config_version == 3) is beside_first
    assert state.config_version >= 3
    assert (state.balance, state.pressure) == (1.25, 1.5)


def steady(tokens: int) -> np.ndarray:
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    counts[:, 0] = tokens * TOP_K
    return counts


@pytest.mark.parametrize("window_steps", [1, 10, 10**6])
def test_a_steady_load_is_its_tokens_a_step_whatever_the_window(window_steps):
    window = LoadWindow(2, LAYERS, EXPERTS)
    for _ in range(50):
        window.add([steady(3), steady(1)], 1, 1, window_steps)
    load = window.tokens_a_step()
    assert load[:, 0, 0].tolist() == pytest.approx([6.0, 2.0])
    assert load[:, :, 1:].sum() == 0.0


def test_of_a_load_that_changed_the_newer_part_weighs_more():
    window = LoadWindow(1, LAYERS, EXPERTS)
    for tokens in (6, 2):
        for _ in range(10):
            window.add([steady(tokens)], 1, 1, 10)
    assert 4.0 < window.tokens_a_step()[0, 0, 0] < 8.0
    window.clear()
    assert (window.steps, window.tokens_a_step().sum()) == (0.0, 0.0)


@given(rows=passes())
def test_the_affinity_equals_a_count_by_hand(rows):
    affinity, pairs = Affinity(LAYERS, EXPERTS, 7), Counter()
    for ids, real in rows:
        affinity.add(ids[:, :real])
        for layer in range(LAYERS - 1):
            for token in range(real):
                pairs.update((layer, int(a), int(b)) for a in ids[layer, token] for b in ids[layer + 1, token])
    shown = affinity.summarise()
    assert (shown.directive, shown.passes, shown.tokens) == (7, len(rows), sum(real for _, real in rows))
    assert len(shown.strongest) <= STRONGEST
    for row in shown.strongest:
        assert row.tokens == pairs[row.layer, row.expert, row.next]
        before = sum(n for (layer, a, _), n in pairs.items() if (layer, a) == (row.layer, row.expert))
        after = sum(n for (layer, _, b), n in pairs.items() if (layer, b) == (row.layer, row.next))
        every = sum(n for (layer, _, _), n in pairs.items() if layer == row.layer)
        assert row.over_chance == pytest.approx(row.tokens * every / (before * after))
