"""Fit a head that judges by parts on rated rows, pairs, restyled and corrupted copies.

Does: for a `PartsHead`, its fork included, group rows into units that share a batch, draw copies, compute the states below
the fork, descend, and average the last weights; for a `KernelHead`, solve for the weights of the rows that it keeps.
Does not: read files, choose settings, or evaluate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from datasets.utils import tqdm
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, smooth_l1_loss, softplus

from car_datasets.scoring.batching import CPU_BUDGET, Tokens, pad, token_batches
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.heads import FAULTS, OUTPUTS, UNITS, Judge, KernelHead, PartsHead, likeness
from car_datasets.scoring.iqs.layers import segment_features

SOUNDNESS, WORTH, PRODUCT, EXPERT, INTACT = range(len(OUTPUTS))
SORTED_BATCHES = 12  # batches whose rows are sorted by length together, which saves padding and keeps the order random
GAPS = {"soundness": 1.0, "worth": 1.0, "product": 4.0}  # least difference of two ratings that should show in the order
LEAST_SOUND = 3.0  # a row below it is worthless itself: its corrupted copy need not be much worse
AVERAGED = 0.3  # share of the last steps whose weights are averaged, every fourth of them
# Of a kernel: every n-th row brings a restyled copy, and every n-th a coarsely corrupted one.
STYLED_EVERY, CORRUPTED_EVERY = 6, 8
BROKEN_SOUNDNESS, USUAL_WORTH = 4.0, 3.0  # the most of a corrupted copy; of rows whose worth nobody has rated
LENGTH_AXES = 0.1  # of the two lengths, in standard deviations; the principal axes have nearly nothing of them


class Copy(NamedTuple):
    """A changed copy of a row: the number of its text, and how much a corrupted one is to fall, from 0 to 1."""

    text: int
    weight: float = 1.0


@dataclass(frozen=True)
class Examples:
    """The texts and labels that a head is fitted on; row i is text i, and the copies come after the rows.

    Args:
        tokens ([`~car_datasets.scoring.batching.Tokens`]): of all texts.
        soundness, worth (`(rows,)` float32): ratings, NaN where unknown.
        fault (`(rows,)` int64): index in `FAULTS`, -1 where unknown.
        expert (`(rows,)` float32): 1 for a revision, 0 for what was revised, NaN for others.
        partner (`(rows,)` int64): the other half of the pair, or -1.
        styled, corrupted (`list[list[Copy]]`): copies of each row, of which one is drawn whenever the row is read.
    """

    tokens: Tokens
    soundness: npt.NDArray[np.float32]
    worth: npt.NDArray[np.float32]
    fault: npt.NDArray[np.int64]
    expert: npt.NDArray[np.float32]
    partner: npt.NDArray[np.int64]
    styled: Sequence[Sequence[Copy]]
    corrupted: Sequence[Sequence[Copy]]

    def units(self, rows: npt.NDArray[np.int64]) -> list[tuple[int, ...]]:
        """Return these rows in units that share a batch: pairs, worse half first, and single rows."""
        chosen = set(rows.tolist())
        paired = {int(i) for i in rows if self.partner[i] in chosen}
        pairs = [(i, int(self.partner[i])) for i in sorted(paired) if self.expert[i] == 0]
        return [*pairs, *((int(i),) for i in rows if int(i) not in paired)]


class Weights(NamedTuple):
    """Weights of the terms of the loss; soundness has 1.

    Args:
        rank: order of two rows of a batch by each rating.
        fault, worth, product, expert: of the other outputs.
        style, style_expert: penalty on a shift by a change of style, of the ratings and of the expert's logit.
        corruption: margin between a row and its corrupted copy.
    """

    rank: float
    fault: float
    worth: float
    product: float
    expert: float
    style: float
    style_expert: float
    corruption: float


class Schedule(NamedTuple):
    """The optimisation: AdamW with a warm-up over a tenth of the steps and a cosine to nearly 0."""

    epochs: int
    units_per_batch: int
    learning_rate: float
    head_learning_rate: float
    layerwise_decay: float
    weight_decay: float


class _Batch(NamedTuple):
    """Rows of one step, their drawn copies, and the place in `rows` of the row that each copy is of."""

    rows: npt.NDArray[np.int64]
    styled: list[Copy]
    styled_of: list[int]
    corrupted: list[Copy]
    corrupted_of: list[int]


def fit_parts(
    head: PartsHead,
    below: Callable[[Sequence[int]], tuple[Tensor, Tensor, Tensor]],
    examples: Examples,
    rows: npt.NDArray[np.int64],
    weights: Weights,
    schedule: Schedule,
    seed: int,
) -> None:
    """Fit a head in place.

    Args:
        head ([`PartsHead`]): on its device, with the fork already copied from the encoder.
        below (`Callable`): a function of numbers of texts that returns states below the fork, mask and answer starts.
        examples ([`Examples`]): all rows.
        rows (`(n,)` int64): the rows to fit on.
        weights ([`Weights`]), schedule ([`Schedule`]): loss and optimisation.
        seed (`int`): of the order and the copies; dropout follows torch's generator.
    """
    rng = np.random.default_rng(seed)
    units = examples.units(rows)
    steps = schedule.epochs * -(-len(units) // schedule.units_per_batch)
    optimiser = torch.optim.AdamW(_groups(head, schedule), betas=(0.9, 0.98), weight_decay=schedule.weight_decay)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    parameters = [weight for weight in head.parameters() if weight.requires_grad]
    means: list[Tensor] = []
    counted = 0
    head.train()
    with tqdm(total=steps, desc="Fitting parts", unit=" batches") as bar:
        for step, batch in enumerate(_batches(examples, units, schedule, rng)):
            copies = [copy.text for copy in (*batch.styled, *batch.corrupted)]
            loss = parts_loss(head(*below([*batch.rows.tolist(), *copies])), batch, examples, weights)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            rates.step()
            if step >= (1 - AVERAGED) * steps and step % 4 == 0:
                counted += 1
                with torch.no_grad():
                    if not means:
                        means = [weight.detach().clone() for weight in parameters]
                    for mean, weight in zip(means, parameters, strict=True):
                        mean += (weight - mean) / counted
            bar.update()
    with torch.no_grad():
        for mean, weight in zip(means, parameters, strict=bool(means)):
            weight.copy_(mean)
    head.eval()


def _rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(1.0, 0.1 * steps))
    return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps))))


def _groups(head: PartsHead, schedule: Schedule) -> list[dict[str, Any]]:
    """Return the parameters with their learning rates: each layer of the fork learns slower than the one above it."""
    top = len(head.fork) - 1
    groups: list[dict[str, Any]] = [
        {"params": list(layer.parameters()), "lr": schedule.learning_rate * schedule.layerwise_decay ** (top - i)}
        for i, layer in enumerate(head.fork)
    ]
    own = [weight for name, weight in head.named_parameters() if not name.startswith("fork.")]
    return [*groups, {"params": own, "lr": schedule.head_learning_rate}]


def _batches(
    examples: Examples, units: Sequence[tuple[int, ...]], schedule: Schedule, rng: np.random.Generator
) -> Iterator[_Batch]:
    """Yield the batches of all epochs: units of similar length, in random order, with freshly drawn copies."""
    size = schedule.units_per_batch
    length = np.array([max(examples.tokens.lengths[i] for i in unit) for unit in units])
    for _ in range(schedule.epochs):
        order = rng.permutation(len(units))
        parts: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), size * SORTED_BATCHES):
            part = order[start : start + size * SORTED_BATCHES]
            part = part[np.argsort(length[part], kind="stable")]
            parts += [part[at : at + size] for at in range(0, len(part), size)]
        for number in rng.permutation(len(parts)):
            rows = np.array([i for unit in parts[number] for i in units[unit]])
            drawn = [_draw(examples.styled, rows, rng), _draw(examples.corrupted, rows, rng)]
            yield _Batch(rows, *drawn[0], *drawn[1])


def _draw(
    copies: Sequence[Sequence[Copy]], rows: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[list[Copy], list[int]]:
    """Draw a copy of every row that has one; return the copies and the places of their rows."""
    places = [place for place, row in enumerate(rows.tolist()) if copies[row]]
    owned = [copies[row] for row in rows.tolist() if copies[row]]
    return [of_row[int(rng.integers(len(of_row)))] for of_row in owned], places


def parts_loss(outputs: Tensor, batch: _Batch, examples: Examples, weights: Weights) -> Tensor:
    """Return the loss of one batch; `outputs` (texts, members, outputs) are of its rows, then of its copies."""
    plain, styled, corrupted = outputs.split([len(batch.rows), len(batch.styled), len(batch.corrupted)])
    total = _ratings_loss(plain, batch.rows, examples, weights) + weights.expert * _expert_loss(plain, batch, examples)
    # Intact are the rows and, less surely, what was restyled.
    total = total + 0.5 * softplus(-plain[..., INTACT]).mean()
    if batch.styled:
        shift = styled - plain[batch.styled_of]
        rated, expert = shift[..., : len(UNITS)], shift[..., EXPERT]
        total = total + weights.style * (2 * rated.square().mean() + 4 * rated.mean(dim=0).square().mean())
        total = total + weights.style_expert * (expert.square().mean() / 4 + expert.mean(dim=0).square().mean())
        total = total + 0.3 * softplus(-styled[..., INTACT]).mean()
    if batch.corrupted:
        total = total + _corruption_loss(plain, corrupted, batch, examples, weights)
    return total


def _ratings_loss(plain: Tensor, rows: npt.NDArray[np.int64], examples: Examples, weights: Weights) -> Tensor:
    total = plain.sum() * 0
    sound, worth = examples.soundness[rows], examples.worth[rows]
    # Half the weight for the order by worth and product, which fewer rows have.
    for name, target, weight, rank in (
        ("soundness", sound, 1.0, 1.0),
        ("worth", worth, weights.worth, 0.5),
        ("product", sound * worth, weights.product, 0.5),
    ):
        at = np.flatnonzero(~np.isnan(target))
        if not len(at):
            continue
        mean, scale = UNITS[name]
        given = torch.from_numpy((target[at] - mean) / scale).to(plain)
        found = plain[at][..., OUTPUTS.index(name)]
        total = total + weight * smooth_l1_loss(found, given[:, None].expand_as(found))
        total = total + weight * rank * weights.rank * order_loss(found, given, GAPS[name] / scale)
    known = np.flatnonzero(examples.fault[rows] >= 0)
    if len(known):
        fault = torch.from_numpy(examples.fault[rows[known]]).to(plain.device)
        logits = plain[known][..., len(OUTPUTS) :].reshape(-1, len(FAULTS))
        total = total + weights.fault * cross_entropy(logits, fault.repeat_interleave(plain.shape[1]))
    return total


def order_loss(found: Tensor, given: Tensor, gap: float) -> Tensor:
    """Return the mean logistic loss over pairs of rows whose ratings differ by `gap` or more.

    Args:
        found (`Tensor` of shape `(rows, members)`): outputs.
        given (`Tensor` of shape `(rows,)`): ratings.
        gap (`float`): in the unit of the ratings.
    """
    counts = (given[:, None] - given[None]) >= gap - 1e-6
    loss = softplus(found[None] - found[:, None]).mean(dim=2)
    return (loss * counts).sum() / counts.sum().clamp(min=1)


def _expert_loss(plain: Tensor, batch: _Batch, examples: Examples) -> Tensor:
    labels = examples.expert[batch.rows]
    at = np.flatnonzero(~np.isnan(labels))
    if not len(at):
        return plain.sum() * 0
    logits = plain[at][..., EXPERT]
    given = torch.from_numpy(labels[at]).to(plain)
    total = binary_cross_entropy_with_logits(logits, given[:, None].expand_as(logits))
    # The halves of a pair are neighbours, the worse one first.
    worse = np.flatnonzero(examples.partner[batch.rows[:-1]] == batch.rows[1:])
    if len(worse):
        total = total + 1.5 * softplus(plain[worse][..., EXPERT] - plain[worse + 1][..., EXPERT]).mean()
    return total


def _corruption_loss(plain: Tensor, corrupted: Tensor, batch: _Batch, examples: Examples, weights: Weights) -> Tensor:
    rows = batch.rows[batch.corrupted_of]
    fall = torch.tensor([copy.weight for copy in batch.corrupted]).to(plain)[:, None, None]
    # Not of a row that is worthless itself; NaN, of rows without a rating, counts as sound.
    worthless = torch.from_numpy(examples.soundness[rows] < LEAST_SOUND).to(plain.device)
    weight = fall * torch.where(worthless, 0.3, 1.0)[:, None, None]
    gap = (plain[batch.corrupted_of] - corrupted)[..., [SOUNDNESS, PRODUCT, EXPERT, INTACT]]
    # A steep softplus: nearly no loss beyond the margin.
    total = weights.corruption * 0.5 * (softplus(4 * (fall - gap)) * weight).mean()
    return total + 0.5 * (softplus(corrupted[..., INTACT]) * fall[..., 0]).mean()


def outputs_of(
    head: Judge,
    below: Callable[[Sequence[int]], tuple[Tensor, ...]],
    lengths: Sequence[int],
    texts: Sequence[int],
    budget: int,
) -> Tensor:
    """Return what a head says of texts, (texts, members, outputs), on the CPU; `budget` tokens in one pass."""
    found: Tensor | None = None
    for places in token_batches([lengths[i] for i in texts], budget):
        with torch.inference_mode():
            outputs = head(*below([texts[i] for i in places])).cpu()
        if found is None:
            found = torch.empty((len(texts), *outputs.shape[1:]))
        found[places] = outputs
    assert found is not None  # the caller passes texts
    return found


class Below:
    """The states below the fork of texts, computed whenever they are needed, as all of them would not fit.

    Args:
        encoder (`nn.Module`): a `BertModel` without the layers above the fork, frozen.
        tokens ([`~car_datasets.scoring.batching.Tokens`]): of all texts.
        pad_id (`int`): of the tokenizer.
    """

    def __init__(self, encoder: torch.nn.Module, tokens: Tokens, pad_id: int) -> None:
        self.encoder, self.tokens, self.pad_id = encoder, tokens, pad_id
        self.device = next(encoder.parameters()).device

    def __call__(self, texts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return states (texts, tokens, units), mask (texts, tokens) and answer starts (texts,)."""
        input_ids, mask = pad([self.tokens.ids[i] for i in texts], self.pad_id, self.device)
        with torch.no_grad():
            states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        start = torch.tensor([self.tokens.answer_starts[i] for i in texts], device=self.device)
        return states, mask, start


