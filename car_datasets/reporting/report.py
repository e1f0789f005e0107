"""`SelectionReport`: the figures of a selection, compared with those of two controls of the same size.

Does: count and measure; give the figures as a dataclass, JSON, Markdown, a table in the terminal, plots and a page; put
them in words.
Does not: select rows, or know how a figure is drawn.

The controls are there because self-scoring methods hardly beat random choice on large pools (arXiv 2410.09335), and
because scores correlate with length: `random_control` is drawn at random from the scored rows,
`length_matched_control` has the selection's distribution of lengths.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from car_datasets.loading.chats import OK, is_scored, status_kind
from car_datasets.loading.languages import UNDETERMINED, count_languages, describe_languages
from car_datasets.loading.schemas import Schema
from car_datasets.reporting.ledger import count_of, excluded_counts
from car_datasets.reporting.likes import (
    ScoreByGroup,
    describe,
    lost_groups,
    named_group,
    plain_name,
    score_by_groups,
    shares_table,
)
from car_datasets.reporting.maps import check_projection, map_of
from car_datasets.reporting.naming import NamedCluster, name_clusters
from car_datasets.reporting.overview import CONTROLS, Overview, count_clusters
from car_datasets.reporting.page import PAGE_FILE, Told, render_page
from car_datasets.reporting.plots import can_draw, draw, refuse_no_matplotlib
from car_datasets.selection.rule import BY_CLUSTER, BY_GAIN, BY_LIKE, BY_PIN, OTHER_REASONS, REASONS, Indices
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.digests import public
from car_datasets.utils.files import printable, table_text
from car_datasets.utils.settings import SEED

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)
# Keys of `score_quantiles` as str(q): saved reports hold them.
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LISTED_CLUSTERS = 20  # clusters in the Markdown report, those from which most rows were selected
FOLLOWS = 0.4  # a rank correlation with length, from which the verdict warns of it
DETAILS = 5  # of one kind of status that are listed, such as unknown roles; the others are counted together


@dataclass(frozen=True)
class GroupFigures:
    """Figures of one group of rows.

    Args:
        rows (`int`): rows in the group.
        mean_score (`float`): mean score of the rows.
        score_quantiles (`dict[str, float]`): scores by quantile; `"0.5"` is the median.
        mean_length (`float`): mean length in the report's `length_unit`.
        clusters (`int`): clusters that have a row in the group.
    """

    rows: int
    mean_score: float
    score_quantiles: dict[str, float]
    mean_length: float
    clusters: int


@public
@dataclass(frozen=True)
class SelectionReport:
    """The figures of a selection: what was selected, and why.

    Args:
        rows_in (`int`): rows in the pool.
        rows_scored (`int`): rows that have a score.
        rejected (`dict[str, int]`): rows without a score, by reason (`null`, `unknown_role: narrator`, ...).
        marked (`dict[str, int]`): rows that were scored but deserve a look (`empty_response`, `tool_call`, ...).
        selected_by (`dict[str, int]`): rows that were selected by `score` only, by `cluster` only, or by `both`.
        clusters (`int`): clusters in the pool.
        clusters_by_score (`int`): clusters that the rows taken by score cover by themselves.
        score_length_correlation (`dict[str, float]`): `pearson` and `spearman`, over the scored pool.
        length_unit (`str`): `"tokens"` of the scored text, or `"characters"` of the row's strings.
        pool ([`GroupFigures`]): of the scored rows.
        selected ([`GroupFigures`]): of the selected rows.
        random_control, length_matched_control ([`GroupFigures`]): of the two controls, which have the selection's size.
        seed (`int`): of the controls.
        languages (`dict[str, int]`): rows of the pool by language, `"und"` for those whose language cannot be told. They
            are fewer than `rows_in` if a sample was read; empty if none was.
        selected_languages (`dict[str, int]`): the selected rows by language.
        within_languages (`bool`): True if the rows were ranked within their languages.
        score_by (`dict[str, ScoreByGroup]`): what the score likes: its variance, and the shares of groups that it keeps,
            by kind and form of answer, language, length and columns of few values; see
            [`~car_datasets.reporting.likes.score_by_groups`]. Empty for small pools and reports of earlier versions.
        excluded (`dict[str, int]`): scored rows that could not be selected, by the first mark that kept them out:
            `vetoed`, `contaminated` or `duplicates`.
        named_clusters (`dict[str, NamedCluster]`): keywords, a typical row and counts of each cluster by its number; see
            [`~car_datasets.reporting.naming.name_clusters`]. Empty for reports of earlier versions.
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
    languages: dict[str, int] = field(default_factory=dict)
    selected_languages: dict[str, int] = field(default_factory=dict)
    within_languages: bool = False
    score_by: dict[str, ScoreByGroup] = field(default_factory=dict)
    excluded: dict[str, int] = field(default_factory=dict)
    named_clusters: dict[str, NamedCluster] = field(default_factory=dict)

    @classmethod
    def from_selection(
        cls,
        pool: Dataset,
        selected: Dataset,
        *,
        names: ColumnNames = ColumnNames(),
        seed: int = SEED,
        schema: Schema | None = None,
    ) -> SelectionReport:
        """Compute the figures of a selection and of the pool it comes from.

        Args:
            pool (`Dataset`): scored and clustered. Without an index column its rows are named by their position.
            selected (`Dataset`): the rows that [`select_car`] took from it.
            names ([`ColumnNames`]): the columns of score, cluster and row index.
            seed (`int`): for the two controls.
            schema ([`Schema`], *optional*): how the rows are read; by default it is recognised.

        Raises:
            ValueError: a selected row is not in the pool, or a column is missing.
        """
        return cls.from_overview(Overview.of(pool, selected, names=names, seed=seed), schema)

    @classmethod
    def from_overview(cls, overview: Overview, schema: Schema | None = None) -> SelectionReport:
        """Compute the figures of an [`Overview`], for callers that need it for more than one report.

        Args:
            overview ([`Overview`]): of the pool and its selection.
            schema ([`Schema`], *optional*): how the rows are read; by default it is recognised.
        """
        reasons = Counter(overview.selected_by.tolist())
        statuses = _statuses(overview)
        # Rows kept by both rules count as taken by score: the question is what clustering adds to it.
        by_score = overview.positions[overview.selected_by != BY_CLUSTER]
        return cls(
            rows_in=len(overview.scores),
            rows_scored=len(overview.scored),
            rejected={k: n for k, n in statuses.items() if not is_scored(k)},
            marked={k: n for k, n in statuses.items() if is_scored(k) and k != OK},
            selected_by={
                name: reasons[name] for name in (*REASONS, *OTHER_REASONS) if name in REASONS or reasons[name]
            },
            clusters=overview.cluster_count,
            clusters_by_score=count_clusters(overview.clusters[by_score]),
            score_length_correlation=overview.score_length_correlation(),
            length_unit=overview.length_unit,
            pool=_figures(overview.scored, overview),
            selected=_figures(overview.positions, overview),
            random_control=_figures(overview.random_control, overview),
            length_matched_control=_figures(overview.length_matched_control, overview),
            seed=overview.seed,
            languages=_languages(overview.languages),
            selected_languages=_languages(overview.languages, overview.positions),
            within_languages=overview.is_within_languages,
            score_by=score_by_groups(overview, schema),
            excluded=excluded_counts(overview),
            named_clusters=name_clusters(overview, schema),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, figures: dict[str, Any]) -> SelectionReport:
        """Create a report from the result of `to_dict`, such as the content of `report.json`."""
        groups = ("pool", "selected", *CONTROLS)  # fields that are dataclasses too
        nested: dict[str, Any] = {name: GroupFigures(**figures[name]) for name in groups}
        by_group = {name: ScoreByGroup(**value) for name, value in dict(figures.get("score_by", {})).items()}
        named = {label: NamedCluster(**value) for label, value in dict(figures.get("named_clusters", {})).items()}
        return cls(**{**figures, **nested, "score_by": by_group, "named_clusters": named})

    def to_json(self) -> str:
        """Return all figures as JSON, with the fields of this class in order."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_markdown(self) -> str:
        """Return the report as Markdown: verdict, counts as a list, the four groups and the clusters as tables."""
        lines = ["# Selection report", "", " ".join(self.verdict()), "", *[f"- {line}" for line in self.sentences()]]
        lines += ["", *_markdown_table(self.comparison())]
        if self.named_clusters:
            lines += ["", "## Clusters from which most rows were selected", "", *_markdown_table(self._clusters())]
        return "\n".join(lines) + "\n"

    def _clusters(self) -> list[list[str]]:
        """Return a header and a row for each of the clusters from which most rows were selected, as text."""
        rows = [["cluster", "keywords", "typical row", "scored rows", "selected"]]
        most = sorted(self.named_clusters.items(), key=lambda item: (-item[1].selected, -item[1].rows))
        for label, named in most[:LISTED_CLUSTERS]:
            typical = "" if named.typical is None else plain_name(str(named.typical))
            rows.append([label, ", ".join(named.keywords), typical, f"{named.rows:,}", f"{named.selected:,}"])
        return rows

    def to_table(self) -> Table:
        """Return the four groups as a `rich` table for the terminal, with the counts as its caption."""
        header, *rows = self.comparison()
        table = Table(title="Selection report", title_style="bold", caption_justify="left", caption_style="none")
        table.caption = table_text("\n".join(self.sentences()), "table.caption")
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
        names: ColumnNames = ColumnNames(),
    ) -> list[Path]:
        """Draw every figure of the selection. Files of an earlier call in the same folder are replaced.

        Args:
            folder (`str`): for one `plot_<name>.png` per figure of `PLOTS`.
            pool, selected (`Dataset`): the datasets that this report was made from; without embeddings there is no map.
            projection (`str`): of the map: `"pca"`, `"tsne"`, or `"umap"` (with umap-learn).
            names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.

        Returns:
            `list[Path]`: the files.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the datasets do not belong together, the projection is not known, or it needs umap-learn.
        """
        # Both checks come first: reading the pool takes longest.
        check_projection(projection)
        refuse_no_matplotlib()
        overview = Overview.of(pool, selected, names=names, seed=self.seed)
        files = draw(overview, map_of(overview, projection), self.named_clusters)
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
        names: ColumnNames = ColumnNames(),
        head: Mapping[str, str] | None = None,
    ) -> str:
        """Return the selection as one HTML page that needs no network, with figures if matplotlib is installed.

        Args:
            pool, selected (`Dataset`): the datasets that this report was made from; without embeddings there is no map.
            projection (`str`): of the map: `"pca"`, `"tsne"`, or `"umap"` (with umap-learn).
            names ([`ColumnNames`]): the columns of score, cluster, row index and embedding.
            head (`Mapping[str, str]`, *optional*): what the page says at its top of the selection's origin, such as
                `{"dataset": "tatsu-lab/alpaca"}`; [`Receipt.head`] tells it of a result of [`curate`].

        Raises:
            ValueError: the datasets do not belong together, the projection is not known, or it needs umap-learn.
        """
        check_projection(projection)
        overview = Overview.of(pool, selected, names=names, seed=self.seed)
        return self.pictures(overview, projection, head)[PAGE_FILE].decode()

    def pictures(
        self, overview: Overview, projection: str = "pca", head: Mapping[str, str] | None = None
    ) -> dict[str, bytes]:
        """Return the page, and the plots if matplotlib is installed, as files by name.

        Args:
            overview ([`Overview`]): that this report was made from.
            projection (`str`): of the map: `"pca"`, `"tsne"`, or `"umap"` (with umap-learn).
            head (`Mapping[str, str]`, *optional*): what the page says at its top of the selection's origin.
        """
        # Without matplotlib the page is still worth having; only [`~SelectionReport.plot`] raises.
        drawable = can_draw()
        if not drawable:
            logger.warning("No plots were drawn: they need matplotlib, pip install 'car-datasets[plots]'.")
        pool_map = map_of(overview, projection)
        # One map for the plots and the page, so that a row has the same place and colour in both.
        plots = draw(overview, pool_map, self.named_clusters) if drawable else {}
        told = Told(
            dict(head or {}),
            self.verdict(),
            self.sentences(),
            self.comparison(),
            shares_table(self.score_by),
            self.named_clusters,
        )
        return {**plots, PAGE_FILE: render_page(overview, pool_map, plots, told).encode()}

    def verdict(self) -> list[str]:
        """Return what the selection is, in two sentences: its scores, and what deserves a look."""
        share = 100 * self.selected.rows / max(1, self.rows_in)
        return [
            f"{self.selected.rows:,} of {self.rows_in:,} rows were selected ({share:.1f} %): their mean score is "
            f"{self.selected.mean_score:.2f}, against {self.pool.mean_score:.2f} in the pool and "
            f"{self.length_matched_control.mean_score:.2f} in as many rows of the same lengths drawn at random.",
            f"{self._about_clusters()}, and {self._about_preferences()}.",
        ]

    def _about_clusters(self) -> str:
        """Return what clustering did, without a full stop."""
        by = self.selected_by
        if not by["score"] + by["both"] + by["cluster"]:  # by another rule
            return f"They come from {self.selected.clusters:,} of {self.clusters:,} clusters"
        reached = f"the best by score reach {self.clusters_by_score:,} of {self.clusters:,} clusters by themselves"
        rows = "no rows" if by["cluster"] == 0 else "1 row" if by["cluster"] == 1 else f"{by['cluster']:,} rows"
        return f"Clustering added {rows} ({reached})"

    def _about_preferences(self) -> str:
        """Return the gravest thing that is known of what the score prefers, without a full stop."""
        if not self.score_by:
            return "too few rows have a score to tell what it prefers"
        lost = [named_group(name, group) for name, groups in self.score_by.items() for group in lost_groups(groups)]
        if lost:
            others = len(lost) - 2
            more = [f"{others} more {'group' if others == 1 else 'groups'}"] if others > 0 else []
            *first, last = [*lost[:2], *more]
            named = f"{', '.join(first)} and {last}" if first else last
            return f"the score all but loses {named}: check that you can do without them"
        length = self.score_length_correlation["spearman"]
        if abs(length) >= FOLLOWS:
            return f"the score follows the length of a row (Spearman {length:+.2f})"
        return "no kind of row that can be told apart is all but lost"

    def sentences(self) -> list[str]:
        """Return the counts in words."""
        correlation = self.score_length_correlation
        # Both from the counts by status, so that the sum and its parts cannot differ.
        rejected, marked = sum(self.rejected.values()), sum(self.marked.values())
        sentences = [
            f"{self.rows_in:,} rows in, {self.rows_scored:,} scored, {rejected:,} rejected{_listed(self.rejected)}",
            f"scored but marked: {marked:,}{_listed(self.marked)}",
            *([f"left out before the choice: {_in_words(self.excluded)}"] if self.excluded else []),
            self._selected_sentence(),
            f"{self.selected.clusters:,} of {self.clusters:,} clusters covered; "
            f"the rows taken by score alone cover {self.clusters_by_score:,}",
            f"score against length in {self.length_unit}: Pearson {correlation['pearson']:+.2f}, "
            f"Spearman {correlation['spearman']:+.2f}",
        ]
        more = (*self._language_sentence(), *describe(self.score_by))
        return [printable(sentence) for sentence in (*sentences, *more)]

    def _selected_sentence(self) -> str:
        """Return how many rows were selected, and for which reasons."""
        by, total = self.selected_by, max(1, self.selected.rows)  # a divisor
        selected = (
            f"{self.selected.rows:,} selected ({100 * self.selected.rows / max(1, self.rows_in):.2f} % of the rows in)"
        )
        words = {BY_PIN: "that must be in", BY_GAIN: "by gain", BY_LIKE: "as most like the examples"}
        others = [f"{by[name]:,} {word}" for name, word in words.items() if by.get(name)]
        cluster = f"{by['cluster']:,} added by clustering ({100 * by['cluster'] / total:.1f} %)"
        if others and not by["score"] + by["both"] + by["cluster"]:
            return f"{selected}: {', '.join(others)}"
        counts = [f"{by['score']:,} by score", f"{by['both']:,} by both", cluster, *others]
        return f"{selected} with n1 = {by['score'] + by['both']:,}: {', '.join(counts)}"

    def _language_sentence(self) -> list[str]:
        """Return a sentence about the languages, none if the pool is in one."""
        # Rows of undetermined language, such as code, do not make a second language.
        if len(self.languages.keys() - {UNDETERMINED}) < 2:
            return []
        # Without a column of languages `curate` reads a sample, which the sentence must say.
        read = sum(self.languages.values())
        pool = "languages of the pool" if read == self.rows_in else f"languages of {read:,} rows of the pool"
        ranked = "; ranked within each language" if self.within_languages else ""
        return [
            f"{pool}: {describe_languages(self.languages)}; of the selection: "
            f"{describe_languages(self.selected_languages)}{ranked}"
        ]

    def comparison(self) -> list[list[str]]:
        """Return a header and one row per figure, as text: pool, selected and the two controls."""
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


def _markdown_table(rows: list[list[str]]) -> list[str]:
    header, *others = rows
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in others)]


def _listed(counts: dict[str, int]) -> str:
    return f" ({_counted(counts)})" if counts else ""


def _in_words(counts: dict[str, int]) -> str:
    return ", ".join(count_of(n, word) for word, n in counts.items())


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _languages(languages: pa.Array | None, rows: Indices | None = None) -> dict[str, int]:
    if languages is None:
        return {}
    return count_languages((languages if rows is None else languages.take(pa.array(rows))).to_pylist())


def _statuses(overview: Overview) -> dict[str, int]:
    """Count the rows by status, most frequent first; without a status column, by whether they have a score."""
    if overview.statuses is not None:
        counts, kinds = Counter[str](), Counter[str]()
        for status, n in Counter(overview.statuses.to_pylist()).most_common():
            # The part after the kind comes from the rows (a role, a type), so there may be as many as rows.
            kind = status_kind(str(status))
            kinds[kind] += 1
            counts[str(status) if kinds[kind] <= DETAILS else f"{kind}: others"] += n
        return dict(counts.most_common())
    missing = int(np.isnan(overview.scores).sum())
    return {OK: len(overview.scores) - missing} | ({"no_score": missing} if missing else {})


def _figures(rows: Indices, overview: Overview) -> GroupFigures:
    scores = overview.scores[rows]  # of scored rows, so without NaN
    quantiles = np.quantile(scores, QUANTILES)
    return GroupFigures(
        rows=len(rows),
        mean_score=float(scores.mean()),
        score_quantiles={str(q): float(v) for q, v in zip(QUANTILES, quantiles, strict=True)},
        mean_length=float(overview.lengths[rows].mean()),
        clusters=count_clusters(overview.clusters[rows]),
    )
