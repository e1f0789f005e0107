"""Pairs of a worse and a better answer, out of the files they come in: what scorers are trained and measured on.

Does: read CaR's two CSV formats (`src,score` and `src,pos,neg`) and JSON Lines with (chosen, rejected) or (prompt, chosen,
rejected), as text or as chat messages; name the row of everything that cannot be read.
Does not: clean text (templates.py), split files (preparation.py) or score (evaluation.py).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.formatting import SCHEMAS, exchanges_of
from car_datasets.templates import Exchange, Text, clean, join_surrogates

logger = logging.getLogger(__name__)

_PARTS = re.compile(r"\s*Instruction:(?P<asked>.*?) ?\bResponse:(?P<response>.*)", re.DOTALL)
_HH_TURN = "\n\nAssistant:"


class Pair(NamedTuple):
    """Two answers of which the second is better; its instruction may be better as well."""

    worse: Exchange
    better: Exchange


class LabelledRows(NamedTuple):
    """Rows and their labels, float32 in [0, 1]; where the file held pairs, rows 2i and 2i + 1 are one."""

    rows: list[Exchange]
    labels: npt.NDArray[np.float32]


def read_pairs(path: str | Path) -> list[Pair]:
    """Read a file of pairs.

    Args:
        path (`str`): `.csv` with the columns `src` and `score` (rows 2i and 2i + 1 are a pair, the higher score is the
            better one) or `src`, `pos` and `neg` (the original's ranking files; both answers get the same instruction);
            `.jsonl` or `.json` with `chosen` and `rejected`, and `prompt` if they do not hold it; of chats the last
            answer counts, after all that was said before.

    An empty answer is kept, with a warning; `Instruction` and answer both empty are an error.

    Raises:
        ValueError: a column is missing, a text is empty, two rows of a pair have the same score, or the file is of
            another kind; rows are counted from 1.
    """
    content = _read(path)
    columns = set(content[0])
    if {"chosen", "rejected"} <= columns:
        pairs = [_preference(path, i, row) for i, row in enumerate(content, 1)]
    elif {"src", "pos", "neg"} <= columns:
        pairs = [_ranked(path, i, row) for i, row in enumerate(content, 1)]
    elif {"src", "score"} <= columns:
        pairs = _pair_up(path, _labelled(path, content))
    else:
        raise _wrong_columns(path, content)
    return pairs


def read_labelled_rows(path: str | Path) -> LabelledRows:
    """Read the same files as rows and labels: graded ones of a `src,score` file as they are, else 0 (worse) and 1 (better).

    Raises:
        ValueError: as for [`read_pairs`]; a label is not a number in [0, 1], or all are the same.
    """
    content = _read(path)
    if {"src", "score"} <= set(content[0]):
        found = _labelled(path, content)
    else:
        pairs = read_pairs(path)
        labels = np.tile(np.array([0, 1], dtype=np.float32), len(pairs))
        found = LabelledRows([row for pair in pairs for row in pair], labels)
    if len(set(found.labels.tolist())) == 1:
        raise ValueError(f"{path}: every label is {found.labels[0]:g}; a model learns nothing from one class only.")
    return found


def refuse_crossing(train: Sequence[Exchange], valid: Sequence[Exchange], names: tuple[str, str]) -> None:
    """Raise a ValueError if the two files share a row: what is measured on it is then remembered, not judged.

    Rows are compared cleaned. The same instruction with other answers on both sides crosses as well.
    """
    known = {question(row) for row in train}
    crossing = [i for i, row in enumerate(valid, 1) if question(row) in known]
    if crossing:
        raise ValueError(
            f"The split crosses: {len(crossing)} of the {len(valid)} rows of {names[1]} (the first: row {crossing[0]}) have "
            f"an instruction that {names[0]} holds too. `car-datasets prepare` makes a split that keeps them on one side."
        )


def question(row: Exchange) -> tuple[str, str]:
    """Instruction and input, cleaned and without case: what two rows share that ask the same."""
    return clean(row.instruction).casefold(), clean(row.input).casefold()


def as_given(row: Exchange) -> Text:
    """The text in the form of the original's training files, nothing cleaned."""
    asked = f"Instruction: {row.instruction} Input: {row.input}" if row.input else f"Instruction: {row.instruction}"
    return Text(asked, f"Response: {row.response}")


def cleaned(row: Exchange) -> Exchange:
    """Every part through [`~car_datasets.templates.clean`]."""
    return Exchange(*(clean(part) for part in row))


def _read(path: str | Path) -> list[dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}.") from error
    if path.suffix == ".csv":
        rows: list[Any] = _read_csv(path, text)
    elif path.suffix in (".jsonl", ".json"):
        rows = _read_json(path, text)
    else:
        raise ValueError(f"{path}: pairs are read from .csv, .jsonl or .json files.")
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no rows." if not rows else f"{path} must hold one object per row.")
    return rows


def _read_csv(path: Path, text: str) -> list[Any]:
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, len(text)))  # 128 KiB is too little for some answers
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows: list[Any] = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    names = [name for name in reader.fieldnames or () if name]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has the columns {names}; each may be there only once.")
    for number, row in enumerate(rows, 1):
        if any(row.get(None, ())):
            raise ValueError(
                f"{path}, row {number} has more cells than columns; a text that holds a comma must be quoted."
            )
    return rows


