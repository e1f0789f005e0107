"""Read and run what the pages of the documentation show: the snippets and commands of a page, in its order."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from types import ModuleType

from typer.testing import CliRunner

from car_datasets.cli import app

# What these commands do takes minutes, a server or a model of the Hub. Tests of their own run them; here they are parsed.
ELSEWHERE = {"convert", "evaluate", "explore", "judge", "prepare", "prove", "quantise", "train"}
# Words that stand for a reader's own names, and addresses that a test cannot reach.
NOT_HERE = re.compile(r"OWNER/|hf://|--engine |car_paper\.yaml")


def blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and content of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """Return the lines of a shell block that call the command line, without its name."""
    return [line.removeprefix("car-datasets ") for line in block.splitlines() if line.startswith("car-datasets ")]


def lines_without_numbers(text: str) -> list[str]:
    """Return the lines of an output with one space between words and `#` for each number, which a machine may change."""
    return [re.sub(r"\d[\d.,]*", "#", " ".join(line.split())) for line in text.splitlines()]


def run_page(text: str) -> tuple[dict[str, object], str]:
    """Run the snippets and commands of a page in the current folder.

    Returns:
        `(names, printed)`: what the snippets have defined, and what snippets and commands have printed.
    """
    page = ModuleType("page")
    sys.modules["page"] = page  # a dataclass looks its module up
    printed = []
    for language, block in blocks(text):
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as shown:
                exec(compile(block, "page", "exec"), vars(page))
            printed.append(shown.getvalue())
        elif language == "sh":
            for line in commands(block):
                name, *words = shlex.split(line, comments=True)
                if name in ELSEWHERE or NOT_HERE.search(line):
                    continue
                done = CliRunner().invoke(app, [name, *words])
                assert done.exit_code == 0, (line, done.output, done.exception)
                printed.append(done.stdout)  # progress and next steps go to standard error
    return vars(page), "\n".join(printed)
