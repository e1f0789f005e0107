"""Write the selected rows as a training file, in the format that a trainer documents, with the configuration for it.

Does: carry the source's columns as they are where the trainer reads them; turn rows into messages where it does not;
refuse rows that the format has no place for.
Does not: train, or write a column that this package added.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yaml import safe_dump

from car_datasets.loading.templates import parse_json
from car_datasets.publishing.training_rows import (
    Selected,
    TrainingRow,
    Unfit,
    as_messages,
    as_sharegpt,
    calls_of,
    open_selected,
    refuse_other_orders,
    text_of,
    tools_of,
    tools_text,
    unweighted,
)
from car_datasets.utils.files import output_path, refuse_in_source, user_path, without_nan, write_content, write_whole

TRAINERS = ("trl", "llama-factory", "axolotl", "openai", "alpaca")
INFO_FILE = "dataset_info.json"  # where LLaMA-Factory looks datasets up, next to their files
FEWEST = 10  # rows of a file that OpenAI accepts


class Exported(NamedTuple):
    """What [`export_selection`] wrote.

    Args:
        file (`Path`): the training file.
        rows (`int`): its rows, in the order of the selection.
        columns (`tuple[str, ...]`): its columns.
        left_out (`tuple[str, ...]`): columns of the source, and keys of its messages as `column[].key`, that the file
            does not have.
        stanza (`str`): the configuration or the lines of Python that the trainer wants.
        info (`Path`, *optional*): the file that the stanza was written to; only LLaMA-Factory reads one next to the data.
        next_step (`str`): what to do with the two, in a sentence.
    """

    file: Path
    rows: int
    columns: tuple[str, ...]
    left_out: tuple[str, ...]
    stanza: str
    info: Path | None
    next_step: str


def export_selection(
    folder: str | os.PathLike[str],
    trainer: str,
    output: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> Exported:
    """Write the selected rows of a result as a training file for a trainer.

    Values are those of the source, in the order of the selection. Where the trainer reads other columns than the source
    has, each row becomes a list of messages, and a chat stays a chat of as many turns.

    Example:
    ```python
    >>> curate("alpaca_data.json", "out", n1=1000)
    >>> export_selection("out", "trl").file
    PosixPath('out-trl/train.jsonl')
    ```

    Args:
        folder (`str` or `PathLike`): the folder that [`curate`] wrote.
        trainer (`str`): `"trl"`, `"llama-factory"`, `"axolotl"`, `"openai"` (JSON Lines of messages, as its service for
            fine-tuning and many others take them) or `"alpaca"` (a JSON list of `instruction`, `input` and `output`).
        output (`str` or `PathLike`, *optional*): the file, which ends in `.jsonl` (`.json` for `"alpaca"`), or a folder
            for `train.jsonl`; by default the folder `FOLDER-TRAINER` next to the result.
        overwrite (`bool`): replace the file if it exists.

    Returns:
        [`Exported`]: the file, and the stanza of configuration for it.

    Raises:
        ValueError: the trainer is unknown, the folder is not a result, the file exists, or the format has no place for
            something that rows have, such as several turns or calls of tools; the message has their numbers, and
            nothing was written.
    """
    if trainer not in TRAINERS:
        raise ValueError(f"trainer={trainer!r} is not known; choose one of {', '.join(TRAINERS)} (--for trl).")
    folder = user_path(folder)
    target = _target(folder, trainer, output, overwrite)
    info = target.parent / INFO_FILE if trainer == "llama-factory" else None
    # The name of the dataset for LLaMA-Factory, which has no other use.
    name = re.sub(r"\W+", "_", target.stem if target.stem != "train" else folder.resolve().name)
    known = {} if info is None else _known_datasets(info, name, target)
    source = open_selected(folder, trainer)
    layout = _LAYOUTS[trainer](source, target)
    made = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(target, lambda temporary: _write(source, layout, temporary))
    except ValueError:
        if made:
            target.parent.rmdir()
        raise
    stanza, step = layout.stanza, layout.next_step
    if info is not None:
        entry, step = {name: json.loads(stanza)}, step.replace("NAME", name)
        stanza = json.dumps(entry, indent=2, ensure_ascii=False)
        write_content(info, json.dumps({**known, **entry}, indent=2, ensure_ascii=False) + "\n")
    gone = [name for name in source.own if name not in (*layout.columns, *source.spoken)]
    gone += [] if layout.keeps_keys else [f"{source.schema.turns}[].{key}" for key in source.keys]
    return Exported(target, len(source.rows), layout.columns, tuple(gone), stanza, info, step)


def _target(folder: Path, trainer: str, output: str | os.PathLike[str] | None, overwrite: bool) -> Path:
    suffix = ".json" if trainer == "alpaca" else ".jsonl"
    base = folder.resolve()
    place = base.with_name(f"{base.name}-{trainer}") if output is None else output_path(output, "output")
    if output is None and not folder.is_absolute():
        with contextlib.suppress(ValueError):  # shorter to read and to type
            place = Path(os.path.relpath(place))
    target = place if place.suffix in (".json", ".jsonl") else place / f"train{suffix}"
    if target.suffix != suffix:
        raise ValueError(f"output={str(output)!r}: {trainer} reads {suffix} files; name one (--output train{suffix}).")
    for parent in target.parents:
        if parent.is_file():
            raise ValueError(f"output={str(output)!r}: {parent} is a file; name a folder.")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(f"{target} is there already; name another output (--output), or pass overwrite (--overwrite).")
    refuse_in_source(target, folder, "output")
    return target


def _known_datasets(path: Path, name: str, target: Path) -> dict[str, Any]:
    """Return the entries of LLaMA-Factory's file in the folder, which are kept.

    Raises:
        ValueError: the file cannot be read, or has an entry of this name for another file than the target.
    """
    if not path.exists():
        return {}
    known = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict):
        raise ValueError(f"{path} is not a JSON object of datasets; mend it, or name another folder (--output).")
    entry = known.get(name)
    if entry is not None and (not isinstance(entry, dict) or entry.get("file_name") != target.name):
        raise ValueError(
            f"{path} has another dataset of the name {name!r}, whose entry would be lost. Name another file, whose name "
            f"becomes that of the dataset (--output {target.with_stem(name + '-2')})."
        )
    return known


# formats --------------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How a trainer's file is written: its columns, a row as a record, the stanza, and whether messages keep all keys."""

    columns: tuple[str, ...]
    record: Callable[[TrainingRow], dict[str, Any]]
    stanza: str
    next_step: str
    keeps_keys: bool = False


