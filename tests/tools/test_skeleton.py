"""A model's shape without weights: what programs load, and which folders are refused."""

import json

import pytest
from moe_contract.input_errors import InvalidInput
from moe_tools.cli import app
from moe_tools.skeleton import DEFAULT_SHAPE, SHAPES, make_skeleton
from moe_tools.tiny.corpus import Corpus, QuestionAndAnswer
from transformers import AutoConfig, AutoTokenizer
from typer.testing import CliRunner

CORPUS = Corpus(
    prose=(), sources=(), exchanges=(QuestionAndAnswer(question="q", answer="a path joins to another path"),)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_skeleton(tmp_path_factory.mktemp("models") / "shape", DEFAULT_SHAPE, 20, CORPUS)


def test_it_has_the_models_shape_and_the_layers_asked_for(folder):
    config = AutoConfig.from_pretrained(folder)
    assert (config.architectures, config.num_hidden_layers) == (["Qwen3MoeForCausalLM"], 20)
    assert (config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok) == (2048, 768, 8)
    assert SHAPES[DEFAULT_SHAPE]["num_hidden_layers"] == 48


def test_every_id_that_the_model_may_answer_has_a_text(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    entries = AutoConfig.from_pretrained(folder).vocab_size
    assert len(tokenizer) == entries
    assert tokenizer.decode([entries - 1, entries - 2]) == f"<{entries - 1}><{entries - 2}>"
    assert tokenizer.eos_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"]


def test_text_is_cut_into_trained_tokens_and_comes_back(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"a path <{len(tokenizer) - 1}> joins"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) // 2


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "kept").touch()
    with pytest.raises(InvalidInput, match="is not empty; name a new folder"):
        make_skeleton(tmp_path, DEFAULT_SHAPE, None, CORPUS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_another_shape_is_reported_with_those_that_are_known(tmp_path):
    done = CliRunner().invoke(app, ["model", "skeleton", str(tmp_path / "new"), "--like", "gpt"])
    assert done.exit_code == 2
    assert done.stderr == f"--like: unknown 'gpt'; known: {DEFAULT_SHAPE}\n"
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="cannot make the model here"):
        make_skeleton(tmp_path / "file" / "model", DEFAULT_SHAPE, None, CORPUS)
