"""Mark duplicates: rows whose prompt and answer another, better row has too, word for word or with small edits.

Does: find equal texts by digests; let similar embeddings propose pairs and the words of prompt and answer decide; keep
the best-scored row of each group; say which sources or templates would lose much.
Does not: remove rows, or compute scores, embeddings or clusters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from datasets import Dataset
from datasets.table import InMemoryTable

from car_datasets.loading.schemas import Schema, find_schema
from car_datasets.loading.values import carried
from car_datasets.selection.marks.near_pairs import Pairs, near_pairs
from car_datasets.selection.marks.resembling import Signatures
from car_datasets.selection.marks.same_text import (
    Row,
    Sides,
    Weights,
    are_copies,
    digest_of,
    normalised,
    sides_of,
)
from car_datasets.selection.rule import ranks_of
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    Positions,
    check_columns,
    join_columns,
    read_clusters,
    read_numbers,
    refuse_no_embeddings,
    refuse_other_datasets,
    refuse_overwrite,
)
from car_datasets.utils.processes import from_main

DUPLICATE_COLUMNS = (ColumnNames.duplicate_of, ColumnNames.duplicate_similarity)
HOW = ("near", "exact")
SIMILARITY = 0.85  # cosine from which on two rows are compared by their words; small edits leave 0.87 or more
CONTAINMENT = 0.8  # share of the words, by weight, that the lighter of two texts must have in common with the other
READ = 1_000  # rows of text in memory at a time
SAMPLE = 20_000  # rows by which the words are weighed
TOGETHER = 1 << 20  # pairs whose texts are looked at together
PART = 1 << 14  # pairs that are compared together
GROUP, LOSS = 20, 0.3  # rows of a group, and the share of them lost, from which on the loss is told
COMPARED = 32  # pairs that are kept for a row: so many with the best-scored rows, and as many with the most similar


class Found(NamedTuple):
    """The duplicates of a dataset.

    Args:
        of (`(rows,)` int64): position of the row that is kept in place of this one, -1 for a row that is kept.
        similarity (`(rows,)` float32): cosine of the two, 1 for equal texts; NaN for a row that is kept.
    """

    of: Positions
    similarity: npt.NDArray[np.float32]


def mark_duplicates(
    dataset: Dataset,
    how: str = "near",
    *,
    names: ColumnNames = ColumnNames(),
    schema: str | Schema = "auto",
    columns: Mapping[str, str] | None = None,
    similarity: float = SIMILARITY,
    containment: float = CONTAINMENT,
) -> Dataset:
    """Return the dataset with the columns `duplicate_of` and `duplicate_similarity`.

    Example:
    ```python
    >>> marked = mark_duplicates(scored)
    >>> kept = marked.filter(lambda better: better is None, input_columns="duplicate_of")
    ```

    Of a group of duplicates the row with the best score stays; of equal scores, and without scores, the first. Each
    other row was compared with the row that it names, so that no chain of small steps joins different rows.

    Rows are equal if the texts of prompt and answer are, apart from case, white space, Unicode's forms and punctuation
    at the ends. They are near-duplicates if their embeddings are similar and, in the prompt and in the answer, the
    words of the lighter text are in the heavier one, by weight: a word that few rows have weighs more. Rows with
    another number, name or negation, or with another word in the same slot of a template, are not. The system prompts
    of duplicates are equal. The prompt of a chat is all that users and tools say, its answer all that the assistant
    says.

    Under a launcher, all processes call this; the main process computes, and all get the same dataset.

    Args:
        dataset (`Dataset`): rows of text. `"near"` needs embeddings; rows without one can only be equal to another.
            Scores are optional; a row without a score stays if no row of its group has one. Clusters are optional:
            without them, rows are compared within cells around rows evenly drawn from the dataset.
        how (`str`): `"near"`, or `"exact"`, which finds equal rows only and reads neither embeddings nor clusters.
        names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.
        schema (`str` or [`Schema`]): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`, *optional*): your names for the schema's columns, such as
            `{"response": "answer"}`.
        similarity (`float`): cosine in (0, 1] from which on the words of two rows are compared.
        containment (`float`): share of the lighter text's words in (0, 1] that must be in the heavier one, by weight.

    Returns:
        `Dataset`: all rows, with `duplicate_of`, the index of the row that is kept (its position if there is no column
        of indices), null for rows that are kept; and `duplicate_similarity`, float32, the cosine of the two rows, 1 if
        they are equal.

    Raises:
        ValueError: a column is missing or would be overwritten, no schema fits, an option is invalid, or embeddings or
            scores are.
    """
    refuse_other_datasets(dataset, "mark_duplicates", "mark_duplicates on a Dataset of its rows")
    if how not in HOW:
        raise ValueError(f"how={how!r} is not known; choose one of {HOW}.")
    for option, value in (("similarity", similarity), ("containment", containment)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise ValueError(f"{option}={value!r} must be a number above 0 and at most 1, such as {option}=0.8.")
    refuse_overwrite(dataset.column_names, DUPLICATE_COLUMNS, "dataset.rename_column(...) on them")
    known = schema if isinstance(schema, Schema) else find_schema(dataset.column_names, schema, columns or {})
    if how == "near":
        refuse_no_embeddings(dataset.column_names, names.embedding)
    scores = np.full(len(dataset), np.nan)
    if names.score in dataset.column_names:
        scores = read_numbers(dataset, names.score, np.nan)
    texts = _Texts(dataset, known)

    def compute() -> Found:
        ranks = ranks_of(scores)
        equal = _equal(texts, ranks)
        return _near(texts, names, ranks, equal, similarity, containment) if how == "near" else equal

    return join_columns(dataset, _as_columns(dataset, from_main(compute), names.index))


def duplicate_losses(
    dataset: Dataset,
    column: str | None = None,
    *,
    schema: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> list[str]:
    """Return in words which groups of rows would lose more than 30 % of their rows as duplicates, largest loss first.

    Such a loss is right where a source was added twice, and wrong where rows that share a template were taken for
    copies: look at some of these rows before you drop them.

    Args:
        dataset (`Dataset`): with the column `duplicate_of`, as [`mark_duplicates`] returns it.
        column (`str`, *optional*): column by whose values the rows are grouped, such as `"source"`; without it, rows
            are grouped by the first three words of their prompts, as those of a template.
        schema (`str`), columns (`Mapping[str, str]`, *optional*): as for [`mark_duplicates`]; read without `column`.

    Returns:
        `list[str]`: a sentence for each group of 20 or more rows that would lose so many; empty if none would.

    Raises:
        ValueError: a column is missing, or no schema fits.
    """
    refuse_other_datasets(dataset, "duplicate_losses", "duplicate_losses on a Dataset of its rows")
    check_columns(dataset.column_names, [DUPLICATE_COLUMNS[0], *([] if column is None else [column])], ())
    of = dataset.select_columns([DUPLICATE_COLUMNS[0]]).with_format("arrow")[:][DUPLICATE_COLUMNS[0]]
    lost = np.asarray(of.is_valid())
    if column is None:
        known = find_schema(dataset.column_names, schema, columns or {})
        groups = [_opening(sides) for sides in _Texts(dataset, known).all()]
    else:
        groups = [str(value) for value in dataset.select_columns([column]).with_format(None)[:][column]]
    codes, values = pd.factorize(np.array(groups, dtype=object))
    rows, losses = np.bincount(codes, minlength=1), np.bincount(codes, lost, minlength=1).astype(np.int64)
    wide = np.flatnonzero((rows >= GROUP) & (losses > LOSS * rows))
    what = "whose prompt begins with" if column is None else f"with {column}"
    return [
        f"{losses[i]:,} of {rows[i]:,} rows {what} {values[i]!r} are duplicates ({100 * losses[i] / rows[i]:.0f} %)."
        for i in sorted(wide.tolist(), key=lambda i: (-losses[i], i))
    ]


def _opening(sides: Sides | None) -> str:
    return "" if sides is None else " ".join(sides.prompt.split(None, 3)[:3])


def _as_columns(dataset: Dataset, found: Found, index: str) -> Dataset:
    """Return the two columns of the duplicates."""
    kept = found.of < 0
    of = pa.array(found.of, mask=kept)
    if index in dataset.column_names:
        values = dataset.select_columns([index]).with_format("arrow")[:][index]
        of = values.combine_chunks().take(of) if len(dataset) else values.combine_chunks()
    similarity = pa.array(found.similarity, mask=kept)
    return Dataset(InMemoryTable(pa.table([of, similarity], names=list(DUPLICATE_COLUMNS))))


class _Texts:
    """The texts of a dataset, read in batches or row by row.

    Args:
        dataset (`Dataset`): rows of text and other columns.
        schema ([`Schema`]): of these rows.
    """

    def __init__(self, dataset: Dataset, schema: Schema) -> None:
        read = [name for name in schema.read_columns if name in dataset.column_names]
        self.dataset, self.schema = dataset, schema
        self._rows = carried(dataset.select_columns(read).with_format(None))

    def __len__(self) -> int:
        return len(self._rows)

    def all(self) -> Iterator[Sides | None]:
        """Yield the text of every row, `None` for a row without text."""
        for batch in self._rows.iter(batch_size=READ):
            yield from sides_of(batch, self.schema)

    def at(self, rows: Iterable[int]) -> Iterator[Sides | None]:
        """Yield the texts of these rows."""
        wanted = list(rows)
        for start in range(0, len(wanted), READ):
            yield from sides_of(self._rows[wanted[start : start + READ]], self.schema)


def _equal(texts: _Texts, ranks: Positions) -> Found:
    """Return the rows whose text a better row has too."""
    digests = np.zeros((len(texts), 2), dtype=np.uint64)
    known = np.zeros(len(texts), dtype=bool)
    for row, sides in enumerate(texts.all()):
        if sides is not None and (normalised(sides.prompt) or normalised(sides.answer)):
            digests[row] = np.frombuffer(digest_of(sides), dtype="<u8")
            known[row] = True
    rows = np.flatnonzero(known)
    order = rows[np.lexsort((ranks[rows], digests[rows, 0], digests[rows, 1]))]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    best = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    of = np.full(len(texts), -1, dtype=np.int64)
    of[order[~new]] = best[~new]
    return Found(of, np.where(of < 0, np.float32(np.nan), np.float32(1)))


def _near(
    texts: _Texts, names: ColumnNames, ranks: Positions, equal: Found, similarity: float, containment: float
) -> Found:
    """Return the equal rows and the near-duplicates."""
    dataset = texts.dataset
    clusters = read_clusters(dataset, names.cluster) if names.cluster in dataset.column_names else None
    step = max(1, -(-len(dataset) // SAMPLE))
    weights = Weights(sides for sides in texts.at(range(0, len(dataset), step)) if sides is not None)
    candidates = _Candidates(texts, weights, ranks, containment)
    for pairs in _ahead(_together(near_pairs(dataset, names.embedding, clusters, equal.of >= 0, similarity))):
        candidates.add(pairs)
    of, found = equal.of.copy(), equal.similarity.copy()
    for row, kept, cosine in _decide(texts, weights, candidates, containment):
        of[row], found[row] = kept, cosine
    # A row that equals one which is a near-duplicate itself is compared with the row that stays through its equal.
    moved = np.flatnonzero((equal.of >= 0) & (of[equal.of] >= 0))
    of[moved], found[moved] = of[equal.of[moved]], found[equal.of[moved]]
    return Found(of, found)


def _together(parts: Iterable[Pairs]) -> Iterator[Pairs]:
    """Yield the same pairs in larger parts, each of `TOGETHER` pairs or more, except for the last."""
    waiting: list[Pairs] = []
    for pairs in parts:
        waiting.append(pairs)
        if sum(len(some.first) for some in waiting) >= TOGETHER:
            yield Pairs.joined(waiting)
            waiting = []
    if waiting:
        yield Pairs.joined(waiting)


def _ahead(parts: Iterator[Pairs]) -> Iterator[Pairs]:
    """Yield the same parts, computing the next one in a thread while the caller works on the last."""
    # A thread is enough: NumPy releases the interpreter lock during the matrix products that find the pairs.
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, parts, None)
        while (pairs := coming.result()) is not None:
            coming = pool.submit(next, parts, None)
            yield pairs


class _Candidates:
    """Pairs that may be duplicates, as signatures of their texts allow; few for each row.

    Args:
        texts ([`_Texts`]), weights ([`Weights`]): of the dataset.
        ranks (`(rows,)` int64): 1 for the row with the best score.
        containment (`float`): as for [`mark_duplicates`].
    """

    def __init__(self, texts: _Texts, weights: Weights, ranks: Positions, containment: float) -> None:
        self._texts, self._ranks, self._containment = texts, ranks, containment
        self._signatures, self._read = Signatures(len(texts), weights), np.zeros(len(texts), dtype=bool)
        self._kept = Pairs.none()

    @property
    def weights_of_texts(self) -> npt.NDArray[np.int32]:
        """Return the weights of prompts and answers, `(2, rows)`, of the rows that are in a pair."""
        return self._signatures.weight

    def add(self, pairs: Pairs) -> None:
        """Keep those of these pairs whose texts may be copies, a few for each row; many at a time, in any order."""
        near = np.zeros(len(self._texts), dtype=bool)
        near[pairs.first] = near[pairs.second] = True
        unread = np.flatnonzero(near & ~self._read).tolist()
        for row, sides in zip(unread, self._texts.at(unread), strict=True):
            if sides is not None:
                self._signatures.read(row, sides)
        self._read[unread] = True
        # A part at a time, which a processor's cache holds.
        parts = [pairs.at(slice(start, start + PART)) for start in range(0, len(pairs.first), PART)]
        alike = [self._signatures.may_be_copies(part.first, part.second, self._containment) for part in parts]
        first, second, cosines = Pairs.joined([part.at(some) for part, some in zip(parts, alike, strict=True)])
        swap = self._ranks[first] > self._ranks[second]
        better, worse = np.where(swap, second, first), np.where(swap, first, second)
        self._kept = _few(Pairs.joined([self._kept, Pairs(better, worse, cosines)]), self._ranks)

    def all(self) -> Pairs:
        """Return the pairs in the order of the worse row, and for each that of the better one."""
        better, worse, _ = self._kept
        order = np.lexsort((self._ranks[better], self._ranks[worse]))
        return self._kept.at(order)


def _few(pairs: Pairs, ranks: Positions) -> Pairs:
    """Return each pair once, and of each worse row those with the best-scored and with the most similar rows."""
    better, worse, cosines = pairs
    _, once = np.unique(worse * len(ranks) + better, return_index=True)
    better, worse, cosines = better[once], worse[once], cosines[once]
    kept = np.zeros(len(once), dtype=bool)
    for order in (np.lexsort((ranks[better], worse)), np.lexsort((ranks[better], -cosines, worse))):
        starts = np.flatnonzero(np.r_[True, worse[order][1:] != worse[order][:-1]]) if len(order) else order
        within = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
        kept[order[within < COMPARED]] = True
    return Pairs(better, worse, cosines).at(kept)


def _decide(
    texts: _Texts, weights: Weights, candidates: _Candidates, containment: float
) -> Iterator[tuple[int, int, float]]:
    """Yield a row, the row that is kept in its place, and their cosine, from the best-scored row down."""
    dropped: set[int] = set()
    pairs, known = candidates.all(), candidates.weights_of_texts
    for start in range(0, len(pairs.first), PART):
        part = pairs.at(slice(start, start + PART))
        numbers = np.unique(np.concatenate([part.first, part.second]))
        rows = {
            row: Row.of(sides, weights, weight)
            for row, sides, weight in zip(
                numbers.tolist(), texts.at(numbers), zip(*known[:, numbers].tolist(), strict=True), strict=True
            )
            if sides is not None
        }
        for kept, row, cosine in zip(part.first.tolist(), part.second.tolist(), part.cosines.tolist(), strict=True):
            if row in dropped or kept in dropped:
                continue
            if are_copies(rows[kept], rows[row], weights, containment):
                dropped.add(row)
                yield row, kept, cosine
