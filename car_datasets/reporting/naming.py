"""Name clusters by the words in which their rows differ from all others, and by a typical row: `name_clusters`.

Does: read the text of some rows of each cluster; rank their words by class-based tf-idf; find the row nearest the centre.
Does not: use a language model or a list of stop words; tell whether the rows of a cluster are good.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from car_datasets.loading.schemas import Schema
from car_datasets.reporting.likes import exchanges_at
from car_datasets.reporting.overview import Overview
from car_datasets.selection.rule import Indices
from car_datasets.utils.columns import read_numbers

# What bounds the time, to some 2 s: rows whose text is read, of all clusters and of one, and characters of a row.
ROWS_READ, ROWS_OF_A_CLUSTER, CHARACTERS = 10_000, 80, 1_000
KEYWORDS = 4
COMMON = 0.05  # share of the rows of a cluster that have a word, from which the word is common there
EVERYWHERE = 0.25  # share of the clusters; words that are common in more of them, such as articles, are no keywords
SHORTEST, LONGEST = 3, 30  # letters of a word; longer ones are encoded data
HAN = 200  # Chinese characters of a row that are read: each begins up to three words

# Scripts without spaces between words. Two to four Chinese characters may be a word; a run of katakana is one, and a
# run of hiragana is grammar. Words of Thai and its neighbours cannot be told without a dictionary.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNSPACED = re.compile(
    f"(?P<han>[{_HAN}]+)|(?P<katakana>[\u30a1-\u30fa\u30fc]{{2,}})"
    "|[\u3041-\u309f\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+|[\u30a1-\u30fc]"
)
_ALL_HAN = re.compile(f"[{_HAN}]+")


@dataclass(frozen=True)
class NamedCluster:
    """What is known of a cluster in words and counts.

    Args:
        keywords (`list[str]`): words that set its rows apart, the most telling first, in lower case. Empty if no word
            does, if there is only one cluster, or if the rows are of no known schema.
        typical (`int` or `str`, *optional*): the index of the scored row that is nearest to the centre; `None` if the
            pool has no column of distances.
        rows (`int`): scored rows in the cluster.
        selected (`int`): those of them that were selected.
    """

    keywords: list[str]
    typical: int | str | None
    rows: int
    selected: int


def name_clusters(overview: Overview, schema: Schema | None = None) -> dict[str, NamedCluster]:
    """Name the clusters that have scored rows.

    A word counts once for each row that has it. Its weight in a cluster is the share of the rows that have it, times
    the logarithm of how rare it is in all clusters (c-TF-IDF). Words that the other clusters have almost as often, such
    as articles, are no keywords, in whatever language.

    Args:
        overview ([`Overview`]): of the pool and its selection.
        schema ([`Schema`], *optional*): how the rows are read; by default it is recognised.

    Returns:
        `dict[str, NamedCluster]`: by the number of the cluster as text, ascending.
    """
    labels, rows = _members(overview)
    if not labels:
        return {}
    most = max(1, min(ROWS_OF_A_CLUSTER, ROWS_READ // len(labels)))
    # Spread evenly over the cluster, not drawn: the names depend on the rows alone.
    read = [part[np.linspace(0, len(part) - 1, min(most, len(part))).astype(np.int64)] for part in rows]
    texts = iter(exchanges_at(overview, np.concatenate(read), schema))
    counts = []
    for part in read:
        exchanges = [next(texts) for _ in range(len(part))]
        known = ["\n".join(e)[:CHARACTERS] for e in exchanges if e is not None]
        counts.append((Counter(word for text in known for word in words_of(text)), max(1, len(known))))
    nearest = _nearest(overview, rows)
    return {
        str(label): NamedCluster(words, near, len(part), int(np.count_nonzero(overview.taken[part])))
        for label, part, words, near in zip(labels, rows, keywords(counts), nearest, strict=True)
    }


def _members(overview: Overview) -> tuple[list[int], list[Indices]]:
    """Return the clusters, ascending, and the scored rows of each."""
    scored = overview.scored[overview.clusters[overview.scored] >= 0]
    labels, starts = np.unique(np.sort(overview.clusters[scored]), return_index=True)
    in_order = scored[np.argsort(overview.clusters[scored], kind="stable")]
    return labels.tolist(), np.split(in_order, starts[1:])


def _nearest(overview: Overview, rows: Sequence[Indices]) -> list[int | str | None]:
    """Return the name of the row of each cluster that is nearest to the centre."""
    if overview.names.distance not in overview.pool.column_names:
        return [None] * len(rows)
    distances = np.nan_to_num(read_numbers(overview.pool, overview.names.distance, np.nan), nan=np.inf)
    named = (overview.name_of(int(part[np.argmin(distances[part])])) for part in rows)
    return [name if isinstance(name, int) else str(name) for name in named]


# words ----------------------------------------------------------------------------------------------------------------


def words_of(text: str) -> set[str]:
    """Return the words of a text in lower case; of Chinese characters, what may be words."""
    words: set[str] = set()
    room = HAN
    for run in _word_pattern().findall(text.lower()):
        if run.isascii():
            words.add(run)
            continue
        place = 0
        for found in _UNSPACED.finditer(run):
            words.add(run[place : found.start()])
            place = found.end()
            if han := (found["han"] or "")[:room]:
                room -= len(han)
                words.update(han[i : i + n] for n in (2, 3, 4) for i in range(len(han) - n + 1))
            elif found["katakana"]:
                words.add(found[0])
        words.add(run[place:])
    return {word for word in words if _may_be_keyword(word)}


def _may_be_keyword(word: str) -> bool:
    """Return True for a word of a length that can tell something; scripts without case have shorter words."""
    return (SHORTEST if word.upper() != word.lower() else 2) <= len(word) <= LONGEST


@functools.lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    """Return a pattern of words: letters, the marks that belong to them, and apostrophes between them."""
    # To `re`, the vowels of Indian scripts are no letters.
    marks = "".join(c for c in map(chr, range(0x300, 0x3100)) if unicodedata.category(c) in ("Mn", "Mc"))
    letter = rf"(?:[^\W\d_]|[{marks}])"
    return re.compile(rf"{letter}+(?:['\u2019]{letter}+)*")


def keywords(counts: Sequence[tuple[Counter[str], int]]) -> list[list[str]]:
    """Return the keywords of each cluster.

    Args:
        counts (`Sequence[tuple[Counter[str], int]]`): of each cluster, the rows that have each word, and the rows read.
    """
    if len(counts) < 2:
        return [[] for _ in counts]
    total: dict[str, float] = defaultdict(float)
    common: Counter[str] = Counter()  # clusters in which a word is common
    for words, rows in counts:
        for word, n in words.items():
            total[word] += n / rows
            common[word] += n >= max(2, COMMON * rows)
    most = max(1, EVERYWHERE * len(counts))
    average = sum(total.values()) / len(counts)  # words of a row
    idf = {word: math.log(1 + average / n) for word, n in total.items() if common[word] <= most}
    return [_keywords(words, rows, idf) for words, rows in counts]


def _keywords(words: Counter[str], rows: int, idf: dict[str, float]) -> list[str]:
    # Rounded, so that words of equal weight are in alphabetical order on any machine.
    weights = {
        word: round(n / rows * idf[word], 9)
        for word, n in words.items()
        if word in idf and n >= max(2, COMMON * rows)  # a word of one row says nothing of the others
    }
    chosen: list[str] = []
    # The longer of two, because a part of a Chinese word is in as many rows as the word.
    for word in sorted(weights, key=lambda word: (-weights[word], -len(word), word)):
        if len(chosen) < KEYWORDS and not any(_alike(word, other) for other in chosen):
            chosen.append(word)
    return chosen


def _alike(word: str, other: str) -> bool:
    """Return True for two forms of a word, such as "recipe" and "recipes", and for Chinese ones that overlap."""
    if _ALL_HAN.fullmatch(word) and _ALL_HAN.fullmatch(other):
        meet = any(word[:i] == other[-i:] or word[-i:] == other[:i] for i in range(1, min(len(word), len(other))))
        return meet or word in other or other in word
    return word.startswith(other) or other.startswith(word)
