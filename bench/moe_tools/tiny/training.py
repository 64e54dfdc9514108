"""Makes the tiny model: tokenizer, weights, a short training, and the figures that say what it learned.

Called by `moe_tools.tiny.store` alone. With the same settings, text, torch and number of threads, two trainings that
reach their last step give the same weights.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_tools.tiny.corpus import Corpus
from moe_tools.tiny.pairs import build_pair_start
from moe_tools.tiny.settings import TinySettings
from moe_tools.tiny.tokens import END, END_OF_TEXT, build_tokenizer, render_exchange

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

Progress = Callable[[str, float], None]
"""Called with the stage's name and its completed part, from 0 to 1."""

SHARES = {"exchanges": 0.5, "prose": 0.35, "sources": 0.15}
HELD_OUT = 0.05
HELD_OUT_SEQUENCES = 16
WARM_UP = 0.1
THREAD_COUNTS = (1, 2, 4)
ROUTER_RATE_SHARE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Token ids (int64): all of the text in order; the training set and the held-out set, (sequences, tokens)."""

    all_ids: np.ndarray
    sequences: np.ndarray
    held_out: np.ndarray


def make_model(
    directory: Path, settings: TinySettings, read_text: Callable[[], Corpus], progress: Progress
) -> dict[str, Any]:
    """Writes a complete model into `directory` and returns the report of its training."""
    progress("reading text", 0.0)
    corpus = read_text()
    tokenizer = build_tokenizer(_all_texts(corpus), settings.vocabulary, settings.context_tokens)
    progress("counting tokens", 0.0)
    text = build_text(corpus, tokenizer, settings)
    model = build_model(settings, tokenizer)
    before = measure(model, text.held_out)
    if settings.steps:
        progress("counting pairs", 0.0)
        start_from_pairs(model, text.all_ids, settings)
    started = measure(model, text.held_out)
    steps, seconds = train(model, text.sequences, settings, progress)
    after = measure(model, text.held_out)
    progress("writing", 1.0)
    save(model, tokenizer, directory)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "train_s": round(seconds, 1),
        "trained_tokens": steps * settings.batch_sequences * settings.sequence_tokens,
        "unigram_entropy_nats": round(unigram_entropy(text.all_ids), 3),
        "before": before,
        "head_start": started,
        "after": after,
    }


def build_model(settings: TinySettings, tokenizer: "PreTrainedTokenizerFast") -> "Qwen3MoeForCausalLM":
    """Random weights from the seed."""
    import torch
    from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    ends = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 2,
        moe_intermediate_size=settings.expert_hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_size,
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        norm_topk_prob=True,
        router_aux_loss_coef=settings.balance_weight,
        tie_word_embeddings=False,
        max_position_embeddings=settings.context_tokens,
        eos_token_id=ends[0],
        pad_token_id=ends[1],
    )
    torch.manual_seed(settings.seed)
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    return model


def build_text(corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", settings: TinySettings) -> Text:
    """Of each kind of text there is its share, or as much as there is; held-out documents are whole documents."""
    random = np.random.default_rng(settings.seed)
    wanted = max(settings.steps * settings.batch_sequences, 1)
    kept_ids, sequences, held_out = [], [], []
    for kind, texts in _texts_by_kind(corpus).items():
        order = random.permutation(len(texts))
        cut = max(1, int(len(texts) * HELD_OUT))
        held, kept = (_token_ids([texts[index] for index in part], tokenizer) for part in (order[:cut], order[cut:]))
        kept_ids.append(kept)
        sequences.append(cut_sequences(kept, settings.sequence_tokens, math.ceil(wanted * SHARES[kind])))
        held_out.append(cut_sequences(held, settings.sequence_tokens, math.ceil(HELD_OUT_SEQUENCES * SHARES[kind])))
    return Text(
        all_ids=np.concatenate(kept_ids),
        sequences=random.permutation(np.concatenate(sequences)),
        held_out=np.concatenate(held_out),
    )


def start_from_pairs(model: "Qwen3MoeForCausalLM", ids: np.ndarray, settings: TinySettings) -> None:
    """Puts the bigram start into the embedding and the output head."""
    import torch

    embedding, head = build_pair_start(ids, model.config.vocab_size, settings.hidden, settings.seed)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(embedding))
        model.lm_head.weight.copy_(torch.from_numpy(head))


def train(
    model: "Qwen3MoeForCausalLM", sequences: np.ndarray, settings: TinySettings, progress: Progress
) -> tuple[int, float]:
    """AdamW; its rate follows steps or time, whichever is further. Returns the steps made and their seconds."""

    optimiser = build_optimiser(model)
    started = time.monotonic()
    model.train()
    if settings.steps:
        choose_threads(model, _batch(sequences, 0, settings.batch_sequences))
    for step in range(settings.steps):
        done = max(step / settings.steps, (time.monotonic() - started) / settings.limit_s)
        progress("training", min(done, 1.0))
        if done >= 1.0:
            return step, time.monotonic() - started
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * group["share"] * rate_factor(done)
        _train_step(model, optimiser, _batch(sequences, step, settings.batch_sequences))
    return settings.steps, time.monotonic() - started


def choose_threads(model: "Qwen3MoeForCausalLM", tokens: "torch.Tensor") -> int:
    """Sets the number of threads with which one pass is fastest now, and returns it.

    On a machine that is busy with other work, threads wait for one another, and one is many times faster than all.
    """
    import torch

    best, best_s = 1, math.inf
    _time_pass(model, tokens[:1])
    for threads in sorted({min(count, len(os.sched_getaffinity(0))) for count in THREAD_COUNTS}):
        torch.set_num_threads(threads)
        pass_s = _time_pass(model, tokens)
        if pass_s >= best_s:
            break
        best, best_s = threads, pass_s
    torch.set_num_threads(best)
    return best


def build_optimiser(model: "Qwen3MoeForCausalLM") -> "torch.optim.AdamW":
    """Routers learn slower: at full rate a few experts take all tokens before the balance term can act."""
    import torch

    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]
    known = {id(parameter) for parameter in routers}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [{"params": rest, "share": 1.0}, {"params": routers, "share": ROUTER_RATE_SHARE}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True)


def rate_factor(done: float) -> float:
    """Share of the full learning rate at a share of the training: up over the first tenth, then down to nothing."""
    return min(done / WARM_UP + 0.01, (1.0 - done) / (1.0 - WARM_UP), 1.0)


def measure(model: "Qwen3MoeForCausalLM", sequences: np.ndarray) -> dict[str, Any]:
    """Loss (nats a token) and, for each layer, how the experts share the load."""
    import torch

    model.eval()
    with torch.no_grad():
        tokens = torch.from_numpy(sequences)
        answer = model(input_ids=tokens, labels=tokens, output_router_logits=True)
    cross_entropy = float(answer.loss - model.router_aux_loss_coef * answer.aux_loss)
    top = model.config.num_experts_per_tok
    loads = [_expert_load(logits, top) for logits in answer.router_logits]
    return {
        "loss_nats": round(cross_entropy, 3),
        "expert_max_over_mean": [round(float(load.max() / load.mean()), 2) for load in loads],
        "expert_entropy_share": [round(load_entropy(load) / math.log(len(load)), 3) for load in loads],
    }


def load_entropy(load: np.ndarray) -> float:
    """Entropy in nats of how the tokens spread over the experts."""
    share = load[load > 0] / load.sum()
    return float(-(share * np.log(share)).sum())


def unigram_entropy(sequences: np.ndarray) -> float:
    """Loss in nats of a model that knows how often each token comes and nothing else."""
    return load_entropy(np.bincount(sequences.ravel()).astype(float))


def save(model: "Qwen3MoeForCausalLM", tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """As a hub model: bfloat16 safetensors, configuration, tokenizer, chat template."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for weights in directory.glob("*.safetensors"):
        # The library makes them readable for their owner alone; an engine in a pod has another user.
        weights.chmod((directory / "config.json").stat().st_mode)


