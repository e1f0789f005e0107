"""Compare texts through MiniLM with `SentenceTransformer.encode`, the limit of the processor, and the tokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from car_datasets import QualityScorer, TextEmbedder
from car_datasets.scoring.batching import tokenise
from car_datasets.scoring.embedder import load_sentence_transformer
from car_datasets.utils.processes import device_for
from tests.benchmarks.table import Line, best_of
from tests.benchmarks.texts import texts

COUNT = 2_000


def measure() -> Iterator[Line]:
    """Measure C1, C2 and F1 of the targets, and the time of a loop that a user would write."""
    kind, found = texts(COUNT)
    scorer, embedder = QualityScorer(), TextEmbedder()
    both = QualityScorer(embedding_column="embedding")
    sentences = load_sentence_transformer(embedder.model_id, str(embedder.revision), "float32", device_for())
    loaded = scorer.load()
    for warm in (embedder.embed_texts, scorer.score_texts, both.score_texts, sentences.encode):
        warm(found[:64])

    theirs, _ = best_of(1, lambda: sentences.encode(found))
    embedding, _ = best_of(1, lambda: embedder.embed_texts(found))
    what = f"embed {COUNT:,} {kind}"
    met = embedding <= theirs / 1.5
    yield Line(f"C1: {what}; compared with SentenceTransformer.encode", embedding, theirs, target="<= 1/1.5", met=met)
    one, _ = best_of(1, lambda: [sentences.encode(text) for text in found])
    yield Line(f"{what}; compared with encode, text by text, as CaR's cluster.py", embedding, one)
    scoring, _ = best_of(1, lambda: scorer.score_texts(found))
    passes, _ = best_of(1, lambda: both.score_texts(found))
    yield Line(f"score and {what} in one pass; compared with both apart", passes, scoring + embedding)
    tokenising, tokens = best_of(2, lambda: tokenise(loaded.tokenizer, found, 512))
    lengths = [len(ids) for ids in tokens.ids]
    rate, limit = flop(lengths, loaded.model.config.encoder_config) / scoring / 1e9, sgemm()
    what = f"C2: score {COUNT:,} {kind}, real tokens only; compared with a matrix product 2048 x 384 x 1536"
    yield Line(what, rate, limit, "GFLOP/s", ">= 0.6", rate >= 0.6 * limit)
    slower = max(tokenising, scoring - tokenising)  # the model waits for the first window of texts, here the only one
    met = scoring <= 1.1 * slower
    yield Line(
        "F1: text to score; compared with the slower of tokenizer and model", scoring, slower, target="<= 1.10", met=met
    )
    ordinary, _ = best_of(2, lambda: loaded.tokenizer(found, truncation=False, verbose=False)["input_ids"])
    yield Line(f"tokenise {sum(lengths):,} tokens; compared with tokenizer(...)", tokenising, ordinary)


def flop(lengths: list[int], config: object) -> float:
    """Count multiplications and additions of the encoder's matrix products without padding (facts: 2 (4 h^2 + 2 h f) + 4 s h)."""
    h, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    return float(sum(layers * (2 * (4 * h * h + 2 * h * f) * s + 4 * s * s * h) for s in lengths))


def sgemm(seconds: float = 2.0) -> float:
    """Return the GFLOP/s of a matrix product of the encoder's shape, in float32."""
    a, b = torch.randn(2048, 384), torch.randn(384, 1536)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.mm(a, b)
        done += 1
    return done * 2 * 2048 * 384 * 1536 / (time.perf_counter() - start) / 1e9
