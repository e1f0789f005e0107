"""`Overview`: a pool and its selection as arrays, shared by all reports, with two control samples.

Does: read scores, clusters, lengths and statuses once; find the selected rows in the pool; draw controls and samples.
Does not: read text, compute a figure, or draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from car_datasets.clustering.fitting import number_of_clusters
from car_datasets.selection.marks.exclusions import excluded_from
from car_datasets.selection.rule import (
    BY_BOTH,
    BY_CLUSTER,
    BY_LIKE,
    BY_PIN,
    BY_SCORE,
    SELECTION_COLUMNS,
    Indices,
    ranks_of,
    ranks_within,
    refuse_infinite,
)
from car_datasets.selection.strata import read_strata
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import (
    Matrix,
    check_columns,
    count_vectors,
    embedding_batches,
    is_text,
    read_clusters,
    read_embeddings,
    read_numbers,
)
from car_datasets.utils.settings import SEED

if TYPE_CHECKING:
    from datasets import Dataset

Floats = npt.NDArray[np.float64]
LENGTH_BINS = 20  # in each, the length-matched control has as many rows as the selection


class Asked(NamedTuple):
    """What a recipe asked of the selection, as far as reports tell it.

    Args:
        n2 (`int`): rows from every cluster.
        k (`int` or `"sqrt"`): clusters.
        groups (`str`, *optional*): the column among whose values the budget is shared out.
        tokens (`bool`): True for a budget in tokens.
        within (`str`, *optional*): the column within whose values the rows are ranked, other than that of languages.
    """

    n2: int
    k: int | str
    groups: str | None = None
    tokens: bool = False
    within: str | None = None


@dataclass(frozen=True, eq=False)
class Overview:
    """A pool and its selection, with one array entry per row of the pool.

    Args:
        pool (`Dataset`): scored and clustered, without a format. Its embedding column is read only on request.
        names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.
        scores (`(rows,)` float64): NaN for a row without a score.
        clusters (`(rows,)` int64): -1 for a row without a cluster.
        lengths (`(rows,)` float64): length of every row in `length_unit`.
        length_unit (`str`): `"tokens"` of the scored text, or `"characters"` of the row's strings.
        ranking (`(rows,)` float64): what the rows are ranked by: the scores, or their ranks within languages or others.
        excluded (`(rows,)` str): why a row could not be selected: `"drop"`, `"contaminated"`, `"duplicate"`, or `""`.
        languages (`pyarrow.Array`, *optional*): the language of every row; `None` if the names have no such column.
        statuses (`pyarrow.Array`, *optional*): the scorer's status of every row; `None` if the pool has no such column.
        ids (`pyarrow.Array`, *optional*): the index column; `None` if rows are named by their position.
        positions (`(selected,)` int64): the selected rows, in the order of the selection.
        selected_by (`(selected,)` str): `"score"`, `"cluster"` or `"both"` for each of them.
        random_control, length_matched_control (`(selected,)` int64): rows of the pool.
        seed (`int`): seed of the controls, of samples and of the map.
        asked ([`Asked`], *optional*): by the recipe that made the selection; `None` if no recipe is known.
    """

    pool: Dataset
    names: ColumnNames
    scores: Floats
    clusters: Indices
    lengths: Floats
    length_unit: str
    ranking: Floats
    excluded: npt.NDArray[np.str_]
    languages: pa.Array | None
    statuses: pa.Array | None
    ids: pa.Array | None
    positions: Indices
    selected_by: npt.NDArray[np.str_]
    random_control: Indices
    length_matched_control: Indices
    seed: int
    asked: Asked | None = None

    @classmethod
    def of(
        cls,
        pool: Dataset,
        selected: Dataset,
        *,
        names: ColumnNames = ColumnNames(),
        seed: int = SEED,
        asked: Asked | None = None,
    ) -> Overview:
        """Read the columns of a pool and of the rows selected from it.

        Args:
            pool (`Dataset`): scored and clustered. Without an index column its rows are named by their position.
            selected (`Dataset`): the rows that [`select_car`] took from it, with `selected_by` and the index column.
            names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.
            seed (`int`): for the two control samples.
            asked ([`Asked`], *optional*): by the recipe that made the selection. Without it, n2 and k are what the rows
                show.

        Raises:
            ValueError: a selected row is not in the pool, a score is infinite, or a column is missing.
        """
        check_columns(pool.column_names, (names.score, names.cluster), ())
        check_columns(selected.column_names, (names.index, "selected_by"), ())
        pool, selected = pool.with_format(None), selected.with_format(None)
        scores = read_numbers(pool, names.score, np.nan)
        refuse_infinite(scores, names.score)
        lengths, unit = row_lengths(pool, names)
        positions = positions_in_pool(pool, selected, names.index)
        random, matched = draw_controls(lengths, positions, np.flatnonzero(~np.isnan(scores)), seed)
        return cls(
            pool=pool,
            names=names,
            scores=scores,
            clusters=read_clusters(pool, names.cluster),
            lengths=lengths,
            length_unit=unit,
            ranking=_ranking(pool, selected, names, scores, positions),
            excluded=excluded_from(pool, positions),
            languages=_column(pool, names.language),
            statuses=_column(pool, names.status),
            ids=_column(pool, names.index),
            positions=positions,
            selected_by=np.array(selected["selected_by"][:], dtype=np.str_),
            random_control=random,
            length_matched_control=matched,
            seed=seed,
            asked=asked,
        )

    # columns that are read on request ---------------------------------------------------------------------------------

    @cached_property
    def user_columns(self) -> list[str]:
        """Return the pool's columns that no stage added."""
        names = self.names
        added = {names.score, names.within, names.cluster, names.index, names.embedding, names.language}
        added |= {*names.diagnostics, *names.marks, *SELECTION_COLUMNS}
        return [column for column in self.pool.column_names if column not in added]

    @cached_property
    def embedded(self) -> int:
        """Return the number of rows that have an embedding; 0 if the pool has no embedding column."""
        return count_vectors(self.pool, self.names.embedding)

    def embedding_batches(self) -> Iterator[tuple[Matrix, Indices]]:
        """Yield the embeddings in float32 batches with the positions of their rows.

        Every call reads the column again, batch by batch, because it may be larger than memory.

        Raises:
            ValueError: the pool has no embedding column, or one that does not hold finite vectors of one length.
        """
        return embedding_batches(self.pool, self.names.embedding)

    def embeddings_of(self, rows: Indices) -> tuple[Matrix, Indices]:
        """Return the embeddings of some rows as one float32 matrix, and which of `rows` (by index) have one.

        Both are empty if none of the rows has an embedding.

        Raises:
            ValueError: the embedding column does not hold finite vectors of one length.
        """
        some = self.pool.select(rows.tolist())
        if count_vectors(some, self.names.embedding) == 0:
            return np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int64)
        return read_embeddings(some, self.names.embedding)

    # figures that follow from the arrays ------------------------------------------------------------------------------

    @cached_property
    def scored(self) -> Indices:
        """Return the positions of the rows that have a score."""
        return np.flatnonzero(~np.isnan(self.scores))

    @cached_property
    def taken(self) -> npt.NDArray[np.bool_]:
        """Return a mask over the pool that is True for selected rows."""
        mask = np.zeros(len(self.scores), dtype=bool)
        mask[self.positions] = True
        return mask

    @cached_property
    def cluster_count(self) -> int:
        """Return the number of clusters that have rows in the pool."""
        return count_clusters(self.clusters)

    @cached_property
    def k(self) -> int:
        """Return the k of the selection: the number of clusters that were fitted, of which some may have no rows."""
        # For a dataset not made by `curate`, k is unknown: use the number of clusters that have rows.
        if self.asked is None:
            return self.cluster_count
        # The rows that have a cluster are those that k-means was fitted on, from which "sqrt" follows.
        return number_of_clusters(self.asked.k, int(np.count_nonzero(self.clusters >= 0)))

    @cached_property
    def by_score(self) -> int:
        """Return the n1 of the selection: the number of rows taken by score, also where a budget or share gave it."""
        return int(np.count_nonzero(self.selected_by != BY_CLUSTER))

    @cached_property
    def by_like(self) -> int:
        """Return the number of rows that were taken for their likeness to examples."""
        return int(np.count_nonzero(self.selected_by == BY_LIKE))

    @cached_property
    def by_cluster(self) -> int:
        """Return the n2 of the selection: the number of rows taken from every cluster that has so many."""
        picks = self.positions[np.isin(self.selected_by, (BY_CLUSTER, BY_BOTH))]
        most = int(self.cluster_ranks[picks].max()) if len(picks) else 0
        # For a dataset not made by `curate`, n2 is unknown: use the largest number taken from one cluster. The published
        # rule takes one row for n2 = 0, and accepts an n2 above the number of rows.
        return most if self.asked is None else max(most, min(self.asked.n2, self.eligible_rows))

    @cached_property
    def score_ranks(self) -> Indices:
        """Return the rank of every row in the pool, 1 for the best; ties by row order, rows that have none last."""
        return ranks_of(self.eligible)

    @cached_property
    def eligible(self) -> Floats:
        """Return what the rows are ranked by, NaN for those that could not be selected."""
        return np.where(self.excluded == "", self.ranking, np.nan) if self.excluded.any() else self.ranking

    @cached_property
    def rules(self) -> frozenset[str]:
        """Return the reasons for which rows were selected."""
        return frozenset(self.selected_by.tolist())

    @cached_property
    def bounded(self) -> bool:
        """Return True if bounds other than numbers of rows decided as well: shares of groups, tokens, pinned rows."""
        return BY_PIN in self.rules or (self.asked is not None and (self.asked.tokens or self.asked.groups is not None))

    @cached_property
    def is_within_languages(self) -> bool:
        """Return True if the rows were ranked within their languages, and not within the values of another column."""
        other = None if self.asked is None else self.asked.within
        is_ranked = self.ranking is not self.scores and self.languages is not None
        return is_ranked and other in (None, self.names.language)

    @cached_property
    def token_costs(self) -> Indices | None:
        """Return the tokens of each row as a budget in tokens counts them; None for a budget in rows."""
        if self.asked is None or not self.asked.tokens:
            return None
        if ColumnNames.budget_tokens in self.pool.column_names:  # by a tokenizer that was named for the budget
            return np.asarray(read_numbers(self.pool, ColumnNames.budget_tokens, 0), dtype=np.int64)
        return self.lengths.astype(np.int64) if self.length_unit == "tokens" else None

    @cached_property
    def groups(self) -> list[str] | None:
        """Return the group of each row, if the budget was shared out among groups."""
        return read_strata(self.pool, self.asked.groups) if self.asked and self.asked.groups else None

    @cached_property
    def last_ranks(self) -> dict[str | None, int]:
        """Return the last rank that was taken by score, in each group and, under `None`, of all; 0 where none was.

        Rows that were taken as ones like the examples have their place in the round robin as their rank.
        """
        by_like = BY_LIKE in self.rules
        taken = self.positions[np.isin(self.selected_by, (BY_SCORE, BY_BOTH, BY_LIKE))]
        ranks = read_numbers(self.pool, ColumnNames.like_rank, 0).astype(np.int64) if by_like else self.score_ranks
        last: dict[str | None, int] = {None: int(ranks[taken].max()) if len(taken) else 0}
        if self.groups is not None:
            for row in taken.tolist():
                group = self.groups[row]
                last[group] = max(last.get(group, 0), int(ranks[row]))
        return last

    def value_of(self, column: str, row: int) -> Any:
        """Return what a row holds in a column, `None` without the column."""
        if column not in self.pool.column_names:
            return None
        if column not in self._columns:
            self._columns[column] = _column(self.pool, column)
        return self._columns[column][row].as_py()

    @cached_property
    def _columns(self) -> dict[str, Any]:
        """Return the columns that `value_of` has read."""
        return {}

    @cached_property
    def percentiles(self) -> Floats:
        """Return the share of the scored rows, in %, that score no better than each row; 0 without a score."""
        # NaN sorts behind all numbers, so rows without a score would get 100.
        below = np.searchsorted(np.sort(self.scores[self.scored]), self.scores, side="right")
        return np.where(np.isnan(self.scores), 0.0, 100 * below / max(1, len(self.scored)))

    @cached_property
    def eligible_rows(self) -> int:
        """Return the number of rows that could be selected."""
        return int(np.count_nonzero(~np.isnan(self.eligible)))

    @cached_property
    def cluster_ranks(self) -> Indices:
        """Return the rank of every row that could be selected in its cluster, 1 for the best; 0 without a cluster."""
        ranks = np.zeros(len(self.scores), dtype=np.int64)
        # The positions of these rows, best first: rows that could not be selected have the last ranks.
        order = np.argsort(self.score_ranks)[: self.eligible_rows]
        ranks[order] = ranks_within(self.clusters[order])
        return ranks

    @cached_property
    def reasons(self) -> npt.NDArray[np.str_]:
        """Return `selected_by` for every row of the pool, empty for rows that were not selected."""
        reasons = np.full(len(self.scores), "", dtype="<U7")  # "cluster" is the longest reason
        reasons[self.positions] = self.selected_by
        return reasons

    def score_length_correlation(self) -> dict[str, float]:
        """Return `pearson` and `spearman` of scores and lengths over the scored rows; 0 if either is constant."""
        from scipy.stats import pearsonr, spearmanr

        scores, lengths = self.scores[self.scored], self.lengths[self.scored]
        if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {"pearson": float(pearsonr(scores, lengths)[0]), "spearman": float(spearmanr(scores, lengths)[0])}

    def name_of(self, row: int) -> str | int:
        """Return the index of the row at a position, or the position if the pool has no index column."""
        name: str | int = row if self.ids is None else self.ids[row].as_py()
        return name

    def sample(self, limit: int, among: Indices | None = None) -> Indices:
        """Draw a sample of rows, selected ones first.

        Args:
            limit (`int`): rows in the sample at most. Selected rows fill up to half of it, other rows the rest.
            among (`(n,)` int64, *optional*): the rows to draw from, ascending; by default all scored rows.

        Returns:
            `(at most limit,)` int64: row positions, ascending.
        """
        rows = self.scored if among is None else among
        if len(rows) <= limit:
            return rows
        rng = np.random.default_rng(self.seed)
        taken = np.isin(rows, self.positions)
        kept = rng.choice(rows[taken], min(int(taken.sum()), limit // 2), replace=False)
        others = rng.choice(rows[~taken], min(int((~taken).sum()), limit - len(kept)), replace=False)
        return np.sort(np.concatenate([kept, others]))


def count_clusters(clusters: Indices) -> int:
    """Return the number of different clusters among those of some rows; negative numbers mean no cluster."""
    return len(np.unique(clusters[clusters >= 0]))


def _column(dataset: Dataset, name: str) -> pa.Array | None:
    """Return a column as one Arrow array, or `None` if the dataset has no such column."""
    if name not in dataset.column_names:
        return None
    # In Arrow's format, a column is read without a Python object per row.
    return dataset.select_columns([name]).with_format("arrow")[:][name].combine_chunks()


def _ranking(pool: Dataset, selected: Dataset, names: ColumnNames, scores: Floats, positions: Indices) -> Floats:
    """Return what the selection was ranked by: the column of ranks within languages, if its ranks are those."""
    if names.within not in pool.column_names or "score_rank" not in selected.column_names:
        return scores
    within: Floats = read_numbers(pool, names.within, np.nan)
    # Another selection from the same pool may compare all scores.
    by_language = np.array_equal(ranks_of(within)[positions], read_numbers(selected, "score_rank", 0))
    return within if by_language else scores


def positions_in_pool(pool: Dataset, selected: Dataset, index_column: str) -> Indices:
    """Return the positions of the selected rows in the pool.

    Args:
        pool (`Dataset`), selected (`Dataset`): a pool, and rows of it.
        index_column (`str`): identifies a row in both. If the pool does not have it, `selected` holds row positions.

    Raises:
        ValueError: a selected row is not in the pool, or several rows of the pool have the same index.
    """
    ids = _column(pool, index_column)
    wanted = selected.select_columns([index_column]).with_format("arrow")[:][index_column].to_pandas()
    known = pd.RangeIndex(len(pool)) if ids is None else pd.Index(ids.to_pandas())
    if not known.is_unique:
        raise ValueError(
            f"The pool's index column {index_column!r} has the same value in several rows. Pass the name of a "
            "column that identifies a row: index_column=..., or names=ColumnNames(index=...)."
        )
    places = known.get_indexer(wanted)  # -1 for a value that the pool does not have
    if (places < 0).any():
        missing = wanted[places < 0]
        raise ValueError(
            f"{len(missing)} selected rows are not in the pool by {index_column!r}, the first {missing[:5].tolist()}. "
            "Pass the pool that the selection was made from."
        )
    return np.asarray(places, dtype=np.int64)


def row_lengths(dataset: Dataset, names: ColumnNames = ColumnNames()) -> tuple[Floats, str]:
    """Return the length of every row and its unit: the scorer's token counts if they were kept, else characters."""
    if names.tokens in dataset.column_names:
        return np.asarray(read_numbers(dataset, names.tokens, 0), dtype=np.float64), "tokens"
    # Statuses and faults are text of a scorer, not of the row. Embeddings have no characters, and are slow to read.
    stems = [name.removesuffix("_tokens") for name in dataset.column_names if name.endswith("_tokens")]
    of_scorers = {name for each in map(ColumnNames, (names.score, *stems)) for name in (each.status, each.fault)}
    kept = [column for column in dataset.column_names if column not in (*of_scorers, names.embedding)]
    table = dataset.select_columns(kept).with_format("arrow")[:]
    lengths = np.zeros(len(dataset), dtype=np.float64)
    for column in table.columns:
        lengths += _characters(column.combine_chunks())
    return lengths, "characters"


def _characters(values: pa.Array) -> Floats:
    """Count the characters of all strings in every value, including those in lists and structs (a chat's turns)."""
    if isinstance(values, pa.ExtensionArray):  # JSON, as text
        values = values.storage
    kind = values.type
    if is_text(kind):
        return np.asarray(pc.utf8_length(values).fill_null(0), dtype=np.float64)
    if pa.types.is_struct(kind):
        return sum((_characters(part) for part in values.flatten()), np.zeros(len(values)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        # For every element of a list, the index of the row that it belongs to; the counts are added up by row.
        parents = np.asarray(pc.list_parent_indices(values))
        return np.bincount(parents, _characters(pc.list_flatten(values)), minlength=len(values)).astype(np.float64)
    return np.zeros(len(values))


# The names of the two controls, in the order in which they are drawn: fields of `Overview` and of the report, and splits
# of a pushed dataset.
CONTROLS = ("random_control", "length_matched_control")


def draw_controls(lengths: Floats, positions: Indices, scored: Indices, seed: int) -> tuple[Indices, Indices]:
    """Draw the random and the length-matched control, each with as many scored rows as were selected."""
    rng = np.random.default_rng(seed)  # one generator for both, in this order: published controls depend on it
    return rng.choice(scored, size=len(positions), replace=False), length_matched(lengths, positions, scored, rng)


def length_matched(lengths: Floats, positions: Indices, scored: Indices, rng: np.random.Generator) -> Indices:
    """Draw as many scored rows as were selected, with the selection's distribution over bins of length.

    Args:
        lengths (`(rows,)` float64): of the entire pool.
        positions (`(selected,)` int64), scored (`(scored,)` int64): rows of the pool.
        rng (`numpy.random.Generator`): draws without replacement.

    Returns:
        `(selected,)` int64: row positions, shortest bin first.
    """
    # Quantiles of a pool in which many rows share a length repeat; np.unique leaves fewer, larger bins.
    edges = np.unique(np.quantile(lengths[scored], np.linspace(0, 1, LENGTH_BINS + 1)))[1:]
    bin_of = np.digitize(lengths, edges)
    wanted = np.bincount(bin_of[positions], minlength=len(edges) + 1)
    drawn = [rng.choice(scored[bin_of[scored] == b], size=n, replace=False) for b, n in enumerate(wanted) if n]
    return np.concatenate(drawn)
