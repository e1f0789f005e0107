"""`Settings`: the base of recipes and training files, a dataclass of plain values that is YAML on disk.

Does: check every value by type and every key by name; read and write YAML, and refuse what is huge in memory; name the
defaults that several classes and functions share; refuse a setting that needs an extra which is not installed.
Does not: define the settings of a recipe or a training file.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import numbers
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar, get_origin, get_type_hints

MOST_HEADER = 1 << 24  # characters of YAML in a card, with names replaced by what they stand for
DEEPEST_HEADER = 64

# Defaults of more than one public function, each written once.
N1 = 1000  # rows by score; the paper's number, and the most that `default_n1` gives
K = "sqrt"  # clusters; the paper's int(sqrt(rows / 2))
N_INIT = 1  # runs of k-means; scikit-learn takes as many for k-means++
KMEANS = "torch"  # the engine of k-means, a key of `ENGINES`
EXPLAINED_VARIANCE = 0.95  # share of the variance that PCA keeps; the paper's number
KMEANS_SAMPLE = 256  # rows per cluster to fit k-means on; faiss samples as many (`max_points_per_centroid`)
SEED = 42
SPLIT = "selected"  # of a pushed dataset: the split of the selected rows
CONFIG_NAME = "default"  # of a pushed dataset: what `datasets` calls the configuration of a dataset with one alone
ESTIMATE_ROWS = 256  # rows that an estimate of the scoring time scores
BOOTSTRAP_SAMPLES = 1000  # for each interval of a figure

Kind = TypeVar("Kind", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """The base class of dataclasses of plain values: checked by type when made, read from and written to YAML."""

    _called = "training file"  # what messages call the settings; without a type, since it is not a field

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            # An integer is a valid float, but True is not a number, although Python has bool as a kind of int.
            # `columns` is checked by its own module, since it may be a mapping or pairs.
            accepted = int | float if kind is float else get_origin(kind) if get_origin(kind) in (list, tuple) else kind
            if name != "columns" and (not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool)):
                shown = reprlib.repr(value) if isinstance(value, (dict, list)) else repr(value)  # YAML's aliases grow
                raise ValueError(f"{name}={shown} must be of the type {getattr(kind, '__name__', kind)}.")

    def refuse_outside(self, low: float, high: float | None, *names: str) -> None:
        """Raise ValueError if a field is not a number from `low` to `high`; with `high=None`, any finite number.

        Args:
            low, high (`float`): the limits, which are allowed values themselves.
            names (`str`): the fields to check.
        """
        for name in names:
            value = getattr(self, name)
            if not low <= value <= (sys.float_info.max if high is None else high):
                most = "" if high is None else f" and at most {high:g}"
                raise ValueError(f"{name}={value} must be at least {low:g}{most}.")

    @classmethod
    def from_yaml(cls: type[Kind], path: str | os.PathLike[str], *, given: Sequence[str] = (), **changes: Any) -> Kind:
        """Read the settings from a YAML file; `changes` win over the file, and `given` over both.

        A value without quotes is text where the field is text: `no`, `1e5` and `0123` are then what was written, not
        what YAML makes of them.

        Args:
            path (`str`): the file.
            given (`Sequence[str]`): settings as `"key=value"`, with the value in YAML as in the file.
            changes: settings by name.

        Raises:
            ValueError: the file is not YAML, or holds a key that is not a field (the message names the nearest field).
        """
        values = _read_yaml(path)
        later = dict(_parse_given(text) for text in given)
        kinds = get_type_hints(cls)
        read = {
            name: value.for_text() if _is_text(name, kinds.get(name)) else value.value
            for name, value in (values | later).items()
        }
        # Through `changed`, which names the nearest field for an unknown key.
        return cls().changed(**{**read, **{name: value for name, value in changes.items() if name not in later}})

    def to_yaml(self) -> str:
        """Return the settings as YAML that [`~Settings.from_yaml`] reads back."""
        import yaml

        content = asdict(self)
        if "columns" in content:
            content["columns"] = dict(content["columns"])
        text: str = yaml.safe_dump(content, sort_keys=False)
        return text

    def changed(self: Kind, **changes: Any) -> Kind:
        """Return a copy with other values.

        Raises:
            ValueError: a name is not a field, or a value does not have the field's type.
        """
        # All names before any value, so that a misspelt key is not hidden by a wrong type.
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else "."
                raise ValueError(f"A {self._called} has no {name!r}{meant} Known: {known}.")
        kinds = get_type_hints(type(self))
        for name, value in changes.items():
            if kinds[name] is float and isinstance(value, str):  # YAML 1.1 reads 1e-5 as text: it wants 1.0e-5
                with contextlib.suppress(ValueError):
                    changes[name] = float(value)
        return replace(self, **changes)


def default_n1(rows: int) -> int:
    """Return the number of rows taken by score where none is given: 1000, but at most half of the scored rows.

    So any pool leaves something to choose, and one of 2000 rows or more gives the paper's number. The half of an odd
    number is rounded up.

    Args:
        rows (`int`): number of rows that have a score.
    """
    return min(N1, (rows + 1) // 2)


def refuse_two_amounts(n1: int | float | None, budget: int | None) -> None:
    """Raise ValueError if both n1 and a budget are given, of which one would have to be ignored."""
    if n1 is not None and budget is not None:
        raise ValueError(
            f"n1={n1} and budget={budget}: with a budget, n1 follows from it. Leave one of the two out (--n1, --budget)."
        )


def is_integer(value: object) -> TypeGuard[int]:
    """Return True if a value is an integer, Python's or numpy's, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def refuse_missing_extra(
    extra: str,
    what: str,
    modules: Mapping[str, str],
    error: type[Exception] = ValueError,
    load: bool = False,
) -> None:
    """Raise an error that says what to install if a module of an extra is missing.

    Args:
        extra (`str`): name of the extra, such as `"umap"`.
        what (`str`): what needs it, the start of the message.
        modules (`Mapping`): the modules, each with the name of its package.
        error (`type`): the type of the error.
        load (`bool`): import the modules as well; a broken installation then counts as a missing one.
    """
    # Found without running them by default: some of these modules take seconds to import, or report their use.
    try:
        for name in modules:
            if load:
                importlib.import_module(name)
            elif importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(name)
    except ImportError as missing:
        needed = " and ".join(modules.values())
        raise error(f"{what} needs {needed}: pip install 'car-datasets[{extra}]'.") from missing


