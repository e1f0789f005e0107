"""Read pairs of a worse and a better answer, the data that scorers are trained and evaluated on.

Does: read CaR's two CSV formats (`src,score` and `src,pos,neg`), and preference files with `chosen`, `rejected` and
mostly a prompt, as text or as chat messages; name the row of everything that cannot be read.
Does not: split files or score.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from car_datasets.loading.chats import NOT_A_STRING, NULL
from car_datasets.loading.schemas import Schema, exchanges_of
from car_datasets.loading.templates import Exchange, Text, clean, join_surrogates

logger = logging.getLogger(__name__)
# The columns that a prompt may have, as text or as a chat; the first that a row has counts.
PROMPTS = ("prompt", "conversations", "messages", "conversation", "instruction", "question", "query", "input")
# The first "Response:" ends the instruction; DOTALL, because texts have line breaks.
_PARTS = re.compile(r"\s*Instruction:(?P<asked>.*?) ?\bResponse:(?P<response>.*)", re.DOTALL)
# The last such turn starts the answer (Anthropic's HH-RLHF).
_HH_TURN = "\n\nAssistant:"


class Pair(NamedTuple):
    """A worse and a better answer; the instruction of the better half may be revised, too."""

    worse: Exchange
    better: Exchange


class LabelledRows(NamedTuple):
    """Rows and their labels, float32 in [0, 1]; if the file contains pairs, rows 2i and 2i + 1 are one pair."""

    rows: list[Exchange]
    labels: npt.NDArray[np.float32]


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of pairs.

    Args:
        path (`str`): `.csv` with the columns `src` and `score` (rows 2i and 2i + 1 are a pair, the higher score is the
            better half) or `src`, `pos` and `neg` (the original's ranking files; both answers get the same
            instruction); or a preference file, `.jsonl`, `.json`, `.parquet` or `.csv`, with `chosen` and `rejected`
            (a text, a message or a list of messages), and with the prompt in one of `PROMPTS` unless they contain it.
            `input`, `system` and `history` are read as in a dataset. The answer of a chat is its last one, after the
            nearest earlier turns.

    An empty answer is kept, with a warning. It is an error if both instruction and answer are empty.

    Raises:
        ValueError: a column is missing, a text is empty, two rows of a pair have the same score, or the file has
            another format; the message counts rows from 1.
    """
    content = read_records(path)
    columns = set(content[0])
    if {"chosen", "rejected"} <= columns:
        pairs = [_preference(path, i, row) for i, row in enumerate(content, 1)]
    elif {"src", "pos", "neg"} <= columns:
        pairs = [_ranked(path, i, row) for i, row in enumerate(content, 1)]
    elif {"src", "score"} <= columns:
        # Rows of one file in turn: the order of the two halves does not matter, their scores decide.
        pairs = _pair_up(path, _labelled(path, content))
    else:
        raise _wrong_columns(path, content)
    return pairs


def read_labelled_rows(path: str | Path) -> LabelledRows:
    """Read a file of pairs or of scored rows as rows and labels.

    Args:
        path (`str`): a file in any format of [`read_pairs`]. The scores of a `src,score` file are kept as they are; in
            all other formats the label is 0 for the worse and 1 for the better half.

    Raises:
        ValueError: the file cannot be read as pairs or scored rows, a label is not a number in [0, 1], or all labels
            are equal.
    """
    content = read_records(path)
    if {"src", "score"} <= set(content[0]):
        labelled = _labelled(path, content)
    else:
        pairs = read_pairs(path)
        # A pair is (worse, better).
        labels = np.tile(np.array([0, 1], dtype=np.float32), len(pairs))
        labelled = LabelledRows([row for pair in pairs for row in pair], labels)
    if len(set(labelled.labels.tolist())) == 1:
        raise ValueError(
            f"{path}: every label is {labelled.labels[0]:g}; a model learns nothing from one class only. Add others."
        )
    return labelled


def refuse_crossing(train: Sequence[Exchange], valid: Sequence[Exchange], names: tuple[str, str]) -> None:
    """Raise ValueError if training and validation rows share an instruction, because accuracy would measure memory.

    Instruction and input are compared, cleaned and without case; the answers may differ.

    Args:
        train, valid (`Sequence[Exchange]`): the rows.
        names (`tuple[str, str]`): their names for the message.
    """
    known = {question(row) for row in train}
    crossing = [i for i, row in enumerate(valid, 1) if question(row) in known]
    if crossing:
        raise ValueError(
            f"The split crosses: {len(crossing)} of the {len(valid)} rows of {names[1]} (the first: row {crossing[0]}) "
            f"have an instruction that {names[0]} contains too. `car-datasets prepare` makes splits that do not cross."
        )