class Pooled:
    """The pooled states of texts, computed once and kept in half precision: what a `KernelHead` reads.

    Args:
        encoder (`nn.Module`): a complete `BertModel`, frozen.
        tokens ([`~car_datasets.scoring.batching.Tokens`]): of all texts.
        pad_id (`int`): of the tokenizer.
        dtype (`str`): of the encoder's products, `"float32"` or `"bfloat16"`. The states are pooled in float32.
    """

    def __init__(self, encoder: torch.nn.Module, tokens: Tokens, pad_id: int, dtype: str = "float32") -> None:
        self.encoder, self.tokens, self.pad_id = encoder, tokens, pad_id
        self.device = next(encoder.parameters()).device
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._known: dict[int, Tensor] = {}

    def __call__(self, texts: Sequence[int]) -> tuple[Tensor]:
        """Return [`segment_features`] of texts, (texts, width), on the device of the encoder."""
        new = [i for i in texts if i not in self._known]
        lengths = [len(self.tokens.ids[i]) for i in new]
        with tqdm(total=len(new), desc="Encoding", unit=" texts", disable=len(new) < 1000) as bar:
            half = self.dtype != torch.float32
            for places in token_batches(lengths, CPU_BUDGET):
                batch = [new[place] for place in places]
                input_ids, mask = pad([self.tokens.ids[i] for i in batch], self.pad_id, self.device)
                start = torch.tensor([self.tokens.answer_starts[i] for i in batch], device=self.device)
                with torch.inference_mode():
                    with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
                        states = self.encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True)
                    found = segment_features(states.hidden_states, mask, start).half().cpu()
                self._known |= zip(batch, found, strict=True)
                bar.update(len(batch))
        return (torch.stack([self._known[i] for i in texts]).to(self.device).float(),)


