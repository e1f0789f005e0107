"""Turn expert revisions into training, validation and test files, and audit their labels for leaks.

Does: drop the smallest edits, split 8 : 1 : 1 as the original does, keep near-duplicate pairs in one split, clean the
text, write both of the original's CSV formats, and test whether single tokens reveal the labels.
Does not: train, or read preference pairs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.templates import Exchange, join_surrogates
from car_datasets.training.evaluation import Clue, clues, cross_validated, pair_metrics
from car_datasets.training.pairs import Pair, as_given, cleaned, parse_text, question
from car_datasets.utils.files import table_text, write_folder
from car_datasets.utils.settings import SEED, refuse_missing_extra

if TYPE_CHECKING:
    from rich.table import Table

SIDES = ("train", "valid", "test")

# The original drops 1,211 of its 3,751 revisions.
PUBLISHED_SHARE = 1211 / 3751

# Labels leak if a bag of words ranks more than this share of the pairs correctly. CaR's pairs, cleaned, give 0.86.
LEAK = 0.9


@dataclass(frozen=True)
class Audit:
    """The cross-validated accuracy of a bag of words on the pairs; a value near 1 means that the labels leak.

    Args:
        pairs (`float`): share of pairs that the probe ranks correctly.
        auc (`float`): share of all (worse, better) combinations of rows that it ranks correctly.
        clues (`tuple[Clue]`): the most revealing tokens, with the shares of worse and of better texts that contain
            them.
    """

    pairs: float
    auc: float
    clues: tuple[Clue, ...]

    @property
    def leaks(self) -> bool:
        """Return True if single tokens rank more than 90 % of the pairs correctly."""
        return self.pairs > LEAK


class Prepared(NamedTuple):
    """The written files, the counts of revisions per step, the pairs moved to training, and the audits by text form."""

    files: dict[str, Path]
    counts: dict[str, int]
    moved: int
    audits: dict[str, Audit]


def prepare(
    revisions: str | Path,
    output: str | Path,
    *,
    drop: float = PUBLISHED_SHARE,
    seed: int = SEED,
    clean_text: bool = True,
    similarity: float | None = 0.8,
) -> Prepared:
    """Write training, validation and test files in two formats, and `report.json`, into a new folder.

    The files are `score_{train,valid,test}.csv` (src, score) and `ranking_{train,valid,test}.csv` (src, pos, neg).

    With `clean_text=False, similarity=None` the pairs and splits are those of the original's files.

    Args:
        revisions (`str`): JSON list of objects with `original` and `revised`, each a text of the form
            "Instruction: ... Input: ... Response: ..." or an object with `instruction`, `input` and `output`.
        output (`str`): a new folder.
        drop (`float`): share (below 1) or number of pairs with the smallest Levenshtein distance to drop.
        seed (`int`): seed of the split.
        clean_text (`bool`): decode typed-out escapes, straighten quotes and fold white space.
        similarity (`float`, *optional*): cosine from which two pairs count as near-duplicates; `None` skips the search.

    Raises:
        ValueError: rapidfuzz is not installed, the folder exists, an argument or an entry of the file is invalid, or
            one of the files would be empty.
    """
    _edit_distance()  # a missing extra is an error before anything is read
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"output={str(output)!r} already exists; name a new folder.")
    if similarity is not None and not 0 < similarity <= 1:
        raise ValueError(f"similarity={similarity} must be above 0 and at most 1, or None to skip the search.")
    everything = read_revisions(revisions)
    # Small edits first: a pair with nearly equal halves teaches little, and its label is noise.
    pairs = drop_smallest_edits(everything, drop)
    groups = np.arange(len(pairs)) if similarity is None else near_duplicates(pairs, similarity)
    parts, moved = split_pairs(pairs, seed, groups)
    empty = [side for side, part in zip(SIDES, parts, strict=True) if not part]
    if empty:
        raise ValueError(
            f"No pairs are left for {' and '.join(empty)}: {moved} that resemble others were moved to train. Provide "
            f"more revisions, or raise similarity={similarity}."
        )
    # Both ways, because typed-out escapes may give the labels away, and cleaning removes these.
    audits = {
        name: audit_labels(pairs, flag, groups.tolist()) for name, flag in (("as given", False), ("cleaned", True))
    }
    counts = {"revisions": len(everything), "dropped": len(everything) - len(pairs)}
    counts |= {side: len(part) for side, part in zip(SIDES, parts, strict=True)}
    counts["groups_of_near_duplicates"] = int((np.bincount(groups) > 1).sum())
    report = {"counts": counts, "moved_to_training": moved, "seed": seed, "cleaned": clean_text}
    report["audits"] = {name: asdict(audit) for name, audit in audits.items()}
    files = {}
    with write_folder(folder) as partial:
        for side, part in zip(SIDES, parts, strict=True):
            written = [Pair(*(cleaned(row) for row in pair)) for pair in part] if clean_text else part
            for name, header, rows in (
                (f"score_{side}", ("src", "score"), _score_rows(written)),
                (f"ranking_{side}", ("src", "pos", "neg"), _triples(written)),
            ):
                _write_csv(partial / f"{name}.csv", header, rows)
                files[name] = folder / f"{name}.csv"
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        (partial / "report.json").write_text(text, encoding="utf-8")
    return Prepared(files, counts, moved, audits)


def read_revisions(path: str | Path) -> list[Pair]:
    """Read a JSON list of revisions.

    Args:
        path (`str`): the file. Each entry has `original` and `revised`, or `input` and `output` as in CaR's own file.
            Each of the two is a text of the form "Instruction: ... Input: ... Response: ...", or an object with
            `instruction`, `input` and `output`.

    Raises:
        ValueError: the file or an entry is not of that form; the message counts entries from 1.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must hold a list of revisions, objects with original and revised.")
    return [_revision(path, number, entry) for number, entry in enumerate(content, 1)]


