"""Fill in the pages of the documentation that follow from the code: commands, settings, docstrings.

mkdocs calls the functions `on_...` as hooks (mkdocs.yml), and griffe, which reads the code for mkdocstrings, `Docstrings`.
"""

import importlib
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import griffe
from typer.main import get_command

from car_datasets.cli import app
from car_datasets.recipe import PANELS, Recipe

FACES = ("", ".loading", ".scoring", ".scoring.iqs", ".scoring.judges", ".clustering", ".selection", ".reporting")
FACES += (".publishing", ".proving", ".training")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the comments that ask for what follows from the code."""
    for comment, write in WRITTEN.items():
        if comment in markdown:
            markdown = markdown.replace(comment, "\n".join(write()))
    return markdown


def on_post_page(output: str, **_: Any) -> str:
    """Name the search dialog, which the theme leaves without a name for screen readers."""
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


# --- commands


def write_commands() -> Iterator[str]:
    """Yield the lines of a section for every command, with its options in groups."""
    parser: Any = get_command(app)
    for name, command in parser.commands.items():
        yield f"\n## {name}\n"
        yield f"{_escaped(command.help)}\n"
        context = command.make_context(name, [], resilient_parsing=True)
        usage = re.sub(r"\{(\w+)\}", lambda found: found[1].upper(), " ".join(command.collect_usage_pieces(context)))
        yield f"```text\ncar-datasets {name} {usage}\n```\n"
        yield from _write_table("Argument", [p for p in command.params if p.param_type_name == "argument"])
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        panels = {getattr(p, "rich_help_panel", None) or "Options": None for p in options}
        for panel in panels:
            of_panel = [p for p in options if (getattr(p, "rich_help_panel", None) or "Options") == panel]
            yield from _write_table(panel, of_panel)
        if command.epilog:
            yield f"`{command.epilog.removeprefix('Example: ')}`\n"


def _write_table(title: str, params: list[Any]) -> Iterator[str]:
    if params:
        yield f"| {title} | |\n|---|---|"
        for param in params:
            names = ", ".join(f"`{each}`" for each in _names(param))
            yield f"| {names} | {_help(param)} |"
        yield ""


def _names(param: Any) -> list[str]:
    if param.param_type_name == "argument":
        return [(param.metavar or param.name).upper()]
    return [*param.opts, *param.secondary_opts]


def _help(param: Any) -> str:
    text, _, default = re.sub(r"\[/?dim\]", "", param.help or "").replace("\\[", "[").partition("  [default: ")
    shown = default.rstrip("]")
    if not default and param.default not in (None, False, ()) and not param.required and not callable(param.default):
        shown = str(param.default)
    ends = ["Required."] * param.required + [f"Default: `{shown}`."] * bool(shown)
    return " ".join([_escaped(text), *ends])


# --- settings


def write_settings() -> Iterator[str]:
    """Yield the lines of a table for every group of the fields of `Recipe`."""
    for panel in PANELS:
        of_panel = [f for f in fields(Recipe) if f.metadata["panel"] == panel]
        if of_panel:
            yield f"\n## {panel}\n\n| Field | |\n|---|---|"
            for field in of_panel:
                kind = field.type.__name__ if isinstance(field.type, type) else re.sub(r"[a-z]+\.", "", str(field.type))
                default = field.metadata["shown"] or repr(field.default).replace("'", '"')
                text = _escaped(field.metadata["help"].partition("  [default: ")[0])
                flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
                option = "" if flag == f"--{field.name.replace('_', '-')}" else f" Option: `{flag}`."
                kinds = kind.replace(" | ", "` or `")
                yield f"| `{field.name}` | {text} Type: `{kinds}`. Default: {_escaped(default)}.{option} |"
            yield ""


def _escaped(text: str) -> str:
    """Return a help text as Markdown, in one cell of a table: words such as train[:10%] are no links."""
    return _cell(re.sub(r"([\[\]*<>])", r"\\\1", text or ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n\n", " ").replace("\n", " ")


WRITTEN: dict[str, Callable[[], Iterator[str]]] = {
    "<!-- commands -->": write_commands,
    "<!-- settings -->": write_settings,
}


# --- docstrings


class Docstrings(griffe.Extension):
    """Rewrite docstrings as Markdown: sections as lists, and names in brackets as links.

    griffe's own parser of Google style knows neither arguments that are documented in groups nor Markdown in types.
    """

    def __init__(self) -> None:
        super().__init__()
        self.links = {}
        for face in FACES:
            names = importlib.import_module(f"car_datasets{face}").__all__
            self.links |= {name: f"car_datasets{face}.{name}" for name in names if name not in self.links}

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of each object that is read."""
        if obj.docstring:
            obj.docstring.value = self.link(as_markdown(obj.docstring.value))

    def link(self, text: str) -> str:
        """Turn [`name`] into a link, if the name has a place in the reference, else into code."""

        def replace(match: re.Match[str]) -> str:
            name, _, member = match[1].strip("~").partition(".")
            found = self.links.get(name)
            return f"[`{match[1]}`][{found}{'.' * bool(member)}{member}]" if found else f"`{match[1]}`"

        return re.sub(r"\[`([~\w.]+)`\](?![\[(])", replace, text)


def as_markdown(docstring: str) -> str:
    """Return a docstring in Google style with its sections as lists and paragraphs."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):[ ]*\n", docstring, flags=re.MULTILINE)
    written = [parts[0]]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        inside, rest = _split_indented(body)
        name = {"Args": "Arguments"}.get(title, title)
        written.append(f"**{name}**\n\n{_items(title, inside)}\n\n{rest}")
    return "\n".join(written)


def _split_indented(body: str) -> tuple[str, str]:
    lines = body.split("\n")
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip("\n"), "\n".join(lines[end:])


def _items(title: str, inside: str) -> str:
    if title not in ("Args", "Attributes", "Raises"):
        return inside
    items = re.split(r"\n(?=\S)", inside)
    bold = "" if title == "Raises" else "**"
    return "\n".join(re.sub(r"^([\w, *]+?)(?= \(|:)", rf"- {bold}\1{bold}", each) for each in items)
