"""What a rank counts of its routing equals a count by hand; what is padded, a dummy or switched off counts nothing."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moe_agent.experts.recording import MOST_PAIR_CELLS, RoutingRecorder
from moe_agent.experts.window import LoadWindow
from moe_agent.vllm.device_recording import DeviceRecorder

LAYERS, EXPERTS, TOP_K, MOST_TOKENS = 3, 5, 2, 6
KINDS = ["host", "device", *(["cuda"] if torch.cuda.is_available() else [])]


def passes(draw: st.DrawFn) -> list[tuple[np.ndarray, int]]:
    """Passes of ids `[layer, token, place]`, and how many of the tokens are real."""
    made = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = draw(st.integers(1, MOST_TOKENS))
        seed = draw(st.integers(0, 2**32 - 1))
        ids = np.random.default_rng(seed).integers(0, EXPERTS, (LAYERS, tokens, TOP_K)).astype(np.int32)
        made.append((ids, draw(st.integers(0, tokens))))
    return made


def count_by_hand(rows: list[tuple[np.ndarray, int]], pairs_every: int) -> tuple[Counter, Counter]:
    tokens: Counter[tuple[int, int]] = Counter()
    pairs: Counter[tuple[int, int, int]] = Counter()
    counted = 0
    for ids, real in rows:
        counted += real > 0
        with_pairs = counted % pairs_every == 0
        for token in range(real):
            for layer in range(LAYERS):
                for expert in ids[layer, token].tolist():
                    tokens[layer, expert] += 1
                    if layer + 1 < LAYERS and with_pairs:
                        for following in ids[layer + 1, token].tolist():
                            pairs[layer, expert, following] += 1
    return tokens, pairs


def make(kind: str, pairs_every: int):
    if kind == "host":
        return RoutingRecorder(LAYERS, EXPERTS, pairs_every)
    device = torch.device("cuda" if kind == "cuda" else "cpu")
    return DeviceRecorder(LAYERS, EXPERTS, MOST_TOKENS, TOP_K, device, pairs_every)


def show(recorder, ids: np.ndarray, real: int) -> None:
    for layer in range(LAYERS):
        recorder.capture(layer, ids[layer] if isinstance(recorder, RoutingRecorder) else torch.from_numpy(ids[layer]))
    recorder.end_pass(real)


@pytest.mark.parametrize("kind", KINDS)
@given(rows=st.composite(passes)(), pairs_every=st.integers(1, 4))
def test_the_counts_equal_a_count_by_hand(kind, rows, pairs_every):
    recorder = make(kind, pairs_every)
    recorder.on = True
    for ids, real in rows:
        show(recorder, ids, real)
    counted, (tokens, pairs) = recorder.take(), count_by_hand(rows, pairs_every)
    assert {place: n for place, n in np.ndenumerate(counted.tokens) if n} == dict(tokens)
    assert {place: n for place, n in np.ndenumerate(counted.pairs) if n} == dict(pairs)
    assert counted.pair_passes == sum(real > 0 for _, real in rows) // pairs_every


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_taken_is_forgotten(kind):
    recorder = make(kind, 1)
    recorder.on = True
    show(recorder, np.zeros((LAYERS, 2, TOP_K), np.int32), 2)
    assert recorder.take().tokens.sum() == LAYERS * 2 * TOP_K
    assert (recorder.take().tokens.sum(), recorder.take().pair_passes) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_nothing_is_counted_and_switched_on_in_the_midst_of_a_pass_neither(kind):
    recorder = make(kind, 1)
    show(recorder, np.zeros((LAYERS, 2, TOP_K), np.int32), 2)
    assert recorder.take().tokens.sum() == 0
    if kind == "host":
        recorder.capture(0, np.zeros((2, TOP_K), np.int32))
        recorder.on = True
        recorder.capture(1, np.zeros((2, TOP_K), np.int32))
        recorder.end_pass(2)
        assert recorder.take().tokens.sum() == 0, "the pass was not seen whole"


def test_a_model_whose_pairs_would_fill_the_memory_has_its_tokens_counted_alone():
    experts = int(MOST_PAIR_CELLS**0.5) + 1
    recorder = RoutingRecorder(2, experts, 1)
    recorder.on = True
    for layer in (0, 1):
        recorder.capture(layer, np.zeros((1, TOP_K), np.int32))
    recorder.end_pass(1)
    counted = recorder.take()
    assert (counted.tokens.sum(), counted.pairs.size, counted.pair_passes) == (2 * TOP_K, 0, 0)


def steady(tokens: int):
    recorder = RoutingRecorder(LAYERS, EXPERTS, 1)
    recorder.on = True
    show(recorder, np.zeros((LAYERS, tokens, TOP_K), np.int32), tokens)
    return recorder.take()


@pytest.mark.parametrize("window_steps", [1, 10, 10**6])
def test_a_steady_load_is_its_tokens_a_step_whatever_the_window(window_steps):
    window = LoadWindow(2, LAYERS, EXPERTS)
    for _ in range(50):
        window.add([steady(3), steady(1)], 1, window_steps)
    load = window.tokens_a_step()
    assert load[:, 0, 0].tolist() == pytest.approx([6.0, 2.0])
    assert load[:, :, 1:].sum() == 0.0
    assert window.pairs_a_step()[0, 0, 0] == pytest.approx((3 + 1) * TOP_K * TOP_K)


def test_of_a_load_that_changed_the_newer_part_weighs_more():
    window = LoadWindow(1, LAYERS, EXPERTS)
    for tokens in (6, 2):
        for _ in range(10):
            window.add([steady(tokens)], 1, 10)
    assert 4.0 < window.tokens_a_step()[0, 0, 0] < 8.0
    window.clear()
    assert (window.steps, window.tokens_a_step().sum(), window.pairs_a_step()) == (0.0, 0.0, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_captured_graph_records_what_each_replay_routes():
    recorder = make("cuda", 1)
    ids = torch.zeros(LAYERS, MOST_TOKENS, TOP_K, dtype=torch.int32, device="cuda")
    rows = [(np.random.default_rng(seed).integers(0, EXPERTS, ids.shape).astype(np.int32), real) for seed, real in
            enumerate((6, 0, 3, 5))]  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            # A step of the model between the buffer and the recorder, as the router is.
            recorder.capture(layer, ids[layer] + 0)
    recorder.on = True
    for routed, real in rows:
        ids.copy_(torch.from_numpy(routed))
        graph.replay()
        recorder.end_pass(real)
    counted, (tokens, pairs) = recorder.take(), count_by_hand(rows, 1)
    assert {place: n for place, n in np.ndenumerate(counted.tokens) if n} == dict(tokens)
    assert {place: n for place, n in np.ndenumerate(counted.pairs) if n} == dict(pairs)
