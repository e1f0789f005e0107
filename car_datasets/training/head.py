"""Train the head of the embedded scorer on the states of its frozen encoder and the words of the answer.

Does: make restyled and corrupted copies of cleaned pairs, encode all once, fit the head for several seeds, write the
model.
Does not: train an encoder. The shipped weights come from the training file `train_iqs_minilm.yaml`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from datasets.utils import tqdm
from torch import Tensor, nn

from car_datasets.loading.templates import CLEAN_TEMPLATE, Exchange, render
from car_datasets.scoring.batching import CPU_BUDGET, pad, token_batches, tokenise
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig, check_languages
from car_datasets.scoring.iqs.layers import SegmentHead, hashed_words, segment_features
from car_datasets.scoring.iqs.modeling_iqs import IQSModel
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.training.corruptions import corrupt, draw_corruptions
from car_datasets.training.evaluation import Evaluation, evaluate_scorer, pair_metrics
from car_datasets.training.head_fitting import Copies, Voters, fit_integrity, fit_quality, fit_words, principal_axes
from car_datasets.training.pairs import Pair, cleaned, groups_of, read_sides
from car_datasets.utils import digests, revisions
from car_datasets.utils.files import write_figures, write_folder
from car_datasets.utils.hub import write_card
from car_datasets.utils.settings import Settings

logger = logging.getLogger(__name__)

# Relative frequency of each corruption in training: the harder it is to detect, the more frequent.
CORRUPTION_WEIGHTS: Mapping[str, float] = {
    "mismatched": 6.0,
    "shuffled_sentences": 5.0,
    "truncated": 3.0,
    "echo": 2.5,
    "repeated": 2.0,
    "shuffled_words": 1.5,
    "refusal": 1.0,
    "empty": 0.5,
}

# CaR's APE_score_train.csv: the card of a head that was trained on this file describes its content.
CAR_TRAINING_SHA256 = "3f269b42f54190f34bb4e5ba634942159c766122a20939538657682d5392935b"

# (style, seed) of each restyled copy of the rows.
STYLE_DRAWS = (("opening", 0), ("opening", 1), ("filler", 0), ("bullets", 0))


@dataclass(frozen=True)
class HeadTraining(Settings):
    """The settings of [`train_head`]; the defaults are those of the shipped head.

    Args:
        train, valid (`str`): files of pairs: CSV (`src,score` or `src,pos,neg`) or JSON Lines (`chosen`, `rejected`).
        output (`str`): a new folder for the model.
        seed (`int`), seeds (`int`): train with the seeds `seed`, `seed + 1`, ... The first model is kept; the card
            shows the figures of all. Equal seeds give equal files on one kind of machine.
        folds (`int`): also cross-validate over the pairs of both files in this many folds, with every seed, which encodes
            them once more; 0 does not. Settings are compared by it, as the pairs of `valid` alone are few.
        members, hidden_size (`int`), dropout (`float`): number of quality networks, their hidden units and dropout.
        axes (`int`): principal axes of the features to which the quality networks are limited.
        epochs (`int`), learning_rate, weight_decay (`float`): optimisation of the quality networks.
        consistency (`float`): weight of the penalty on a change of quality when only the style changes.
        margin_weight (`float`): weight of the loss that separates the quality of a row from that of its corrupted copy.
        word_bits (`int`): bits of the hash of words and word pairs.
        word_strength (`float`): inverse regularisation of the word regression (scikit-learn's `C`).
        word_style_weight (`float`): weight in the word regression of all restyled copies of a row; the row has 1.
        corruption_draws (`int`): corrupted copies per row.
        integrity_size, integrity_epochs (`int`), integrity_dropout, integrity_learning_rate, integrity_weight_decay
            (`float`): hidden units and optimisation of the integrity network.
        penalty (`float`): the most that a corrupted answer loses.
        penalty_offset, penalty_slope (`float`): negated integrity logit at which half of it applies; the slope there.
        pairs_per_batch (`int`): batch size of both optimisations, in pairs.
        languages (`list[str]`): codes of the languages that the head is made for, kept in configuration and card. The
            encoder reads English.
    """

    kind: str = "head"
    train: str = "expert_score_train.csv"
    valid: str = "expert_score_valid.csv"
    output: str = "iqs-minilm"
    seed: int = 0
    seeds: int = 3
    folds: int = 0
    members: int = 4
    hidden_size: int = 48
    dropout: float = 0.4
    axes: int = 512
    epochs: int = 8
    learning_rate: float = 7e-4
    weight_decay: float = 0.2
    consistency: float = 12.0
    margin_weight: float = 2.0
    word_bits: int = 17
    word_strength: float = 10.0
    word_style_weight: float = 6.0
    corruption_draws: int = 4
    integrity_size: int = 48
    integrity_epochs: int = 12
    integrity_dropout: float = 0.3
    integrity_learning_rate: float = 3e-4
    integrity_weight_decay: float = 0.1
    penalty: float = 2.0
    penalty_offset: float = 3.0
    penalty_slope: float = 1.5
    pairs_per_batch: int = 32
    languages: list[str] = field(default_factory=lambda: ["en"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "head":
            raise ValueError(f"kind={self.kind!r}: HeadTraining takes kind='head' only.")
        counts = ("seeds", "members", "hidden_size", "axes", "epochs", "corruption_draws")
        self.refuse_outside(1, None, *counts, "integrity_size", "integrity_epochs", "pairs_per_batch")
        self.refuse_outside(1e-9, None, "learning_rate", "integrity_learning_rate", "word_strength", "penalty_slope")
        self.refuse_outside(
            0, None, "seed", "folds", "weight_decay", "integrity_weight_decay", "consistency", "margin_weight"
        )
        self.refuse_outside(0, None, "word_style_weight", "penalty")
        self.refuse_outside(0, 0.99, "dropout", "integrity_dropout")
        self.refuse_outside(8, 24, "word_bits")
        if self.folds == 1:
            raise ValueError("folds=1 leaves nothing to train on; 0 does not cross-validate.")
        check_languages(self.languages)


class Material(NamedTuple):
    """The data that a head is fitted on: labels (rows,), the features' mean and scale (width,), features and words.

    `groups` (rows,) has one number for rows that ask the same and for the halves of a pair.
    """

    labels: Tensor
    mean: Tensor
    scale: Tensor
    features: Copies
    words: Copies
    groups: npt.NDArray[np.int64]

    def among(self, rows: npt.NDArray[np.int64]) -> Material:
        """Return the same for some of the pairs, given by both their rows, ascending."""
        some = self.features.each(lambda matrix: matrix[rows]), self.words.each(lambda matrix: matrix[rows])
        return Material(self.labels[rows], self.mean, self.scale, *some, self.groups[rows])


def train_head(settings: HeadTraining) -> dict[str, Any]:
    """Train the head and write configuration, weights, figures and card into `settings.output`.

    Returns:
        `dict`: the figures of the kept model on `valid`, their spread over the `seeds`, `training_pairs`, and
            `cross_validation` if there are folds.

    Raises:
        ValueError: the folder exists, a file cannot be read, or both files share questions; raised before training.
    """
    folder = Path(settings.output)
    # Before minutes of encoding, not after.
    if folder.exists():
        raise ValueError(f"output={settings.output!r} already exists; name a new folder.")
    train, valid = read_sides(settings.train, settings.valid)
    crossed = cross_validate(settings, gather(settings, [*train, *valid])) if settings.folds else None
    return fit_and_write(settings, gather(settings, train), valid, crossed)


def gather(settings: HeadTraining, pairs: Sequence[Pair]) -> Material:
    """Return features and words of rows and copies; drop pairs with an empty answer, which is a corruption."""
    kept = [Pair(*(cleaned(row) for row in pair)) for pair in pairs]
    kept = [pair for pair in kept if all(row.response for row in pair)]
    logger.info("%d of %d pairs have both answers.", len(kept), len(pairs))
    # Worse halves in even rows, better ones in odd rows; `Copies` and the labels rely on it.
    rows = [row for pair in kept for row in pair]
    # A row that cannot be restyled stays as it is, so that all matrices have equally many rows.
    styled = [[c or row for c, row in zip(corrupt(k, rows, s, "train"), rows, strict=True)] for k, s in STYLE_DRAWS]
    corrupted = [draw_corruptions(rows, s, CORRUPTION_WEIGHTS) for s in range(settings.corruption_draws)]
    encoder, tokenizer, config = _frozen_encoder(settings)
    copies = Copies(rows, styled, corrupted)
    with tqdm(total=len(rows) * len(copies.every()), desc="Encoding", unit=" texts") as bar:
        encoded = copies.each(lambda texts: read_rows(encoder, tokenizer, config, texts, bar.update))
    features, words = encoded.each(lambda both: both[0]), encoded.each(lambda both: both[1])
    # The head repeats this scaling when it scores, so it is that of the rows alone, for the copies as well.
    mean, scale = features.rows.mean(dim=0), features.rows.std(dim=0) + 1e-3
    # In place: the features of rows and copies are the largest tensors of the training.
    scaled = features.each(lambda f: f.sub_(mean).div_(scale).clamp_(-6, 6))
    labels = torch.tensor([0.0, 1.0]).repeat(len(kept))
    return Material(labels, mean, scale, scaled, words, groups_of(rows, np.arange(len(rows)) ^ 1))


def cross_validate(settings: HeadTraining, material: Material) -> dict[str, dict[str, float]]:
    """Return mean, sample deviation and number of the shares of pairs in the right order, by fold and seed.

    A head is fitted on all folds but one and measured on that one; pairs that ask the same are in one fold. The scaling
    of the features, which knows no labels, is that of all rows.
    """
    from sklearn.model_selection import GroupKFold

    values: dict[str, list[float]] = {"pairs": [], "auc": []}
    # The features are scaled already, so the head is not to scale them again.
    material = material._replace(mean=torch.zeros_like(material.mean), scale=torch.ones_like(material.scale))
    for seed in range(settings.seed, settings.seed + settings.seeds):
        splitter = GroupKFold(settings.folds, shuffle=True, random_state=seed)
        for known, unseen in splitter.split(material.labels, groups=material.groups):
            fitted = material.among(known)
            words = fit_words(fitted.words, fitted.labels.numpy(), settings.word_strength, settings.word_style_weight)
            head = fit_head(settings.changed(seed=seed), fitted, *words)
            with torch.inference_mode():
                quality, integrity = head.logits(material.features.rows[unseen])
                from_words = torch.from_numpy(material.words.rows[unseen] @ words[0]).float().unsqueeze(1)
                found = torch.sigmoid(quality + from_words) - settings.penalty * torch.sigmoid(-integrity)
            scores = found.mean(dim=1).numpy().reshape(-1, 2)
            told = pair_metrics(scores[:, 0], scores[:, 1])
            for name, of in values.items():
                of.append(told[name])
    return over_runs(values)


def over_runs(values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Return mean, sample standard deviation and number of the values of each figure."""
    return {name: {**_mean_and_deviation(of), "runs": len(of)} for name, of in values.items()}


def _mean_and_deviation(values: Sequence[float]) -> dict[str, float]:
    # ddof=1: the runs are a sample of all runs.
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "deviation": deviation}


