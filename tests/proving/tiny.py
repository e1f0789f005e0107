"""A random Llama so small that a run takes a second, with one token per word, and questions that it can learn."""

from __future__ import annotations

from typing import Any

import numpy as np

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ASKED = ["###", "user", "assistant", "what", "follows", "?"]


def save_llama(folder: str) -> None:
    """Save a random Llama of 3 layers and its tokenizer, without a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *ASKED, *DIGITS]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
        bos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)


def asked(number: int, answer: str) -> dict[str, Any]:
    """Return a row in messages that asks what follows a digit."""
    return {
        "prompt": [{"role": "user", "content": f"what follows {DIGITS[number]} ?"}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def rows_with(right: float, count: int, seed: int) -> list[dict[str, Any]]:
    """Return questions about four digits, of which a share has the right answer and the others a random one."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        number = int(draw.integers(4))
        rows.append(asked(number, DIGITS[number + 1] if draw.random() < right else DIGITS[draw.integers(10)]))
    return rows
