"""Real routing: which experts a trained model sends texts of different topics to, as a sequence of loads.

The model is run as it is (transformers, no engine): what a router chooses depends on its weights and the text alone. A
topic is a kind of text; a scenario says which topics each source has in each round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from moe_contract.input_errors import InputError, InvalidInput
from moe_tools.tiny.corpus import read_corpus

# Tokens of a source that are looked at in a round, and of them in a step.
ROUND_TOKENS = 16_384
STEP_TOKENS = 256
_PIECE_TOKENS = 512
_TEXT_CHARACTERS = 100_000

Topics = Mapping[str, Sequence[float]]
"""Parts of the topics in a source's text, by name of the topic; one value for each source."""

TOPICS = ("prose", "sources", "questions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Choices of the router: `tokens[..., layer, expert]`, and how many tokens two neighbouring experts share.

    `pairs[..., layer, expert, next]` counts each of a token's experts with each of its experts in the next layer.
    """

    tokens: np.ndarray
    pairs: np.ndarray


def _alternating(is_first: bool) -> Topics:
    return {"prose": (float(is_first),) * 2, "sources": (float(not is_first),) * 2}


def _of_tenants(is_first: bool) -> Topics:
    here, there = float(is_first), float(not is_first)
    return {"prose": (here, there), "sources": (there, here)}


# Of a round's place in the sequence, from 0 to 1: the part of each topic, for two sources.
SCENARIOS: Mapping[str, Callable[[float], Topics]] = MappingProxyType(
    {
        "steady": lambda _: {"prose": (1.0, 1.0)},
        "two tenants": lambda _: _of_tenants(is_first=True),
        "drift": lambda at: {"prose": (1 - at,) * 2, "sources": (at,) * 2},
        "switch": lambda at: _alternating(at < 0.5),
        "back and forth": lambda at: _alternating(at * 10 % 2 < 1),
        "tenants change places": lambda at: _of_tenants(at < 0.5),
    }
)


def record(model_dir: Path, scenario: str, rounds: int, seed: int) -> Routed:
    """`tokens[round, source, layer, expert]` and `pairs[round, layer, expert, next]`, in tokens a step.

    Args:
        model_dir: a trained model whose router transformers can show.
        scenario: one of `SCENARIOS`.
        rounds: of the sequence.
        seed: of what text is read in which round.

    Raises:
        InvalidInput: the folder has no such model.
    """
    routed = route_topics(model_dir)
    generator = np.random.default_rng(seed)
    loads, pairs = [], []
    for number in range(rounds):
        parts = SCENARIOS[scenario](number / max(1, rounds - 1))
        sources = len(next(iter(parts.values())))
        load: Any = 0
        paired: Any = 0
        for topic, shares in parts.items():
            pieces = routed[topic]
            for source in range(sources):
                count = round(shares[source] * ROUND_TOKENS / _PIECE_TOKENS)
                drawn = generator.integers(0, len(pieces.tokens), count)
                load = load + np.eye(sources)[source][:, None, None] * pieces.tokens[drawn].sum(axis=0)
                paired = paired + pieces.pairs[drawn].sum(axis=0)
        loads.append(load * STEP_TOKENS / ROUND_TOKENS)
        pairs.append(paired * STEP_TOKENS / ROUND_TOKENS)
    return Routed(tokens=np.array(loads), pairs=np.array(pairs))


def route_topics(model_dir: Path) -> dict[str, Routed]:
    """For each topic the choices of the router, by piece of its text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        model = AutoModelForCausalLM.from_pretrained(model_dir)
        experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInput([InputError(str(model_dir), f"no MoE model: {error}")]) from None
    routed = {}
    for topic, text in topic_texts().items():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
        pieces = ids[: len(ids) // _PIECE_TOKENS * _PIECE_TOKENS].view(-1, _PIECE_TOKENS)[
            : 2 * ROUND_TOKENS // _PIECE_TOKENS
        ]
        tokens, pairs = [], []
        for piece in pieces:
            with torch.no_grad():
                logits = model(piece[None], output_router_logits=True).router_logits
            counted = count_choices([layer.topk(top_k).indices.numpy() for layer in logits], experts)
            tokens.append(counted.tokens)
            pairs.append(counted.pairs)
        routed[topic] = Routed(tokens=np.array(tokens), pairs=np.array(pairs))
    return routed


def count_choices(chosen: Sequence[np.ndarray], experts: int) -> Routed:
    """Counts of a text whose tokens went to the experts `chosen[layer][token, place]`."""
    goes = np.stack([np.eye(experts)[layer].sum(axis=1) for layer in chosen])
    return Routed(tokens=goes.sum(axis=1), pairs=np.swapaxes(goes[:-1], 1, 2) @ goes[1:])


def topic_texts() -> dict[str, str]:
    """A long text of each topic."""
    corpus = read_corpus()
    questions = (f"{exchange.question}\n{exchange.answer}" for exchange in corpus.exchanges)
    texts = ("\n".join(corpus.prose), "\n".join(corpus.sources), "\n".join(questions))
    return {topic: text[:_TEXT_CHARACTERS] for topic, text in zip(TOPICS, texts, strict=True)}
