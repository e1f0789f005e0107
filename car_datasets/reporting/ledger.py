"""Say for every row of a pool what brought it into the selection or kept it out: `why`, `ledger`.

Does: name the rule, mark or bound that decided on a row; give one line per row; count the rows that each mark took out.
Does not: select rows, or find duplicates and contamination.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from car_datasets.reporting.overview import Overview
from car_datasets.selection.marks.exclusions import CONTAMINATED, DROPPED, DUPLICATE
from car_datasets.selection.rule import BY_BOTH, BY_CLUSTER, BY_GAIN, BY_LIKE, BY_PIN, BY_SCORE
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import printable

# The words for rows that each mark keeps out, in the order in which the marks count.
WORDS = {DROPPED: "vetoed", CONTAMINATED: "contaminated", DUPLICATE: "duplicates"}


def ledger(overview: Overview) -> Iterator[str]:
    """Yield one line per row of the pool, in its order: the row's index, and why it was selected or not.

    Args:
        overview ([`Overview`]): of the pool and its selection.
    """
    for row in range(len(overview.scores)):
        status = "unknown" if overview.statuses is None else str(overview.statuses[row].as_py())
        yield printable(f"row {overview.name_of(row)}: {why(overview, row, status)}")


def excluded_counts(overview: Overview) -> dict[str, int]:
    """Return how many scored rows each mark kept out, by a word such as `"duplicates"`; none for a mark without rows."""
    marks = overview.excluded[overview.scored]
    counts = {word: int(np.count_nonzero(marks == mark)) for mark, word in WORDS.items()}
    return {word: n for word, n in counts.items() if n}


def count_of(n: int, word: str) -> str:
    """Return a count in words, such as `1 duplicate` or `2,000 duplicates`."""
    return f"{n:,} {word.removesuffix('s') if n == 1 else word}"


def why(overview: Overview, row: int, status: str = "unknown") -> str:
    """Return what decided on a row, in a sentence.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        row (`int`): its position in the pool.
        status (`str`): the scorer's status of it, which says why it has no score.
    """
    reason = overview.reasons[row].item()
    return _why_kept(overview, row, reason) if reason else f"not kept{_why_left_out(overview, row, status)}."


def _why_kept(overview: Overview, row: int, reason: str) -> str:
    score, cluster = _by_score(overview, row), _in_cluster(overview, row)
    if reason == BY_SCORE:
        return f"kept by score: {score}; it is {cluster}."
    if reason == BY_CLUSTER:
        return f"kept by its cluster: {cluster}; it is {score}."
    if reason == BY_LIKE:
        return f"kept as one of the rows most like the examples: {_among_alike(overview, row)}."
    if reason == BY_GAIN:
        return f"kept by gain: it added the most to what the rows taken before it cover; it is {score}."
    name = {BY_BOTH: "by both", BY_PIN: "as a row that must be in"}.get(reason, f"by {reason}")
    return f"kept {name}: {score}, and {cluster}."


def _why_left_out(overview: Overview, row: int, status: str) -> str:
    mark = overview.excluded[row].item()
    if mark == DROPPED:
        return ": it is one of the rows that must not be in"
    if mark == CONTAMINATED:
        item, share = (overview.value_of(c, row) for c in (ColumnNames.contaminated_by, ColumnNames.contaminated_share))
        return f": contaminated by {item}, of which it gives away {100 * share:.0f} %"
    if mark == DUPLICATE:
        columns = ColumnNames.duplicate_of, ColumnNames.duplicate_similarity
        other, similarity = (overview.value_of(column, row) for column in columns)
        return f": duplicate of {other}" + ("" if similarity is None else f" (similarity {similarity:.3f})")
    if np.isnan(overview.scores[row]):
        return f": it has no score{'' if status == 'unknown' else f' ({status})'}"
    score = _by_score(overview, row)
    if BY_LIKE in overview.rules:
        place = overview.value_of(ColumnNames.like_rank, row)
        bound = "" if place is None else _full_bound(overview, row, place)
        return f": {bound}{'; it is ' if bound else ''}{_among_alike(overview, row)}"
    if BY_GAIN in overview.rules:
        return f": {_too_little_gain(overview, row)}; it is {score}"
    return _passed_over(overview, row, score)


def _too_little_gain(overview: Overview, row: int) -> str:
    """Return why the rule `gain` did not take a row, with the bounds under which rows were compared."""
    asked, groups = overview.asked, overview.groups
    share = f" of {asked.groups} {groups[row]}, which has a quota" if asked and groups is not None else ""
    least = f"it would have added less to what is covered than the rows that were taken{share}"
    return f"{least}, or did not fit into the budget in tokens" if asked and asked.tokens else least


def _full_bound(overview: Overview, row: int, rank: int) -> str:
    """Return which bound kept a row out that comes before the last one that was taken, `""` if none did."""
    asked, groups, last = overview.asked, overview.groups, overview.last_ranks
    if asked is not None and groups is not None and last.get(groups[row], 0) < rank < last[None]:
        return f"the quota of {asked.groups} {groups[row]} was full"
    if asked is not None and asked.tokens and rank < last[None]:
        return "it did not fit into what was left of the budget in tokens"
    return ""


def _passed_over(overview: Overview, row: int, score: str) -> str:
    """Return why CaR's rule did not take a row that it could have taken."""
    rank, cluster = int(overview.score_ranks[row]), _in_cluster(overview, row)
    if bound := _full_bound(overview, row, rank):
        return f": {bound}; it is {score}"
    within = int(overview.cluster_ranks[row])
    # n1 and n2 follow from the selection, which need not be CaR's.
    if not overview.bounded and (rank <= overview.by_score or 0 < within <= overview.by_cluster):
        return f", though it is {score}, and {cluster}: the selection was made by another rule"
    return f": {score}, and it is {cluster}"


def _by_score(overview: Overview, row: int) -> str:
    rank = f"rank {int(overview.score_ranks[row]):,} of {overview.eligible_rows:,} by score"
    # Under the rule `gain`, a rank by score decides on nothing.
    return (
        rank
        if overview.bounded or BY_GAIN in overview.rules
        else f"{rank}, where the best {overview.by_score:,} are taken"
    )


def _in_cluster(overview: Overview, row: int) -> str:
    within = int(overview.cluster_ranks[row])
    return (
        f"number {within:,} of its cluster, which gives its best {overview.by_cluster:,}" if within else "in no cluster"
    )


def _among_alike(overview: Overview, row: int) -> str:
    place = overview.value_of(ColumnNames.like_rank, row)
    if place is None:
        return "it has no embedding, by which to compare it with the examples"
    return f"place {place:,} in the round robin over the examples, where {overview.by_like:,} rows are taken"
