"""REPORT: `SelectionReport`, the figures of a selection beside those of two controls of the same size.

Does: count, measure and print, as a dataclass, JSON, Markdown, a table in the terminal, plots and a page.
Does not: choose rows, or draw (plots.py, report_page.py).

The controls are there because self-scoring methods hardly beat random choice on large pools (arXiv 2410.09335), and
because scores go with length: `random_control` is a plain draw from the scored rows, `length_matched_control` a draw with
the selection's distribution of lengths.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from car_datasets.overview import Overview
from car_datasets.plots import can_draw, draw, refuse_no_matplotlib
from car_datasets.projection import check_projection, map_of
from car_datasets.report_page import PAGE_FILE, render_page
from car_datasets.selection import BY_CLUSTER, Indices

if TYPE_CHECKING:
    from datasets import Dataset
    from rich.table import Table

logger = logging.getLogger(__name__)

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True)
class GroupFigures:
    """Figures of one group of rows.

    Args:
        rows (`int`): in the group.
        mean_score (`float`), score_quantiles (`dict[str, float]`): `"0.5"` is the median.
        mean_length (`float`): in the report's `length_unit`.
        clusters (`int`): clusters that the group touches.
    """

    rows: int
    mean_score: float
    score_quantiles: dict[str, float]
    mean_length: float
    clusters: int


@dataclass(frozen=True)
class SelectionReport:
    """What was selected and why.

    Args:
        rows_in (`int`), rows_scored (`int`): of the pool.
        rejected (`dict[str, int]`): rows without a score, by reason (`null`, `not_a_string`, `no_assistant_turn`, ...).
        marked (`dict[str, int]`): rows that were scored but are worth a look (`empty_response`, `truncated`).
        selected_by (`dict[str, int]`): rows that came in by `score` only, by `cluster` only, or by `both`.
        clusters (`int`): clusters in the pool.
        clusters_by_score (`int`): clusters that the rows taken by score touch by themselves.
        score_length_correlation (`dict[str, float]`): `pearson` and `spearman`, over the scored pool.
        length_unit (`str`): `tokens` of the scored text, or `characters` of the row's strings.
        pool, selected, random_control, length_matched_control ([`GroupFigures`]): the controls have the selection's size.
        seed (`int`): of the controls.
    """

    rows_in: int
    rows_scored: int
    rejected: dict[str, int]
    marked: dict[str, int]
    selected_by: dict[str, int]
    clusters: int
    clusters_by_score: int
    score_length_correlation: dict[str, float]
    length_unit: str
    pool: GroupFigures
    selected: GroupFigures
    random_control: GroupFigures
    length_matched_control: GroupFigures
    seed: int

    @classmethod
    def from_selection(
        cls,
        pool: Dataset,
        selected: Dataset,
        *,
        score_column: str = "iqs_score",
        cluster_column: str = "cluster",
        index_column: str = "source_index",
        seed: int = 42,
    ) -> SelectionReport:
        """Measure a selection against the pool it comes from.

        Args:
            pool (`Dataset`): scored and clustered, with `index_column` (without it, row positions are taken).
            selected (`Dataset`): what [`select_car`] made of it.
            score_column, cluster_column, index_column (`str`): as in [`select_car`].
            seed (`int`): of the two controls.

        Raises:
            ValueError: a selected row is not in the pool, or a column is missing.
        """
        names = {"score_column": score_column, "cluster_column": cluster_column, "index_column": index_column}
        return cls.from_overview(Overview.of(pool, selected, **names, seed=seed))

    @classmethod
    def from_overview(cls, seen: Overview) -> SelectionReport:
        """As [`~SelectionReport.from_selection`], of columns that have been read."""
        scored, clusters = seen.scored, seen.clusters
        reasons = Counter(seen.selected_by.tolist())
        statuses = _statuses(seen)
        groups = [
            _figures(rows, seen) for rows in (scored, seen.positions, seen.random_control, seen.length_matched_control)
        ]
        return cls(
            rows_in=len(seen.scores),
            rows_scored=len(scored),
            rejected={k: n for k, n in statuses.items() if k not in ("ok", "empty_response", "truncated")},
            marked={k: n for k, n in statuses.items() if k in ("empty_response", "truncated")},
            selected_by={name: reasons.get(name, 0) for name in ("score", "cluster", "both")},
            clusters=_touched(clusters),
            clusters_by_score=_touched(clusters[seen.positions[seen.selected_by != BY_CLUSTER]]),
            score_length_correlation=seen.score_length_correlation(),
            length_unit=seen.length_unit,
            pool=groups[0],
            selected=groups[1],
            random_control=groups[2],
            length_matched_control=groups[3],
            seed=seen.seed,
        )

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> SelectionReport:
        """Read [`~SelectionReport.to_dict`], such as the content of `report.json`."""
        groups = ("pool", "selected", "random_control", "length_matched_control")
        return cls(**{**figures, **{name: GroupFigures(**figures[name]) for name in groups}})

    def to_json(self) -> str:
        """All figures as JSON, keys in the order of this class."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        """The report as a page: what went in, what came out and why, and the four groups side by side."""
        lines = ["# Selection report", "", *[f"- {line}" for line in self.sentences()], ""]
        header, *rows = self.comparison()
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join(lines) + "\n"

    def to_table(self) -> Table:
        """The four groups as a `rich` table for the terminal; the sentences stand under it."""
        from rich.table import Table

        header, *rows = self.comparison()
        table = Table(title="Selection report", caption="\n".join(self.sentences()), caption_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name == header[0] else "right")
        for row in rows:
            table.add_row(*row)
        return table

    def plot(
        self,
        folder: str | os.PathLike[str],
        pool: Dataset,
        selected: Dataset,
        *,
        projection: str = "pca",
        score_column: str = "iqs_score",
        cluster_column: str = "cluster",
        index_column: str = "source_index",
        embedding_column: str = "embedding",
    ) -> list[Path]:
        """Draw the selection: scores, map, clusters, lengths. Files of an earlier call in the same folder are replaced.

        Args:
            folder (`str`): for `plot_scores.png`, `plot_map.png`, `plot_clusters.png` and `plot_lengths.png`.
            pool, selected (`Dataset`): what this report was made from; without embeddings there is no map.
            projection (`str`): of the map: `"pca"`, `"tsne"`, or `"umap"` (with umap-learn).
            score_column, cluster_column, index_column, embedding_column (`str`): as in [`select_car`].

        Returns:
            `list[Path]`: the files.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the datasets do not fit, or the projection, or it needs umap-learn.
        """
        check_projection(projection)
        refuse_no_matplotlib()
        names = {"score_column": score_column, "cluster_column": cluster_column, "index_column": index_column}
        seen = Overview.of(pool, selected, **names, seed=self.seed)
        files = draw(seen, map_of(pool, seen, embedding_column, projection))
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return [Path(folder) / name for name in files]

    def to_html(
        self,
        pool: Dataset,
        selected: Dataset,
        *,
        projection: str = "pca",
        score_column: str = "iqs_score",
        cluster_column: str = "cluster",
        index_column: str = "source_index",
        embedding_column: str = "embedding",
    ) -> str:
        """The selection as one HTML page that needs no network, with its figures where matplotlib is installed.

        Args:
            pool, selected, projection, score_column, cluster_column, index_column, embedding_column: as in
                [`~SelectionReport.plot`].

        Raises:
            ValueError: the datasets do not fit, or the projection, or it needs umap-learn.
        """
        check_projection(projection)
        names = {"score_column": score_column, "cluster_column": cluster_column, "index_column": index_column}
        seen = Overview.of(pool, selected, **names, seed=self.seed)
        return self.pictures(pool, seen, projection, embedding_column, **names)[PAGE_FILE].decode()

    def pictures(
        self, pool: Dataset, seen: Overview, projection: str, embedding_column: str, **names: str
    ) -> dict[str, bytes]:
        """The page, and the plots where matplotlib is installed, as files by their names; of columns that have been read."""
        if not can_draw():
            logger.warning("No plots were drawn: they need matplotlib, pip install 'car-datasets[plots]'.")
        pool_map = map_of(pool, seen, embedding_column, projection)
        plots = draw(seen, pool_map) if can_draw() else {}
        told = (self.sentences(), self.comparison())
        page = render_page(pool, seen, pool_map, plots, *told, embedding_column=embedding_column, **names)
        return {**plots, PAGE_FILE: page.encode()}

    def sentences(self) -> list[str]:
        """The counts in words."""
        by, correlation = self.selected_by, self.score_length_correlation
        total = max(1, self.selected.rows)
        rejected, marked = sum(self.rejected.values()), sum(self.marked.values())
        return [
            f"{self.rows_in:,} rows in, {self.rows_scored:,} scored, {rejected:,} rejected{_listed(self.rejected)}",
            f"scored but marked: {marked:,}{_listed(self.marked)}",
            f"{self.selected.rows:,} selected ({100 * total / max(1, self.rows_in):.2f} % of the rows in): "
            f"{by['score']:,} by score, {by['both']:,} by both, "
            f"{by['cluster']:,} added by clustering ({100 * by['cluster'] / total:.1f} %)",
            f"{self.selected.clusters:,} of {self.clusters:,} clusters covered; "
            f"the rows taken by score alone cover {self.clusters_by_score:,}",
            f"score against length in {self.length_unit}: Pearson {correlation['pearson']:+.2f}, "
            f"Spearman {correlation['spearman']:+.2f}",
        ]

    def comparison(self) -> list[list[str]]:
        """A header and one row per figure, as text: pool, selected and the two controls."""
        groups = (self.pool, self.selected, self.random_control, self.length_matched_control)
        rows = [["", "pool", "selected", "random control", "length-matched control"]]
        rows.append(["rows", *(f"{g.rows:,}" for g in groups)])
        rows.append(["mean score", *(f"{g.mean_score:.3f}" for g in groups)])
        for q in QUANTILES:
            rows.append([_quantile_name(q), *(f"{g.score_quantiles[str(q)]:.3f}" for g in groups)])
        rows.append([f"mean length ({self.length_unit})", *(f"{g.mean_length:.1f}" for g in groups)])
        rows.append(["clusters", *(f"{g.clusters:,}" for g in groups)])
        return rows


def _quantile_name(q: float) -> str:
    return {0.0: "lowest score", 0.5: "median score", 1.0: "highest score"}.get(q, f"{100 * q:.0f} % quantile")


def _listed(counts: dict[str, int]) -> str:
    return f" ({', '.join(f'{n:,} {name}' for name, n in counts.items())})" if counts else ""


def _statuses(seen: Overview) -> dict[str, int]:
    if seen.statuses is not None:
        return dict(Counter(seen.statuses.to_pylist()).most_common())
    missing = int(np.isnan(seen.scores).sum())
    return {"ok": len(seen.scores) - missing} | ({"no_score": missing} if missing else {})


def _touched(clusters: Indices) -> int:
    return len(np.unique(clusters[clusters >= 0]))


def _figures(rows: Indices, seen: Overview) -> GroupFigures:
    scores = seen.scores
    quantiles = np.quantile(scores[rows], QUANTILES)
    return GroupFigures(
        rows=len(rows),
        mean_score=float(scores[rows].mean()),
        score_quantiles={str(q): float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        mean_length=float(seen.lengths[rows].mean()),
        clusters=_touched(seen.clusters[rows]),
    )
