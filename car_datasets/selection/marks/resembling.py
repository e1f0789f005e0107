"""Find the old rows that may be copies of new ones, by their words alone: `resembling_rows`.

Does: hash the word n-grams of new rows; return the old rows that have many of them.
Does not: embed, or decide which rows are duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from car_datasets.loading.schemas import Schema
from car_datasets.loading.values import carried
from car_datasets.selection.marks.same_text import sides_of
from car_datasets.utils.item_index import words_of

if TYPE_CHECKING:
    from datasets import Dataset

GRAM = 4  # words of an n-gram
SHARED = 0.3  # share of its n-grams that an old row has in common with new rows
READ = 1_000  # rows of text in memory at a time


def resembling_rows(old: Dataset, new: Dataset, schema: Schema) -> npt.NDArray[np.int64]:
    """Return the positions of the old rows that share many n-grams of words with new rows; all others differ too much.

    Args:
        old, new (`Dataset`), schema ([`Schema`]): rows, and how both are read.

    Returns:
        `(found,)` int64: positions in `old`, in order.
    """
    numbers: dict[str, int] = {}
    codes = np.random.default_rng(4).integers(1, 1 << 63, 1, dtype=np.uint64)
    known: list[npt.NDArray[np.uint64]] = []
    for words in _words(new, schema):
        ids = [numbers.setdefault(word, len(numbers) + 1) for word in words]
        known.append(_grams(np.array(ids, dtype=np.uint64), codes[0]))
    grams = np.unique(np.concatenate([*known, np.zeros(0, dtype=np.uint64)]))
    rows = []
    for row, words in enumerate(_words(old, schema)):
        found = _grams(np.array([numbers.get(word, 0) for word in words], dtype=np.uint64), codes[0])
        at = np.searchsorted(grams, found)
        if len(found) and np.mean(grams[np.minimum(at, len(grams) - 1)] == found) >= SHARED:
            rows.append(row)
    return np.array(rows, dtype=np.int64)


def _grams(ids: npt.NDArray[np.uint64], base: np.uint64) -> npt.NDArray[np.uint64]:
    """Return hashes of the n-grams of a text; of one that is shorter, of all of it."""
    length = min(GRAM, len(ids))
    hashes = np.zeros(max(0, len(ids) - length + 1) if length else 0, dtype=np.uint64)
    for start in range(length):
        hashes = hashes * (base | np.uint64(1)) + ids[start : start + len(hashes)]
    return hashes


def _words(rows: Dataset, schema: Schema) -> Iterator[list[str]]:
    """Yield the words of each row, prompt and answer."""
    read = [name for name in schema.read_columns if name in rows.column_names]
    for batch in carried(rows.select_columns(read).with_format(None)).iter(batch_size=READ):
        for sides in sides_of(batch, schema):
            yield [] if sides is None else words_of(f"{sides.prompt}\n{sides.answer}")