def read_sides(train: str | Path, valid: str | Path) -> tuple[list[Pair], list[Pair]]:
    """Read the pairs to train on and to validate on; raise ValueError if both ask the same (see [`refuse_crossing`])."""
    sides = read_pairs(train), read_pairs(valid)
    rows = [[row for pair in side for row in pair] for side in sides]
    refuse_crossing(rows[0], rows[1], (str(train), str(valid)))
    return sides


def question(row: Exchange) -> tuple[str, str]:
    """Return instruction and input, cleaned and case-folded: a key that is equal for rows that ask the same."""
    # Cleaned, as a copy with typed-out escapes asks the same.
    return clean(row.instruction).casefold(), clean(row.input).casefold()


def groups_of(rows: Sequence[Exchange], partner: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return a number per row, (rows,) int64; rows that ask the same, and the halves of pairs, have one number.

    Args:
        rows (`Sequence[Exchange]`): rows.
        partner (`(rows,)` int64): position of the other half of the pair, or -1.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    numbers: dict[tuple[str, str], int] = {}
    asked = np.array([numbers.setdefault(question(row), len(numbers)) for row in rows])
    # A graph of questions, in which those of the two halves of a pair are linked.
    halves = np.flatnonzero(partner >= 0)
    links = csr_matrix((np.ones(len(halves)), (asked[halves], asked[partner[halves]])), shape=[len(numbers)] * 2)
    found: npt.NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)[asked]
    return found


def as_given(row: Exchange) -> Text:
    """Return the text in the form of the original's training files, without cleaning."""
    asked = f"Instruction: {row.instruction} Input: {row.input}" if row.input else f"Instruction: {row.instruction}"
    return Text(asked, f"Response: {row.response}")


def cleaned(row: Exchange) -> Exchange:
    """Return the row with typed-out escapes decoded, quotes straightened and white space folded in every part."""
    return Exchange(*(clean(part) for part in row))


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a CSV, JSON Lines, JSON or Parquet file.

    Raises:
        ValueError: the file does not exist, has another format, or holds no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}; check the path.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as bytes: text mode would change line ends within answers
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}. Convert it to UTF-8.") from error
    if path.suffix == ".csv":
        rows: list[Any] = _read_csv(path, text)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_json(path, text)
    else:
        raise ValueError(f"{path}: pairs are read from .csv, .jsonl, .json or .parquet files.")
    # For every format alike: a JSON file may hold other values than records.
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows." if not rows else f"{path} must hold one JSON object per row.")
    return rows


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not Parquet: {error}.") from error
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def _read_csv(path: Path, text: str) -> list[Any]:
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))  # the default, 128 KiB, is too small for some answers
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows: list[Any] = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    columns = [name for name in reader.fieldnames or () if name]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has the columns {columns}; each may occur only once.")
    for number, row in enumerate(rows, 1):
        # DictReader collects surplus cells under the key None.
        if any(row.get(None, ())):
            raise ValueError(
                f"{path}, row {number} has more cells than columns; a text that contains a comma must be quoted."
            )
    return rows


def _read_json(path: Path, text: str) -> list[Any]:
    try:
        if text.lstrip().startswith("["):
            rows: list[Any] = json.loads(text)
            return rows
        # Not splitlines(): strings may contain other line separators, such as U+2028.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _wrong_columns(path: str | Path, content: Sequence[Mapping[str, Any]]) -> ValueError:
    return ValueError(
        f"{path} has the columns {list(content[0])}; pairs need src and score, or src, pos and neg, or chosen and "
        f"rejected, with a prompt in one of {', '.join(PROMPTS)}."
    )


def _labelled(path: str | Path, content: Sequence[Mapping[str, Any]]) -> LabelledRows:
    labels = np.empty(len(content), dtype=np.float32)
    for i, row in enumerate(content):
        given = row.get("score")
        try:
            label = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            label = np.nan  # fails the next comparison
        if not 0 <= label <= 1:
            raise ValueError(f"{path}, row {i + 1}: score={given!r:.80} must be a number from 0 to 1.")
        labels[i] = label
    return LabelledRows([parse_text(path, i, row.get("src")) for i, row in enumerate(content, 1)], labels)


