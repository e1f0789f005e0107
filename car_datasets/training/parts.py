"""Train a scorer with parts: expert, soundness and worth on one pass, with a fork of the encoder's top layers.

Does: check settings and files before training; make restyled and corrupted copies; fit a head per seed and, on request,
per fold; place the score on the scale of a reference pool; write configuration, weights, figures and card.
Does not: change the encoder that embeds, or choose which score is the default.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from car_datasets.loading.templates import CLEAN_TEMPLATE, Exchange, render
from car_datasets.scoring.batching import CPU_BUDGET, tokenise
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig, check_languages
from car_datasets.scoring.iqs.heads import COMBINED, KNOTS, OUTPUTS, UNITS, Judge, PartsHead
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.training.corruptions import FINE_CORRUPTIONS, FINE_STYLES, STYLES, corrupt, draw_corruptions
from car_datasets.training.evaluation import evaluate_scorer
from car_datasets.training.head import (
    CORRUPTION_WEIGHTS,
    config_of,
    each_seed,
    load_encoder,
    load_tokenizer,
    over_runs,
    over_seeds,
    save_head,
)
from car_datasets.training.pairs import Pair, cleaned, groups_of, question, read_sides
from car_datasets.training.parts_fitting import (
    Below,
    Copy,
    Examples,
    Pooled,
    Schedule,
    Weights,
    fit_kernel,
    fit_parts,
    outputs_of,
)
from car_datasets.training.ratings import Ratings, rating_figures, read_ratings, told_apart
from car_datasets.training.train import deterministic
from car_datasets.utils.files import write_figures, write_folder
from car_datasets.utils.hub import write_card
from car_datasets.utils.processes import device_for
from car_datasets.utils.settings import Settings

logger = logging.getLogger(__name__)

FINE_WEIGHT = 0.4  # margin and weight of a fine corruption; a coarse one has 1
MOST_REFERENCE_ROWS = 1000  # of the pool that the scale of the score comes from


@dataclass(frozen=True)
class PartsTraining(Settings):
    """The settings of [`train_parts`].

    Args:
        train, valid (`str`): files of pairs, as for the head of the embedded scorer.
        ratings, valid_ratings (`str`): files of ratings of single rows; see
            [`~car_datasets.training.ratings.read_ratings`].
        output (`str`): a new folder for the model.
        seed (`int`), seeds (`int`): train with the seeds `seed`, `seed + 1`, ... The first model is kept; the card shows
            the figures of all. Equal seeds give equal files on one kind of machine.
        folds (`int`): also cross-validate over the rows of all files in this many folds, with every seed; 0 does not.
        fork_layers (`int`): top layers of the encoder that are copied and trained.
        fork_dropout, dropout (`float`): dropout in the fork and in the members.
        queries, members, hidden_size (`int`): pooling queries, networks that vote, and their hidden units.
        max_tokens (`int`): tokens read of a text.
        epochs, units_per_batch (`int`): passes over the data, and pairs or single rows per step.
        axes (`int`): 0 trains a fork. Otherwise the head is a `KernelHead` on this many axes of the frozen encoder's pooled
            states, and of the keys above and below only the files, seeds, folds, `max_tokens`, `corruption_draws`,
            `combination` and `penalty` apply.
        dtype (`str`): with `axes`: of the encoder's products, `"float32"` or `"bfloat16"`, three times as fast on CPUs
            that have it; the pooled states are float32.
        noise (`float`): with `axes`: of the ratings, by the variance of the kernel; more makes the head smoother.
        learning_rate, head_learning_rate (`float`): of the fork's top layer and of the rest of the head.
        layerwise_decay, weight_decay (`float`): ratio of a layer's learning rate to that of the layer above; of AdamW.
        rank_weight, fault_weight, worth_weight, product_weight, expert_weight, style_weight, expert_style_weight,
            corruption_weight (`float`): weights of the terms of the loss; regression on soundness has 1.
        corruption_draws (`int`): coarse corrupted copies per row.
        combination (`list[float]`): weights of soundness, worth, their product and expert in the score.
        penalty (`float`): the most that a broken answer loses, in the unit of the combination.
        languages (`list[str]`): codes of the languages that the head is made for. The encoder reads English.
    """

    kind: str = "parts"
    train: str = "expert_score_train.csv"
    valid: str = "expert_score_valid.csv"
    ratings: str = "ratings_train.csv"
    valid_ratings: str = "ratings_valid.csv"
    output: str = "iqs-parts"
    seed: int = 0
    seeds: int = 1
    folds: int = 0
    fork_layers: int = 3
    fork_dropout: float = 0.1
    dropout: float = 0.3
    queries: int = 4
    members: int = 4
    hidden_size: int = 64
    max_tokens: int = 512
    axes: int = 0
    noise: float = 0.5
    dtype: str = "float32"
    epochs: int = 8
    units_per_batch: int = 48
    learning_rate: float = 2e-4
    head_learning_rate: float = 1e-3
    layerwise_decay: float = 0.9
    weight_decay: float = 0.02
    rank_weight: float = 1.0
    fault_weight: float = 0.3
    worth_weight: float = 1.0
    product_weight: float = 1.0
    expert_weight: float = 0.5
    style_weight: float = 1.0
    expert_style_weight: float = 0.3
    corruption_weight: float = 1.0
    corruption_draws: int = 4
    combination: list[float] = field(default_factory=lambda: [0.0, 0.0, 1.0, 0.0])
    penalty: float = 2.0
    languages: list[str] = field(default_factory=lambda: ["en"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "parts":
            raise ValueError(f"kind={self.kind!r}: PartsTraining takes kind='parts' only.")
        self.refuse_outside(1, None, "seeds", "members", "hidden_size", "epochs", "units_per_batch", "corruption_draws")
        self.refuse_outside(3, 512, "max_tokens")
        self.refuse_outside(0, 6, "fork_layers")
        self.refuse_outside(0, 2048, "axes")
        self.refuse_outside(
            0, None, "seed", "folds", "queries", "weight_decay", "penalty", "rank_weight", "fault_weight"
        )
        self.refuse_outside(0, None, "worth_weight", "product_weight", "expert_weight", "style_weight")
        self.refuse_outside(0, None, "expert_style_weight", "corruption_weight")
        self.refuse_outside(1e-9, None, "learning_rate", "head_learning_rate", "noise")
        self.refuse_outside(0, 0.99, "dropout", "fork_dropout")
        self.refuse_outside(0, 1, "layerwise_decay")
        numbers = [value for value in self.combination if type(value) in (int, float)]
        if len(numbers) != len(COMBINED) or len(numbers) < len(self.combination) or not any(numbers):
            raise ValueError(
                f"combination={self.combination} must be {len(COMBINED)} numbers, not all 0: the weights of "
                f"{', '.join(COMBINED)}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not known; choose float32 or bfloat16.")
        if self.axes and (self.fork_layers or self.axes < 3):
            raise ValueError(
                f"axes={self.axes} with fork_layers={self.fork_layers}: a kernel reads the encoder as it is, on at least 3 "
                "axes, two of them for the lengths. Set fork_layers=0, or axes=0 for a fork."
            )
        if self.folds == 1:
            raise ValueError("folds=1 leaves nothing to train on; 0 does not cross-validate.")
        check_languages(self.languages)


class Files(NamedTuple):
    """What the files hold: pairs and ratings to train on and to validate on."""

    pairs: list[Pair]
    valid: list[Pair]
    ratings: Ratings
    valid_ratings: Ratings


class Material(NamedTuple):
    """Texts and labels, how many of the rows are training rows, the reference pool, and what computes the states.

    Args:
        examples ([`Examples`]): the rows of training, then those of validation, then copies and reference rows.
        training (`int`): rows of training, which come first.
        groups (`(rows,)` int64): rows with one number ask the same, or are a pair.
        reference (`range`): texts of the pool that the scale comes from.
        below ([`Below`] or [`Pooled`]): computes what the head reads.
    """

    examples: Examples
    training: int
    groups: npt.NDArray[np.int64]
    reference: range
    below: Below | Pooled


def train_parts(settings: PartsTraining) -> dict[str, Any]:
    """Train the scorer and write configuration, weights, figures and card into `settings.output`.

    Returns:
        `dict`: the figures of [`evaluate_scorer`] on `valid`, with `ratings`, those on `valid_ratings`, `seeds`, their
        spread, `training_rows`, and `cross_validation` if there are folds.

    Raises:
        ValueError: the folder exists, a file cannot be read, or training and validation share questions; raised before
            training.
    """
    folder = Path(settings.output)
    if folder.exists():
        raise ValueError(f"output={settings.output!r} already exists; name a new folder.")
    files = read_files(settings)
    with deterministic():
        return _fit_and_write(settings, gather(settings, files), files)


def read_files(settings: PartsTraining) -> Files:
    """Read all files; leave out training rows whose question is in a validation file.

    Raises:
        ValueError: a file cannot be read, or training and validation pairs share questions.
    """
    train, valid = read_sides(settings.train, settings.valid)
    ratings, valid_ratings = read_ratings(settings.ratings), read_ratings(settings.valid_ratings)
    # Not an error: a pool that was rated may well contain a few questions of the validation files.
    asked = {question(row) for row in (*(row for pair in valid for row in pair), *valid_ratings.rows)}
    kept = ratings.without(asked)
    pairs = [pair for pair in train if not any(question(row) in asked for row in pair)]
    dropped = len(ratings.rows) - len(kept.rows)
    if dropped or len(pairs) < len(train):
        logger.info(
            "%d rated rows and %d pairs are left out: a validation file asks the same.",
            dropped,
            len(train) - len(pairs),
        )
    return Files(pairs, valid, kept, valid_ratings)


class _Labelled:
    """Rows with all that is known of each, merged where a rated row is also half of a pair."""

    def __init__(self) -> None:
        self.rows: list[Exchange] = []
        self.labels: list[dict[str, float]] = []
        self._at: dict[Exchange, int] = {}

    def add_pairs(self, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            halves = [cleaned(row) for row in pair]
            if not all(row.response for row in halves):  # an empty answer is a corruption of its own
                continue
            first = len(self.rows)
            for at, row in enumerate(halves):
                self._add(row, expert=float(at), partner=float(first + 1 - at))

    def add_ratings(self, ratings: Ratings) -> None:
        for i, row in enumerate(map(cleaned, ratings.rows)):
            if not row.response:
                continue
            known = self._at.get(row)
            at = self._add(row) if known is None or "soundness" in self.labels[known] else known
            self.labels[at] |= {"soundness": float(ratings.soundness[i]), "fault": float(ratings.fault[i])}
            self.labels[at] |= {"worth": float(ratings.worth[i])}

    def _add(self, row: Exchange, **labels: float) -> int:
        self._at.setdefault(row, len(self.rows))
        self.rows.append(row)
        self.labels.append(labels)
        return len(self.rows) - 1

    def column(self, name: str, missing: float = np.nan) -> npt.NDArray[np.float32]:
        return np.array([labels.get(name, missing) for labels in self.labels], dtype=np.float32)


def gather(settings: PartsTraining, files: Files) -> Material:
    """Return texts, labels and copies of all rows, tokenised."""
    labelled = _Labelled()
    labelled.add_pairs(files.pairs)
    labelled.add_ratings(files.ratings)
    training = len(labelled.rows)
    if settings.folds:  # else nothing is trained on them
        labelled.add_pairs(files.valid)
        labelled.add_ratings(files.valid_ratings)
    rows = labelled.rows
    texts = [*rows]
    styled: list[list[Copy]] = [[] for _ in rows]
    corrupted: list[list[Copy]] = [[] for _ in rows]
    for into, copies, weight in _copies(rows, settings.corruption_draws):
        for i, copy in enumerate(copies):
            if copy is not None:
                (styled if into == "styled" else corrupted)[i].append(Copy(len(texts), weight))
                texts.append(copy)
    reference = range(len(texts), len(texts) + len(pool := _reference(settings, files)))
    rendered = [render(row, CLEAN_TEMPLATE) for row in (*texts, *pool)]
    encoder, tokenizer = _lower_encoder(settings)
    # The answer begins after the question and one space.
    tokens = tokenise(
        tokenizer, [t.whole for t in rendered], settings.max_tokens, [len(t.question) + 1 for t in rendered]
    )
    examples = Examples(
        tokens=tokens,
        soundness=labelled.column("soundness"),
        worth=labelled.column("worth"),
        fault=labelled.column("fault", -1).astype(np.int64),
        expert=labelled.column("expert"),
        partner=labelled.column("partner", -1).astype(np.int64),
        styled=styled,
        corrupted=corrupted,
    )
    pad_id = tokenizer.pad_token_id
    below = Pooled(encoder, tokens, pad_id, settings.dtype) if settings.axes else Below(encoder, tokens, pad_id)
    return Material(examples, training, groups_of(rows, examples.partner), reference, below)


def _copies(rows: Sequence[Exchange], draws: int) -> list[tuple[str, Sequence[Exchange | None], float]]:
    """Return restyled and corrupted copies of the rows, with the weight of each kind."""
    styles = [("styled", corrupt(kind, rows, 0, "train"), 1.0) for kind in (*STYLES, *FINE_STYLES)]
    coarse = [("corrupted", draw_corruptions(rows, seed, CORRUPTION_WEIGHTS), 1.0) for seed in range(draws)]
    fine = [("corrupted", corrupt(kind, rows, 0, "train"), FINE_WEIGHT) for kind in FINE_CORRUPTIONS]
    return [*styles, *coarse, *fine]


def _reference(settings: PartsTraining, files: Files) -> list[Exchange]:
    """Return the pool that the scale comes from: rows of the rated files that nothing is trained on, if there are any."""
    trained = {row for pair in files.pairs for row in map(cleaned, pair)}
    unseen = [row for row in map(cleaned, files.ratings.unrated) if row.response and row not in trained]
    if len(unseen) < KNOTS:
        logger.warning(
            "Only %d rows of the rated files are not trained on; the scale comes from rated rows.", len(unseen)
        )
        unseen = [row for row in map(cleaned, files.ratings.rows) if row.response]
    chosen = np.random.default_rng(settings.seed).permutation(len(unseen))[:MOST_REFERENCE_ROWS]
    return [unseen[i] for i in sorted(chosen)]


def _lower_encoder(settings: PartsTraining) -> tuple[Any, Any]:
    """Return the encoder without the layers that are copied, frozen, on the device of this process, and its tokenizer."""
    encoder = load_encoder()
    encoder.encoder.layer = encoder.encoder.layer[: len(encoder.encoder.layer) - settings.fork_layers]
    for weight in encoder.parameters():
        weight.requires_grad_(False)
    return encoder.to(device_for()), load_tokenizer()


def fit_head(settings: PartsTraining, material: Material, rows: npt.NDArray[np.int64]) -> Judge:
    """Fit a head on some rows, by the seed of the settings, and give its score the scale of the reference pool."""
    torch.manual_seed(settings.seed)  # all random numbers below follow from it
    below = material.below
    if isinstance(below, Pooled):
        head: Judge = fit_kernel(_config(settings), below, material.examples, rows, settings.noise)
    else:
        head = _fit_fork(settings, below, material.examples, rows)
    head.weights.copy_(torch.tensor(settings.combination))
    pool = head.unscaled(_outputs(head, material, list(material.reference)).to(head.weights.device)).mean(dim=1)
    # Distinct knots, or a step of the scale would have no width.
    knots = torch.quantile(pool, torch.linspace(0, 1, KNOTS, device=pool.device))
    head.knots.copy_(knots + torch.arange(KNOTS, device=pool.device) * 1e-6)
    return head.cpu()


def _fit_fork(settings: PartsTraining, below: Below, examples: Examples, rows: npt.NDArray[np.int64]) -> PartsHead:
    """Fit a head with a fork on some rows; it stays on the device of the encoder."""
    head = PartsHead(_config(settings))
    for copy, layer in zip(head.fork, load_encoder().encoder.layer[head.lower :], strict=True):
        copy.copy_from(layer)
    head.to(below.device)
    weights = Weights(
        rank=settings.rank_weight,
        fault=settings.fault_weight,
        worth=settings.worth_weight,
        product=settings.product_weight,
        expert=settings.expert_weight,
        style=settings.style_weight,
        style_expert=settings.expert_style_weight,
        corruption=settings.corruption_weight,
    )
    schedule = Schedule(
        epochs=settings.epochs,
        units_per_batch=settings.units_per_batch,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        layerwise_decay=settings.layerwise_decay,
        weight_decay=settings.weight_decay,
    )
    fit_parts(head, below, examples, rows, weights, schedule, settings.seed)
    return head


def _outputs(head: Judge, material: Material, texts: Sequence[int]) -> torch.Tensor:
    lengths = [len(ids) for ids in material.examples.tokens.ids]
    return outputs_of(head, material.below, lengths, texts, CPU_BUDGET)


def _fit_and_write(settings: PartsTraining, material: Material, files: Files) -> dict[str, Any]:
    folder = Path(settings.output)
    found: list[dict[str, Any]] = []
    with write_folder(folder) as partial:
        for seeded, place in each_seed(settings, partial):
            head = fit_head(seeded, material, np.arange(material.training))
            save_head(place, head.config, head)
            scorer = QualityScorer(str(place))
            evaluation = evaluate_scorer(scorer, files.valid)
            found.append({"evaluation": evaluation, "ratings": rating_figures(scorer, files.valid_ratings)})
        figures = {**asdict(found[0]["evaluation"]), "model": folder.name, "ratings": found[0]["ratings"]}
        figures |= {"seeds": over_seeds([each["evaluation"] for each in found]), "training_rows": material.training}
        if settings.folds:
            figures["cross_validation"] = cross_validate(settings, material)
        write_figures(partial, figures)
        names = {name: Path(getattr(settings, name)).name for name in ("train", "valid", "ratings", "valid_ratings")}
        write_card(
            partial,
            "parts_scorer_card.md.jinja",
            settings=settings.changed(output=folder.name, **names),
            figures=figures,
            ratings=None,  # `evaluate --ratings` has them
            config=_config(settings),
            kept=head.config.hidden_sizes[1] if settings.axes else 0,
        )
    return figures


def cross_validate(settings: PartsTraining, material: Material) -> dict[str, dict[str, float]]:
    """Return mean, sample deviation and number of the figures of rows that a head was not fitted on, by fold and seed.

    Validation rows are folded as well, so the settings are compared on all that may be used for it.
    """
    from sklearn.model_selection import GroupKFold

    values: dict[str, list[float]] = {}
    rows = np.arange(len(material.groups))
    for seed in range(settings.seed, settings.seed + settings.seeds):
        splitter = GroupKFold(settings.folds, shuffle=True, random_state=seed)
        for known, unseen in splitter.split(rows, groups=material.groups):
            head = fit_head(settings.changed(seed=seed), material, known)
            outputs = _outputs(head.to(material.below.device), material, unseen.tolist()).mean(dim=1).numpy()
            for name, value in _fold_figures(outputs, material.examples, unseen).items():
                values.setdefault(name, []).append(value)
    return over_runs(values)


def _fold_figures(
    outputs: npt.NDArray[np.float32], examples: Examples, unseen: npt.NDArray[np.int64]
) -> Mapping[str, float]:
    """Return the share of pairs that the expert part ranks right, and how well the ratings are told."""
    at = np.full(len(examples.expert), -1)
    at[unseen] = np.arange(len(unseen))
    better = unseen[examples.expert[unseen] == 1]
    expert = outputs[:, OUTPUTS.index("expert")]
    figures = {}
    if len(better):
        difference = expert[at[better]] - expert[at[examples.partner[better]]]
        figures["expert_pairs"] = float(np.mean(difference > 0) + np.mean(difference == 0) / 2)
    lengths = np.array([examples.tokens.lengths[i] - examples.tokens.answer_starts[i] for i in unseen])
    # In the unit of the ratings, for their product.
    told = [outputs[:, OUTPUTS.index(name)] * UNITS[name][1] + UNITS[name][0] for name in ("soundness", "worth")]
    rated = (examples.soundness[unseen], examples.worth[unseen])
    return figures | told_apart((told[0], told[1].clip(0)), rated, lengths)


def _config(settings: PartsTraining) -> IQSConfig:
    if settings.axes:
        sizes = (settings.axes, 1)  # the second one follows from the rows
        alone = settings.changed(members=1)  # nobody votes
        return config_of(alone, head="kernel", hidden_sizes=sizes, max_tokens=settings.max_tokens)
    return config_of(
        settings,
        head="parts",
        hidden_sizes=(settings.hidden_size,),
        max_tokens=settings.max_tokens,
        fork_layers=settings.fork_layers,
        fork_dropout=settings.fork_dropout,
        queries=settings.queries,
    )