def _write(source: Selected, layout: _Layout, path: str) -> None:
    """Write all rows, or raise ValueError with the numbers of those that do not fit."""
    refused: dict[str, list[str]] = {}
    # A JSON list for the alpaca format, with a row on each line; JSON Lines otherwise.
    start, between, end = ("[\n", ",\n", "\n]\n") if source.trainer == "alpaca" else ("", "\n", "\n")
    with open(path, "w", encoding="utf-8") as file:
        for place, row in enumerate(source.read()):
            try:
                record = layout.record(row) if row.turns else _unread()
            except Unfit as unfit:
                refused.setdefault(str(unfit), []).append(str(row.values[source.index_column]))
                continue
            record |= {name: row.values[name] for name in source.extras}
            text = json.dumps(without_nan(record), ensure_ascii=False, allow_nan=False)
            file.write(f"{between if place else start}{text}")
        file.write(end)
    if refused:
        raise ValueError(_refusal(source, refused))


def _unread() -> dict[str, Any]:
    raise Unfit("cannot be read as a conversation")


def _refusal(source: Selected, refused: Mapping[str, Sequence[str]]) -> str:
    parts = [
        f"{len(rows)} {reason} (rows {', '.join(rows[:5])}{', ...' if len(rows) > 5 else ''})"
        for reason, rows in refused.items()
    ]
    return (
        f"trainer={source.trainer!r} has no place for what {sum(map(len, refused.values()))} of {len(source.rows)} "
        f"selected rows have: {'; '.join(parts)}. Nothing was written. Export for another trainer (--for), or curate "
        "again without these rows: drop=FILE (--drop FILE)."
    )


