"""Render model cards and dataset cards from templates, and write the figures that belong to them.

Does: provide the Jinja environment and its filters; write `README.md` and `figures.json`.
Does not: know what a card is about.
"""

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
    """Return the environment of the card templates.

    Filters: `percent` and `number` format a figure with its 95 % interval; `code` removes from a name what could end a code
    span or start markup; `span` writes any text as a code span, unchanged, with as many backticks as it needs.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(hub.data_folder("hub_cards")), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["percent"] = lambda figure: "{value:.1f} % ({low:.1f} to {high:.1f})".format(
        **{name: 100 * value for name, value in figure.items()}
    )
    environment.filters["code"] = lambda text: "".join(c for c in str(text) if c not in "`'<>[]|" and c.isprintable())
    environment.filters["span"] = code_span
    environment.filters["number"] = lambda figure: "{value:.3f} ({low:.3f} to {high:.3f})".format(**figure)
    return environment


def code_span(text: str) -> str:
    """Return any text as a code span in Markdown; characters that cannot be printed become Python escapes."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) or '""'
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    around = " " if shown[0] in "` " or shown[-1] in "` " else ""  # Markdown strips one space from each side
    return f"{fence}{around}{shown}{around}{fence}"


def write_card(folder: Path, template: str, **values: Any) -> None:
    """Render a card template to `README.md` in `folder`; every value that the template uses must be given."""
    (folder / "README.md").write_text(card_templates().get_template(template).render(**values), encoding="utf-8")


def write_figures(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write `figures.json`, without the entry `revision`."""
    # The revision of a local folder is a digest of its files, this one among them.
    content = without_nan({name: value for name, value in figures.items() if name != "revision"})
    (folder / "figures.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def without_nan(content: Any) -> Any:
    """Return the figures with `None` instead of NaN, which JSON does not have."""
    if isinstance(content, dict):
        return {name: without_nan(part) for name, part in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
