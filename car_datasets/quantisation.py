"""A scorer's encoder to 8-bit integers, calibrated on the user's own texts, and how much that changes and saves.

Does: convert, quantise and write an engine's folder; score the same texts in float32 and in int8 and compare.
Does not: run an engine (openvino_encoder.py), or measure a scorer against labels (evaluation.py).
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

from car_datasets.batching import pad, tokenise
from car_datasets.formatting import find_schema
from car_datasets.openvino_encoder import MODEL_FILE, RECORD_FILE, import_openvino
from car_datasets.results import fresh_folder, write_whole
from car_datasets.rows import Rows
from car_datasets.scoring import QualityScorer
from car_datasets.templates import Text

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

FEWEST_TEXTS = 20  # ranges of activations from fewer are chance


def quantise_encoder(scorer: QualityScorer, texts: Sequence[Text], folder: str | os.PathLike[str]) -> Path:
    """Write an int8 copy of a scorer's encoder, for `QualityScorer(..., engine=folder)`.

    Weights and the inputs of matrix products become 8-bit integers, each on a scale of its own that is fixed here, from
    what the encoder does with `texts`. Attention, normalisation and the residual stream are computed in float32.

    Args:
        scorer ([`QualityScorer`]): in float32, without an engine.
        texts (`Sequence[Text]`): of the kind that will be scored; a few hundred.
        folder (`str`): takes `encoder.xml`, `encoder.bin` and `engine.json`, which says whose encoder this is and what
            made it.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: the extra is not installed, the folder holds an engine already, there are too few texts, or the scorer
            is not in float32.
    """
    path = fresh_folder(Path(folder), (RECORD_FILE,), "folder")  # written last: a folder without it is nothing yet
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
    # One text at a time: padding would take part in the ranges.
    samples = [[tensor.numpy() for tensor in pad([row], 0, torch.device("cpu"))] for row in ids]
    logging.getLogger("nncf").setLevel(
        logging.ERROR
    )  # its own set_log_level also turns down handlers that others have added
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of branches; test_openvino_encoder.py holds what they come to
        example = pad([ids[0], ids[0][:-1]], loaded.tokenizer.pad_token_id, torch.device("cpu"))
        converted = openvino.convert_model(_HiddenStates(loaded.model.encoder), example_input=example)
    quantised = nncf.quantize(
        converted,
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    gc.collect()  # nncf's `Core`s must go in the thread that made them, see `_core` in openvino_encoder.py
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
    openvino.save_model(quantised, path / MODEL_FILE, compress_to_fp16=False)
    content = json.dumps(record, indent=2) + "\n"
    write_whole(path / RECORD_FILE, lambda name: Path(name).write_text(content, encoding="utf-8"))
    return path


def sample_texts(
    dataset: Dataset, scorer: QualityScorer, rows: int, others: int | None = None, seed: int = 42
) -> tuple[list[Text], list[Text]]:
    """Texts of randomly drawn rows, as the scorer reads them; rows that cannot be scored are passed over.

    Args:
        rows (`int`): how many to calibrate on, at most.
        others (`int`, *optional*): how many others to compare on, at most; as many by default.

    Returns:
        Texts of the first and of the others. A chat has one per exchange, all of them on one side.
    """
    drawn = np.random.default_rng(seed).permutation(len(dataset))

    def texts(places: npt.NDArray[np.int64]) -> list[Text]:
        batch = dataset.with_format(None).select(places)[:]
        schema = find_schema(dataset.column_names, scorer.schema, scorer.columns)
        return Rows.from_batch(batch, schema, str(scorer.template), "mark").texts

    return texts(drawn[:rows]), texts(drawn[rows : rows + (rows if others is None else others)])


@dataclass(frozen=True)
class Agreement:
    """What an engine changes and saves, measured by [`compare_engines`].

    Args:
        texts (`int`): how many were scored.
        spearman (`float`): rank correlation of the scores in float32 and in int8.
        top_tenth (`float`): share of the best tenth by float32 that is in the best tenth by int8.
        largest (`float`): largest difference of two scores of one text.
        float32_rows_per_second, int8_rows_per_second (`float`): from text to score, tokenisation included.
    """

    texts: int
    spearman: float
    top_tenth: float
    largest: float
    float32_rows_per_second: float
    int8_rows_per_second: float

    def to_table(self) -> Table:
        """One table for a terminal."""
        from rich.table import Table

        table = Table("int8 beside float32", f"{self.texts:,} texts", title_justify="left")
        table.add_row("Spearman of the scores", f"{self.spearman:.4f}")
        table.add_row("best tenth in common", f"{100 * self.top_tenth:.1f} %")
        table.add_row("largest difference of a score", f"{self.largest:.3f}")
        speeds = self.int8_rows_per_second, self.float32_rows_per_second
        table.add_row("rows per second", f"{speeds[0]:.0f} beside {speeds[1]:.0f}: {speeds[0] / speeds[1]:.2f} times")
        return table


def compare_engines(scorer: QualityScorer, quick: QualityScorer, texts: Sequence[Text]) -> Agreement:
    """Score texts in float32 and by an engine, in turn, twice each; the better time of each counts.

    Args:
        scorer, quick ([`QualityScorer`]): without and with an engine.
        texts (`Sequence[Text]`): others than those that it was calibrated on.

    Raises:
        ValueError: there are fewer than 10 texts.
    """
    if len(texts) < 10:
        raise ValueError(f"texts: {len(texts)} given; a rank correlation needs at least 10.")
    both = {"float32": scorer, "int8": quick}
    scores: dict[str, npt.NDArray[np.float32]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for one in both.values():
        one.score_texts(texts[:10])  # loads the weights
    for _ in range(2):
        for name, one in both.items():
            start = time.perf_counter()
            scores[name] = one.score_texts(texts).scores
            seconds[name].append(time.perf_counter() - start)
    from scipy.stats import spearmanr

    float32, int8 = scores["float32"], scores["int8"]
    count = max(1, len(texts) // 10)
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
    """An encoder as a function of two tensors to all of its hidden states, which is what can be converted."""

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
