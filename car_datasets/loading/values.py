"""Give Python and JSON values exact Arrow types, and read back what Arrow and `datasets` store without changing it.

Does: infer the types of JSON values over all rows; build Arrow arrays; make a Dataset of Python rows or a DataFrame;
read `Json` columns to the last digit; pass over the decoding of images, audio and video.
Does not: read files.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.features.features import generate_from_arrow_type, get_nested_type, register_feature
from datasets.formatting.formatting import LazyBatch
from datasets.table import InMemoryTable

from car_datasets.loading.templates import DEEPEST_READ, is_deep, join_surrogates
from car_datasets.utils.columns import refuse_wide

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)

EXACT = 2**53  # up to here float64 has every integer
DEEPEST = 8  # levels of lists and objects that become Arrow types; Arrow's files allow 64, and few readers want many

MOST_KEYS = 1_000  # of objects that become Arrow's structs
NESTED = f"it is nested more than {DEEPEST_READ} levels deep"

if hasattr(datasets, "Json"):

    class StoredJson(datasets.Json):
        """The feature `Json` of `datasets`, read by Python's parser: its own loses digits and refuses big integers."""

        def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
            """Return the value that a JSON text means."""
            return None if example_data is None else json.loads(example_data)

        def __eq__(self, other: object) -> bool:
            """Return True for every kind of `Json`, so that datasets with one and the other can be concatenated."""
            return isinstance(other, datasets.Json) and bool(self.decode == other.decode)

        __hash__ = None  # type: ignore[assignment]

    class ExactJson(StoredJson):
        """A `Json` feature that also writes every value as what it is; `datasets` makes the text "42" a number."""

        def encode_example(self, example_data: Any) -> str | None:
            """Return the value as JSON text."""
            return None if example_data is None else as_json(example_data)

    # `datasets` builds the features of a cached, concatenated or written dataset anew, by name. Without this entry the
    # second run of a script, which reads the cache of the first, would get other digits than the first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the function is experimental
        log = logging.getLogger("datasets.features.features")
        level = log.level
        log.setLevel(logging.ERROR)  # and that the name is taken
        register_feature(StoredJson, "Json")
        log.setLevel(level)


def as_json(value: Any) -> str:
    """Return a value as JSON text without a change: text keeps its characters, and floats all of their digits."""
    return json.dumps(value, ensure_ascii=False)


def is_json(feature: Any) -> bool:
    """Return True for a feature whose values are stored as JSON text."""
    return hasattr(datasets, "Json") and isinstance(feature, datasets.Json)


def _json_feature(path: str, reason: str) -> Any:
    if not hasattr(datasets, "Json"):
        raise ValueError(
            f"The column {path!r} {reason}, and datasets {datasets.__version__} has no type for such a column: "
            "pip install -U datasets, or make its values alike."
        )
    return ExactJson()


def changed_features(feature: Any, change: Callable[[Any], Any]) -> Any:
    """Return a feature, or a mapping of features, with `change` applied to every feature that holds no others."""
    if isinstance(feature, Mapping):
        return {name: changed_features(part, change) for name, part in feature.items()}
    if hasattr(feature, "feature"):  # a list of any kind
        inner = changed_features(feature.feature, change)
        if inner is feature.feature:
            return feature
        feature = copy.copy(feature)
        feature.feature = inner
        return feature
    return change(feature)


def exact_features(features: Features) -> Features:
    """Return features with [`ExactJson`] for every `Json`, at any depth."""
    return Features(changed_features(features, lambda f: ExactJson(decode=f.decode) if is_json(f) else f))


def carried_features(features: Features) -> Features:
    """Return exact features that do not decode images, audio, video and the like: values are bytes and paths."""

    def carried(feature: Any) -> Any:
        if is_json(feature):
            return ExactJson(decode=feature.decode)
        if getattr(feature, "decode", False):
            feature = copy.copy(feature)
            feature.decode = False
        return feature

    return Features(changed_features(features, carried))


def as_written(dataset: Dataset) -> Dataset:
    """Return a dataset whose `Json` columns are read and written exactly; all other columns stay as they are.

    Images, audio and video keep the user's `decode`, because nothing in this package reads them through it: what reads
    rows calls [`carried`].
    """
    if not any_feature(dataset.features, lambda f: is_json(f) and not isinstance(f, ExactJson)):
        return dataset
    return _with_features(dataset, exact_features(dataset.features), "as written")


def carried(dataset: Dataset) -> Dataset:
    """Return a dataset whose rows can be read in Python without decoding images, audio or video, and JSON exactly."""
    if not any_feature(dataset.features, lambda f: hasattr(f, "decode")):
        return dataset
    return _with_features(dataset, carried_features(dataset.features), "carried")


