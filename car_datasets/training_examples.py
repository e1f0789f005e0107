"""Rows and pairs to what a model is trained on: token ids and labels, and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from car_datasets.batching import pad, tokenise
from car_datasets.metrics import kendall
from car_datasets.pairs import Pair, as_given
from car_datasets.templates import PAPER_TEMPLATE, Exchange, Text, render


def regression_examples(
    rows: Sequence[tuple[Exchange, float]], tokenizer: Any, template: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Rows and labels to `input_ids` and `labels`."""
    ids = tokenise(tokenizer, [_text(row, template).whole for row, _ in rows], max_tokens).ids
    return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]


def ranking_examples(pairs: Sequence[Pair], tokenizer: Any, template: str, max_tokens: int) -> list[dict[str, Any]]:
    """Pairs to `question_ids`, `input_ids` (the better answer) and `rejected_ids`.

    The question is the better half's, as in the original's files. The label says that the
    first answer is the better.
    """
    better = [_text(pair.better, template) for pair in pairs]
    worse = [_text(pair.worse, template) for pair in pairs]
    parts = {
        "question_ids": [text.question for text in better],
        "input_ids": [text.answer for text in better],
        "rejected_ids": [text.answer for text in worse],
    }
    ids = {name: tokenise(tokenizer, texts, max_tokens).ids for name, texts in parts.items()}
    return [{**{name: found[i] for name, found in ids.items()}, "labels": 1.0} for i in range(len(pairs))]


@dataclass(frozen=True)
class Collator:
    """Pads a batch of examples, each kind of text to its own longest."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`*_ids` and their masks, int64 of shape (batch, longest), and `labels`, float32 of shape (batch,)."""
        masks = {"input_ids": "attention_mask", "question_ids": "question_mask", "rejected_ids": "rejected_mask"}
        batch = {"labels": torch.tensor([example["labels"] for example in examples])}
        for name, mask in masks.items():
            if name in examples[0]:
                batch[name], batch[mask] = pad([e[name] for e in examples], self.pad_token_id, torch.device("cpu"))
        return batch


def _text(row: Exchange, template: str) -> Text:
    """For the paper's template the text of the file itself, in which an empty input leaves no trace, as the original did."""
    return as_given(row) if template == PAPER_TEMPLATE else render(row, template)


def compute_kendall(prediction: Any) -> dict[str, float]:
    """Tau-b of scores and labels; for the ranking model, as in the original, (concordant - discordant) / pairs."""
    scores = np.asarray(prediction.predictions)
    if scores.shape[-1] == 2:
        return {"kendall": float(np.sign(scores[:, 0] - scores[:, 1]).mean())}
    return {"kendall": kendall(scores[:, 0], prediction.label_ids)}