_TRL = """\
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

rows = load_dataset("json", data_files={file}, split="train")
settings = SFTConfig(output_dir="trained"{loss})
trainer = SFTTrainer(model="Qwen/Qwen3-0.6B", args=settings, train_dataset=rows)
trainer.train()"""


def _trl(source: Selected, target: Path) -> _Layout:
    """Return TRL's conversational formats: prompt and completion, or messages."""
    tools = ("tools",) if source.schema.tools else ()

    def record(row: TrainingRow) -> dict[str, Any]:
        messages = as_messages(row, source)
        said = {"prompt": messages[:-1], "completion": messages[-1:]} if source.single else {"messages": messages}
        # As text, because a reader of JSON gives all tools the keys of all others.
        return {**said, **({"tools": tools_text(row, source)} if tools else {})}

    columns = ("prompt", "completion") if source.single else ("messages",)
    # Of a prompt and its completion, TRL trains on the completion alone, without being told.
    stanza = _TRL.format(file=json.dumps(str(target)), loss="" if source.single else ", assistant_only_loss=True")
    step = "Put these lines into a file, name your model, and run it with Python."
    return _Layout((*columns, *tools, *source.extras), record, stanza, step, keeps_keys=True)


def _axolotl(source: Selected, target: Path) -> _Layout:
    """Return Axolotl's `chat_template` format, with the source's own keys where it maps them."""
    mapped = source.schema.role == "from" and source.schema.turns is not None and not source.calls
    name = source.schema.turns if mapped and source.schema.turns else "messages"

    def record(row: TrainingRow) -> dict[str, Any]:
        said = {name: as_sharegpt(row, source) if mapped else as_messages(row, source)}
        return {**said, **({"tools": tools_of(row, source)} if source.schema.tools else {})}

    entry: dict[str, Any] = {"path": str(target), "ds_type": "json", "type": "chat_template", "field_messages": name}
    entry["message_property_mappings"] = dict(
        zip(("role", "content"), ("from", "value") if mapped else ("role", "content"), strict=True)
    )
    entry |= {"field_tools": "tools"} if source.schema.tools else {}
    entry |= {"message_field_training": "train"} if source.unscored else {}
    entry |= {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
    stanza = safe_dump({"datasets": [entry]}, sort_keys=False, allow_unicode=True).rstrip()
    columns = (name, *(("tools",) if source.schema.tools else ()), *source.extras)
    step = "Put this entry into the configuration of your run, and start it by: axolotl train CONFIG.yml"
    return _Layout(columns, record, stanza, step, keeps_keys=not mapped)


def _llama_factory(source: Selected, target: Path) -> _Layout:
    """Return LLaMA-Factory's alpaca format with the source's columns, or its sharegpt format for everything else."""
    schema = source.schema
    tools = {"tools": schema.tools} if schema.tools else {}
    as_is = schema.turns is not None and schema.role == "role" and not source.calls
    if source.plain:
        named = {"prompt": schema.instruction, "query": schema.input, "response": schema.response}
        named |= {"system": schema.system, "history": schema.history}
        columns = {key: column for key, column in named.items() if column is not None}

        def record(row: TrainingRow) -> dict[str, Any]:
            _refuse_unweighted(row, source)
            texts = {column: row.values[column] for column in columns.values()}
            return {**texts, **{column: tools_text(row, source) for column in tools.values()}}

        entry: dict[str, Any] = {"formatting": "alpaca", "columns": {**columns, **tools}}
    else:
        name = schema.turns or "conversations"
        keys = ("role", "content", "user", "assistant") if as_is else ("from", "value", "human", "gpt")

        def record(row: TrainingRow) -> dict[str, Any]:
            said = as_messages(row, source) if as_is else as_sharegpt(row, source)
            refuse_other_orders(said, keys[0], (keys[2], "observation"))
            return {name: said, **{column: tools_text(row, source) for column in tools.values()}}

        tags = dict(zip(("role_tag", "content_tag", "user_tag", "assistant_tag"), keys, strict=True))
        others = {"observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
        entry = {"formatting": "sharegpt", "columns": {"messages": name, **tools}, "tags": {**tags, **others}}
    stanza = json.dumps({"file_name": target.name, **entry})
    held = tuple(dict.fromkeys((*(c for c in entry["columns"].values()), *source.extras)))
    step = f"Put these two into the configuration of your run: dataset_dir: {target.parent} and dataset: NAME"
    return _Layout(held, record, stanza, step, keeps_keys=not source.plain and as_is)


def _openai(source: Selected, target: Path) -> _Layout:
    """Return OpenAI's format, whose records have no other keys than `messages` and `tools`."""

    def record(row: TrainingRow) -> dict[str, Any]:
        messages = as_messages(row, source)
        if messages[-1]["role"] != "assistant":
            raise Unfit("do not end with an answer")
        tools = [
            t if t.get("type") == "function" else {"type": "function", "function": t}
            for t in tools_of(row, source) or ()
        ]
        return {"messages": messages, **({"tools": tools} if tools else {})}

    stanza = (
        "from openai import OpenAI\n\nclient = OpenAI()\n"
        f'file = client.files.create(file=open({json.dumps(str(target))}, "rb"), purpose="fine-tune")\n'
        'client.fine_tuning.jobs.create(training_file=file.id, model="gpt-4.1-mini-2025-04-14")'
    )
    few = f" The service wants {FEWEST} rows or more." if len(source.rows) < FEWEST else ""
    step = f"Put these lines into a file, name your model, and run it with Python.{few}"
    return _Layout(("messages", *(("tools",) if source.schema.tools else ())), record, stanza, step)


def _alpaca(source: Selected, target: Path) -> _Layout:
    """Return the alpaca format, which has one question, its context and one answer."""
    schema = source.schema

    def record(row: TrainingRow) -> dict[str, Any]:
        _refuse_unweighted(row, source)
        if tools_of(row, source):
            raise Unfit("define tools")
        if row.turns[0].kind == "system":
            raise Unfit("have a system prompt")
        if [turn.kind for turn in row.turns] != ["user", "assistant"]:
            raise Unfit("have other turns than one question and one answer")
        if any(calls_of(message, schema) for message in row.messages):
            raise Unfit("call tools")
        if source.plain:
            asked, answer = (row.values[name] for name in schema.required)
            context = row.values[schema.input] if schema.input else None
            return {"instruction": asked, "input": context or "", "output": answer}
        asked, answer = (text_of(*said, schema) for said in zip(row.turns, row.messages, strict=True))
        return {"instruction": asked, "input": "", "output": answer}

    stanza = (
        "from datasets import load_dataset\n\n"
        f'rows = load_dataset("json", data_files={json.dumps(str(target))}, split="train")'
    )
    return _Layout(
        ("instruction", "input", "output"),
        record,
        stanza,
        "Name the file where your trainer asks for data in the alpaca format.",
    )


def _refuse_unweighted(row: TrainingRow, source: Selected) -> None:
    """Raise `Unfit` if an answer of the row has weight 0 and the format has no mark for that."""
    if not all(turn.scored for turn in row.turns):
        unweighted(source.trainer)


_LAYOUTS: dict[str, Callable[[Selected, Path], _Layout]] = dict(
    zip(TRAINERS, (_trl, _llama_factory, _axolotl, _openai, _alpaca), strict=True)
)
