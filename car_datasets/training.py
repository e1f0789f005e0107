"""Train the head of the embedded default: a small network on the frozen encoder's states.

Does: read CaR's `src,score` files, clean the text as the scorer will, compute the encoder's features once, fit the head on
the training file, choose the epoch on the validation file, write configuration, weights and card.
Does not: train an encoder.

The weights in `car_datasets/models/iqs-minilm` come from configs/train_iqs_minilm.yaml.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from car_datasets import hub
from car_datasets.batching import CPU_BUDGET, pad, token_batches
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.modeling_iqs import IQSModel, feed_forward
from car_datasets.settings import Settings
from car_datasets.templates import CLEAN_TEMPLATE, clean


@dataclass(frozen=True)
class HeadTraining(Settings):
    """The settings of [`train_head`].

    Args:
        train, valid (`str`): files for [`read_score_csv`].
        output (`str`): a new folder.
        seed (`int`): of initial weights, order and dropout. The same seed gives the same file on one kind of machine.
        hidden_size (`int`), dropout (`float`): of the head.
        epochs (`int`), pairs_per_batch (`int`), learning_rate (`float`), weight_decay (`float`): of AdamW.
    """

    train: str = "expert_score_train.csv"
    valid: str = "expert_score_valid.csv"
    output: str = "iqs-minilm"
    seed: int = 0
    hidden_size: int = 256
    dropout: float = 0.3
    epochs: int = 25
    pairs_per_batch: int = 32
    learning_rate: float = 3e-4
    weight_decay: float = 0.1


class Texts(NamedTuple):
    """Rendered texts and their labels, the worse (0) and the better (1) answer of a pair in turn."""

    texts: list[str]
    labels: npt.NDArray[np.float32]


def read_score_csv(path: str | Path) -> Texts:
    """Read a file of CaR's `expert-revised` folder: columns `src` and `score`, rows 2i and 2i + 1 a pair.

    Raises:
        ValueError: a column is missing, or the labels are not 0, 1, 0, 1, ...
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"src", "score"} <= set(rows[0]):
        raise ValueError(f"{path} must have the columns src and score; it has {list(rows[0]) if rows else 'no rows'}.")
    labels = np.array([float(row["score"]) for row in rows], dtype=np.float32)
    if len(rows) % 2 or labels[::2].any() or not labels[1::2].all():
        raise ValueError(f"{path} must hold pairs: the scores 0, 1, 0, 1, ... in turn.")
    return Texts([row["src"] for row in rows], labels)


