"""Rows as chat messages, in TRL's conversational prompt-completion form, and the groups that they fall into.

Does: turn loaded rows into messages; identify a row by what it says; find a column of sources or the kinds of tasks.
Does not: load, choose or tokenise rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from car_datasets.loading.chats import Turn
from car_datasets.loading.kinds import kinds_of
from car_datasets.loading.schemas import Schema, conversations_of
from car_datasets.loading.values import carried
from car_datasets.utils.columns import check_columns

GROUP_COLUMNS = ("source", "dataset", "subset", "category", "domain", "task")  # usual names of a column of sources
MOST_GROUPS = 100  # values of such a column; one with more is taken for free text
MESSAGES = [{"role": Value("string"), "content": Value("string")}]
BATCH = 1_000  # rows that are read at a time


def as_examples(dataset: Dataset, schema: Schema) -> tuple[Dataset, list[str]]:
    """Return the rows as messages, and what is wrong with each.

    Args:
        dataset (`Dataset`), schema ([`Schema`]): loaded rows, and how they are read.

    Returns:
        `Dataset`, `list[str]`: `prompt` and `completion` of every row; and `"unreadable"`, `"empty answer"`, or `""`
        for a row that can be used.
    """
    examples: dict[str, list[list[dict[str, str]]]] = {"prompt": [], "completion": []}
    problems: list[str] = []
    for batch in carried(dataset.select_columns(list(schema.read_columns)).with_format(None)).iter(batch_size=BATCH):
        for turns in conversations_of(batch, schema):
            prompt, completion = ([], []) if isinstance(turns, str) else as_example(turns)
            examples["prompt"].append(prompt)
            examples["completion"].append(completion)
            answered = bool(completion) and bool(completion[0]["content"].strip())
            problems.append("" if answered else "empty answer" if completion else "unreadable")
    return Dataset.from_dict(examples, features=Features({"prompt": MESSAGES, "completion": MESSAGES})), problems


def as_example(turns: Sequence[Turn]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the messages before the last answer of a chat, and this answer; both are empty if it has none.

    Turns of one speaker in a row are one message. Calls of tools are text of the assistant. A thought is kept, between
    `<think>` and `</think>`, in the last answer only, as chat templates do.

    Args:
        turns (`Sequence[Turn]`): from `conversations_of`.
    """
    joined: list[Turn] = []
    for turn in turns:
        text = "\n".join(part for part in (turn.text, turn.call) if part)
        said = (
            turn._replace(kind="assistant", text="", thought=turn.text)
            if turn.kind == "thought"
            else turn._replace(text=text)
        )
        if joined and joined[-1].kind == said.kind:
            last = joined[-1]
            texts, thoughts = (
                [t for t in pair if t] for pair in ((last.text, said.text), (last.thought, said.thought))
            )
            joined[-1] = said._replace(text="\n".join(texts), thought="\n".join(thoughts))
        else:
            joined.append(said)
    end = max((i for i, turn in enumerate(joined) if turn.kind == "assistant" and turn.scored), default=0)
    if end == 0:  # nothing was said, or nothing before it
        return [], []
    last = joined[end]
    answer = f"<think>\n{last.thought}\n</think>\n\n{last.text}" if last.thought and last.text.strip() else last.text
    prompt = [{"role": turn.kind, "content": turn.text} for turn in joined[:end]]
    return prompt, [{"role": "assistant", "content": answer}]


def digest_of(row: Mapping[str, Any]) -> str:
    """Return the sha256 of the messages of a row, without differences in white space and case.

    Args:
        row (`Mapping`): `prompt` and `completion`, lists of messages.
    """
    texts = [f"{m['role']}:{' '.join(m['content'].lower().split())}" for m in (*row["prompt"], *row["completion"])]
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def find_groups(rows: Dataset, usual: Sequence[str], wanted: str | None) -> str:
    """Return the column by which rows are grouped, or `""` if there is none.

    Args:
        rows (`Dataset`): as they were loaded.
        usual (`Sequence[str]`): usual names of such columns; the first that holds 2 to `MOST_GROUPS` texts is taken.
        wanted (`str`, *optional*): the column that was asked for.

    Raises:
        ValueError: the column that was asked for is not there.
    """
    if wanted is not None:
        check_columns(rows.column_names, (wanted,), ())
        return wanted
    texts = [n for n in usual if getattr(rows.features.get(n), "dtype", "") in ("string", "large_string")]
    return next((name for name in texts if 2 <= len(rows.unique(name)) <= MOST_GROUPS), "")


def kinds_of_rows(rows: Dataset) -> list[str]:
    """Return the kind of task of every row, from its last question and its answer.

    Args:
        rows (`Dataset`): `prompt` and `completion`, lists of messages.
    """
    kinds: list[str] = []
    for batch in rows.select_columns(["prompt", "completion"]).iter(batch_size=BATCH):
        asked = [next((m["content"] for m in reversed(p) if m["role"] == "user"), "") for p in batch["prompt"]]
        kinds += kinds_of(asked, [completion[0]["content"] for completion in batch["completion"]])
    return kinds