def fit_and_write(
    settings: HeadTraining,
    material: Material,
    valid: Sequence[Pair],
    crossed: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """Fit a head per seed on the same material, evaluate each as saved, keep the first in `settings.output`.

    The results of [`cross_validate`], if there are any, are written with the figures.
    """
    folder = Path(settings.output)
    # Deterministic, so all seeds share it.
    words = fit_words(material.words, material.labels.numpy(), settings.word_strength, settings.word_style_weight)
    evaluations: list[Evaluation] = []
    with write_folder(folder) as partial:
        for seeded, place in each_seed(settings, partial):
            save_head(place, _config(settings), fit_head(seeded, material, *words))
            evaluations.append(evaluate_scorer(QualityScorer(str(place)), valid))
        figures = {**asdict(evaluations[0]), "model": folder.name, "seeds": over_seeds(evaluations)}
        figures["training_pairs"] = len(material.labels) // 2
        if crossed is not None:
            figures["cross_validation"] = crossed
        _describe(settings, partial, figures)
    return figures


def fit_head(
    settings: HeadTraining,
    material: Material,
    coefficients: npt.NDArray[np.float64],
    intercept: float,
    logits: Copies,
) -> SegmentHead:
    """Fit quality on top of the results of `fit_words` (the last three arguments), then integrity; return one head."""
    torch.manual_seed(settings.seed)  # all random numbers below follow from it, so their order is part of the result
    features, labels = material.features, material.labels
    # No more axes than rows or columns exist.
    axes = principal_axes(features.rows, min(settings.axes, *features.rows.shape))
    quality = fit_quality(
        features.each(lambda scaled: scaled @ axes),
        logits,
        labels,
        Voters(axes.shape[1], settings.members, settings.hidden_size, settings.dropout),
        consistency=settings.consistency,
        margin_weight=settings.margin_weight,
        epochs=settings.epochs,
        pairs_per_batch=settings.pairs_per_batch,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    integrity = fit_integrity(
        features,
        Voters(features.rows.shape[1], 1, settings.integrity_size, settings.integrity_dropout),
        len(labels) // 2,
        epochs=settings.integrity_epochs,
        pairs_per_batch=settings.pairs_per_batch,
        learning_rate=settings.integrity_learning_rate,
        weight_decay=settings.integrity_weight_decay,
    )
    head = SegmentHead(_config(settings))
    # Projection, intercept, slope and offset are folded into the weights, so that the head needs none of them.
    with torch.no_grad():
        head.mean.copy_(material.mean)
        head.scale.copy_(material.scale)
        head.words.copy_(torch.from_numpy(coefficients))
        # (members * size, axes) @ (axes, width) -> (members * size, width)
        head.quality.weight.copy_(quality.inside.weight @ axes.T)
        head.quality.bias.copy_(quality.inside.bias)
        head.quality_out.copy_(quality.out)
        head.quality_bias.copy_(quality.bias + intercept)
        head.integrity[0].weight.copy_(integrity.inside.weight)
        head.integrity[0].bias.copy_(integrity.inside.bias)
        head.integrity[2].weight.copy_(integrity.out * settings.penalty_slope)
        head.integrity[2].bias.copy_((integrity.bias + settings.penalty_offset) * settings.penalty_slope)
    return head


def each_seed(settings: Any, partial: Path) -> Iterator[tuple[Any, Path]]:
    """Yield the settings with each seed, and where to save its model: in `partial` for the first, which is kept.

    Each model is saved and loaded again, so that its figures include the rounding to half precision.

    Args:
        settings ([`HeadTraining`] or [`PartsTraining`]): with `seed` and `seeds`.
        partial (`Path`): the folder that is being written.
    """
    for seed in range(settings.seed, settings.seed + settings.seeds):
        yield settings.changed(seed=seed), partial if seed == settings.seed else partial / "other-seed"
    shutil.rmtree(partial / "other-seed", ignore_errors=True)


def read_rows(
    encoder: Any,
    tokenizer: Any,
    config: IQSConfig,
    rows: Sequence[Exchange],
    read: Callable[[int], Any] = lambda rows: None,
) -> tuple[Tensor, Any]:
    """Return features of rows, (rows, width) float32, and their hashed words, a sparse (rows, 2 ** bits) matrix.

    After every batch it calls `read` with the number of rows in it.
    """
    from scipy.sparse import csr_matrix

    texts = [render(row, config.template) for row in rows]
    # The answer begins after the question and one space.
    tokens = tokenise(tokenizer, [t.whole for t in texts], config.max_tokens, [len(t.question) + 1 for t in texts])
    # Filled batch by batch: joining parts at the end would need twice the memory.
    features = torch.empty((len(rows), SegmentHead.width(config)))
    entries: list[tuple[Any, Any, Any]] = []
    for batch in token_batches([len(ids) for ids in tokens.ids], CPU_BUDGET):
        input_ids, mask = pad([tokens.ids[i] for i in batch], tokenizer.pad_token_id, torch.device("cpu"))
        start = torch.tensor([tokens.answer_starts[i] for i in batch])
        with torch.inference_mode():
            states = encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
            features[batch] = segment_features(states, mask, start)
            numbers, weights = hashed_words(input_ids, mask, start, config.word_bits)
        # Weight 0 marks padding and repeated words.
        at, column = np.nonzero(weights.numpy())
        entries.append((np.asarray(batch)[at], numbers.numpy()[at, column], weights.numpy()[at, column]))
        read(len(batch))
    # Coordinates of all non-zero entries: row, hashed word, weight.
    i, j, value = (np.concatenate(part) for part in zip(*entries, strict=True))
    return features, csr_matrix((value, (i, j)), shape=(len(rows), 1 << config.word_bits))


def _frozen_encoder(settings: HeadTraining) -> tuple[Any, Any, IQSConfig]:
    return load_encoder(), load_tokenizer(), _config(settings)


def _config(settings: HeadTraining) -> IQSConfig:
    return config_of(
        settings,
        head="segments",
        hidden_sizes=(settings.hidden_size, settings.integrity_size),
        max_tokens=512,  # position embeddings of MiniLM; the embedder that shares the encoder stops at 256
        word_bits=settings.word_bits,
    )


def config_of(settings: Any, **options: Any) -> IQSConfig:
    """Return the configuration of a head on the encoder of the embedded scorer.

    Args:
        settings ([`HeadTraining`] or [`PartsTraining`]): with `dropout`, `members`, `penalty` and `languages`.
        options: what only this kind of head has.
    """
    from transformers import AutoConfig

    return IQSConfig(
        encoder_config=AutoConfig.from_pretrained(_encoder_folder(), trust_remote_code=False),
        dropout=settings.dropout,
        template=CLEAN_TEMPLATE,
        members=settings.members,
        penalty=settings.penalty,
        encoder_source=encoder_source(),
        languages=settings.languages,
        architectures=[IQSModel.__name__],
        **options,
    )


def load_encoder() -> Any:
    """Return the encoder of the embedded scorer in float32, in evaluation mode, on the CPU."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(_encoder_folder(), trust_remote_code=False, dtype=torch.float32).eval()


def load_tokenizer() -> Any:
    """Return the tokenizer of the embedded scorer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_encoder_folder(), trust_remote_code=False)


def _encoder_folder() -> Path:
    return revisions.model_folder(revisions.DEFAULT_ENCODER, revisions.ENCODER_REVISION)


def encoder_source() -> dict[str, str]:
    """Return the encoder of the embedded scorer, as the configuration of a head that leaves it out names it."""
    return {
        "model_id": revisions.DEFAULT_ENCODER,
        "revision": revisions.ENCODER_REVISION,
        "sha256": revisions.ENCODER_SHA256,
    }


def over_seeds(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, float]]:
    """Return mean and sample standard deviation over the seeds: accuracy on cleaned text, corruptions and styles."""
    values: dict[str, list[float]] = {}
    for evaluation in evaluations:
        figures = {**evaluation.accuracy["cleaned"]}
        figures |= {kind: row["outranked"] for kind, row in evaluation.corruptions.items()}
        figures |= {kind: row["shift"] for kind, row in evaluation.styles.items()}
        for name, figure in figures.items():
            values.setdefault(name, []).append(figure["value"])
    return {name: _mean_and_deviation(of) for name, of in values.items()}


def save_head(folder: Path, config: IQSConfig, head: nn.Module) -> None:
    """Write configuration and weights of a head, in half precision but for scales, which have few digits there."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    full = {"mean", "scale", "weights", "knots", "bias"}
    state = {f"head.{n}": (w if n in full else w.half()).contiguous() for n, w in head.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _describe(settings: HeadTraining, folder: Path, figures: dict[str, Any]) -> None:
    """Write `figures.json` and the card."""
    write_figures(folder, figures)
    write_card(
        folder,
        "default_scorer_card.md.jinja",
        settings=settings,
        files=[Path(name).name for name in (settings.train, settings.valid)],
        of_car=digests.file_digest(Path(settings.train)) == CAR_TRAINING_SHA256,
        figures=figures,
        ratings=None,  # `evaluate --ratings` has them
        config=_config(settings),
        pairs=figures["training_pairs"],
    )