def carried_stream(stream: IterableDataset) -> IterableDataset:
    """Return a stream like [`carried`]; one that does not declare its features is returned as it is."""
    if stream.features is None or not any_feature(stream.features, lambda f: hasattr(f, "decode")):
        return stream
    return stream.cast(carried_features(stream.features))


def table_of(columns: Mapping[str, Sequence[Any]], features: Features) -> pa.Table:
    """Return columns of Python values, as [`carried`] rows have them, as a table of these features.

    Args:
        columns (`Mapping[str, Sequence]`): a column for every feature.
        features (`Features`): may decode images and the like, which are stored as the bytes and paths that they are.
    """

    def stored(feature: Any) -> Any:
        media = hasattr(feature, "decode") and not is_json(feature)
        return generate_from_arrow_type(feature()) if media else feature

    arrays = {}
    for name, feature in changed_features(features, stored).items():
        values = columns[name]
        if not any_feature(feature, is_json):  # class labels, for one, become numbers
            values = Features({name: feature}).encode_column(values, name)
        arrays[name] = array_of(values, feature)
    return pa.table(arrays, schema=features.arrow_schema)


def any_feature(feature: Any, wanted: Callable[[Any], bool]) -> bool:
    """Return True if a feature, or one in it at any depth, is `wanted`."""
    if isinstance(feature, Mapping):
        return any(any_feature(part, wanted) for part in feature.values())
    return any_feature(feature.feature, wanted) if hasattr(feature, "feature") else wanted(feature)


def _with_features(dataset: Dataset, features: Features, how: str) -> Dataset:
    """Return the dataset with other features over the same Arrow table, which is not copied."""
    info = dataset.info.copy()
    info.features = features
    # Another fingerprint, because a function that reads other values has other results in the cache of `.map`.
    fingerprint = datasets.fingerprint.Hasher.hash([dataset._fingerprint, how])
    form: dict[str, Any] = dataset.format
    changed = Dataset(dataset.data, info, dataset.split, dataset._indices, fingerprint)
    if form["type"] is None and form["columns"] == dataset.column_names:
        return changed
    return changed.with_format(
        form["type"], form["columns"], output_all_columns=form["output_all_columns"], **form["format_kwargs"]
    )


def untouched(batch: Any) -> Any:
    """Return a batch of `.map` to read from: `datasets` encodes anew each column that is read from its own batch.

    Encoding anew turns the text "42" in a JSON column into a number, and decodes images in a chat that is read. A batch
    of any other kind is returned as it is.
    """
    if not isinstance(batch, LazyBatch):
        return batch
    own = batch.formatter
    return LazyBatch(batch.pa_table, type(own)(carried_features(own.features), True, own.token_per_repo_id))


class Kind:
    """What is known of the values at one place, such as a column or a key within it, after some of them were seen.

    Attributes:
        fields (`dict[str, Kind]`): the kinds of the values of objects, by key, in order of first appearance.
    """

    __slots__ = ("bools", "fields", "floats", "high", "items", "low", "objects", "seen", "texts")

    def __init__(self) -> None:
        self.seen = 0  # nulls count
        self.texts = self.bools = self.floats = False
        self.low: int | None = None  # of integers
        self.high: int | None = None
        self.objects = 0
        self.fields: dict[str, Kind] = {}
        self.items: Kind | None = None  # of lists

    def see(self, value: Any) -> None:
        """Take a value into account: null, boolean, integer, float, text, list or object.

        Raises:
            TypeError: it is of another type.
        """
        self.seen += 1
        kind = type(value)
        if kind is str:
            self.texts = True
        elif kind is dict:
            self.objects += 1
            for key, part in value.items():
                if key not in self.fields:
                    self.fields[key] = Kind()
                self.fields[key].see(part)
        elif kind is list:
            self.items = self.items or Kind()
            for part in value:
                self.items.see(part)
        elif kind is bool:
            self.bools = True
        elif kind is int:
            self.low = value if self.low is None else min(self.low, value)
            self.high = value if self.high is None else max(self.high, value)
        elif kind is float:
            self.floats = True
        elif value is not None:
            raise TypeError(f"{kind.__name__} is no JSON value")

    def features(self, reasons: dict[str, str]) -> Features:
        """Return the features of the columns whose rows were seen as objects; a key that a row lacks is null there.

        Args:
            reasons (`dict[str, str]`): is given the places that are kept as JSON, each with the reason.

        Raises:
            ValueError: a column needs `Json`, which this version of `datasets` lacks.
        """
        return Features({name: field.feature(name, reasons) for name, field in self.fields.items()})

    def feature(self, path: str, reasons: dict[str, str], depth: int = 0) -> Any:
        """Return the feature that holds every value that was seen at this place exactly."""
        found = {
            "text": self.texts,
            "booleans": self.bools,
            "numbers": self.floats or self.low is not None,
            "objects": self.objects > 0,
            "lists": self.items is not None,
        }
        kinds = [name for name, there in found.items() if there]
        if not kinds:
            return Value("null")
        if reason := self._reason(kinds, depth):
            reasons[path] = reason
            return _json_feature(path, reason)
        if self.objects:
            return {key: part.feature(f"{path}.{key}", reasons, depth + 1) for key, part in self.fields.items()}
        if self.items is not None:
            inner = self.items.feature(f"{path}[]", reasons, depth + 1)
            # `datasets` decides by one of the inner lists whether it decodes them, and by an empty one it does not.
            if isinstance(inner, List) and any_feature(inner, is_json):
                inner = _json_feature(path, "holds lists of mixed values")
            return List(inner)
        if kinds == ["numbers"]:
            whole = "int64" if self.high is None or self.high < 2**63 else "uint64"
            return Value("float64" if self.floats else whole)
        return Value("string" if self.texts else "bool")

    def _reason(self, kinds: list[str], depth: int) -> str:
        """Return why no Arrow type holds these values, or an empty text."""
        if len(kinds) > 1:
            return f"mixes {' and '.join(kinds)}"
        if depth >= DEEPEST and (self.objects or self.items is not None):
            return f"is nested more than {DEEPEST} levels deep"
        if self.objects and (not self.fields or "" in self.fields):
            return "has objects without keys, or a key without text"
        if len(self.fields) > MOST_KEYS:
            return f"has objects of more than {MOST_KEYS:,} keys"
        if self.objects and any(field.seen < self.objects for field in self.fields.values()):
            return "has objects of differing keys"
        if self.low is not None and self.high is not None:
            if self.floats and (self.low < -EXACT or self.high > EXACT):
                return "mixes fractions and integers beyond 2**53"
            if self.low < -(2**63) or self.high >= 2**64 or (self.low < 0 and self.high >= 2**63):
                return "has integers beyond 64 bits"
        return ""


