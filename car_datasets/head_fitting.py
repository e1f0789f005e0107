"""Fit the parts of a `SegmentHead` on features that are computed already: words, quality, integrity.

Does: three small optimisations on matrices; each says what it must tell apart, and what must not move it.
Does not: run an encoder or read files (head_training.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

FOLDS = 5
_bce = nn.functional.binary_cross_entropy_with_logits
_softplus = nn.functional.softplus


@dataclass(frozen=True)
class Copies:
    """Matrices of the training rows and of changed copies of them; row i of each belongs to row i of `rows`.

    Args:
        rows: the rows themselves, 2i the worse and 2i + 1 the better half of pair i.
        styled: the rows in other styles, one matrix per draw, which must score the same.
        corrupted: the rows with something broken, one matrix per draw, which must score less.
    """

    rows: Any
    styled: Sequence[Any]
    corrupted: Sequence[Any]

    def each(self, change: Callable[[Any], Any]) -> Copies:
        """Every matrix changed in the same way."""
        return Copies(change(self.rows), [change(m) for m in self.styled], [change(m) for m in self.corrupted])

    def every(self) -> list[Any]:
        """All matrices, the rows' first."""
        return [self.rows, *self.styled, *self.corrupted]


def principal_axes(scaled: Tensor, size: int) -> Tensor:
    """The `size` axes of the largest variance of features of shape (texts, width): (width, size), each divided by the
    square root of the standard deviation along it."""
    _, singular, axes = torch.linalg.svd(scaled, full_matrices=False)
    return axes[:size].T / (3 * (singular[:size] / len(scaled) ** 0.5).sqrt())


def fit_words(
    words: Copies, labels: npt.NDArray[np.float32], strength: float, style_weight: float
) -> tuple[npt.NDArray[np.float64], float, Copies]:
    """Logistic regression on the hashed words of rows and styled copies, which have their row's label.

    Args:
        words ([`Copies`]): sparse matrices (texts, 2 ** bits).
        labels (`(rows,)`): 0, 1, 0, 1, ...
        strength (`float`): scikit-learn's `C`.
        style_weight (`float`): of all styled copies of a row together; the row itself has 1.

    Returns:
        weights, intercept, and the logits of all matrices by models that have not seen the pair (`FOLDS` of them): what
        the other parts are fitted beside, since they must mend this part as it is on new text.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    parts = [words.rows, *words.styled]
    weight = [1.0] + [style_weight / len(words.styled)] * len(words.styled)

    def fit(at: npt.NDArray[np.int64]) -> Any:
        model = LogisticRegression(C=strength, max_iter=1000)
        return model.fit(
            vstack([part[at] for part in parts]),
            np.tile(labels[at], len(parts)),
            sample_weight=np.repeat(weight, len(at)),
        )

    logits = words.each(lambda matrix: np.zeros(matrix.shape[0], dtype=np.float32))
    pairs = np.arange(len(labels)) // 2
    for known, unseen in GroupKFold(min(FOLDS, len(labels) // 2)).split(labels, groups=pairs):
        model = fit(known)
        for matrix, out in zip(words.every(), logits.every(), strict=True):
            out[unseen] = model.decision_function(matrix[unseen])
    whole = fit(np.arange(len(labels)))
    return whole.coef_[0], float(whole.intercept_[0]), logits.each(lambda out: torch.from_numpy(out).unsqueeze(1))


class Voters(nn.Module):
    """Networks of one hidden layer side by side, with dropout on what goes in and on the hidden units."""

    def __init__(self, width: int, members: int, size: int, dropout: float) -> None:
        super().__init__()
        self.members = members
        self.inside = nn.Linear(width, members * size)
        self.out = nn.Parameter(torch.randn(members, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(members))
        self.dropout_in, self.dropout = nn.Dropout(0.1), nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """(texts, width) to logits (texts, members)."""
        hidden = self.dropout(torch.tanh(self.inside(self.dropout_in(features))))
        return (hidden.view(len(features), self.members, -1) * self.out).sum(dim=-1) + self.bias


def fit_quality(
    features: Copies,
    words: Copies,
    labels: Tensor,
    voters: Voters,
    *,
    consistency: float,
    margin_weight: float,
    **schedule: Any,
) -> Voters:
    """Quality, beside the words' logits: expert labels, their order in each pair, and nothing for style.

    Loss: cross-entropy on the labels + half a logistic loss on the difference of each pair + `consistency` x (a quarter of
    the mean square, and the squared mean, of the shift of the logit by each style) + `margin_weight` x a logistic loss
    with margin 1 on row over corrupted copy.
    """

    def loss(rows: Tensor, step: int) -> Tensor:
        broken = step % len(features.corrupted)
        seen = [features.rows, *features.styled, features.corrupted[broken]]
        beside = [words.rows, *words.styled, words.corrupted[broken]]
        logits = voters(torch.cat([m[rows] for m in seen])) + torch.cat([m[rows] for m in beside])
        plain, *styled, corrupted = logits.split(len(rows))
        found = _bce(plain, labels[rows].unsqueeze(1).expand_as(plain))
        found = found + 0.5 * _softplus(plain[::2] - plain[1::2]).mean()
        for other in styled:
            shift = other - plain
            found = found + consistency / len(styled) * (shift.square().mean() / 4 + shift.mean(dim=0).square().mean())
        return found + margin_weight * _softplus(1 - (plain - corrupted)).mean()

    return _descend(voters, loss, len(labels) // 2, **schedule)


def fit_integrity(features: Copies, voters: Voters, pairs: int, **schedule: Any) -> Voters:
    """Integrity: rows, whatever their label or style, against corrupted copies, by class and by margin over their own copy."""

    def loss(rows: Tensor, step: int) -> Tensor:
        styled = features.styled[step % len(features.styled)]
        corrupted = features.corrupted[step % len(features.corrupted)]
        whole, other, broken = voters(torch.cat([m[rows] for m in (features.rows, styled, corrupted)])).split(len(rows))
        found = _softplus(-whole).mean() + 0.3 * _softplus(-other).mean() + _softplus(broken).mean()
        return found + _softplus(3 - (whole - broken)).mean()

    return _descend(voters, loss, pairs, **schedule)


def _descend(
    voters: Voters,
    loss_of: Callable[[Tensor, int], Tensor],
    pairs: int,
    *,
    epochs: int,
    pairs_per_batch: int,
    learning_rate: float,
    weight_decay: float,
) -> Voters:
    """AdamW with one cycle of the learning rate, in batches of whole pairs."""
    optimiser = torch.optim.AdamW(voters.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-pairs // pairs_per_batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps + 1)
    voters.train()
    step = 0
    for _ in range(epochs):
        for chosen in torch.randperm(pairs).split(pairs_per_batch):
            rows = torch.stack([2 * chosen, 2 * chosen + 1], dim=1).flatten()
            loss = loss_of(rows, step)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            step += 1
    return voters.eval()
