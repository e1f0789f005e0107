"""`Settings`: what recipes and training files have in common, a dataclass that is YAML on disk and names every mistake."""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Kind = TypeVar("Kind", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """Base of dataclasses of plain values: checked by type when made, read from and written to YAML."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            accepted = int | float if kind is float else kind
            if name != "columns" and (not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool)):
                raise ValueError(f"{name}={value!r} must be of the type {getattr(kind, '__name__', kind)}.")

    @classmethod
    def from_yaml(cls: type[Kind], path: str | os.PathLike[str], **changes: Any) -> Kind:
        """Read a file; `changes` win over it.

        Raises:
            ValueError: it is not YAML, or holds a key that is not a field (the nearest known one is named).
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, not `key: value` lines.")
        return cls().changed(**{**{str(key): value for key, value in content.items()}, **changes})

    def to_yaml(self) -> str:
        """The settings as YAML that [`~Settings.from_yaml`] reads back."""
        import yaml

        content = asdict(self)
        if "columns" in content:
            content["columns"] = dict(content["columns"])
        text: str = yaml.safe_dump(content, sort_keys=False)
        return text

    def changed(self: Kind, **changes: Any) -> Kind:
        """A copy with other values.

        Raises:
            ValueError: a name is not one of the fields, or a value not of its type.
        """
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"A {type(self).__name__.lower()} has no {name!r}{meant} Known: {known}.")
        return replace(self, **changes)