def fit_kernel(
    config: IQSConfig, pooled: Pooled, examples: Examples, rows: npt.NDArray[np.int64], noise: float
) -> KernelHead:
    """Return a head that keeps rows and some of their copies, and weighs each of them by kernel ridge regression.

    Args:
        config ([`IQSConfig`]): its first hidden size is the number of axes; the second one is set to the number of texts.
        pooled ([`Pooled`]): gives the pooled states of texts.
        examples ([`Examples`]): all rows.
        rows (`(n,)` int64): the rows to fit on.
        noise (`float`): of the targets, by the variance of the kernel: more of it makes the head smoother.
    """
    texts, targets = _kernel_targets(examples, rows)
    config.hidden_sizes[1] = len(texts)
    head, (features,) = KernelHead(config), pooled(texts)
    plain = features[: len(rows)]
    head.mean, head.scale = plain.mean(dim=0).cpu(), plain.std(dim=0).cpu() + 1e-3
    scaled = ((features.cpu() - head.mean) / head.scale).clamp_(-6, 6)
    head.axes = _axes(scaled[: len(rows)], config.hidden_sizes[0])
    head.kept = (scaled @ head.axes).half().float()  # as it is saved
    kernel = likeness(head.kept, head.kept)
    known = ~np.isnan(targets)
    head.bias[INTACT] = 6.0  # nothing is lost to `penalty`: broken copies already have low ratings
    for column in range(targets.shape[1]):
        at = np.flatnonzero(known[:, column])
        if (known[:, :column] == known[:, column : column + 1]).all(axis=0).any() or not len(at):
            continue  # solved with an earlier column that the same texts have
        alike = np.flatnonzero((known == known[:, column : column + 1]).all(axis=0))
        given = torch.from_numpy(targets[np.ix_(at, alike)])
        head.bias[alike] = given.mean(dim=0)
        inside = kernel[np.ix_(at, at)]
        inside.diagonal().add_(noise)
        solved = torch.cholesky_solve(given - given.mean(dim=0), torch.linalg.cholesky(inside))
        head.duals[torch.from_numpy(at)[:, None], torch.from_numpy(alike)] = solved
    return head.eval()


