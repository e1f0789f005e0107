"""Read ratings of single rows: soundness, its main fault, and worth, each from 0 to 10.

Does: find the rated rows in the files that the ratings point to; refuse values out of range, rows that do not exist and
unknown faults, with the line; also return the rows of those files that nobody has rated; measure how well a scorer tells
sound rows from faulty ones and agrees with the ratings.
Does not: read pairs, or train.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.schemas import exchanges_of, find_schema
from car_datasets.loading.templates import Exchange, join_lines, render
from car_datasets.scoring.iqs.heads import FAULTS, PARTS
from car_datasets.training.evaluation import TOKEN, Figures, share_in_order, with_intervals
from car_datasets.training.pairs import cleaned, parse_text, question, read_records

if TYPE_CHECKING:
    from car_datasets.scoring.scorer import QualityScorer

COLUMNS = ("file", "row", "soundness", "fault", "worth")
PLACE = COLUMNS[:2]  # of a row in another file
FORMATS = (".json", ".jsonl", ".csv", ".parquet")
UNREADABLE = Exchange("", "", "")
FEWEST = 5  # rows with a fault, pairs, or known ratings, below which there is no figure
FAULTY, SOUND = 4.0, 8.0  # a row is faulty up to the first rating of soundness, sound from the second on


Numbers = npt.NDArray[Any]


class Ratings(NamedTuple):
    """Rated rows.

    Args:
        rows (`list[Exchange]`): the rows.
        soundness (`(rows,)` float32): 0 to 10.
        fault (`(rows,)` int64): index in [`~car_datasets.scoring.iqs.heads.FAULTS`].
        worth (`(rows,)` float32): 0 to 10, NaN where nobody has rated it.
        source (`list[str]`): what each row is from: its `source` if it has one, else the name of its file.
        unrated (`list[Exchange]`): the rows of those files that have no rating, in order.
    """

    rows: list[Exchange]
    soundness: npt.NDArray[np.float32]
    fault: npt.NDArray[np.int64]
    worth: npt.NDArray[np.float32]
    source: list[str]
    unrated: list[Exchange]

    def without(self, asked: Container[tuple[str, str]]) -> Ratings:
        """Return the ratings without rows that ask one of these questions (see [`~car_datasets.training.pairs.question`])."""
        kept = [i for i, row in enumerate(self.rows) if question(row) not in asked]
        return Ratings(
            [self.rows[i] for i in kept],
            self.soundness[kept],
            self.fault[kept],
            self.worth[kept],
            [self.source[i] for i in kept],
            [row for row in self.unrated if question(row) not in asked],
        )


def read_ratings(path: str | Path) -> Ratings:
    """Read a file of ratings, and the rows that it points to.

    Args:
        path (`str`): CSV, JSON Lines or Parquet with the columns `file`, `row`, `soundness`, `fault` and `worth`. `file`
            is the name of a file in the same folder, with or without its ending: a dataset (`instruction`, `input`,
            `output`, or another schema), or texts in a column `src` of the form "Instruction: ... Response: ...". `row`
            counts from 0. An empty `worth` is unknown. Without `file` and `row`, the ratings are columns of the rows
            themselves, and a column `source` names where each is from.

    Raises:
        ValueError: a file or a column is missing, a rating is not a number from 0 to 10, a row does not exist or is
            rated twice, a fault is unknown, or all rows are sound, or none is; the message names the line.
    """
    content = read_records(path)
    own = not any(name in content[0] for name in PLACE)
    missing = [name for name in (COLUMNS[len(PLACE) :] if own else COLUMNS) if name not in content[0]]
    if missing:
        raise ValueError(f"{path} has the columns {list(content[0])}; ratings need {list(COLUMNS)}, so {missing} too.")
    files: dict[str, list[Exchange]] = {Path(path).stem: _rows_of(path, content)} if own else {}
    places: list[tuple[str, int]] = []
    numbers = np.full((2, len(content)), np.nan, dtype=np.float32)
    faults = np.zeros(len(content), dtype=np.int64)
    seen: dict[tuple[str, int], int] = {}
    for i, record in enumerate(content):
        line = f"{path}, row {i + 1}"
        if own:
            record = {**record, "file": Path(path).stem, "row": i}
        place = _place(path, line, record, files)
        if (first := seen.setdefault(place, i)) != i:
            raise ValueError(f"{line}: row {place[1]} of {place[0]} is rated in row {first + 1} too; keep one rating.")
        places.append(place)
        numbers[0, i] = _rating(line, "soundness", record["soundness"])
        if record["worth"] not in (None, ""):
            numbers[1, i] = _rating(line, "worth", record["worth"])
        if record["fault"] not in FAULTS:
            raise ValueError(f"{line}: fault={record['fault']!r:.80} is not known; choose one of {list(FAULTS)}.")
        faults[i] = FAULTS.index(record["fault"])
    _refuse_one_class(path, numbers[0], faults)
    unrated = [row for name, rows in files.items() for at, row in enumerate(rows) if (name, at) not in seen]
    rows = [files[name][at] for name, at in places]
    source = [str(record.get("source") or name) for record, (name, _) in zip(content, places, strict=True)]
    return Ratings(rows, numbers[0], faults, numbers[1], source, unrated)


def _rating(line: str, name: str, given: Any) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError, OverflowError):
        value = np.nan  # fails the next comparison
    if not 0 <= value <= 10:
        raise ValueError(f"{line}: {name}={given!r:.80} must be a number from 0 to 10.")
    return value


def _place(path: str | Path, line: str, record: Mapping[str, Any], files: dict[str, list[Exchange]]) -> tuple[str, int]:
    """Return file and row of a record; read the file into `files` if it is new."""
    name = record["file"]
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{line}: file={name!r:.80} must be the name of a file in the folder of the ratings.")
    if name not in files:
        files[name] = _read_rows(Path(path).parent, line, name)
    try:
        row = int(record["row"])
        known = float(record["row"]) == row and 0 <= row < len(files[name])
    except (TypeError, ValueError, OverflowError):
        known = False
    if not known:
        raise ValueError(
            f"{line}: row={record['row']!r:.80} points nowhere: {name} has {len(files[name])} rows, counted from 0."
        )
    if files[name][row] == UNREADABLE:
        raise ValueError(f"{line}: row {row} of {name} has no question and no answer that can be read; leave it out.")
    return name, row


def _read_rows(folder: Path, line: str, name: str) -> list[Exchange]:
    found = [place for ending in ("", *FORMATS) if (place := folder / f"{name}{ending}").is_file()]
    if not found:
        raise ValueError(f"{line}: file={name!r:.80} points nowhere; {folder} has no {name} with one of {FORMATS}.")
    return _rows_of(found[0], read_records(found[0]))


def _rows_of(path: str | Path, records: Sequence[Mapping[str, Any]]) -> list[Exchange]:
    if "src" in records[0]:
        return [parse_text(path, i, record.get("src")) for i, record in enumerate(records, 1)]
    schema = find_schema(list(records[0]), "auto", ())
    batch = {column: [record.get(column) for record in records] for column in records[0]}
    rows: list[Exchange] = []
    for exchanges in exchanges_of(batch, schema):
        # A row that cannot be read is kept empty, so that the others keep their numbers; rating one is an error below.
        rows.append(exchanges[-1] if not isinstance(exchanges, str) and exchanges else UNREADABLE)
    return rows


def _refuse_one_class(path: str | Path, soundness: Sequence[float], faults: npt.NDArray[np.int64]) -> None:
    """Raise ValueError if no two rows differ in soundness, or none has a fault, or all have."""
    if len(set(np.asarray(soundness).tolist())) == 1:
        raise ValueError(f"{path}: every soundness is {soundness[0]:g}; a model learns nothing from one class only.")
    if len({bool(fault) for fault in faults}) == 1:
        has = "no row has a fault" if not faults.any() else "every row has a fault"
        raise ValueError(f"{path}: {has}; a model learns nothing from one class only. Add others.")


def rating_figures(scorer: QualityScorer, ratings: Ratings) -> Figures:
    """Return how well a scorer with parts tells the ratings of rows, with 95 % intervals (bootstrap over rows).

    Args:
        scorer ([`QualityScorer`]): a scorer whose head is `"parts"`.
        ratings ([`Ratings`]): rows that it was not trained on.

    Returns:
        `dict`: the figures of [`told_apart`], and `score`, the rank correlation of the score with soundness x worth.
    """
    texts = [render(cleaned(row), str(scorer.template)) for row in ratings.rows]
    found = scorer.score_texts(texts)
    if found.parts is None:
        raise ValueError(f"The head of {scorer.model_id} judges no parts; ratings are told by a scorer that has them.")
    soundness, worth = (found.parts[:, PARTS.index(name)] for name in ("soundness", "worth"))
    lengths = np.array([len(row.response) for row in map(cleaned, ratings.rows)])

    def measure(at: npt.NDArray[np.int64]) -> dict[str, float]:
        rated = ratings.soundness[at], ratings.worth[at]
        figures = told_apart((soundness[at], worth[at]), rated, lengths[at])
        (score,), _ = correlations(found.scores[None, at], rated[0] * rated[1], lengths[at])
        return {**figures, "score": float(score)}

    return with_intervals(measure, len(texts))


def told_apart(told: tuple[Numbers, Numbers], rated: tuple[Numbers, Numbers], lengths: Numbers) -> dict[str, float]:
    """Return how well told soundness and worth agree with the ratings.

    Args:
        told (`tuple`): soundness and worth as a scorer tells them, (rows,) each.
        rated (`tuple`): the ratings, (rows,) each; NaN where unknown.
        lengths (`(rows,)`): of the answers.

    Returns:
        `dict`: `faulty`, the share of all (faulty, sound) combinations of rows whose soundness is told in the right
        order, NaN without such rows; `soundness` and `worth`, rank correlations; `soundness_length_held` and
        `worth_length_held`, the partial ones with the length held constant; `product`, of soundness x worth.
    """
    figures = {"faulty": float(shares_apart(told[0][None], rated[0] <= FAULTY, rated[0] >= SOUND)[0])}
    for name, found, given in zip(("soundness", "worth"), told, rated, strict=True):
        at = ~np.isnan(given)
        (plain,), (held,) = correlations(found[None, at], given[at], lengths[at])
        figures |= {name: float(plain), f"{name}_length_held": float(held)}
    at = ~np.isnan(rated[0] * rated[1])
    (product,), _ = correlations((told[0] * told[1])[None, at], (rated[0] * rated[1])[at], lengths[at])
    return {**figures, "product": float(product)}


def bags_of_words(known: Ratings, rows: Sequence[Exchange]) -> dict[str, Numbers]:
    """Return what ridge regressions on tf-idf, one per rating, tell of rows: (rows,) by name.

    Args:
        known ([`Ratings`]): other rated rows, which the regressions are fitted to; a rating that fewer than `FEWEST` of
            them have is left out.
        rows (`Sequence[Exchange]`): cleaned rows.

    Raises:
        ValueError: the known rows share no words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge

    vectors = TfidfVectorizer(token_pattern=TOKEN, min_df=2, sublinear_tf=True)
    try:
        words = vectors.fit_transform([join_lines(*cleaned(row)) for row in known.rows])
    except ValueError as error:
        raise ValueError(f"other: its {len(known.rows)} rows share no words ({error}). Add ratings.") from error
    told = vectors.transform([join_lines(*row) for row in rows])
    found = {}
    for target, rated in (
        ("soundness", known.soundness),
        ("worth", known.worth),
        ("product", known.soundness * known.worth),
    ):
        at = np.flatnonzero(~np.isnan(rated))
        if len(at) >= FEWEST:
            ridge = Ridge(solver="sparse_cg").fit(words[at], rated[at].astype(np.float64))
            found[f"bag of words, {target}"] = np.asarray(ridge.predict(told), dtype=np.float64)
    return found