def array_of(values: Sequence[Any], feature: Any) -> pa.Array:
    """Return values as an Arrow array of the type that [`Kind.feature`] found for them."""
    if is_json(feature):
        texts = [None if value is None else as_json(value) for value in values]
        return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
    if not any_feature(feature, is_json):
        return pa.array(values, get_nested_type(feature))
    absent = pa.array([value is None for value in values], pa.bool_())
    if isinstance(feature, dict):
        parts = [array_of([None if v is None else v[key] for v in values], part) for key, part in feature.items()]
        return pa.StructArray.from_arrays(parts, fields=list(get_nested_type(feature)), mask=absent)
    ends = [0]
    for value in values:
        ends.append(ends[-1] + len(value or ()))
    inner = array_of([part for value in values for part in value or ()], feature.feature)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), inner, get_nested_type(feature), mask=absent)


def batch_of(rows: Sequence[Mapping[str, Any]], features: Features) -> pa.RecordBatch:
    """Return rows as a record batch; a key that a row lacks is null there."""
    arrays = [array_of([row.get(name) for row in rows], feature) for name, feature in features.items()]
    return pa.RecordBatch.from_arrays(arrays, schema=features.arrow_schema)


def warn_of_json(shown: str, reasons: Mapping[str, str]) -> None:
    """Log which places of a source are kept as JSON text, and why."""
    if reasons:
        places = "; ".join(f"{path!r} {reason}" for path, reason in reasons.items())
        logger.warning(
            "%s: kept as JSON (the feature Json), because Arrow has no type for all values: %s.", shown, places
        )


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a surrogate pair


def readable(value: Any, text: str) -> Any:
    """Return a value that was parsed from JSON, mended where its text needs it.

    Raises:
        ValueError: it is nested too deeply, or cannot be mended.
    """
    if is_deep(value, text):
        raise ValueError(NESTED)
    return mended(value) if _HALF.search(text) else value  # most texts are spared the walk


def mended(value: Any) -> Any:
    """Return a JSON value with U+FFFD for each half of a surrogate pair, at any depth, or the value itself.

    Raises:
        ValueError: two keys of an object would become equal.
    """
    if isinstance(value, str):
        return join_surrogates(value)
    if isinstance(value, list):
        return [mended(part) for part in value]
    if isinstance(value, dict):
        whole = {mended(key): mended(part) for key, part in value.items()}
        if len(whole) < len(value):
            raise ValueError(f"an object has keys that differ only in halves of surrogate pairs: {sorted(whole)}")
        return whole
    return value


def warn_of_halves(shown: str, rows: Sequence[int], count: int) -> None:
    """Log that rows held half a surrogate pair; `rows` are the first of `count`."""
    if count:
        more = ", ..." if count > len(rows) else ""
        logger.warning(
            "%s: %d rows hold half of a surrogate pair, which is no character; U+FFFD takes its place (rows %s%s).",
            *(shown, count, ", ".join(map(str, rows)), more),
        )


