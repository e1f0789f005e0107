"""Quantise a scorer's encoder to int8, calibrated on given texts, and compare its scores and speed with float32.

Does: convert and quantise the encoder, write an engine's folder, score the same texts in float32 and in int8.
Does not: run an engine, or evaluate a scorer against labels.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from car_datasets.loading.schemas import find_schema
from car_datasets.loading.templates import Text
from car_datasets.loading.values import carried
from car_datasets.scoring.batching import pad, tokenise
from car_datasets.scoring.iqs.openvino_encoder import MODEL_FILE, RECORD_FILE, import_openvino
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.scoring.stage import Rows
from car_datasets.utils.files import fresh_folder, write_content
from car_datasets.utils.settings import SEED

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

FEWEST_TEXTS = 20  # the ranges of activations of fewer texts are not reliable


def quantise_encoder(scorer: QualityScorer, texts: Sequence[Text], folder: str | os.PathLike[str]) -> Path:
    """Write an int8 copy of a scorer's encoder, for `QualityScorer(..., engine=folder)`.

    Weights and the inputs of matrix products become 8-bit integers. Each has a scale of its own, which is fixed here
    from the activations for `texts`. Attention, normalisation and the residual stream are computed in float32.

    Args:
        scorer ([`QualityScorer`]): a scorer in float32, without an engine.
        texts (`Sequence[Text]`): a few hundred texts similar to those that will be scored.
        folder (`str`): a folder without an engine. `encoder.xml`, `encoder.bin` and `engine.json` are written there;
            the last one records the model, its revision and the versions of the libraries.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: the extra `openvino` is not installed, the folder already contains an engine, there are fewer than
            20 texts, or the scorer has an engine or is not in float32.
    """
    # The record is written last, so a folder without it contains no engine.
    path = fresh_folder(Path(folder), (RECORD_FILE,), "folder")
    if len(texts) < FEWEST_TEXTS:
        raise ValueError(
            f"texts: {len(texts)} given; calibration needs at least {FEWEST_TEXTS}, better 300 (--rows 300)."
        )
    if scorer.engine is not None or scorer.dtype != "float32":
        raise ValueError(
            f"scorer has engine={scorer.engine!r} and dtype={scorer.dtype!r}; quantise QualityScorer(model_id) itself."
        )
    openvino = import_openvino("nncf")
    import nncf

    loaded = scorer.load(torch.device("cpu"))
    read = (
        [part for text in texts for part in text] if scorer.objective == "ranking" else [text.whole for text in texts]
    )
    ids = tokenise(loaded.tokenizer, read, loaded.model.config.max_tokens).ids
    # One text at a time, because padding would count in the ranges of activations.
    samples = [[tensor.numpy() for tensor in pad([row], 0, torch.device("cpu"))] for row in ids]
    # Not nncf's own set_log_level, which also lowers the level of handlers that the caller has added.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of data-dependent branches, whose result the tests check
        # Two lengths, so that the traced graph contains the mask and dynamic shapes.
        example = pad([ids[0], ids[0][:-1]], loaded.tokenizer.pad_token_id, torch.device("cpu"))
        converted = openvino.convert_model(_HiddenStates(loaded.model.encoder), example_input=example)
    # By this model type, attention, normalisation and the residual stream stay in float32.
    quantised = nncf.quantize(
        converted,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    # nncf's `Core` objects must be freed in the thread that created them: freed in another one, they leave a dangling
    # signal stack, and the next signal is a segmentation fault (OpenVINO 2026.4).
    gc.collect()
    record = {
        "model": scorer.model_id,
        "revision": scorer.revision,
        "texts": len(texts),
        "texts_sha256": _digest(read),
        "openvino": version("openvino"),
        "nncf": version("nncf"),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    path.mkdir(parents=True, exist_ok=True)
    # Uncompressed, since float16 would change what is left in float32.
    openvino.save_model(quantised, path / MODEL_FILE, compress_to_fp16=False)
    content = json.dumps(record, indent=2) + "\n"
    write_content(path / RECORD_FILE, content)
    return path


def sample_texts(
    dataset: Dataset, scorer: QualityScorer, rows: int, others: int | None = None, seed: int = SEED
) -> tuple[list[Text], list[Text]]:
    """Draw rows at random and return their texts, as the scorer reads them; rows that cannot be scored are skipped.

    Args:
        dataset (`Dataset`): the rows to draw from.
        scorer ([`QualityScorer`]): gives schema, columns and template.
        rows (`int`): most rows to calibrate on.
        others (`int`, *optional*): most other rows to compare on; defaults to `rows`.
        seed (`int`): seed of the draw.

    Returns:
        The texts to calibrate on and those to compare on. A chat gives one text per exchange, all in the same list.
    """
    # One permutation, cut in two: no row is calibrated on and compared.
    drawn = np.random.default_rng(seed).permutation(len(dataset))

    def texts(places: npt.NDArray[np.int64]) -> list[Text]:
        schema = find_schema(dataset.column_names, scorer.schema, scorer.columns)
        rows = dataset.select_columns(list(schema.read_columns)).with_format(None).select(places)
        batch = carried(rows)[:]
        return Rows.from_batch(batch, schema, str(scorer.template), "mark", scorer.score_thoughts).texts

    return texts(drawn[:rows]), texts(drawn[rows : rows + (rows if others is None else others)])


@dataclass(frozen=True)
class Agreement:
    """Agreement and speed of int8 compared with float32, measured by [`compare_engines`].

    Args:
        texts (`int`): number of scored texts.
        spearman (`float`): rank correlation of the scores in float32 and in int8.
        top_tenth (`float`): share of the best tenth by float32 that is also in the best tenth by int8.
        largest (`float`): largest absolute difference between the two scores of a text.
        float32_rows_per_second, int8_rows_per_second (`float`): texts scored per second, tokenisation included.
    """

    texts: int
    spearman: float
    top_tenth: float
    largest: float
    float32_rows_per_second: float
    int8_rows_per_second: float

    def to_table(self) -> Table:
        """Return a table for a terminal."""
        from rich.table import Table

        table = Table("int8 compared with float32", f"{self.texts:,} texts", title_justify="left")
        table.add_row("Spearman of the scores", f"{self.spearman:.4f}")
        table.add_row("shared part of the best tenth", f"{100 * self.top_tenth:.1f} %")
        table.add_row("largest difference between scores", f"{self.largest:.3f}")
        speeds = self.int8_rows_per_second, self.float32_rows_per_second
        table.add_row(
            "rows per second", f"{speeds[0]:.0f} compared with {speeds[1]:.0f}: {speeds[0] / speeds[1]:.2f} times"
        )
        return table


def compare_engines(scorer: QualityScorer, quick: QualityScorer, texts: Sequence[Text]) -> Agreement:
    """Score texts in float32 and with an engine, alternately and twice each; the faster run of each counts.

    Args:
        scorer ([`QualityScorer`]): a scorer in float32, without an engine.
        quick ([`QualityScorer`]): the same scorer with an engine.
        texts (`Sequence[Text]`): texts that the engine was not calibrated on.

    Raises:
        ValueError: there are fewer than 10 texts.
    """
    if len(texts) < 10:
        raise ValueError(f"texts: {len(texts)} given; a rank correlation needs at least 10. Add texts.")
    both = {"float32": scorer, "int8": quick}
    scores: dict[str, npt.NDArray[np.float32]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for one in both.values():
        one.score_texts(texts[:10])  # loads the weights, so that loading is not timed
    # Alternately, so that a slow moment of the machine does not hit one of them alone.
    for _ in range(2):
        for name, one in both.items():
            start = time.perf_counter()
            scores[name] = one.score_texts(texts).scores
            seconds[name].append(time.perf_counter() - start)
    from scipy.stats import spearmanr

    float32, int8 = scores["float32"], scores["int8"]
    count = max(1, len(texts) // 10)
    # Stable sorts: ties are cut alike in both.
    shared = np.intersect1d(np.argsort(-float32, kind="stable")[:count], np.argsort(-int8, kind="stable")[:count])
    return Agreement(
        texts=len(texts),
        spearman=float(spearmanr(float32, int8).statistic),
        top_tenth=len(shared) / count,
        largest=float(np.abs(float32 - int8).max()),
        float32_rows_per_second=len(texts) / min(seconds["float32"]),
        int8_rows_per_second=len(texts) / min(seconds["int8"]),
    )


class _HiddenStates(nn.Module):
    """An encoder that takes two tensors and returns all hidden states as a tuple, a form that OpenVINO can convert."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        return tuple(states)


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
