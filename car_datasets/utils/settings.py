"""`Settings`: the base of recipes and training files, a dataclass of plain values that is YAML on disk.

Does: check every value by type and every key by name; read and write YAML; name the defaults that several classes and
functions share; refuse a setting that needs an extra which is not installed.
Does not: know any other setting.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_origin, get_type_hints

# Defaults of more than one public function, each written once.
N1 = 1000  # rows by score; the paper's number, and the most that `default_n1` gives
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

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            # A whole number is a valid float, but True is not a number, although Python has bool as a kind of int.
            # `columns` is checked by its own module, since it may be a mapping or pairs.
            accepted = int | float if kind is float else list if get_origin(kind) is list else kind
            if name != "columns" and (not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool)):
                raise ValueError(f"{name}={value!r} must be of the type {getattr(kind, '__name__', kind)}.")

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
    def from_yaml(cls: type[Kind], path: str | os.PathLike[str], **changes: Any) -> Kind:
        """Read the settings from a YAML file; `changes` win over the file.

        Raises:
            ValueError: the file is not YAML, or holds a key that is not a field (the message names the nearest field).
        """
        # Through `changed`, which names the nearest field for an unknown key.
        return cls().changed(**{**_read_yaml(path), **changes})

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
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"A {type(self).__name__.lower()} has no {name!r}{meant} Known: {known}.")
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


def is_whole_number(value: object) -> TypeGuard[int]:
    """Return True if a value is a whole number, Python's or numpy's, and not a bool."""
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
    kind = _read_yaml(path).get("kind")
    if kind not in known:
        raise ValueError(f"{path}: kind={kind!r}; a training file needs one of {list(known)}.")
    return str(kind)


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    import yaml

    try:
        # safe_load builds plain values only, so a recipe from a stranger cannot run code. An empty file gives defaults.
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not `key: value` lines.")
    return {str(key): value for key, value in content.items()}