def dataset_from_rows(rows: Sequence[Mapping[str, Any]], shown: str = "source") -> Dataset:
    """Return a list of Python mappings as a dataset that gives back equal values.

    NumPy's numbers and arrays become Python's, tuples become lists. A column of dates, bytes or decimals gets the type
    that Arrow infers.

    Args:
        rows (`Sequence[Mapping]`): the rows; a key that a row lacks is null there.
        shown (`str`): the name of the source in messages.

    Raises:
        ValueError: a row is no mapping, a key no text, or a column holds values that Arrow cannot give back.
    """
    wrong = [i for i, row in enumerate(rows) if not isinstance(row, Mapping)]
    if wrong:
        raise ValueError(f"{shown} holds {len(wrong)} rows that are no mappings (the first are {wrong[:5]}).")
    plain = [_plain(row, f"{shown}, row {i}") for i, row in enumerate(rows)]
    whole = [mended(row) for row in plain]
    halves = [
        i for i, (one, other) in enumerate(zip(plain, whole, strict=True)) if one != other and repr(one) != repr(other)
    ]
    names = dict.fromkeys(name for row in whole for name in row)
    refuse_wide(shown, len(names))
    return _dataset_of({name: [row.get(name) for row in whole] for name in names}, shown, halves)


def dataset_from_pandas(frame: DataFrame, shown: str = "source") -> Dataset:
    """Return a pandas DataFrame as a dataset; missing values are null, and a named index becomes a column.

    Raises:
        ValueError: a column has no text as its name, or two have the same, or values cannot be given back.
    """
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = list(frame.columns)
    refuse_wide(shown, len(names))
    if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{shown} has the columns {names}: rename them, so that each has a text of its own as its name."
        )
    columns: dict[str, Any] = {}
    for name in names:
        column = frame[name]
        if column.dtype.kind in "biuf" and not hasattr(column.dtype, "na_value"):
            columns[name] = pa.array(column, from_pandas=True)  # NaN is how pandas writes that a value is missing
        else:
            missing = column.isna().tolist()
            values = [None if gone else value for value, gone in zip(column.tolist(), missing, strict=True)]
            columns[name] = [_plain(value, f"{shown}, column {name!r}") for value in values]
    texts = [column for column in columns.values() if isinstance(column, list)]
    halves = [i for i in range(len(frame)) if any(repr(mended(c[i])) != repr(c[i]) for c in texts)]
    return _dataset_of(columns, shown, halves)


def _dataset_of(columns: Mapping[str, Any], shown: str, halves: Sequence[int]) -> Dataset:
    """Return columns of plain values, or Arrow arrays, as a dataset in memory."""
    warn_of_halves(shown, halves[:5], len(halves))
    reasons: dict[str, str] = {}
    features: dict[str, Any] = {}
    arrays: list[pa.Array] = []
    for name, values in columns.items():
        if isinstance(values, pa.Array):
            feature, array = generate_from_arrow_type(values.type), values
        else:
            feature, array = _column([mended(value) for value in values], name, reasons)
        features[name] = feature
        arrays.append(array)
    warn_of_json(shown, reasons)
    schema = Features(features).arrow_schema
    return Dataset(InMemoryTable.from_arrays(arrays, schema=schema), datasets.DatasetInfo(features=Features(features)))


def _column(values: list[Any], name: str, reasons: dict[str, str]) -> tuple[Any, pa.Array]:
    """Return the feature and the array of a column in memory."""
    kind = Kind()
    try:
        for value in values:
            kind.see(value)
    except TypeError as error:  # dates, bytes and their like, of which Arrow knows more types than JSON
        try:
            array = pa.array(values)
            same = array.to_pylist() == values
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            same = False
        if not same:
            raise ValueError(
                f"The column {name!r} holds values that Arrow cannot give back ({error}); pass text, numbers, lists and "
                "dicts, or a Dataset with the features of your choice."
            ) from error
        return generate_from_arrow_type(array.type), array
    feature = kind.feature(name, reasons)
    return feature, array_of(values, feature)


def _plain(value: Any, shown: str, levels: int = DEEPEST_READ) -> Any:
    """Return a Python value with lists, dicts and numbers of Python's own in place of NumPy's and other kinds."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if levels < 1 and isinstance(value, (list, tuple, Mapping)):
        raise ValueError(f"{shown}: {NESTED}.")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{shown}: an object has keys that are no text: {list(value)[:5]}.")
        return {str(key): _plain(part, shown, levels - 1) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part, shown, levels - 1) for part in value]
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # a number or an array of NumPy
        return _plain(value.tolist(), shown, levels - 1)
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    return value
