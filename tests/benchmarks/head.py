"""Measure the cost of the embedded scorer's head: forward passes with it and without, in turn, on the same batches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import torch

from car_datasets import IQSModel
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring.batching import CPU_BUDGET, pad, token_batches, tokenise
from car_datasets.utils import files, revisions
from tests.benchmarks.table import Line

ROUNDS = 3


def measure() -> Iterator[Line]:
    """Take the shipped sample's 384 rows, and the least of several rounds each."""
    from transformers import AutoTokenizer

    rows = json.loads(files.sample_file().read_text(encoding="utf-8"))
    texts = [render(Exchange(row["instruction"], row["input"], row["output"])) for row in rows]
    model = IQSModel.from_pretrained(revisions.default_scorer_folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    found = tokenise(tokenizer, [t.whole for t in texts], 512, [len(t.question) + 1 for t in texts])
    batches = []
    for places in token_batches([len(ids) for ids in found.ids], CPU_BUDGET):
        padded = pad([found.ids[i] for i in places], tokenizer.pad_token_id, torch.device("cpu"))
        batches.append((*padded, torch.tensor([found.answer_starts[i] for i in places])))
    seconds: dict[str, list[float]] = {"head": [], "bare": []}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for input_ids, mask, answer_start in batches:
                model.member_scores(input_ids, mask, answer_start)
            middle = time.perf_counter()
            for input_ids, mask, _ in batches:
                model.encoder(input_ids=input_ids, attention_mask=mask)
            seconds["head"].append(middle - start)
            seconds["bare"].append(time.perf_counter() - middle)
    bare = min(seconds["bare"])
    tokens = sum(found.lengths)
    ours = min(seconds["head"])
    what = f"encoder and head compared with the bare encoder, {len(texts)} texts, {tokens:,} tokens"
    yield Line(what, ours, bare, target="<= 1.3 times", met=ours <= 1.3 * bare)
