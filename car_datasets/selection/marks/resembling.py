"""Rule out rows that cannot be copies, by hashes of their words alone: `resembling_rows` and `Signatures`.

Does: return the old rows that have many n-grams of new ones; refuse most pairs of rows by bits for their words, many at
a time.
Does not: embed, or decide which rows are duplicates.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from car_datasets.loading.schemas import Schema
from car_datasets.loading.values import carried
from car_datasets.selection.marks.same_text import (
    CONTENT,
    KNOWN,
    LONG,
    Sides,
    Weights,
    number_of,
    sides_of,
    tokens_of,
)
from car_datasets.utils.item_index import words_of

if TYPE_CHECKING:
    from datasets import Dataset

GRAM = 4  # words of an n-gram
SHARED = 0.3  # share of its n-grams that an old row has in common with new rows
READ = 1_000  # rows of text in memory at a time

_WIDTH = 4  # numbers of 64 bits, a bit for each word that says what a text is about; half are for hardly known words
_START = 4  # letters by which a word is known here, as its forms have these in common
_HALF = 32 * _WIDTH
Bits = npt.NDArray[np.uint64]


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
    rows: list[int] = []
    if len(grams) == 0:  # no new row has words
        return np.array(rows, dtype=np.int64)
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


class Signatures:
    """Bits and sizes of rows, by which most pairs that [`are_copies`] refuses are refused, millions in a second.

    Args:
        rows (`int`): how many rows there are.
        weights ([`Weights`]): of the words in this pool.
    """

    def __init__(self, rows: int, weights: Weights) -> None:
        self._weights = tuple(_Found(partial(weights.of_word, side)) for side in (0, 1))
        self._bits = tuple(_Found(partial(_bit_of, weights, side)) for side in (0, 1))
        self.content = np.zeros((2, rows, _WIDTH), dtype=np.uint64)
        self.marks = np.zeros((2, rows), dtype=np.uint64)
        self.weight = np.full((2, rows), -1, dtype=np.int32)  # -1 for a row whose text was not read, or that has none
        self.system = np.zeros(rows, dtype=np.uint32)

    def read(self, row: int, sides: Sides) -> None:
        """Keep what is needed of a row's text.

        Args:
            row (`int`): its position.
            sides ([`Sides`]): its text.
        """
        self.system[row] = number_of(sides.system)
        for side, text in enumerate(sides[1:]):
            words, marks = tokens_of(text)
            bits = reduce(or_, map(self._bits[side].__getitem__, set(words)), 0)
            self.content[side, row] = np.frombuffer(bits.to_bytes(8 * _WIDTH, "little"), dtype="<u8")
            if marks:
                self.marks[side, row] = reduce(or_, (1 << _hash(mark) % 64 for mark in marks))
            self.weight[side, row] = sum(map(self._weights[side].__getitem__, words))

    def may_be_copies(self, one: Any, other: Any, containment: float) -> npt.NDArray[np.int64]:
        """Return the places of the pairs that [`are_copies`] may accept.

        Args:
            one (`(pairs,)` int64), other (`(pairs,)` int64): positions in the rows.
            containment (`float`): as for [`are_copies`].

        Returns:
            `(places,)` int64: ascending.
        """
        places = np.arange(len(one))
        # The cheapest test first, and each of the pairs that the ones before have left.
        for test in (self._have_text, self._keep_the_question, self._keep_marks, partial(self._contain, containment)):
            places = places[test(one[places], other[places])]
        return places

    def _have_text(self, one: Any, other: Any) -> npt.NDArray[np.bool_]:
        equal = self.system[one] == self.system[other]
        return np.asarray(equal & (self.weight[0][one] >= 0) & (self.weight[0][other] >= 0), dtype=bool)

    def _keep_the_question(self, one: Any, other: Any) -> npt.NDArray[np.bool_]:
        """Return False where another word replaces one of the prompt, and the answers are not long."""
        ours, theirs = self.content[0][one], self.content[0][other]
        shared = ours & theirs
        (known, hardly), (known_there, hardly_there) = (
            [_count(bits[:, part]) for part in (slice(0, _WIDTH // 2), slice(_WIDTH // 2, None))]
            for bits in (ours ^ shared, theirs ^ shared)
        )
        # What is missing on both sides, and cannot be a known word and a misspelling of it.
        misspelled = np.minimum(known, hardly_there) + np.minimum(hardly, known_there)
        swapped = np.minimum(known + hardly, known_there + hardly_there) > misspelled
        kept = ~swapped
        rest = np.flatnonzero(swapped)
        kept[rest] = np.minimum(self.weight[1][one[rest]], self.weight[1][other[rest]]) >= LONG
        return kept

    def _keep_marks(self, one: Any, other: Any) -> npt.NDArray[np.bool_]:
        """Return False where each of two texts has a number or a sign that the other lacks."""
        ours, theirs = self.marks[:, one], self.marks[:, other]
        return np.asarray(~(((ours & ~theirs) != 0) & ((theirs & ~ours) != 0)).any(axis=0), dtype=bool)

    def _contain(self, containment: float, one: Any, other: Any) -> npt.NDArray[np.bool_]:
        """Return False where the heavier text lacks too much of the lighter one."""
        kept = np.ones(len(one), dtype=bool)
        for side in (0, 1):
            sizes = self.weight[side][one], self.weight[side][other]
            ours, theirs = self.content[side][one], self.content[side][other]
            lacks = [_count(bits) for bits in (ours & ~theirs, theirs & ~ours)]
            lacking = np.where(sizes[0] < sizes[1], *lacks)
            lacking = np.where(sizes[0] == sizes[1], np.minimum(*lacks), lacking)
            # One word may be a misspelling of one that is there.
            kept &= (lacking - 1) * CONTENT <= (1 - containment) * np.minimum(*sizes)
        return kept


class _Found(dict[str, int]):
    """What a function returned for words, which is called once for each."""

    def __init__(self, find: Callable[[str], int]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, word: str) -> int:
        found = self[word] = self._find(word)
        return found


def _bit_of(weights: Weights, side: int, word: str) -> int:
    """Return a number with the bit of a word, 0 for one that says little."""
    if weights.of_word(side, word) < CONTENT:
        return 0
    # A misspelling is hardly known and the word itself is known, so their bits are in different halves.
    return 1 << (_hash(word[:_START]) % _HALF + (_HALF if weights.found[side][word] < KNOWN else 0))


def _hash(word: str) -> int:
    # Python's own hash of a text differs from process to process.
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _count(words: Bits) -> npt.NDArray[np.int64]:
    """Return how many bits are set in each row of some words of 64 bits."""
    counts = np.zeros(len(words), dtype=np.int64)
    for column in words.T:
        # Sums of 2, 4 and 8 neighbouring bits, and then of all bytes.
        bits = column - ((column >> np.uint64(1)) & _PAIRS)
        bits = (bits & _FOURS) + ((bits >> np.uint64(2)) & _FOURS)
        bits = (bits + (bits >> np.uint64(4))) & _BYTES
        counts += ((bits * _ONES) >> np.uint64(56)).astype(np.int64)
    return counts


_PAIRS, _FOURS, _BYTES, _ONES = (np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0f", "01"))
