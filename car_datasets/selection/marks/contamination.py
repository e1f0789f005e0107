"""`Decontaminator`: a `.map` callable that marks rows which contain items of evaluation sets.

Does: open the sets once, at construction; find the texts of their items by schema or column; name for each row the item
that it copies, and the share of it.
Does not: remove rows, ship a benchmark, or know how texts are compared; `item_index.py` does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset

from car_datasets.loading.schemas import SCHEMAS, Schema, as_column_names, check_schema, exchanges_of, find_schema
from car_datasets.loading.sources import Reading, open_rows
from car_datasets.loading.templates import join_lines
from car_datasets.loading.values import carried, untouched
from car_datasets.scoring.stage import refuse_taken, set_fields, text_columns
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_tables
from car_datasets.utils.digests import file_digest, public
from car_datasets.utils.files import user_path
from car_datasets.utils.item_index import ItemIndex, Part

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)

CACHE_VERSION = "1"  # datasets hashes the fields below, never our code: raise it when results change
CONTAMINATED_BY, CONTAMINATED_SHARE = ColumnNames.contaminated_by, ColumnNames.contaminated_share
THRESHOLD = 0.8
# Columns whose text answers an item; of these only long ones are looked for.
ANSWERS = {schema.response for schema in SCHEMAS.values() if schema.response} | {
    *(
        "answers",
        "solution",
        "target",
        "targets",
        "label",
        "canonical_solution",
        "explanation",
        "reference",
        "rationale",
    )
}
_ENDINGS = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".bz2", ".xz", ".zst"}
_ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([^:/\\]+))?(?::([^:/\\]+))?")
SAMPLE, NEARLY_ALL = 200, 0.9  # rows of a pool that are looked at, and the share of one set that makes it the pool
FEWEST = 20  # rows below which a share says nothing
Texts = list[tuple[int, str]]  # of a row: 1 for an answer, else 0; and the text


class ItemSet(NamedTuple):
    """An evaluation set that was resolved.

    Args:
        name (`str`): how `contaminated_by` names it: the stem of its file, or the name of the dataset.
        sha256 (`str`): of the file, or of the texts of the items where there is no single file.
        revision (`str`): the commit of a dataset on the Hub, else `""`.
    """

    name: str
    sha256: str
    revision: str = ""


@public
@dataclass(frozen=True)
class Decontaminator:
    """A stage that marks rows which copy evaluation items: `dataset.map(Decontaminator([...]), batched=True)`.

    An item counts as copied where prompt or answer of a row contain at least `threshold` of its prompt, or of its
    answer if that is longer than 20 words, by words weighed by how few items have them. Items of up to 20 words count
    where they occur word for word, those below 10 words only so, and items that say too little (numbers, a single word)
    never. Other numbers in the same template, a shared quotation and a shared formula make no copy.

    The new columns are `contaminated_by`, text such as `"gsm8k_test:17"` (set, and number of the row in it) or null,
    and `contaminated_share`, float32: the share of that item that the row contains, or without a copy the largest share
    of any item that was compared.

    Args:
        against (`Sequence` or `Mapping`): the sets: files (`.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`; `.txt` with an
            item in each line), Hub datasets (`"owner/name"`, `"owner/name:split"`, `"owner/name:config:split"`),
            `Dataset`s and lists of texts; a mapping gives them names. They are read once, here; the field holds name,
            sha256 and commit of each.
        item_columns (`Sequence[str]`): the columns that hold the texts of an item. By default those of a schema that is
            recognised, else all text columns.
        threshold (`float`): share of an item from which on it counts as copied, 0 to 1.
        schema (`str`): name of the schema of the rows that are marked; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for that schema's columns, such as `{"response": "answer"}`.
        token (`str`, *optional*): for private sets on the Hub; never stored.

    Raises:
        FileNotFoundError: a file or dataset does not exist.
        ValueError: a set cannot be read, has no text that could be found, or lacks a column; the threshold is outside 0
            to 1.
    """

    against: Any
    item_columns: Sequence[str] = ()
    threshold: float = THRESHOLD
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    token: InitVar[str | None] = None
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self, token: str | None) -> None:
        columns, item_columns = _checked(self.columns, self.item_columns, self.threshold)
        check_schema(self.schema, columns)
        opened = [_open(source, name, item_columns, token) for name, source in _named(self.against)]
        names = _unique([each.found.name for each in opened])
        sets = tuple(each.found._replace(name=name) for each, name in zip(opened, names, strict=True))
        content = [[name, each.texts] for each, name in zip(opened, names, strict=True)]
        # Not a field: workers on other machines need the texts, and manifests of shards hold fields.
        set_fields(self, _content=zlib.compress(json.dumps(content).encode(), 1))
        set_fields(self, against=sets, item_columns=item_columns, columns=columns, threshold=float(self.threshold))
        set_fields(self, cache_version=CACHE_VERSION)
        _refuse_unfindable(sets, content, self._index()[1])

    def __getstate__(self) -> dict[str, Any]:
        # A text and bytes: the pickles of equal stages are equal, whichever of their strings are one object.
        plain = {name: value for name, value in self.__dict__.items() if name != "_content"}
        return {"fields": json.dumps(plain, sort_keys=True), "content": self.__dict__["_content"]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        plain = json.loads(state["fields"])
        plain["against"] = tuple(ItemSet(*each) for each in plain["against"])
        plain["item_columns"] = tuple(plain["item_columns"])
        plain["columns"] = tuple((role, column) for role, column in plain["columns"])
        set_fields(self, **plain, _content=state["content"])

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the new columns."""
        return (CONTAMINATED_BY, CONTAMINATED_SHARE)

    def output_features(self) -> Features:
        """Return the types of the new columns."""
        from datasets import Features, Value

        return Features({CONTAMINATED_BY: Value("string"), CONTAMINATED_SHARE: Value("float32")})

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        """Return the columns of the text.

        Raises:
            ValueError: no schema fits.
        """
        return text_columns(column_names, self.schema, self.columns)

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of `.map(batched=True)`.

        A row that cannot be scored is compared by the text that it has.

        Raises:
            ValueError: the batch already has the columns, or no schema fits.
        """
        batch = untouched(batch)
        refuse_tables(batch, "dataset.with_format(None)")
        refuse_taken(batch, self)
        schema = find_schema(batch, self.schema, self.columns)
        names, index = self._index()
        found = index.find([[text for _, text in row] for row in _texts(batch, schema)])
        by = [names[each.item] if each.item >= 0 else None for each in found]
        return {CONTAMINATED_BY: by, CONTAMINATED_SHARE: [each.share for each in found]}

    def refuse_own(self, dataset: Dataset, files: Iterable[str] = ()) -> None:
        """Raise ValueError if one of the sets is the dataset itself, of which every row would be marked.

        Args:
            dataset (`Dataset`): the rows that are to be marked.
            files (`Iterable[str]`): sha256 of the files that they were read from, if any.
        """
        digests = set(files)
        for each in self.against:
            if each.sha256 in digests:
                raise ValueError(_own(each.name, "is the file that the rows are from"))
        if len(dataset) < FEWEST:
            return
        step = max(1, len(dataset) // SAMPLE)
        rows = carried(dataset.select(range(0, len(dataset), step)).with_format(None))
        reads = self.read_columns(dataset.column_names)
        marks = [by for batch in rows.select_columns(reads).iter(1_000) for by in self(batch)[CONTAMINATED_BY]]
        for each in self.against:
            count = sum(by is not None and by.rpartition(":")[0] == each.name for by in marks)
            if count >= NEARLY_ALL * len(marks):
                raise ValueError(_own(each.name, f"contains {count} of {len(marks)} rows that were looked at"))

    def _index(self) -> tuple[list[str], ItemIndex]:
        return _indexed(self.__dict__["_content"], self.threshold)


def _own(name: str, why: str) -> str:
    return (
        f"against: the set {name!r} {why}, so that nearly all rows would be marked as contaminated. Name evaluation "
        "sets there, and not the source itself."
    )


class _Opened(NamedTuple):
    found: ItemSet
    texts: list[Texts]


# Few entries, as each holds all items; the content is the key, so that equal stages share one.
@lru_cache(maxsize=2)
def _indexed(content: bytes, threshold: float) -> tuple[list[str], ItemIndex]:
    """Return how each item is named, and the index of all items."""
    names: list[str] = []
    parts: list[Part] = []
    for name, rows in json.loads(zlib.decompress(content)):
        for number, texts in enumerate(rows):
            parts += [Part(len(names), bool(is_answer), text) for is_answer, text in texts]
            names.append(f"{name}:{number}")
    return names, ItemIndex(parts, threshold)


def _checked(columns: Any, item_columns: Any, threshold: Any) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold!r} is a share of an item; pass a number from 0 to 1, such as 0.8.")
    if isinstance(item_columns, str):
        item_columns = (item_columns,)
    if not all(isinstance(name, str) for name in item_columns):
        raise ValueError(f"item_columns={item_columns!r} must be names of columns, such as ['question'].")
    if columns and not isinstance(columns, Mapping) and all(isinstance(each, str) for each in columns):
        raise ValueError(
            f"columns={columns!r} maps roles to columns of the rows that are marked, such as {{'instruction': 'task'}}. "
            f"Name the columns of the evaluation sets by item_columns={list(columns)}."
        )
    return as_column_names(columns), tuple(item_columns)


def _named(against: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield the sets of an `against` argument, each with the name that the user gives it.

    Raises:
        ValueError: there is none.
    """
    if isinstance(against, (str, Path, Dataset)):
        against = [against]
    if not isinstance(against, (Mapping, Sequence)):
        raise ValueError(
            f"against is a {type(against).__name__}; pass a list of files, Hub ids, Datasets or lists of texts."
        )
    if not against:
        raise ValueError("against is empty; pass at least one evaluation set, such as against=['test.jsonl'].")
    if isinstance(against, Mapping):
        yield from ((str(name), source) for name, source in against.items())
        return
    if all(isinstance(each, str) and re.search(r"\s", each.strip()) and not _exists(each) for each in against):
        raise ValueError(
            f"against holds texts, the first {against[0][:40]!r}; pass a list of sets, in which a list of texts is one: "
            "against=[[...]]."
        )
    yield from ((None, source) for source in against)


