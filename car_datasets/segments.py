"""What the embedded scorer sees of a text: its question and its answer pooled apart, and the words of the answer.

Does: encoder states -> one vector per text, layer by layer; token ids -> hashed words and pairs of words.
Does not: learn anything (head_training.py), or turn the vector into a score (`SegmentHead` in layers.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MARK = 2  # the answer's first tokens are its mark, "response" and ":", which every answer has


def segment_features(hidden_states: Sequence[Tensor], mask: Tensor, answer_start: Tensor) -> Tensor:
    """One vector per text from the encoder's states.

    Args:
        hidden_states (`Sequence[Tensor]`): n + 1 states of shape (batch, tokens, units), the embedding output first.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.

    Returns:
        `Tensor` of shape `(batch, (3 * (n + 1) + 1) * units + 2)`, float32: for every state the mean over the question's
        tokens, the mean over the answer's and the standard deviation over the answer's; the product of the last state's
        two means, which is what tells whether the answer is about the question; and the logarithms of both lengths.
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
    """The answer's tokens and pairs of neighbours as numbers below `2 ** bits`, each once.

    Args:
        input_ids, mask (`Tensor` of shape `(batch, tokens)`), answer_start (`Tensor` of shape `(batch,)`): the last real
            token, the separator, is no word.
        bits (`int`): of the hash, Knuth's multiplicative one.

    Returns:
        `(numbers, weights)`, both of shape `(batch, 2 * tokens - 1)`: weights are 0 where a number is not the text's or
        has been seen in it, else the same for all, so that the row has the length 1.
    """
    ends = mask.sum(1, keepdim=True) - 1
    positions = torch.arange(mask.shape[1], device=mask.device)
    word = (positions >= answer_start.unsqueeze(1) + MARK) & (positions < ends)
    low = (1 << 32) - 1
    single = (input_ids * 2654435761) & low
    second = ((input_ids[:, 1:] * 97 + 40503) * 2246822519) & low
    double = ((single[:, :-1] ^ second) * 3266489917) & low
    numbers = torch.cat([single, double], dim=1) >> (32 - bits)
    there = torch.cat([word, word[:, :-1] & word[:, 1:]], dim=1)
    numbers, _ = torch.where(there, numbers, 1 << bits).sort(dim=1)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    weights = (first & (numbers < 1 << bits)).float()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1).sqrt()
    return numbers.clamp(max=(1 << bits) - 1), weights