def _revision(path: str | Path, number: int, entry: Any) -> Pair:
    for names in (("original", "revised"), ("input", "output")):
        if isinstance(entry, dict) and set(names) <= set(entry):
            return Pair(*(_side(path, number, name, entry[name]) for name in names))
    given = list(entry) if isinstance(entry, dict) else type(entry).__name__
    raise ValueError(f"{path}, entry {number}: needs original and revised (or input and output); it has {given}.")


def _side(path: str | Path, number: int, name: str, value: Any) -> Exchange:
    if isinstance(value, str):
        return parse_text(path, number, value)
    given = value if isinstance(value, dict) else {}
    fields = (given.get("instruction", ""), given.get("input") or "", given.get("output", ""))
    parts = [join_surrogates(field) for field in fields if isinstance(field, str)]
    if len(parts) < 3 or not (parts[0] + parts[2]).strip():
        raise ValueError(
            f"{path}, entry {number}: {name} must be a text, or an object with instruction, input and output, "
            f"not {value!r:.80}."
        )
    return Exchange(*parts)


def drop_smallest_edits(pairs: Sequence[Pair], drop: float) -> list[Pair]:
    """Return the pairs without those whose halves differ least, sorted by edit distance.

    The original sorts by distance as well, and its random split depends on that order.

    Args:
        pairs (`Sequence[Pair]`): all pairs.
        drop (`float`): share (below 1) or number of pairs to drop.

    Raises:
        ValueError: `drop` is negative or NaN, or leaves fewer than 10 pairs, or rapidfuzz is not installed.
    """
    edit_distance = _edit_distance()
    known = 0 <= drop <= len(pairs)
    # Below 1 a share, from 1 on a number of pairs.
    count = round(drop * len(pairs)) if drop < 1 else int(drop) if known else 0
    if not known or len(pairs) - count < 10:
        raise ValueError(
            f"drop={drop:g} of {len(pairs)} pairs leaves too few to split; at least 10 must stay. Lower drop."
        )
    distances = [edit_distance(as_given(pair.worse).whole, as_given(pair.better).whole) for pair in pairs]
    # A stable sort: equal distances keep the order of the file.
    order = sorted(range(len(pairs)), key=distances.__getitem__)
    return [pairs[i] for i in order[count:]]


def _edit_distance() -> Callable[[str, str], int]:
    """Return rapidfuzz's Levenshtein distance in characters; raise ValueError if the extra `train` is not installed."""
    refuse_missing_extra("train", "prepare", {"rapidfuzz.distance": "rapidfuzz"}, load=True)
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance


