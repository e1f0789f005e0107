"""Expert revisions to training files: which pairs are kept, how they are split, and what would give the label away.

Does: drop the smallest edits, split 8 : 1 : 1 as the original does, keep near-duplicate pairs on one side, clean the
text, write both of the original's CSV formats, and audit the labels with a probe that reads single tokens only.
Does not: train (training.py), or read preference pairs (pairs.py).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.metrics import pair_metrics
from car_datasets.pairs import Pair, as_given, cleaned, parse_text, question
from car_datasets.probe import Clue, clues, cross_validated
from car_datasets.templates import Exchange, join_surrogates

if TYPE_CHECKING:
    from rich.table import Table

SIDES = ("train", "valid", "test")
# The original drops 1,211 of its 3,751 revisions.
PUBLISHED_SHARE = 1211 / 3751
LEAK = 0.9  # pairs that a bag of words may rank right before the labels are called leaking; cleaned, CaR's give 0.86


@dataclass(frozen=True)
class Audit:
    """What a bag of words learns from the pairs, cross-validated: a share near 1 means that the label leaks.

    Args:
        pairs (`float`): share of pairs that the probe ranks right; auc (`float`): over rows.
        clues (`tuple[Clue]`): the tokens that say most, with the share of worse and of better texts that hold them.
    """

    pairs: float
    auc: float
    clues: tuple[Clue, ...]

    @property
    def leaks(self) -> bool:
        """Whether single tokens rank more than 90 % of the pairs right."""
        return self.pairs > LEAK


class Prepared(NamedTuple):
    """Where the files are and what became of the revisions."""

    files: dict[str, Path]
    counts: dict[str, int]
    moved: int
    audits: dict[str, Audit]


def read_revisions(path: str | Path) -> list[Pair]:
    """Read a JSON list of revisions: objects with `original` and `revised`, or `input` and `output` as CaR's own file.

    Each side is a text of the form "Instruction: ... Input: ... Response: ...", or an object with `instruction`, `input`
    and `output`.

    Raises:
        ValueError: the file or an entry is not of that form (entries are counted from 1).
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} must hold a list of revisions, each with original and revised.")
    return [_revision(path, number, entry) for number, entry in enumerate(content, 1)]


def _revision(path: str | Path, number: int, entry: Any) -> Pair:
    for names in (("original", "revised"), ("input", "output")):
        if isinstance(entry, dict) and set(names) <= set(entry):
            return Pair(*(_side(path, number, name, entry[name]) for name in names))
    seen = list(entry) if isinstance(entry, dict) else type(entry).__name__
    raise ValueError(f"{path}, entry {number}: needs original and revised (or input and output); it has {seen}.")


