"""A random Llama so small that a run takes a second, with a tokenizer that has one token per word."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ASKED = ["###", "user", "assistant", "system", "what", "follows", "?", "is", "."]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute on one thread: several wait for each other longer than these models take."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random Llama of 3 layers, without a chat template."""
    folder = tmp_path_factory.mktemp("llama")
    save_llama(str(folder))
    return str(folder)


def save_llama(folder: str) -> None:
    """Save the model and its tokenizer."""
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


def planted(right: float, rounds: int = 20) -> list[dict[str, Any]]:
    """Return rows that ask what follows each digit but the last; a share of them have the right answer."""
    rows = []
    for place in range(rounds * 9):
        number = place % 9
        is_right = (place // 9) % 10 < 10 * right
        answer = DIGITS[number + 1] if is_right else DIGITS[(number + 3 + place // 9) % 10]
        row = {
            "instruction": f"what follows {DIGITS[number]} ?",
            "output": f"{answer} is {answer} .",
            "right": is_right,
        }
        rows.append({**row, "place": place})
    return rows