def read_kind(path: str | os.PathLike[str], known: Sequence[str]) -> str:
    """Return the `kind` of a training file, which tells which class reads it.

    Raises:
        ValueError: the file has no `kind`, or one that is not in `known`.
    """
    read = _read_yaml(path).get("kind")
    kind = None if read is None else read.value
    if kind not in known:
        raise ValueError(f"{path}: kind={reprlib.repr(kind)}; a training file needs one of {list(known)}.")
    return str(kind)


def _is_text(name: str, kind: Any) -> bool:
    # `columns` maps text to text.
    return kind in (str, str | None) or name == "columns"


class _Written(NamedTuple):
    """A value of a YAML file: what YAML makes of it, and the node that it was written as."""

    value: Any
    node: Any

    def for_text(self) -> Any:
        """Return the value with every scalar but null as the text that was written; nothing is the empty text."""
        return "" if self.node is None else _as_written(self.value, self.node)


def _as_written(value: Any, node: Any) -> Any:
    if isinstance(value, dict):
        # Aliases are resolved in nodes as well; a merge key (`<<`) is not, and leaves the values as YAML reads them.
        if len(value) != len(node.value):
            return value
        pairs = zip(value.items(), node.value, strict=True)
        # No field has mappings in a mapping, and aliases would make their number grow.
        return {
            _as_written(k, key): v if isinstance(v, dict) else _as_written(v, item) for (k, v), (key, item) in pairs
        }
    return value if value is None or not isinstance(node.value, str) else node.value


def _parse_given(text: str) -> tuple[str, _Written]:
    """Return the name and the value of `key=value`.

    Raises:
        ValueError: there is no equals sign, or the value is not YAML.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: write key=value, as in --set epochs=2.")
    return name.strip(), _parse_yaml(value, f"--set {text}:")


def _parse_yaml(text: str, where: str) -> _Written:
    import yaml

    # This loader builds plain values only, so a recipe from a stranger cannot run code.
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return _Written(None if node is None else loader.construct_document(node), node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date such as 2026-13-01, a ValueError
        raise ValueError(f"{where} is not YAML: {error}") from error


def refuse_huge_header(card: str, shown: str) -> None:
    """Raise ValueError if the YAML at the start of a card takes far more memory than its text, or is nested deeply.

    A name in YAML may stand for a list of names, each of which stands for a list: a few lines become billions of values
    as soon as a library walks through them or puts them into a message.

    Args:
        card (`str`): the text of a README.md, or of a file that is YAML alone.
        shown (`str`): the source in the message, such as `"source='you/x'"`.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(card)
    open_parts: list[tuple[str | None, int]] = [(None, 0)]  # the name of each list and mapping, and its size so far
    sizes: dict[str, int] = {}
    with contextlib.suppress(yaml.YAMLError):  # the library that reads the header will say so
        # In C, if it is there: the loader in Python takes quadratic time for brackets in brackets.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for event in yaml.parse(card if block is None else block[2], Loader=loader):
            name, size = getattr(event, "anchor", None), 0
            if isinstance(event, yaml.CollectionStartEvent):
                open_parts.append((name, 0))
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                name, size = open_parts.pop()
            elif isinstance(event, yaml.ScalarEvent):
                size = len(event.value)
            elif isinstance(event, yaml.AliasEvent):
                size = sizes.get(str(name), MOST_HEADER)  # a part that contains itself has no end
            if name is not None:
                sizes[name] = size
            outer, before = open_parts.pop()
            open_parts.append((outer, before + size + 1))
            if before + size >= MOST_HEADER or len(open_parts) > DEEPEST_HEADER:
                raise ValueError(
                    f"{shown}: the header of its README.md has more than {MOST_HEADER:,} characters once its names are "
                    f"replaced by what they stand for, or more than {DEEPEST_HEADER} levels, and is not read. Shorten "
                    "it, or download the data files and pass their paths."
                )


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, _Written]:
    content, node = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
    if not content:  # an empty file gives the defaults
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not `key: value` lines.")
    written = {key.value: item for key, item in node.value}
    return {str(key): _Written(value, written.get(str(key))) for key, value in content.items()}