def _kernel_targets(examples: Examples, rows: npt.NDArray[np.int64]) -> tuple[list[int], npt.NDArray[np.float32]]:
    """Return the texts to keep, rows first, and their targets, (texts, outputs) with NaN where unknown."""
    texts, targets = rows.tolist(), [_targets_of(examples, int(row)) for row in rows]
    chosen = set(texts)
    rng = np.random.default_rng(0)  # a row brings the same copies into every fold
    for row in range(len(examples.soundness)):
        coarse = [copy for copy in examples.corrupted[row] if copy.weight == 1]
        if row % STYLED_EVERY == 0 and examples.styled[row]:
            copy = examples.styled[row][int(rng.integers(len(examples.styled[row])))]
            if row in chosen:
                texts.append(copy.text)
                targets.append(_targets_of(examples, row))
                targets[-1][EXPERT] = np.nan  # which is about style in part
        if row % CORRUPTED_EVERY == 1 and coarse:
            copy = coarse[int(rng.integers(len(coarse)))]
            if row in chosen:
                texts.append(copy.text)
                targets.append(_broken_targets(examples, row))
    return texts, np.stack(targets)


def _broken_targets(examples: Examples, row: int) -> npt.NDArray[np.float32]:
    found = np.full(len(OUTPUTS) + len(FAULTS), np.nan, dtype=np.float32)
    sound = np.fmin(examples.soundness[row], BROKEN_SOUNDNESS)
    worth = USUAL_WORTH if np.isnan(examples.worth[row]) else examples.worth[row]
    for name, value in (("soundness", sound), ("product", sound * worth)):
        found[OUTPUTS.index(name)] = (value - UNITS[name][0]) / UNITS[name][1]
    if not np.isnan(examples.expert[row]):
        found[EXPERT] = 0.0
    return found