def _read_json(path: Path, text: str) -> list[Any]:
    try:
        if text.lstrip().startswith("["):
            found: list[Any] = json.loads(text)
            return found
        return [json.loads(line) for line in text.split("\n") if line.strip()]  # a string may hold other line ends
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error


def _wrong_columns(path: str | Path, content: Sequence[Mapping[str, Any]]) -> ValueError:
    return ValueError(
        f"{path} has the columns {list(content[0])}; pairs need src and score, or src, pos and neg, or chosen and "
        "rejected (and prompt)."
    )


def _labelled(path: str | Path, content: Sequence[Mapping[str, Any]]) -> LabelledRows:
    labels = np.empty(len(content), dtype=np.float32)
    for i, row in enumerate(content):
        given = row.get("score")
        try:
            label = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            label = np.nan
        if not 0 <= label <= 1:
            raise ValueError(f"{path}, row {i + 1}: score={given!r:.80} must be a number from 0 to 1.")
        labels[i] = label
    return LabelledRows([parse_text(path, i, row.get("src")) for i, row in enumerate(content, 1)], labels)


def _pair_up(path: str | Path, found: LabelledRows) -> list[Pair]:
    rows, labels = found
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
    return Pair(*(parse_text(path, number, f"{asked.rstrip()} {answer}") for answer in answers))


def parse_text(path: str | Path, number: int, text: str | None) -> Exchange:
    """A text of the original's form, `Instruction: ... Input: ... Response: ...`, back into its parts."""
    match = _PARTS.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(
            f"{path}, row {number}: a text must have the form 'Instruction: ... Input: ... Response: ...' (Input may be left "
            f"out); it begins with {str(text or '')[:40]!r}."
        )
    instruction, _, context = match["asked"].partition(" Input: ")
    return _checked(path, number, Exchange(instruction.removeprefix(" "), context, match["response"].removeprefix(" ")))


def _checked(path: str | Path, number: int, row: Exchange) -> Exchange:
    if not row.instruction.strip() and not row.response.strip():
        raise ValueError(f"{path}, row {number}: the text is empty.")
    row = Exchange(*(join_surrogates(part) for part in row))
    if not row.response.strip():  # row 270 of CaR's own training file is such a one
        logger.warning("%s, row %d: the answer is empty.", path, number)
    return row


def _preference(path: str | Path, number: int, row: Mapping[str, Any]) -> Pair:
    sides = []
    for side in ("rejected", "chosen"):
        prompt, answer = row.get("prompt"), row.get(side)
        if isinstance(answer, list) and (prompt is None or isinstance(prompt, (str, list))):
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
            sides.append(_last_exchange(path, number, side, [*asked, *answer]))
        elif not isinstance(answer, str) or not (prompt is None or isinstance(prompt, str)):
            raise ValueError(f"{path}, row {number}: prompt and {side} must be text, or lists of messages.")
        elif prompt is not None:
            sides.append(_checked(path, number, Exchange(prompt, "", answer)))
        else:
            sides.append(_whole_conversation(path, number, answer))
    return Pair(*sides)


def _last_exchange(path: str | Path, number: int, side: str, messages: list[Any]) -> Exchange:
    found = exchanges_of({"messages": [messages]}, SCHEMAS["messages"])[0]
    if isinstance(found, str):
        raise ValueError(f"{path}, row {number}: {side} is no chat ({found}).")
    before = "\n".join(f"{e.instruction}\n{e.response}" for e in found[:-1])
    return _checked(path, number, found[-1]._replace(instruction=f"{before}\n{found[-1].instruction}".strip()))


def _whole_conversation(path: str | Path, number: int, text: str) -> Exchange:
    """Prompt and answer in one text: with CaR's marks, or as Anthropic's HH-RLHF writes them."""
    if _PARTS.fullmatch(text):
        return parse_text(path, number, text)
    asked, mark, answer = text.rpartition(_HH_TURN)
    if not mark:
        raise ValueError(
            f"{path}, row {number}: there is no prompt, and the text holds neither 'Response:' nor 'Assistant:', so "
            "where the answer begins is not known. Add a prompt column."
        )
    return _checked(path, number, Exchange(asked.strip().removeprefix("Human:").strip(), "", answer.strip()))
