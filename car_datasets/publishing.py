"""Cards: what a folder that leaves this machine says about itself."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets import hub

if TYPE_CHECKING:
    from jinja2 import Environment


def card_templates() -> Environment:
    """The templates of `hub_cards/`; the filters `percent` and `number` write a figure with its 95 % interval, `code` a
    name for between backticks, and `span` any name whole, with the backticks that it takes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(hub.data_folder("hub_cards")), undefined=StrictUndefined, keep_trailing_newline=True
    )
    found.filters["percent"] = lambda figure: "{value:.1f} % ({low:.1f} to {high:.1f})".format(
        **{name: 100 * value for name, value in figure.items()}
    )
    found.filters["code"] = lambda text: "".join(c for c in str(text) if c not in "`'<>[]|" and c.isprintable())
    found.filters["span"] = code_span
    found.filters["number"] = lambda figure: "{value:.3f} ({low:.3f} to {high:.3f})".format(**figure)
    return found


def code_span(text: str) -> str:
    """Any text as code in Markdown, shown as it is; what cannot be printed is shown as in Python."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or '""'
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    around = " " if shown[0] in "` " or shown[-1] in "` " else ""  # Markdown takes one off each side
    return f"{fence}{around}{shown}{around}{fence}"


def write_card(folder: Path, template: str, **values: Any) -> None:
    """Render a template of `hub_cards/` to `README.md` in `folder`; a value that the template names must be given."""
    (folder / "README.md").write_text(card_templates().get_template(template).render(**values), encoding="utf-8")


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write `figures.json`; without the revision, which is a digest of the folder and so of this file."""
    content = without_nan({name: value for name, value in figures.items() if name != "revision"})
    (folder / "figures.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(content: Any) -> Any:
    """A dict of figures with `None` for what could not be measured: JSON has no NaN."""
    if isinstance(content, dict):
        return {name: without_nan(part) for name, part in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