def _exists(path: str | Sequence[str]) -> bool:
    try:
        return bool(path) and user_path(path if isinstance(path, str) else path[0]).exists()
    except (OSError, ValueError):
        return False


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names, with a number behind those that are taken."""
    unique: list[str] = []
    for name in names:
        count = sum(other == name for other in names[: len(unique)])
        unique.append(name if count == 0 else f"{name}-{count + 1}")
    return unique


def _open(source: Any, name: str | None, item_columns: Sequence[str], token: str | None) -> _Opened:
    """Return a set with the texts of its rows.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, or has no text.
    """
    if isinstance(source, ItemSet):
        raise ValueError(
            f"against={source.name!r} was resolved already; pass the file, Hub id, Dataset or list of texts again."
        )
    if isinstance(source, (list, tuple)) and all(isinstance(text, str) for text in source) and not _exists(source[:1]):
        return _from_memory([[(0, text)] for text in source], name or "texts")
    if isinstance(source, (str, Path)) and str(source).lower().endswith(".txt"):
        path = user_path(str(source))
        texts: list[Texts] = [[(0, line)] for line in _lines(path)]
        return _with_text(_Opened(ItemSet(name or path.stem, file_digest(path)), texts), repr(str(source)))
    shown = repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__
    place, reading = _reading(source, token)
    try:
        opened = open_rows(place, reading)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"against={shown}: {error}") from error
    except ValueError as error:
        advice = " Name a split of a Hub dataset as owner/name:split, or as owner/name:config:split."
        raise ValueError(f"against={shown}: {error}{advice if 'split' in str(error) else ''}") from error
    texts = list(_item_texts(opened.dataset, shown, item_columns))
    origin = opened.origin
    if origin.kind == "memory":
        return _from_memory(texts, name or str(opened.dataset.info.dataset_name or "dataset"), shown)
    digest = origin.files[0][1] if len(origin.files) == 1 and not reading.split else _digest(texts)
    found = ItemSet(name or _stem(origin.name), digest, origin.commit or "")
    return _with_text(_Opened(found, texts), shown)


def _reading(source: Any, token: str | None) -> tuple[Any, Reading]:
    """Return a source without the configuration and split that may follow a Hub id, and these."""
    found = _ON_HUB.fullmatch(source) if isinstance(source, str) and not _exists(source) else None
    if found is None:
        return source, Reading(token=token)
    place, first, second = found.groups()
    return place, Reading(first if second else None, second or first, token=token)


def _stem(name: str) -> str:
    """Return the name of a file without its endings, or of a Hub dataset without its owner."""
    last = Path(name.rstrip("/")).name
    while (shorter := Path(last)).suffix.lower() in _ENDINGS:
        last = shorter.stem
    return last or name


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"against={str(path)!r} does not exist; pass the path of a file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"against={str(path)!r} cannot be read as text in UTF-8 ({error}). Convert the file."
        ) from error


def _from_memory(texts: list[Texts], name: str, shown: str | None = None) -> _Opened:
    return _with_text(_Opened(ItemSet(name, _digest(texts)), texts), shown or repr(name))


def _digest(texts: list[Texts]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _with_text(opened: _Opened, shown: str) -> _Opened:
    if not any(text.strip() for texts in opened.texts for _, text in texts):
        raise ValueError(f"against={shown}: no row has a text. Pass a set with text, or name its item_columns.")
    return opened


def _item_texts(dataset: Dataset, shown: str, item_columns: Sequence[str]) -> Iterator[Texts]:
    """Yield the texts of each row of a set."""
    if missing := [name for name in item_columns if name not in dataset.column_names]:
        raise ValueError(
            f"against={shown}: item_columns={missing} are not in the set, which has {dataset.column_names}. Name columns "
            "that it has."
        )
    schema = None
    if not item_columns:
        try:
            schema = find_schema(dataset.column_names)
        except ValueError:  # most evaluation sets have columns of their own
            item_columns = [name for name, feature in dataset.features.items() if _is_text(feature)]
            if not item_columns:
                raise ValueError(
                    f"against={shown}: none of its columns {dataset.column_names} holds text. Pass a set with text, or "
                    "name its item_columns."
                ) from None
    reads = list(schema.read_columns) if schema is not None else list(item_columns)
    for batch in carried(dataset.select_columns(reads).with_format(None)).iter(batch_size=1_000):
        if schema is not None:
            yield from _texts(batch, schema)
        else:
            yield from (
                _raw(dict(zip(reads, row, strict=True))) for row in zip(*(batch[c] for c in reads), strict=True)
            )


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _texts(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[Texts]:
    """Return the texts of each row of a batch: prompts and answers, thoughts included; of a broken row what it has."""
    rows: list[Texts] = []
    for number, exchanges in enumerate(exchanges_of(batch, schema, score_thoughts=True)):
        if isinstance(exchanges, str):
            rows.append(_raw({column: batch[column][number] for column in schema.read_columns if column in batch}))
        else:
            rows.append(
                [
                    each
                    for instruction, context, response in exchanges
                    for each in ((0, join_lines(instruction, context)), (1, response))
                ]
            )
    return rows


def _raw(row: Mapping[str, Any]) -> Texts:
    """Return the texts of a row by its columns; a list of texts is one text."""
    texts: Texts = []
    for column, value in row.items():
        if isinstance(value, (list, tuple)):
            value = "\n".join(each for each in value if isinstance(each, str))
        if isinstance(value, str) and value.strip():
            texts.append((int(column in ANSWERS), value))
    return texts


def _refuse_unfindable(sets: Sequence[ItemSet], content: Sequence[Any], index: ItemIndex) -> None:
    """Raise ValueError if a set has no item that could be found; say how many items of a set are left out."""
    start = 0
    for each, (_, rows) in zip(sets, content, strict=True):
        lost = sum(number not in index.items for number in range(start, start + len(rows)))
        start += len(rows)
        if lost == len(rows):
            raise ValueError(
                f"against: none of the {len(rows)} items of {each.name!r} could be found in a row: their texts are single "
                "words or numbers, or short answers. Name the columns of the questions by item_columns."
            )
        if lost:
            logger.info("against: %d of %d items of %r say too little to be found.", lost, len(rows), each.name)
