"""The tiny model: whole or absent, found again, and a real model that other programs load."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_contract.input_errors import InvalidInput
from moe_tools.tiny import TinySettings, ensure_tiny_model, read_report
from moe_tools.tiny.corpus import Corpus, build_exchanges, parse_docstrings, read_corpus
from moe_tools.tiny.pairs import build_pair_start, count_pairs
from moe_tools.tiny.report import render_report
from moe_tools.tiny.settings import MANIFEST
from moe_tools.tiny.training import cut_sequences, load_entropy, rate_factor, unigram_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICK = TinySettings(
    steps=2, batch_sequences=2, sequence_tokens=32, vocabulary=512, layers=2, experts=4, hidden=64, expert_hidden=32,
    heads=2, kv_heads=1, head_size=32, context_tokens=256,
)  # fmt: skip


RANDOM = replace(QUICK, steps=0)


@cache
def some_text() -> Corpus:
    whole = read_corpus()
    prose = tuple(text[:2000] for text in whole.prose[:60])
    return Corpus(prose=prose, sources=(whole.sources[-1],), exchanges=whole.exchanges[:300])


def make(directory: Path, settings: TinySettings = QUICK, read_text: Callable[[], Corpus] = some_text) -> Path:
    return ensure_tiny_model(directory, settings=settings, show_progress=False, read_text=read_text)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Beside other tests, threads that wait for one another cost far more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "tiny")


def test_it_loads_as_a_hub_model_and_generates(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.max_position_embeddings == 256
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)["input_ids"]
    out = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4, do_sample=False)
    assert len(ids) < out.shape[1] <= len(ids) + 4


def test_the_chat_template_writes_chatml_and_ends_turns_with_the_end_token(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    config = json.loads((model_folder / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in config["eos_token_id"]
    assert tokenizer.eos_token == "<|im_end|>"


def test_any_text_comes_back_from_its_tokens(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    text = "def f(x):\n\treturn 'naïve — 漢字 🙂'  "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_weights_are_saved_expert_by_expert_as_engines_expect(model_folder):
    from safetensors import safe_open

    with safe_open(model_folder / "model.safetensors", framework="np") as weights:
        names = set(weights.keys())
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" in names


def test_whoever_may_read_the_configuration_may_read_the_weights(model_folder):
    modes = {file.stat().st_mode for file in model_folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    assert modes == {(model_folder / "config.json").stat().st_mode}


def test_training_and_the_counted_pairs_lower_the_held_out_loss(model_folder):
    report = read_report(model_folder)["report"]
    assert report["steps"] == 2
    assert report["head_start"]["loss_nats"] < report["before"]["loss_nats"] - 1
    assert report["after"]["loss_nats"] < report["before"]["loss_nats"] - 1
    assert all(1 <= ratio <= 4 for ratio in report["after"]["expert_max_over_mean"])
    assert "held-out loss" in render_report(read_report(model_folder))


def test_the_second_time_it_is_found_and_not_made(model_folder):
    before = (model_folder / "model.safetensors").stat()
    assert make(model_folder) == model_folder
    assert (model_folder / "model.safetensors").stat() == before


def test_other_settings_make_it_anew_and_leave_nothing_beside_it(tmp_path):
    first = make(tmp_path / "tiny", RANDOM)
    weights = (first / "model.safetensors").read_bytes()
    make(tmp_path / "tiny", replace(RANDOM, seed=21))
    assert (first / "model.safetensors").read_bytes() != weights
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


def test_what_an_interrupted_making_left_is_redone(tmp_path):
    partial = tmp_path / ".tiny.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    made = make(tmp_path / "tiny", RANDOM)
    assert (made / MANIFEST).exists()
    assert not partial.exists()


def test_the_same_seed_gives_the_same_random_weights(tmp_path):
    one, other = make(tmp_path / "one", RANDOM), make(tmp_path / "other", RANDOM)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_two_makers_at_once_agree_on_one_model(tmp_path):
    read = []

    def read_text() -> Corpus:
        read.append(1)
        return some_text()

    with ThreadPoolExecutor(2) as makers:
        made = list(makers.map(lambda _: make(tmp_path / "tiny", RANDOM, read_text), range(2)))
    assert made == [tmp_path / "tiny"] * 2
    assert len(read) == 1


def test_a_folder_of_something_else_is_never_written_over(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InvalidInput, match="holds something other than a tiny model"):
        make(tmp_path)
    with pytest.raises(InvalidInput, match="holds something other than a tiny model"):
        make(tmp_path / "letter.txt")
    with pytest.raises(InvalidInput, match="cannot make the model here"):
        make(tmp_path / "letter.txt" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"limit_s": 0.0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="steps must be 0 or more"):
        TinySettings(**wrong)


def test_every_setting_is_in_the_fingerprint():
    prints = {TinySettings().fingerprint} | {
        TinySettings(**{name: value + 2}).fingerprint for name, value in full().items()
    }
    assert len(prints) == len(full()) + 1


def test_docstrings_become_questions_and_answers():
    source = 'def f():\n    """Join parts of\n    a path.\n\n    More."""\n\nclass _C:\n    """Hidden."""\n'
    documented = parse_docstrings(source, "os.path")
    assert [name for name, _ in documented] == ["os.path.f"]
    (exchange,) = build_exchanges(documented)
    assert "os.path.f" in exchange.question
    assert exchange.answer == "Join parts of a path."
    assert parse_docstrings("def broken(:\n", "m") == []


def test_this_machine_has_text_of_each_kind():
    corpus = read_corpus()
    assert sum(map(len, corpus.prose)) > 100_000
    assert len(corpus.exchanges) > 500
    assert len(corpus.sources) > 20


def test_the_pair_start_predicts_better_than_frequencies_alone():
    random = np.random.default_rng(0)
    # A chain in which each token is mostly followed by its successor.
    steps = np.where(random.random(20_000) < 0.8, 1, random.integers(0, 50, 20_000))
    ids = np.cumsum(steps) % 50
    embedding, head = build_pair_start(ids, vocabulary=50, hidden=32, seed=0)
    assert embedding.shape == head.shape == (50, 32)
    assert np.sqrt((embedding**2).mean(axis=1)) == pytest.approx(np.ones(50), rel=1e-3)
    logits = embedding @ head.T
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert -log_p[ids[:-1], ids[1:]].mean() < unigram_entropy(ids) - 0.5


def test_pairs_are_counted_from_row_to_column():
    assert count_pairs(np.array([0, 1, 1, 2]), 3).tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_entropy_is_full_when_even_and_none_when_one_expert_has_all():
    assert load_entropy(np.array([5.0, 5.0, 5.0, 5.0])) == pytest.approx(np.log(4))
    assert load_entropy(np.array([9.0, 0.0, 0.0])) == 0


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [rate_factor(done / 100) for done in range(101)]
    peak = rates.index(max(rates))
    assert 5 <= peak <= 15
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0
    assert max(rates) <= 1


def test_sequences_are_cut_whole_and_no_more_than_asked():
    ids = np.arange(10)
    assert cut_sequences(ids, 3, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert cut_sequences(ids, 4, 9).shape == (2, 4)
    assert cut_sequences(ids, 11, 1).shape == (0, 11)


def full() -> dict:
    return {name: getattr(TinySettings(), name) for name in TinySettings.__dataclass_fields__}
