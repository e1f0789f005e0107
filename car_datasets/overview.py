"""What REPORT reads: the columns of a pool and its selection as arrays, and the two controls of the selection's size.

Does: read scores, clusters, lengths and statuses once; find the selected rows in the pool; draw the controls, and samples.
Does not: read text or embeddings, or compute a figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from car_datasets.selection import BY_CLUSTER, BY_SCORE, Indices, check_columns, ranks_of, ranks_within, read_numbers

if TYPE_CHECKING:
    from datasets import Dataset

LENGTH_BINS = 20
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Overview:
    """A pool and its selection, row by row of the pool.

    Args:
        scores (`(rows,)` float64): NaN where a row has none.
        clusters (`(rows,)` int64): -1 where a row has none.
        lengths (`(rows,)` float64): in `length_unit`, `tokens` of the scored text or `characters` of the row's strings.
        statuses (`pyarrow.Array`, *optional*): of the rows, where the scorer kept them.
        ids (`pyarrow.Array`, *optional*): what names a row; without, its position in the pool does.
        positions (`(selected,)` int64), selected_by (`(selected,)` str): the selected rows, in the selection's order, and why.
        random_control, length_matched_control (`(selected,)` int64): rows of the pool.
        seed (`int`): of whatever is drawn.
    """

    scores: Floats
    clusters: Indices
    lengths: Floats
    length_unit: str
    statuses: pa.Array | None
    ids: pa.Array | None
    positions: Indices
    selected_by: npt.NDArray[np.str_]
    random_control: Indices
    length_matched_control: Indices
    seed: int

    @classmethod
    def of(
        cls,
        pool: Dataset,
        selected: Dataset,
        *,
        score_column: str = "iqs_score",
        cluster_column: str = "cluster",
        index_column: str = "source_index",
        seed: int = 42,
    ) -> Overview:
        """Read a pool and what was selected from it; see [`SelectionReport.from_selection`].

        Raises:
            ValueError: a selected row is not in the pool, or a column is missing.
        """
        check_columns(pool.column_names, (score_column, cluster_column), ())
        check_columns(selected.column_names, (index_column, "selected_by"), ())
        pool, selected = pool.with_format(None), selected.with_format(None)
        scores = read_numbers(pool, score_column, np.nan)
        lengths, unit = row_lengths(pool, score_column)
        positions = positions_in_pool(pool, selected, index_column)
        random, matched = draw_controls(lengths, positions, np.flatnonzero(~np.isnan(scores)), seed)
        return cls(
            scores=scores,
            clusters=read_numbers(pool, cluster_column, -1),
            lengths=lengths,
            length_unit=unit,
            statuses=_column(pool, score_column.removesuffix("_score") + "_status"),
            ids=_column(pool, index_column),
            positions=positions,
            selected_by=np.array(selected["selected_by"][:], dtype=np.str_),
            random_control=random,
            length_matched_control=matched,
            seed=seed,
        )

    @cached_property
    def scored(self) -> Indices:
        """The positions of the rows that have a score."""
        return np.flatnonzero(~np.isnan(self.scores))

    @cached_property
    def cluster_count(self) -> int:
        """The clusters of the pool."""
        return len(np.unique(self.clusters[self.clusters >= 0]))

    @cached_property
    def by_score(self) -> int:
        """How many rows were taken by score: the n1 of the selection."""
        return int(np.count_nonzero(self.selected_by != BY_CLUSTER))

    @cached_property
    def by_cluster(self) -> int:
        """How many rows were taken from each cluster at most: the n2 of the selection."""
        picks = self.positions[self.selected_by != BY_SCORE]
        return int(self.cluster_ranks[picks].max()) if len(picks) else 0

    @cached_property
    def score_ranks(self) -> Indices:
        """The rank of every row in the pool, 1 for the best; ties by row order, rows without a score last."""
        return ranks_of(self.scores)

    @cached_property
    def cluster_ranks(self) -> Indices:
        """The rank of every scored row in its cluster, 1 for the best; 0 without a cluster or a score."""
        ranks = np.zeros(len(self.scores), dtype=np.int64)
        order = np.argsort(self.score_ranks)[: len(self.scored)]
        ranks[order] = ranks_within(self.clusters[order])
        return ranks

    @cached_property
    def reasons(self) -> npt.NDArray[np.str_]:
        """`selected_by` of every row of the pool, empty where it was not taken."""
        found = np.full(len(self.scores), "", dtype="<U7")
        found[self.positions] = self.selected_by
        return found

    def score_length_correlation(self) -> dict[str, float]:
        """`pearson` and `spearman` of scores and lengths over the scored rows; 0 where one of them does not vary."""
        from scipy.stats import pearsonr, spearmanr

        scores, lengths = self.scores[self.scored], self.lengths[self.scored]
        if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(lengths) == 0:
            return {"pearson": 0.0, "spearman": 0.0}
        return {"pearson": float(pearsonr(scores, lengths)[0]), "spearman": float(spearmanr(scores, lengths)[0])}

    def name_of(self, row: int) -> str | int:
        """What names the row at a position: its value in the index column, or the position."""
        found: str | int = row if self.ids is None else self.ids[row].as_py()
        return found

    def sample(self, limit: int, among: Indices | None = None) -> Indices:
        """At most `limit` of some rows (default: of the scored ones), ascending: selected ones up to half of it, then others."""
        rows = self.scored if among is None else among
        if len(rows) <= limit:
            return rows
        rng = np.random.default_rng(self.seed)
        taken = np.isin(rows, self.positions)
        kept = rng.choice(rows[taken], min(int(taken.sum()), limit // 2), replace=False)
        others = rng.choice(rows[~taken], min(int((~taken).sum()), limit - len(kept)), replace=False)
        return np.sort(np.concatenate([kept, others]))


def _column(dataset: Dataset, name: str) -> pa.Array | None:
    """A column as one Arrow array, or `None` where there is none."""
    if name not in dataset.column_names:
        return None
    return dataset.select_columns([name]).with_format("arrow")[:][name].combine_chunks()


def positions_in_pool(pool: Dataset, selected: Dataset, index_column: str) -> Indices:
    """Where the selected rows stand in the pool, by `index_column` (without it in the pool, by row position).

    Raises:
        ValueError: a selected row is not in the pool, or the column names some rows twice.
    """
    import pandas as pd

    ids = _column(pool, index_column)
    wanted = selected.select_columns([index_column]).with_format("arrow")[:][index_column].to_pandas()
    known = pd.RangeIndex(len(pool)) if ids is None else pd.Index(ids.to_pandas())
    if not known.is_unique:
        raise ValueError(f"The pool's column {index_column!r} names some rows twice; name another: index_column=...")
    places = known.get_indexer(wanted)
    if (places < 0).any():
        missing = wanted[places < 0]
        raise ValueError(
            f"{len(missing)} selected rows are not in the pool by {index_column!r}, the first {missing[:5].tolist()}."
        )
    return np.asarray(places, dtype=np.int64)


def draw_controls(lengths: Floats, positions: Indices, scored: Indices, seed: int) -> tuple[Indices, Indices]:
    """The rows of the random and of the length-matched control: as many scored rows as were selected."""
    rng = np.random.default_rng(seed)
    return rng.choice(scored, size=len(positions), replace=False), length_matched(lengths, positions, scored, rng)


def row_lengths(dataset: Dataset, score_column: str = "iqs_score") -> tuple[Floats, str]:
    """The length of every row, and its unit: the scorer's token counts where they were kept, else characters."""
    tokens = score_column.removesuffix("_score") + "_tokens"
    if tokens in dataset.column_names:
        return np.asarray(read_numbers(dataset, tokens, 0), dtype=np.float64), "tokens"
    status = score_column.removesuffix("_score") + "_status"
    table = dataset.select_columns([c for c in dataset.column_names if c != status]).with_format("arrow")[:]
    lengths = np.zeros(len(dataset), dtype=np.float64)
    for column in table.columns:
        lengths += _characters(column.combine_chunks())
    return lengths, "characters"


def _characters(values: pa.Array) -> Floats:
    """How many characters the strings of every value hold, those in lists and structs included (a chat's turns)."""
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.asarray(pc.utf8_length(values).fill_null(0), dtype=np.float64)
    if pa.types.is_struct(kind):
        return sum((_characters(part) for part in values.flatten()), np.zeros(len(values)))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        parents = np.asarray(pc.list_parent_indices(values))
        return np.bincount(parents, _characters(pc.list_flatten(values)), minlength=len(values)).astype(np.float64)
    return np.zeros(len(values))


def length_matched(lengths: Floats, positions: Indices, scored: Indices, rng: np.random.Generator) -> Indices:
    """Draw as many scored rows as were selected, bin by bin of length, so that both have the same distribution of it."""
    edges = np.unique(np.quantile(lengths[scored], np.linspace(0, 1, LENGTH_BINS + 1)))[1:]
    bin_of = np.digitize(lengths, edges)
    wanted = np.bincount(bin_of[positions], minlength=len(edges) + 1)
    drawn = [rng.choice(scored[bin_of[scored] == b], size=n, replace=False) for b, n in enumerate(wanted) if n]
    return np.concatenate(drawn)
