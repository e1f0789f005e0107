"""Fit the three parts of a `SegmentHead` on features that are already computed: words, quality, integrity.

Does: three small optimisations on matrices.
Does not: run an encoder or read files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets.utils import tqdm
from torch import Tensor, nn

FOLDS = 5  # of the cross-validation that gives the word logits

_bce = nn.functional.binary_cross_entropy_with_logits
_softplus = nn.functional.softplus


@dataclass(frozen=True)
class Copies:
    """Matrices of the training rows and of their copies; row i of each matrix belongs to row i of `rows`.

    Args:
        rows: the worse half of pair i in row 2i, the better half in row 2i + 1.
        styled: restyled copies, one matrix per draw, which must score the same as the rows.
        corrupted: corrupted copies, one matrix per draw, which must score less than the rows.
    """

    rows: Any
    styled: Sequence[Any]
    corrupted: Sequence[Any]

    def each(self, change: Callable[[Any], Any]) -> Copies:
        """Return the copies with a function applied to every matrix."""
        return Copies(change(self.rows), [change(m) for m in self.styled], [change(m) for m in self.corrupted])

    def every(self) -> list[Any]:
        """Return all matrices, those of the rows first."""
        return [self.rows, *self.styled, *self.corrupted]


def principal_axes(scaled: Tensor, size: int) -> Tensor:
    """Return the `size` axes of largest variance of features (texts, width), as a matrix (width, size).

    Each axis is divided by three times the square root of the standard deviation along it: half-way to whitening.
    """
    # `scaled` has mean 0 but for clamping, so the right singular vectors are the principal axes.
    _, singular, axes = torch.linalg.svd(scaled, full_matrices=False)
    return axes[:size].T / (3 * (singular[:size] / len(scaled) ** 0.5).sqrt())


def fit_words(
    words: Copies, labels: npt.NDArray[np.float32], strength: float, style_weight: float
) -> tuple[npt.NDArray[np.float64], float, Copies]:
    """Fit a logistic regression on the hashed words of rows and restyled copies, which have the labels of their rows.

    Args:
        words ([`Copies`]): sparse matrices (rows, 2 ** bits).
        labels (`(rows,)`): 0, 1, 0, 1, ...
        strength (`float`): inverse regularisation (scikit-learn's `C`).
        style_weight (`float`): weight of all restyled copies of a row together; the row has 1.

    Returns:
        Weights (2 ** bits,), intercept, and cross-validated logits of all matrices, (rows, 1) each: quality, which is
        fitted on top of them, must correct this regression as it behaves on unseen text.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    # Corrupted copies are left out: they have no label, and integrity is to catch them.
    parts = [words.rows, *words.styled]
    weight = [1.0] + [style_weight / len(words.styled)] * len(words.styled)

    def fit(rows: npt.NDArray[np.int64]) -> Any:
        model = LogisticRegression(C=strength, max_iter=1000)
        return model.fit(
            vstack([part[rows] for part in parts]),
            np.tile(labels[rows], len(parts)),
            sample_weight=np.repeat(weight, len(rows)),
        )

    # Filled fold by fold by regressions that have not seen the row.
    logits = words.each(lambda matrix: np.zeros(matrix.shape[0], dtype=np.float32))
    pairs = np.arange(len(labels)) // 2  # both halves of a pair are in one fold: they share most words
    folds = GroupKFold(min(FOLDS, len(labels) // 2))
    with tqdm(total=folds.get_n_splits() + 1, desc="Fitting words", unit=" fits") as bar:
        for known, unseen in folds.split(labels, groups=pairs):
            model = fit(known)
            for matrix, out in zip(words.every(), logits.every(), strict=True):
                out[unseen] = model.decision_function(matrix[unseen])
            bar.update()
        final = fit(np.arange(len(labels)))
        bar.update()
    return final.coef_[0], float(final.intercept_[0]), logits.each(lambda out: torch.from_numpy(out).unsqueeze(1))


class Voters(nn.Module):
    """Independent networks of one hidden layer on the same input, with dropout on input and hidden units."""

    def __init__(self, width: int, members: int, size: int, dropout: float) -> None:
        super().__init__()
        self.members = members
        self.inside = nn.Linear(width, members * size)
        # One matrix for all members is faster than a module for each.
        self.out = nn.Parameter(torch.randn(members, size) / size**0.5)
        self.bias = nn.Parameter(torch.zeros(members))
        self.dropout_in, self.dropout = nn.Dropout(0.1), nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (texts, members) for features (texts, width)."""
        hidden = self.dropout(torch.tanh(self.inside(self.dropout_in(features))))
        # (texts, members, size) * (members, size), summed over the hidden units
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
    """Fit quality on top of the words' logits: expert labels and their order in each pair, insensitive to style.

    The loss is the sum of: cross-entropy on the labels; half a logistic loss on the difference within each pair;
    `consistency` x (a quarter of the mean square plus the squared mean of the shift in logit by each style);
    `margin_weight` x a logistic loss that ranks a row above its corrupted copy by a margin of 1.

    Args:
        features, words ([`Copies`]): projected features, (rows, axes) each, and word logits, (rows, 1) each.
        labels (`(rows,)`): 0, 1, 0, 1, ...
        voters ([`Voters`]): the networks to train, in place.
        consistency, margin_weight (`float`): weights of two terms of the loss.
        schedule: `epochs`, `pairs_per_batch`, `learning_rate` and `weight_decay`.
    """

    def quality(rows: Tensor, step: int) -> Tensor:
        draw = step % len(features.corrupted)  # one draw of corruptions per step, in turn
        inputs = [features.rows, *features.styled, features.corrupted[draw]]
        offsets = [words.rows, *words.styled, words.corrupted[draw]]
        logits = voters(torch.cat([m[rows] for m in inputs])) + torch.cat([m[rows] for m in offsets])
        # In the order of `inputs`: the rows, a copy in each style, the corrupted copy.
        plain, *styled, corrupted = logits.split(len(rows))
        total = _bce(plain, labels[rows].unsqueeze(1).expand_as(plain))
        # Even rows are the worse halves: this falls as the better half rises above them.
        total = total + 0.5 * _softplus(plain[::2] - plain[1::2]).mean()
        for other in styled:
            shift = other - plain
            total = total + consistency / len(styled) * (shift.square().mean() / 4 + shift.mean(dim=0).square().mean())
        return total + margin_weight * _softplus(1 - (plain - corrupted)).mean()

    return _descend(voters, quality, len(labels) // 2, **schedule)


def fit_integrity(features: Copies, voters: Voters, pairs: int, **schedule: Any) -> Voters:
    """Fit integrity: rows of any label or style against corrupted copies, by class and by a margin over their own copy.

    `features` are scaled, (rows, width) each; `schedule` is the same as in [`fit_quality`].
    """

    def integrity(rows: Tensor, step: int) -> Tensor:
        styled = features.styled[step % len(features.styled)]
        corrupted = features.corrupted[step % len(features.corrupted)]
        plain, other, broken = voters(torch.cat([m[rows] for m in (features.rows, styled, corrupted)])).split(len(rows))
        # Logit > 0 for an intact row; a restyled copy counts less, a corrupted one must fall below 0.
        total = _softplus(-plain).mean() + 0.3 * _softplus(-other).mean() + _softplus(broken).mean()
        return total + _softplus(3 - (plain - broken)).mean()

    return _descend(voters, integrity, pairs, **schedule)


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
    """Minimise a loss of (rows, step) with AdamW and a one-cycle learning rate, in batches of pairs.

    The progress bar shows the name of the loss, which is that of the part of the head.
    """
    optimiser = torch.optim.AdamW(voters.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-pairs // pairs_per_batch)
    # One more than the steps taken: the scheduler is also stepped after the last one.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps + 1)
    voters.train()
    step = 0
    with tqdm(total=steps, desc=f"Fitting {loss_of.__name__}", unit=" batches") as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(pairs).split(pairs_per_batch):
                # Pairs are shuffled, never split: the loss compares the two halves.
                rows = torch.stack([2 * chosen, 2 * chosen + 1], dim=1).flatten()
                loss = loss_of(rows, step)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                step += 1
                bar.update()
    return voters.eval()
