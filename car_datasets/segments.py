"""Features of the default scorer: question and answer pooled apart, and the words of the answer.

Does: turn encoder states into one vector per text, layer by layer, and token ids into hashed words and pairs of words.
Does not: learn anything, or turn features into a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MARK = 2  # tokens of the mark before every answer, "response" and ":", which tell nothing about its words


def segment_features(hidden_states: Sequence[Tensor], mask: Tensor, answer_start: Tensor) -> Tensor:
    """Pool the encoder's states into one vector per text.

    Args:
        hidden_states (`Sequence[Tensor]`): n + 1 states of shape (batch, tokens, units), the embedding output first.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.

    Returns:
        `Tensor` of shape `(batch, (3 * (n + 1) + 1) * units + 2)`, float32: for every state, the mean over the question's
        tokens, the mean over the answer's and the standard deviation over the answer's; the product of the two means of
        the last state, which tells if the answer is about the question; and the logarithms of both lengths.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    in_answer = (positions >= answer_start.unsqueeze(1)) & mask.bool()
    in_question = mask.bool() & ~in_answer
    counts = torch.stack([in_question.sum(1), in_answer.sum(1)], dim=1).float()
    weights = torch.stack([in_question, in_answer], dim=1).float() / counts.clamp(min=1).unsqueeze(-1)
    parts = []
    for states in hidden_states:
        states = states.float()
        question, answer = (weights @ states).unbind(1)
        square = (weights[:, 1:] @ states.square()).squeeze(1)
        parts += [question, answer, (square - answer.square()).clamp(min=1e-6).sqrt()]
    return torch.cat([*parts, parts[-3] * parts[-2], counts.log1p()], dim=1)


def hashed_words(input_ids: Tensor, mask: Tensor, answer_start: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Hash the answer's tokens and pairs of neighbouring tokens to numbers below `2 ** bits`, each counted once.

    Args:
        input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids; the last real one is the separator.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.
        bits (`int`): of the hash.

    Returns:
        `(numbers, weights)`, both of shape `(batch, 2 * tokens - 1)`: the weight is 0 for padding and for repeated numbers,
        and equal for all others of a text, so that each row of weights has length 1.
    """
    ends = mask.sum(1, keepdim=True) - 1
    positions = torch.arange(mask.shape[1], device=mask.device)
    word = (positions >= answer_start.unsqueeze(1) + MARK) & (positions < ends)
    # Knuth's multiplicative hash in 32 bits. The constants are part of the trained weights: they decide each word's place.
    low = (1 << 32) - 1
    single = (input_ids * 2654435761) & low
    second = ((input_ids[:, 1:] * 97 + 40503) * 2246822519) & low
    double = ((single[:, :-1] ^ second) * 3266489917) & low
    numbers = torch.cat([single, double], dim=1) >> (32 - bits)
    is_word = torch.cat([word, word[:, :-1] & word[:, 1:]], dim=1)
    # Sorted, repetitions are neighbours; what is not a word gets a number above all others and ends up last.
    numbers, _ = torch.where(is_word, numbers, 1 << bits).sort(dim=1)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    weights = (first & (numbers < 1 << bits)).float()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1).sqrt()
    return numbers.clamp(max=(1 << bits) - 1), weights
