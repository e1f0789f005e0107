"""Time `curate` stage by stage on all rows at hand, and compare each with the original's way on the same encoder.

The original's way, as measured and described in the project's facts: score in batches of 16 rows sorted by characters, with
the head that it has (2,048 and 1,024 units on a sparsemax mix of the layers, random here: weights do not change the time) and
eager attention, the only one in the transformers that its code runs with (4.31 to 4.33); embed one row at a time; PCA by full
singular value decomposition; scikit-learn's k-means; look for every cluster's best row in all rows, and for the row in the
list of those taken.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars

from car_datasets import ClusterModel, IQSConfig, IQSModel, Recipe, SelectionReport, TextEmbedder, select_car
from car_datasets.loading.sources import load_instructions
from car_datasets.scoring.embedder import load_sentence_transformer
from car_datasets.stages import resolve
from car_datasets.utils import revisions
from car_datasets.utils.processes import device_for
from tests.benchmarks.table import Line, best_of
from tests.benchmarks.texts import rows, texts

N1, N2, SEED = 1000, 1, 42


def measure() -> Iterator[Line]:
    """Yield a line per stage and one for all of it."""
    disable_progress_bars()
    kind, found = rows()
    ours = _our_way(found)
    theirs = _original_way(texts()[1], found)
    for stage in theirs:
        what = f"{stage}, {len(found):,} {kind}; compared with the original's way"
        yield Line(what, ours[stage], theirs[stage] or None)
    ours_total, theirs_total = sum(ours.values()), sum(theirs.values())
    yield Line(
        f"all of it, {len(found):,} {kind}",
        ours_total,
        theirs_total,
        target="<= 1/3.5",
        met=ours_total <= theirs_total / 3.5,
    )


def _our_way(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    stages = resolve(Recipe())
    stages.score(load_instructions(Dataset.from_list(list(found[:4]))))  # the models are loaded
    seconds: dict[str, float] = {}
    seconds["load"], dataset = best_of(1, lambda: load_instructions(Dataset.from_list(list(found))))
    seconds["score and embed"], pool = best_of(1, lambda: stages.score(dataset))
    seconds["cluster"], pool = best_of(1, lambda: ClusterModel.fit(pool, seed=SEED).label(pool))
    seconds["select"], chosen = best_of(1, lambda: select_car(pool, N1, N2))
    seconds["report"], _ = best_of(1, lambda: SelectionReport.from_selection(pool, chosen))
    return seconds


def _original_way(found: Sequence[str], items: Sequence[dict[str, Any]]) -> dict[str, float]:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = revisions.default_encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = IQSModel(IQSConfig(encoder_config=AutoConfig.from_pretrained(folder))).eval()
    model.encoder.set_attn_implementation("eager")
    model.encoder.load_state_dict(AutoModel.from_pretrained(folder).state_dict(), strict=False)
    embedder = TextEmbedder()
    sentences = load_sentence_transformer(embedder.model_id, str(embedder.revision), "float32", device_for())
    seconds: dict[str, float] = {"load": 0.0}

    def score() -> np.ndarray:
        order, scores = np.argsort([len(text) for text in found]), np.empty(len(found))
        with torch.inference_mode():
            for start in range(0, len(order), 16):
                places = order[start : start + 16]
                batch = tokenizer(
                    [found[i] for i in places], padding=True, truncation=True, max_length=510, return_tensors="pt"
                )
                scores[places] = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0].numpy()
        return scores

    scoring, scores = best_of(1, score)
    embedding, vectors = best_of(1, lambda: np.stack([sentences.encode(text) for text in found]))
    seconds["score and embed"] = scoring + embedding
    k = int((len(found) / 2) ** 0.5)

    def cluster() -> np.ndarray:
        reduced = PCA(0.95, svd_solver="full", random_state=SEED).fit_transform(vectors)
        return KMeans(k, random_state=SEED).fit_predict(reduced)

    seconds["cluster"], labels = best_of(1, cluster)
    start = time.perf_counter()
    ranked = [{**items[i], "score": scores[i], "label": labels[i]} for i in np.argsort(-scores)]
    taken = ranked[:N1]
    for label in set(labels.tolist()):
        best = max((row for row in ranked if row["label"] == label), key=lambda row: row["score"])
        if best not in taken:
            taken.append(best)
    seconds["select"] = time.perf_counter() - start
    seconds["report"] = 0.0
    return seconds
