"""The tiny model's tokenizer: byte-level BPE with ChatML's special tokens and a chat template."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from moe_tools.tiny.corpus import QuestionAndAnswer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, START, END)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def build_tokenizer(texts: Iterable[str], vocabulary: int, context_tokens: int) -> "PreTrainedTokenizerFast":
    """Trains the merges on `texts`; the vocabulary has `vocabulary` entries, special tokens included."""
    return dress_tokenizer(train_tokenizer(texts, vocabulary), context_tokens)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """Trains a byte-level BPE tokenizer with `vocabulary` entries on texts; it has no chat template yet."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def dress_tokenizer(tokenizer: "Tokenizer", context_tokens: int) -> "PreTrainedTokenizerFast":
    """As a model's folder holds it, with the special tokens' parts and the chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_tokens,
        clean_up_tokenization_spaces=False,
    )


def render_exchange(exchange: QuestionAndAnswer) -> str:
    """The exchange as the chat template writes it."""
    return f"{START}user\n{exchange.question}{END}\n{START}assistant\n{exchange.answer}{END}\n"