def _train_step(model: "Qwen3MoeForCausalLM", optimiser: "torch.optim.Optimizer", tokens: "torch.Tensor") -> None:
    import torch

    loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def _time_pass(model: "Qwen3MoeForCausalLM", tokens: "torch.Tensor") -> float:
    started = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.zero_grad()
    return time.perf_counter() - started


def _batch(sequences: np.ndarray, step: int, count: int) -> "torch.Tensor":
    import torch

    rows = np.arange(step * count, (step + 1) * count) % len(sequences)
    return torch.from_numpy(sequences[rows])


def _expert_load(router_logits: "torch.Tensor", top: int) -> np.ndarray:
    chosen = router_logits.reshape(-1, router_logits.shape[-1]).topk(top, dim=-1).indices
    return np.bincount(chosen.numpy().ravel(), minlength=router_logits.shape[-1]).astype(float)


def _texts_by_kind(corpus: Corpus) -> dict[str, list[str]]:
    return {
        "exchanges": [render_exchange(exchange) for exchange in corpus.exchanges],
        "prose": list(corpus.prose),
        "sources": list(corpus.sources),
    }


def _all_texts(corpus: Corpus) -> list[str]:
    answers = [f"{exchange.question}\n{exchange.answer}" for exchange in corpus.exchanges]
    return [*corpus.prose, *answers, *corpus.sources[:20]]


def cut_sequences(ids: np.ndarray, length: int, count: int) -> np.ndarray:
    """At most `count` sequences, one after the other from the beginning."""
    whole = min(len(ids) // length, count)
    return ids[: whole * length].reshape(whole, length)


def _token_ids(texts: list[str], tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """The documents one after the other, each with the end of text behind it."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.array([token for document in encoded for token in (*document.ids, end)], dtype=np.int64)
