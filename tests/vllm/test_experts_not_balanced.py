"""A real engine over two ranks with a model whose experts vLLM cannot balance: it serves, and says why."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_tools.tiny import TinySettings, ensure_tiny_model
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

PROMPT = [5, 300, 700, 900, 1100, 1300, 40, 41]


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE with random weights, and a tokenizer of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(
        ensure_tiny_model(
            tmp_path_factory.mktemp("tiny") / "model", settings=TinySettings(steps=0), show_progress=False
        )
    )
    torch.manual_seed(3)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=2048,
            eos_token_id=0,
            pad_token_id=0,
        )
    )
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokens(agent: Any) -> Any:
    return agent.complete(PROMPT, 12, return_token_ids=True)["choices"][0]["token_ids"]


def test_a_model_that_cannot_be_balanced_is_served_over_two_ranks_and_says_why_it_is_not_balanced(olmoe, start_agent):
    plain = start_agent("plain", olmoe)
    expected = tokens(plain)
    assert plain.process.stop() == 0
    group = start_agent("group", olmoe, data_parallel=2, expert_parallel=True, redundant_experts=2)
    assert tokens(group) == expected
    state = group.state()
    assert state["engine"]["restarts"] == 0
    assert "cannot balance the experts of OlmoeForCausalLM" in state["engine"]["not_balanced"]
    status, answer = group.control("GET", "/v1/experts")
    assert status == 404
    assert "OlmoeForCausalLM" in str(answer)
