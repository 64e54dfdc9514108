"""Loads out of a trained model's routing: which topics are read when, and the error about a folder without a model."""

import numpy as np
import pytest
from moe_lab.experts import recording
from moe_lab.experts.__main__ import app
from moe_lab.experts.recording import (
    ROUND_TOKENS,
    SCENARIOS,
    STEP_TOKENS,
    TOPICS,
    Routed,
    count_choices,
    record,
    topic_texts,
)
from typer.testing import CliRunner

PIECE = 512


@pytest.fixture
def routed(monkeypatch):
    """Each topic goes to an expert of its own, in both layers: one token, one expert."""
    pieces = {
        topic: Routed(
            tokens=np.eye(3)[number] * np.full((4, 2, 1), float(PIECE)),
            pairs=np.outer(np.eye(3)[number], np.eye(3)[number]) * np.full((4, 1, 1, 1), float(PIECE)),
        )
        for number, topic in enumerate(TOPICS)
    }
    monkeypatch.setattr(recording, "route_topics", lambda _: pieces)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_source_has_the_tokens_of_a_step_in_each_round(routed, tmp_path, scenario):
    routed = record(tmp_path, scenario, rounds=10, seed=1)
    load = routed.tokens
    assert load.shape == (10, 2, 2, 3)
    assert routed.pairs.sum(axis=(1, 2, 3)) == pytest.approx(load[:, :, 0].sum(axis=(1, 2)))
    assert np.allclose(load.sum(axis=-1), STEP_TOKENS, atol=STEP_TOKENS * PIECE / ROUND_TOKENS)


def test_topics_come_when_the_scenario_says(routed, tmp_path):
    prose, sources = TOPICS.index("prose"), TOPICS.index("sources")
    drift = record(tmp_path, "drift", rounds=10, seed=1).tokens[:, :, 0]
    assert drift[0, 0, prose] == drift[-1, 0, sources] == STEP_TOKENS
    assert (np.diff(drift[:, 0, prose]) <= 0).all()
    tenants = record(tmp_path, "tenants change places", rounds=10, seed=1).tokens[:, :, 0]
    assert tenants[0, 0, prose] == tenants[0, 1, sources] == STEP_TOKENS
    assert tenants[-1, 0, sources] == tenants[-1, 1, prose] == STEP_TOKENS


def test_the_same_seed_gives_the_same_loads(routed, tmp_path):
    one, again = (record(tmp_path, "steady", 4, 3) for _ in range(2))
    assert np.array_equal(one.tokens, again.tokens)
    assert np.array_equal(one.pairs, again.pairs)


def test_each_expert_of_a_token_is_paired_with_each_of_its_experts_in_the_next_layer():
    counted = count_choices([np.array([[0, 1], [0, 2]]), np.array([[2, 1], [2, 0]])], experts=3)
    assert counted.tokens.tolist() == [[2, 1, 1], [1, 1, 2]]
    assert counted.pairs.tolist() == [[[1, 1, 2], [0, 1, 1], [1, 0, 1]]]


def test_the_topics_are_different_texts():
    texts = topic_texts()
    assert tuple(texts) == TOPICS
    assert all(len(text) > 10_000 for text in texts.values())
    assert len(set(texts.values())) == len(TOPICS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MISSING", "out.npz"], "no MoE model"),
        (["MISSING", "out.npz", "--scenario", "drfit"], "drift"),
    ],
)
def test_what_cannot_be_recorded_is_reported_and_writes_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["record", *words])
    assert answer.exit_code != 0
    assert message in answer.output
    assert "Traceback" not in answer.output
    assert not (tmp_path / "out.npz").exists()
