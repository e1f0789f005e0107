"""Find rows of a pool that equal or resemble evaluation rows.

Does: compare messages by content, by shared word n-grams of prompt and of answer, and by embeddings that are there.
Does not: remove rows, or embed the rows of the pool.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from car_datasets.scoring.stage import Stage
from car_datasets.utils.columns import as_arrow, embedding_batches, matrix_of, unit_rows

Indices = npt.NDArray[np.int64]
Messages = Sequence[Mapping[str, str]]
GRAM = 3  # words
CONTAINED = 0.8  # share of the shorter text's n-grams that are in the other, in prompt and in answer
ALIKE = 0.95  # cosine of two embeddings from which on rows are taken for near-duplicates
BATCH = 1_000
_WORD = re.compile(r"\w+")


class Overlap(NamedTuple):
    """Rows of a pool that are in an evaluation set; a row is in the first group that fits.

    Args:
        equal (`(n,)` int64): the same words in prompt and answer.
        near (`(n,)` int64): at least `CONTAINED` of the n-grams of prompt and of answer in common.
        asked (`(n,)` int64): the same words in the prompt, and another answer.
        evaluation (`set[int]`): the evaluation rows that have an equal or a near row in the pool.
    """

    equal: Indices
    near: Indices
    asked: Indices
    evaluation: set[int]


class _Grams(NamedTuple):
    prompt: frozenset[tuple[str, ...]]
    answer: frozenset[tuple[str, ...]]


def find_overlap(rows: Dataset, evaluation: Dataset) -> Overlap:
    """Return which rows of a pool are in an evaluation set.

    Args:
        rows (`Dataset`), evaluation (`Dataset`): `prompt` and `completion`, lists of messages.
    """
    known = [_words(row["prompt"], row["completion"]) for row in evaluation]
    by_prompt: dict[tuple[str, ...], list[int]] = defaultdict(list)
    by_gram: dict[tuple[str, ...], list[int]] = defaultdict(list)
    grams = [_Grams(_grams(prompt), _grams(answer)) for prompt, answer in known]
    for i, (prompt, _) in enumerate(known):
        by_prompt[prompt].append(i)
        for gram in grams[i].prompt:
            by_gram[gram].append(i)
    found: dict[str, list[int]] = {"equal": [], "near": [], "asked": []}
    hit: set[int] = set()
    position = 0
    for batch in rows.select_columns(["prompt", "completion"]).iter(batch_size=BATCH):
        for messages, completion in zip(batch["prompt"], batch["completion"], strict=True):
            prompt, answer = _words(messages, completion)
            same = by_prompt.get(prompt, [])
            equal = [i for i in same if known[i][1] == answer]
            near = [] if equal else _near(prompt, answer, grams, by_gram)
            hit.update(equal, near)
            if equal or near or same:
                found["equal" if equal else "near" if near else "asked"].append(position)
            position += 1
    groups = [np.array(positions, dtype=np.int64) for positions in found.values()]
    return Overlap(groups[0], groups[1], groups[2], hit)


def find_alike(rows: Dataset, column: str, evaluation: Dataset, embedder: Stage) -> Indices:
    """Return the rows of a pool whose embedding is nearly that of an evaluation row, ascending.

    Args:
        rows (`Dataset`), column (`str`): the pool, and its column of embeddings.
        evaluation (`Dataset`): `prompt` and `completion`, lists of messages.
        embedder ([`Stage`]): the one that embedded the pool, reading these two columns.
    """
    name = embedder.output_columns[0]
    batches = evaluation.select_columns(["prompt", "completion"]).iter(batch_size=BATCH)
    known, _ = matrix_of(as_arrow([v for batch in batches for v in embedder(batch)[name]]), name)
    known = unit_rows(known)
    found = [at[(unit_rows(part) @ known.T).max(axis=1) >= ALIKE] for part, at in embedding_batches(rows, column)]
    return np.concatenate([*found, np.zeros(0, dtype=np.int64)])


def _words(prompt: Messages, completion: Messages) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of a prompt, without system prompts, and of an answer."""
    # A system prompt is shared by all rows of a source, and would make them alike.
    asked = " ".join(message["content"] for message in prompt if message["role"] != "system")
    said = " ".join(message["content"] for message in completion)
    return tuple(_WORD.findall(asked.lower())), tuple(_WORD.findall(said.lower()))


def _grams(words: tuple[str, ...]) -> frozenset[tuple[str, ...]]:
    """Return the word n-grams of a text; the entire text, if it is shorter than one."""
    return frozenset(words[i : i + GRAM] for i in range(max(1, len(words) - GRAM + 1)))


def _near(
    prompt: tuple[str, ...],
    answer: tuple[str, ...],
    known: Sequence[_Grams],
    by_gram: Mapping[tuple[str, ...], Sequence[int]],
) -> list[int]:
    """Return the evaluation rows that share most of their prompt and of their answer with a row."""
    asked = _grams(prompt)
    shared = Counter(i for gram in asked for i in by_gram.get(gram, ()))
    alike = [i for i, n in shared.items() if n >= CONTAINED * min(len(asked), len(known[i].prompt))]
    if not alike:
        return []
    said = _grams(answer)
    return [i for i in alike if len(said & known[i].answer) >= CONTAINED * min(len(said), len(known[i].answer))]