def near_duplicates(pairs: Sequence[Pair], similarity: float) -> npt.NDArray[np.int64]:
    """Return a group number for each pair; pairs linked by a chain of near-duplicates share one.

    Two pairs are near-duplicates if any of their halves have the same instruction and input, or if the cosine between
    the TF-IDF vectors of their better halves (words and word pairs of question and answer) is at least `similarity`.
    All text is cleaned first.

    Args:
        pairs (`Sequence[Pair]`): the pairs.
        similarity (`float`): cosine, above 0 and at most 1.

    Returns:
        int64 of shape `(pairs,)`.
    """
    from scipy.sparse import csr_matrix, vstack
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [as_given(cleaned(pair.better)).whole for pair in pairs]
    # Word pairs as well, because single words make all texts about one subject alike.
    vectors = TfidfVectorizer(ngram_range=(1, 2), dtype=np.float32).fit_transform(texts)
    # In blocks of rows, so that the products below the threshold need not all be in memory.
    blocks = [vectors[i : i + 1000] @ vectors.T for i in range(0, len(texts), 1000)]
    # Keep the structure of the products, with True for the pairs above the threshold.
    near = vstack([csr_matrix((b.data >= similarity, b.indices, b.indptr), shape=b.shape) for b in blocks])
    near.eliminate_zeros()
    # The second relation: a sparse matrix pairs x questions, whose product with itself links pairs of equal questions.
    numbers: dict[tuple[str, str], int] = {}
    asked = [[numbers.setdefault(question(row), len(numbers)) for row in pair] for pair in pairs]
    at = (np.repeat(np.arange(len(pairs)), 2), np.ravel(asked))
    holds = csr_matrix((np.ones(2 * len(pairs)), at), shape=(len(pairs), len(numbers)))
    # Chains count: if a resembles b and b resembles c, all three stay together.
    linked = connected_components(near + holds @ holds.T, directed=False)[1]
    groups: npt.NDArray[np.int64] = linked.astype(np.int64)
    return groups


def split_pairs(pairs: Sequence[Pair], seed: int, groups: npt.NDArray[np.int64]) -> tuple[list[list[Pair]], int]:
    """Split pairs 8 : 1 : 1; groups that the split would cut are moved to training.

    As in the original, scikit-learn's `train_test_split` is called twice with the same seed.

    Args:
        pairs (`Sequence[Pair]`): the pairs, in the order of [`drop_smallest_edits`].
        seed (`int`): seed of the split.
        groups (`(pairs,)` int64): group of each pair.

    Returns:
        The pairs of train, valid and test, and the number of pairs that were moved to training.
    """
    from sklearn.model_selection import train_test_split

    # 8 : 2, and the 2 halved: together 8 : 1 : 1.
    train, rest = train_test_split(np.arange(len(pairs)), test_size=0.2, random_state=seed)
    valid, test = train_test_split(rest, test_size=0.5, random_state=seed)
    side = np.zeros(len(pairs), dtype=np.int64)
    side[valid], side[test] = 1, 2
    spread: dict[int, set[int]] = {}
    for group, place in zip(groups.tolist(), side.tolist(), strict=True):
        spread.setdefault(group, set()).add(place)
    # Moved to training and not dropped: training may contain near-duplicates, evaluation must not.
    stray = [i for i in [*valid, *test] if len(spread[int(groups[i])]) > 1]
    kept = [[i for i in part if i not in set(stray)] for part in (valid, test)]
    return [[pairs[i] for i in part] for part in ([*train, *stray], *kept)], len(stray)


def audit_labels(pairs: Sequence[Pair], clean_text: bool, groups: Sequence[int] | None = None) -> Audit:
    """Measure how well a bag of words tells the better half of each pair, and name the most revealing tokens.

    Args:
        pairs (`Sequence[Pair]`): the pairs.
        clean_text (`bool`): clean the text first.
        groups (`Sequence[int]`, *optional*): pairs of one group stay in one fold of the cross-validation.
    """
    halves = [
        [as_given(cleaned(row) if clean_text else row).whole for row in half] for half in zip(*pairs, strict=True)
    ]
    figures = pair_metrics(*cross_validated(halves[0], halves[1], groups))
    return Audit(figures["pairs"], figures["auc"], tuple(clues(halves[0], halves[1])))


def _score_rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    return [(as_given(row).whole, str(label)) for pair in pairs for label, row in enumerate(pair)]


def _triples(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Return (question, better answer, worse answer); the question is the revised one, as in the original."""
    # The trailing space is the original's: it joins question and answer without another.
    return [(f"{as_given(p.better).question} ", as_given(p.better).answer, as_given(p.worse).answer) for p in pairs]


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def audit_table(name: str, audit: Audit) -> Table:
    """Return a table of the tokens that reveal the label, for a terminal."""
    from rich.table import Table

    verdict = "THE LABELS LEAK" if audit.leaks else "no more than style words"
    table = Table(
        title=f"Text {name}: a bag of words ranks {100 * audit.pairs:.1f} % of unseen pairs right ({verdict})",
        title_justify="left",
    )
    for column in ("token", "in worse texts", "in better texts", "speaks for"):
        table.add_column(column)
    for clue in audit.clues:
        side = "better" if clue.weight > 0 else "worse"
        table.add_row(table_text(repr(clue.token)), f"{100 * clue.worse:.1f} %", f"{100 * clue.better:.1f} %", side)
    return table