def accuracy(scores: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
    """How well scores tell better from worse.

    Args:
        scores (`(2 x pairs,)` float), labels (`(2 x pairs,)`): 0, 1, 0, 1, ...

    Returns:
        `dict`: `pairs`, share of pairs whose better text scores higher; `rows`, share of rows on the right side of 0.5;
        `auc`, share of all (better, worse) combinations in the right order.
    """
    from sklearn.metrics import roc_auc_score

    s, y = np.asarray(scores), np.asarray(labels)
    return {
        "pairs": float((s[1::2] > s[::2]).mean()),
        "rows": float(((s > 0.5) == (y > 0.5)).mean()),
        "auc": float(roc_auc_score(y, s)),
    }


def train_head(settings: HeadTraining) -> dict[str, Any]:
    """Train the head and write `config.json`, `model.safetensors`, `README.md` and `figures.json` into `settings.output`.

    Returns:
        `dict`: accuracy on the validation file, as shipped and cleaned.

    Raises:
        ValueError: the folder is there already, or a file is not as [`read_score_csv`] wants it.
    """
    folder = Path(settings.output)
    if folder.exists():
        raise ValueError(f"output={settings.output!r} is there already; name a new folder.")
    training, validation = read_score_csv(settings.train), read_score_csv(settings.valid)
    encoder, tokenizer, config = _frozen_encoder(settings)
    cleaned = [clean(t) for t in validation.texts]
    features = layer_means(encoder, tokenizer, [clean(t) for t in training.texts], config.max_tokens)
    features_cleaned = layer_means(encoder, tokenizer, cleaned, config.max_tokens)
    features_shipped = layer_means(encoder, tokenizer, validation.texts, config.max_tokens)
    model, epoch = fit_head(settings, config, features, training.labels, features_cleaned, validation.labels)
    with torch.inference_mode():
        figures = {
            "cleaned": accuracy(model(features_cleaned).squeeze(-1), validation.labels),
            "shipped": accuracy(model(features_shipped).squeeze(-1), validation.labels),
            "longer_text": accuracy(np.array([len(t) for t in cleaned]), validation.labels)["pairs"],
            "epoch": epoch,
            "train_pairs": len(training.texts) // 2,
            "valid_pairs": len(validation.texts) // 2,
            "seed": settings.seed,
        }
    _write(folder, config, model, figures)
    return figures


def _frozen_encoder(settings: HeadTraining) -> tuple[Any, Any, IQSConfig]:
    from transformers import AutoModel, AutoTokenizer

    folder = hub.model_folder(hub.DEFAULT_ENCODER, hub.ENCODER_REVISION)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = IQSConfig(
        encoder_config=encoder.config,
        layer_mix="concat",
        hidden_sizes=(settings.hidden_size,),
        dropout=settings.dropout,
        max_tokens=512,
        template=CLEAN_TEMPLATE,
        encoder_source={
            "model_id": hub.DEFAULT_ENCODER,
            "revision": hub.ENCODER_REVISION,
            "sha256": hub.ENCODER_SHA256,
        },
    )
    return encoder, tokenizer, config


def layer_means(encoder: Any, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Tensor:
    """Every hidden state averaged over tokens, side by side: `(texts, (layers + 1) * units)` float32.

    With a frozen encoder this is all that the head ever sees, because averaging and putting side by side commute.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    width = (encoder.config.num_hidden_layers + 1) * encoder.config.hidden_size
    features = torch.empty((len(texts), width))
    for batch in token_batches([len(row) for row in ids], CPU_BUDGET):
        input_ids, mask = pad([ids[i] for i in batch], tokenizer.pad_token_id, torch.device("cpu"))
        with torch.inference_mode():
            states = encoder(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        total = (torch.cat(states, dim=-1) * mask.unsqueeze(-1)).sum(dim=1)
        features[batch] = total / mask.sum(dim=1, keepdim=True)
    return features


def fit_head(
    settings: HeadTraining,
    config: IQSConfig,
    features: Tensor,
    labels: npt.NDArray[np.float32],
    valid_features: Tensor,
    valid_labels: npt.NDArray[np.float32],
) -> tuple[nn.Sequential, int]:
    """Fit the head by mean squared error on 0 and 1 (CaR sec. 3.1); the epoch with the best validation AUC is kept.

    Features are standardised for training; the scaling is then folded into the first layer, so that the shipped head
    reads what the model computes.
    """
    torch.manual_seed(settings.seed)
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    scaled, valid_scaled = (features - mean) / deviation, (valid_features - mean) / deviation
    targets = torch.from_numpy(labels)
    head = feed_forward(config, features.shape[1])
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    best, best_epoch, best_state = -1.0, 0, {}
    for epoch in range(1, settings.epochs + 1):
        head.train()
        for pairs in torch.randperm(len(labels) // 2).split(settings.pairs_per_batch):
            rows = torch.cat([2 * pairs, 2 * pairs + 1])
            loss = nn.functional.mse_loss(head(scaled[rows]).squeeze(-1), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        head.eval()
        with torch.inference_mode():
            auc = accuracy(head(valid_scaled).squeeze(-1), valid_labels)["auc"]
        if auc > best:
            best, best_epoch = auc, epoch
            best_state = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(best_state)
    with torch.no_grad():
        head[0].weight.div_(deviation)
        head[0].bias.sub_(head[0].weight @ mean)
    return head.eval(), best_epoch


def _write(folder: Path, config: IQSConfig, head: nn.Sequential, figures: dict[str, Any]) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config.architectures = [IQSModel.__name__]
    config.save_pretrained(folder)
    save_file(
        {f"head.{k}": v.contiguous() for k, v in head.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    cards = Environment(
        loader=FileSystemLoader(hub.data_folder("hub_cards")), undefined=StrictUndefined, keep_trailing_newline=True
    )
    card = cards.get_template("default_scorer_card.md.jinja").render(config=config, figures=figures)
    (folder / "README.md").write_text(card, encoding="utf-8")
