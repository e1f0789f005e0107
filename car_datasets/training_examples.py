"""Turn rows and pairs into training examples (token ids and labels), padded batches, and the validation metric."""

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
    """Tokenise labelled rows for the regression model, one example with `input_ids` and `labels` per row.

    Args:
        rows (`Sequence[tuple[Exchange, float]]`): rows and their labels in [0, 1].
        tokenizer: the encoder's tokenizer, of transformers.
        template (`str`): name of the text template.
        max_tokens (`int`): tokens read of a text, special tokens included.
    """
    ids = tokenise(tokenizer, [_text(row, template).whole for row, _ in rows], max_tokens).ids
    return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]


def ranking_examples(pairs: Sequence[Pair], tokenizer: Any, template: str, max_tokens: int) -> list[dict[str, Any]]:
    """Tokenise pairs for the ranking model, one example per pair.

    An example has `question_ids`, `input_ids` (the better answer), `rejected_ids` and `labels`. The question is the one
    of the better half, as in the original's files. The label is always 1: the first answer is the better one.

    Args:
        pairs (`Sequence[Pair]`): worse and better answers.
        tokenizer: the encoder's tokenizer, of transformers.
        template (`str`): name of the text template.
        max_tokens (`int`): tokens read of a question or of an answer, special tokens included.
    """
    better = [_text(pair.better, template) for pair in pairs]
    worse = [_text(pair.worse, template) for pair in pairs]
    parts = {
        "question_ids": [text.question for text in better],
        "input_ids": [text.answer for text in better],
        "rejected_ids": [text.answer for text in worse],
    }
    ids = {name: tokenise(tokenizer, texts, max_tokens).ids for name, texts in parts.items()}
    return [{**{name: rows[i] for name, rows in ids.items()}, "labels": 1.0} for i in range(len(pairs))]


@dataclass(frozen=True)
class Collator:
    """A callable that pads a batch of examples, each kind of text to its own longest."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `*_ids` and their masks, int64 (batch, longest), and `labels`, float32 (batch,)."""
        masks = {"input_ids": "attention_mask", "question_ids": "question_mask", "rejected_ids": "rejected_mask"}
        batch = {"labels": torch.tensor([example["labels"] for example in examples])}
        for name, mask in masks.items():
            if name in examples[0]:
                batch[name], batch[mask] = pad([e[name] for e in examples], self.pad_token_id, torch.device("cpu"))
        return batch


def _text(row: Exchange, template: str) -> Text:
    """Return the text to train on; for the paper's template the file's own text, as in the original's training."""
    # The paper's inference template leaves two spaces where the input is empty; its training files do not.
    return as_given(row) if template == PAPER_TEMPLATE else render(row, template)


def compute_kendall(prediction: Any) -> dict[str, float]:
    """Return Kendall's tau-b of scores and labels, the metric that chooses the best epoch.

    The ranking model scores both answers of a pair: for it, as in the original, (concordant - discordant) / pairs.

    Args:
        prediction (`EvalPrediction`): `predictions`, shape (examples, 1) or (pairs, 2), and `label_ids`.
    """
    scores = np.asarray(prediction.predictions)
    if scores.shape[-1] == 2:  # better and worse answer
        return {"kendall": float(np.sign(scores[:, 0] - scores[:, 1]).mean())}
    return {"kendall": kendall(scores[:, 0], prediction.label_ids)}
