"""`public`: name a class after the package, so that a move of its file changes neither pickles nor fingerprints.

Does: set `__module__`, after reading the annotations that would be looked up there.
Does not: export the class; `car_datasets/__init__.pyi` does.
"""

from __future__ import annotations

import inspect
from typing import TypeVar

T = TypeVar("T")


def public(cls: type[T]) -> type[T]:
    """Return the class with `car_datasets` as its module, from which users import it.

    `datasets` puts the module of a callable into the fingerprint that names its cache, and pickles hold it as well.
    Apply this above `@dataclass`, which looks up annotations in the module that the class names.
    """
    # Evaluated now: afterwards `get_type_hints` would look for names such as `Matrix` in `car_datasets`.
    cls.__annotations__ = inspect.get_annotations(cls, eval_str=True)
    cls.__module__ = "car_datasets"
    return cls