def _pair_up(path: str | Path, labelled: LabelledRows) -> list[Pair]:
    rows, labels = labelled
    if len(rows) % 2:
        raise ValueError(f"{path} holds {len(rows)} rows: rows 1 and 2, 3 and 4, ... must be pairs.")
    equal = np.flatnonzero(labels[::2] == labels[1::2])
    if len(equal):
        first = 2 * int(equal[0]) + 1
        raise ValueError(
            f"{path}, rows {first} and {first + 1} have the same score; a pair needs a worse and a better one."
        )
    return [
        Pair(rows[i], rows[i + 1]) if labels[i] < labels[i + 1] else Pair(rows[i + 1], rows[i])
        for i in range(0, len(rows), 2)
    ]


def _ranked(path: str | Path, number: int, row: Mapping[str, Any]) -> Pair:
    asked, *answers = (row.get(name) for name in ("src", "neg", "pos"))
    if not isinstance(asked, str) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{path}, row {number}: src, pos and neg must be texts.")
    # Parsed from the joined text, so that both file formats give equal rows.
    return Pair(*(parse_text(path, number, f"{asked.rstrip()} {answer}") for answer in answers))


def parse_text(path: str | Path, number: int, text: str | None) -> Exchange:
    """Parse a text of the original's form, `Instruction: ... Input: ... Response: ...`, into its parts.

    Args:
        path (`str`), number (`int`): file and row, for the messages.
        text (`str`, *optional*): the text; `Input:` may be missing.

    Raises:
        ValueError: the text has another form, or instruction and response are both empty.
    """
    match = _PARTS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"{path}, row {number}: a text must have the form 'Instruction: ... Input: ... Response: ...' (Input may "
            f"be missing); it begins with {str(text or '')[:40]!r}."
        )
    instruction, _, context = match["asked"].partition(" Input: ")
    return _checked(path, number, Exchange(instruction.removeprefix(" "), context, match["response"].removeprefix(" ")))


def _checked(path: str | Path, number: int, row: Exchange) -> Exchange:
    if not row.instruction.strip() and not row.response.strip():
        raise ValueError(f"{path}, row {number}: the text is empty.")
    row = Exchange(*(join_surrogates(part) for part in row))  # a lone surrogate cannot be encoded
    if not row.response.strip():  # as in row 270 of CaR's training file
        logger.warning("%s, row %d: the answer is empty.", path, number)
    return row


def _preference(path: str | Path, number: int, row: Mapping[str, Any]) -> Pair:
    # The first that has a value, because an earlier one may be null in this row.
    prompt = next((name for name in PROMPTS if row.get(name) is not None), None)
    sides = []
    for side in ("rejected", "chosen"):
        answer = row.get(side)
        if prompt is None and isinstance(answer, str):
            sides.append(_parse_conversation(path, number, answer))
        else:
            sides.append(_last_exchange(path, number, side, row, prompt))
    return Pair(*sides)


def _last_exchange(path: str | Path, number: int, side: str, row: Mapping[str, Any], prompt: str | None) -> Exchange:
    """Return the last answer of one side, after the prompt and what was said before, as the scorer reads a row."""
    given = Schema("pairs", prompt or "prompt", "input", side, system="system", history="history")
    # Without a prompt, a chat contains it.
    batch = {"prompt": [[]], **{name: [value] for name, value in row.items() if value is not None}}
    if prompt == "input":  # then it is the question, not its context
        given = replace(given, input=None)
    exchanges = exchanges_of({**batch, side: [row.get(side)]}, given)[0]
    if exchanges in (NULL, NOT_A_STRING):
        raise ValueError(f"{path}, row {number}: prompt and {side} must be text, or lists of messages.")
    if isinstance(exchanges, str):  # the reason why these messages are not a chat
        raise ValueError(f"{path}, row {number}: {side} is not a valid chat ({exchanges}).")
    return _checked(path, number, exchanges[-1])


def _parse_conversation(path: str | Path, number: int, text: str) -> Exchange:
    """Parse prompt and answer out of one text, in CaR's form or in that of Anthropic's HH-RLHF."""
    if _PARTS.fullmatch(text):
        return parse_text(path, number, text)
    asked, mark, answer = text.rpartition(_HH_TURN)
    if not mark:
        raise ValueError(
            f"{path}, row {number}: there is no prompt, and the text contains neither 'Response:' nor 'Assistant:' to "
            "mark the start of the answer. Add a prompt column."
        )
    return _checked(path, number, Exchange(asked.strip().removeprefix("Human:").strip(), "", answer.strip()))