def shares_apart(scores: Numbers, faulty: npt.NDArray[np.bool_], sound: npt.NDArray[np.bool_]) -> Numbers:
    """Return the share of all (faulty, sound) combinations in the right order by each ranker; NaN without any.

    Args:
        scores (`(rankers, rows)`): what each ranker tells of each row.
        faulty, sound (`(rows,)` bool): which rows are.
    """
    if not (faulty.any() and sound.any()):  # possible in a bootstrap sample, and in one source
        return np.full(len(scores), np.nan)
    return np.array([share_in_order(of[faulty], of[sound]) for of in scores])


def correlations(scores: Numbers, rated: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers]:
    """Return Spearman's correlation of each ranker with a rating, and the same with the length held constant.

    Both are 0 where either is constant, or where nothing is left of a ranker once the length is held constant.

    Args:
        scores (`(rankers, rows)`): what each ranker tells of each row.
        rated, lengths (`(rows,)`): the rating of each row, and the length of its answer.
    """
    from scipy.stats import rankdata

    if scores.shape[1] < 2:
        return np.zeros(len(scores)), np.zeros(len(scores))
    ranks = np.asarray(rankdata(np.vstack([rated, lengths, scores]), axis=1))
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.sqrt(np.square(ranks).sum(axis=1))
    matrix = ranks / np.where(norms > 0, norms, 1)[:, None]
    # Sums row by row: a product of matrices rounds a ranker by its place among the others.
    plain, by_length = (matrix[2:] * matrix[0]).sum(axis=1), (matrix[2:] * matrix[1]).sum(axis=1)
    rest = (1 - np.square(by_length)) * (1 - np.square(matrix[0] @ matrix[1]))
    partial = (plain - by_length * (matrix[0] @ matrix[1])) / np.sqrt(np.where(rest > 1e-9, rest, np.inf))
    return plain, partial + 0.0  # without the sign of -0
