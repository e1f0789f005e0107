"""Rows as chat messages, in TRL's conversational prompt-completion form, and the groups that they fall into.

Does: turn loaded rows into messages; identify a row by what it says; find a column of sources or the kinds of tasks;
shuffle the words of an answer.
Does not: load, choose or tokenise rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features, Value

from car_datasets.loading.kinds import kinds_of
from car_datasets.loading.schemas import Schema, conversations_of
from car_datasets.loading.values import carried
from car_datasets.scoring.conversations import as_example
from car_datasets.utils.columns import check_columns

CountTokens = Callable[[Sequence[Mapping[str, Any]]], Sequence[int]]  # rows of messages to tokens of their answers
GROUP_COLUMNS = ("source", "dataset", "subset", "category", "domain", "task")  # usual names of a column of sources
MOST_GROUPS = 100  # values of such a column; one with more is taken for free text
MESSAGES = [{"role": Value("string"), "content": Value("string")}]
BATCH = 1_000  # rows that are read at a time
UNSPACED = 20  # mean characters of a word from which on a text is taken for a script without spaces


def as_examples(dataset: Dataset, schema: Schema) -> tuple[Dataset, list[str]]:
    """Return the rows as messages, and what is wrong with each.

    Args:
        dataset (`Dataset`), schema ([`Schema`]): loaded rows, and how they are read.

    Returns:
        `Dataset`, `list[str]`: `prompt` and `completion` of every row; and `"unreadable"`, `"empty answer"`, or `""`
        for a row that can be used.
    """
    examples: dict[str, list[list[dict[str, str]]]] = {"prompt": [], "completion": []}
    problems: list[str] = []
    for batch in carried(dataset.select_columns(list(schema.read_columns)).with_format(None)).iter(batch_size=BATCH):
        for turns in conversations_of(batch, schema):
            prompt, completion = ([], []) if isinstance(turns, str) else as_example(turns)
            examples["prompt"].append(prompt)
            examples["completion"].append(completion)
            answered = bool(completion) and bool(completion[0]["content"].strip())
            problems.append("" if answered else "empty answer" if completion else "unreadable")
    return Dataset.from_dict(examples, features=Features({"prompt": MESSAGES, "completion": MESSAGES})), problems


def digest_of(row: Mapping[str, Any]) -> str:
    """Return the sha256 of the messages of a row, without differences in white space and case.

    Args:
        row (`Mapping`): `prompt` and `completion`, lists of messages.
    """
    texts = [f"{m['role']}:{' '.join(m['content'].lower().split())}" for m in (*row["prompt"], *row["completion"])]
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def count_by_batch(rows: Dataset, count_tokens: CountTokens) -> npt.NDArray[np.int64]:
    """Return the tokens of every answer, counted batch by batch.

    Args:
        rows (`Dataset`): `prompt` and `completion`, lists of messages.
        count_tokens (`Callable`): counts those of a list of rows.

    Returns:
        `(rows,)` int64.
    """
    rows = rows.select_columns(["prompt", "completion"])
    starts = range(0, len(rows), BATCH)
    parts = [count_tokens(rows.select(range(at, min(at + BATCH, len(rows)))).to_list()) for at in starts]
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def shuffle_words(text: str, rng: np.random.Generator) -> str:
    """Return a text with its words in another order, in which none keeps its place, with one space between them.

    The characters are shuffled in a script that has no spaces between words. One word alone stays as it is.

    Args:
        text (`str`): an answer.
        rng (`Generator`): draws the order.
    """
    words, space = text.split(), " "
    if len(text) > UNSPACED * len(words):
        words, space = list("".join(words)), ""
    order = rng.permutation(len(words)).tolist()
    moved = dict(zip(order, [*order[1:], *order[:1]], strict=True))
    return space.join(words[moved[place]] for place in range(len(words)))


def find_groups(rows: Dataset, usual: Sequence[str], wanted: str | None) -> str:
    """Return the column by which rows are grouped, or `""` if there is none.

    Args:
        rows (`Dataset`): as they were loaded.
        usual (`Sequence[str]`): usual names of such columns; the first that holds 2 to `MOST_GROUPS` texts is taken.
        wanted (`str`, *optional*): the column that was asked for.

    Raises:
        ValueError: the column that was asked for is not there.
    """
    if wanted is not None:
        check_columns(rows.column_names, (wanted,), ())
        return wanted
    texts = [n for n in usual if getattr(rows.features.get(n), "dtype", "") in ("string", "large_string")]
    return next((name for name in texts if 2 <= len(rows.unique(name)) <= MOST_GROUPS), "")


def kinds_of_rows(rows: Dataset) -> list[str]:
    """Return the kind of task of every row, from its last question and its answer.

    Args:
        rows (`Dataset`): `prompt` and `completion`, lists of messages.
    """
    kinds: list[str] = []
    for batch in rows.select_columns(["prompt", "completion"]).iter(batch_size=BATCH):
        asked = [next((m["content"] for m in reversed(p) if m["role"] == "user"), "") for p in batch["prompt"]]
        kinds += kinds_of(asked, [completion[0]["content"] for completion in batch["completion"]])
    return kinds