def _side(path: str | Path, number: int, name: str, value: Any) -> Exchange:
    if isinstance(value, str):
        return parse_text(path, number, value)
    given = value if isinstance(value, dict) else {}
    fields = (given.get("instruction", ""), given.get("input") or "", given.get("output", ""))
    parts = [join_surrogates(field) for field in fields if isinstance(field, str)]
    if len(parts) < 3 or not (parts[0] + parts[2]).strip():
        raise ValueError(
            f"{path}, entry {number}: {name} must be a text, or an object with instruction, input and output, not {value!r:.80}."
        )
    return Exchange(*parts)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance, in characters (Myers 1999 in the form of Hyyrö 2003: one column is one integer)."""
    if not first or not second:
        return len(first) + len(second)
    everything, last = (1 << len(first)) - 1, 1 << (len(first) - 1)
    where: dict[str, int] = {}
    for i, character in enumerate(first):
        where[character] = where.get(character, 0) | 1 << i
    up, down, distance = everything, 0, len(first)
    for character in second:
        match = where.get(character, 0)
        vertical = match | down
        diagonal = (((match & up) + up) ^ up) | match
        rise, fall = down | ~(diagonal | up), up & diagonal
        distance += bool(rise & last) - bool(fall & last)
        rise, fall = rise << 1 | 1, fall << 1
        up, down = (fall | ~(vertical | rise)) & everything, rise & vertical & everything
    return distance


def drop_smallest_edits(pairs: Sequence[Pair], drop: float) -> list[Pair]:
    """The pairs without those whose halves differ least: a share below 1, or a number of pairs.

    What is left comes in the order of the distance, as in the original, whose split depends on it.

    Raises:
        ValueError: `drop` is negative or no number, or leaves fewer than 10 pairs.
    """
    known = 0 <= drop <= len(pairs)
    count = round(drop * len(pairs)) if drop < 1 else int(drop) if known else 0
    if not known or len(pairs) - count < 10:
        raise ValueError(f"drop={drop:g} of {len(pairs)} pairs leaves too few to split; at least 10 must stay.")
    distances = [edit_distance(as_given(pair.worse).whole, as_given(pair.better).whole) for pair in pairs]
    order = sorted(range(len(pairs)), key=distances.__getitem__)
    return [pairs[i] for i in order[count:]]


def near_duplicates(pairs: Sequence[Pair], similarity: float) -> npt.NDArray[np.int64]:
    """A group number for each pair; two pairs share it if a chain of near-duplicates links them.

    Near means the same instruction and input in either half, or a cosine of at least `similarity` between TF-IDF vectors
    of the words and word pairs of the better halves, question and answer; all cleaned.
    """
    from scipy.sparse import csr_matrix, vstack
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [as_given(cleaned(pair.better)).whole for pair in pairs]
    vectors = TfidfVectorizer(ngram_range=(1, 2), dtype=np.float32).fit_transform(texts)
    blocks = [vectors[i : i + 1000] @ vectors.T for i in range(0, len(texts), 1000)]
    near = vstack([csr_matrix((b.data >= similarity, b.indices, b.indptr), shape=b.shape) for b in blocks])
    near.eliminate_zeros()
    numbers: dict[tuple[str, str], int] = {}
    asked = [[numbers.setdefault(question(row), len(numbers)) for row in pair] for pair in pairs]
    at = (np.repeat(np.arange(len(pairs)), 2), np.ravel(asked))
    holds = csr_matrix((np.ones(2 * len(pairs)), at), shape=(len(pairs), len(numbers)))
    linked = connected_components(near + holds @ holds.T, directed=False)[1]
    groups: npt.NDArray[np.int64] = linked.astype(np.int64)
    return groups


def split_pairs(pairs: Sequence[Pair], seed: int, groups: npt.NDArray[np.int64]) -> tuple[list[list[Pair]], int]:
    """8 : 1 : 1 with scikit-learn's `train_test_split`, twice, as in the original; a group that is cut goes to training.

    Returns:
        The pairs of train, valid and test, and how many were moved to training.
    """
    from sklearn.model_selection import train_test_split

    train, rest = train_test_split(np.arange(len(pairs)), test_size=0.2, random_state=seed)
    valid, test = train_test_split(rest, test_size=0.5, random_state=seed)
    side = np.zeros(len(pairs), dtype=np.int64)
    side[valid], side[test] = 1, 2
    spread: dict[int, set[int]] = {}
    for group, where in zip(groups.tolist(), side.tolist(), strict=True):
        spread.setdefault(group, set()).add(where)
    stray = [i for i in [*valid, *test] if len(spread[int(groups[i])]) > 1]
    kept = [[i for i in part if i not in set(stray)] for part in (valid, test)]
    return [[pairs[i] for i in part] for part in ([*train, *stray], *kept)], len(stray)


def audit_labels(pairs: Sequence[Pair], clean_text: bool, groups: Sequence[int] | None = None) -> Audit:
    """Let a bag of words guess which half is the better one, on the text as given or cleaned; see [`Audit`]."""
    halves = [
        [as_given(cleaned(row) if clean_text else row).whole for row in half] for half in zip(*pairs, strict=True)
    ]
    found = pair_metrics(*cross_validated(halves[0], halves[1], groups))
    return Audit(found["pairs"], found["auc"], tuple(clues(halves[0], halves[1])))


def prepare(
    revisions: str | Path,
    output: str | Path,
    *,
    drop: float = PUBLISHED_SHARE,
    seed: int = 42,
    clean_text: bool = True,
    similarity: float | None = 0.8,
) -> Prepared:
    """Write `score_{train,valid,test}.csv` (src, score), `ranking_{train,valid,test}.csv` (src, pos, neg) and `report.json`.

    With `clean_text=False, similarity=None` these are the original's files, pair for pair.

    Args:
        revisions (`str`): see [`read_revisions`].
        output (`str`): a new folder.
        drop (`float`): share (below 1) or number of pairs with the smallest Levenshtein distance to leave out.
        seed (`int`): of the split.
        clean_text (`bool`): decode typed-out escapes, straighten quotes, fold white space.
        similarity (`float`, *optional*): cosine from which two pairs count as near-duplicates; `None` to not look.

    Raises:
        ValueError: the folder is there already, an argument or an entry of the file is not as said above, or one of the
            files would be empty.
    """
    folder = Path(output)
    if folder.exists():
        raise ValueError(f"output={str(output)!r} is there already; name a new folder.")
    if similarity is not None and not 0 < similarity <= 1:
        raise ValueError(f"similarity={similarity} must be above 0 and at most 1, or None.")
    everything = read_revisions(revisions)
    pairs = drop_smallest_edits(everything, drop)
    groups = np.arange(len(pairs)) if similarity is None else near_duplicates(pairs, similarity)
    parts, moved = split_pairs(pairs, seed, groups)
    empty = [side for side, part in zip(SIDES, parts, strict=True) if not part]
    if empty:
        raise ValueError(
            f"No pairs are left for {' and '.join(empty)}: {moved} that resemble others were moved to train. Bring more "
            f"revisions, or raise similarity={similarity}."
        )
    audits = {
        name: audit_labels(pairs, flag, groups.tolist()) for name, flag in (("as given", False), ("cleaned", True))
    }
    counts = {"revisions": len(everything), "dropped": len(everything) - len(pairs)}
    counts |= {side: len(part) for side, part in zip(SIDES, parts, strict=True)}
    counts["groups_of_near_duplicates"] = int((np.bincount(groups) > 1).sum())
    folder.mkdir(parents=True)
    files = {}
    for side, part in zip(SIDES, parts, strict=True):
        written = [Pair(*(cleaned(row) for row in pair)) if clean_text else pair for pair in part]
        files[f"score_{side}"] = _write_csv(folder / f"score_{side}.csv", ("src", "score"), _score_rows(written))
        files[f"ranking_{side}"] = _write_csv(folder / f"ranking_{side}.csv", ("src", "pos", "neg"), _triples(written))
    report = {"counts": counts, "moved_to_training": moved, "seed": seed, "cleaned": clean_text}
    report["audits"] = {name: asdict(audit) for name, audit in audits.items()}
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Prepared(files, counts, moved, audits)


def audit_table(name: str, audit: Audit) -> Table:
    """The tokens that give the label away, for a terminal."""
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
        table.add_row(repr(clue.token), f"{100 * clue.worse:.1f} %", f"{100 * clue.better:.1f} %", side)
    return table


def _score_rows(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    return [(as_given(row).whole, str(label)) for pair in pairs for label, row in enumerate(pair)]


def _triples(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """The instruction is always the revised one, as in the original."""
    return [(f"{as_given(p.better).question} ", as_given(p.better).answer, as_given(p.worse).answer) for p in pairs]


def _write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