def _targets_of(examples: Examples, row: int) -> npt.NDArray[np.float32]:
    found = np.full(len(OUTPUTS) + len(FAULTS), np.nan, dtype=np.float32)
    rated = {"soundness": examples.soundness[row], "worth": examples.worth[row]}
    rated["product"] = rated["soundness"] * rated["worth"]
    for name, value in rated.items():
        found[OUTPUTS.index(name)] = (value - UNITS[name][0]) / UNITS[name][1]
    found[EXPERT] = examples.expert[row]
    if examples.fault[row] >= 0:
        found[len(OUTPUTS) :] = np.arange(len(FAULTS)) == examples.fault[row]
    return found


def _axes(scaled: Tensor, size: int) -> Tensor:
    """Return principal axes, and the two lengths, as a matrix (width, size) on which rows have the mean square 1."""
    _, _, axes = torch.svd_lowrank(scaled, q=min(size - 2, *scaled.shape), niter=2)
    axes = axes / (scaled @ axes).square().sum(dim=1).mean().sqrt()
    lengths = torch.zeros(scaled.shape[1], 2)
    lengths[-2:] = torch.eye(2) * LENGTH_AXES
    joined = torch.zeros(scaled.shape[1], size)
    joined[:, : axes.shape[1] + 2] = torch.cat([axes, lengths], dim=1)
    return joined.half().float()  # as it is saved
