"""Run the benchmarks of this folder and print one table: `python -m tests.benchmarks [--json FILE] [--only SECTION] [NAME ...]`.

A benchmark is a module with `measure()`, which yields [`~tests.benchmarks.table.Line`]s. Run nothing else on the
machine at the same time: figures are compared with a reference that is measured in the same run, and other load
distorts both.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tests.benchmarks as folder
from tests.benchmarks.table import Line

APART = {"__main__", "synthetic", "table", "texts"}  # modules without measure()


def main(arguments: Sequence[str]) -> None:
    known = sorted({module.name for module in pkgutil.iter_modules(folder.__path__)} - APART)
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure, and print one table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(known)}; default: all")
    parser.add_argument("--only", help="of a benchmark in sections, such as gpu: those whose names begin with this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(known)
    if unknown:
        sys.exit(f"Benchmarks {sorted(unknown)} do not exist; choose from {known}.")
    sections = {} if options.only is None else {"only": options.only}
    modules = {name: importlib.import_module(f"tests.benchmarks.{name}") for name in options.names or known}
    found = []
    for name, module in modules.items():
        for line in module.measure(**sections):
            found.append((name, line))
            # At once, so that a run that is cut off leaves what it has measured.
            print(f"{name}: {line.what}: {line.ours:.4g} {line.unit}", file=sys.stderr, flush=True)
            if options.json is not None:
                lines = [{"benchmark": name, **line._asdict()} for name, line in found]
                options.json.write_text(json.dumps({**machine(), "lines": lines}, indent=2) + "\n", encoding="utf-8")
    show(found)


def machine() -> dict[str, Any]:
    """Return the machine, the versions and the date of the figures."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} cores, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def show(found: Sequence[tuple[str, Line]]) -> None:
    """Print the table: what, ours, reference, ratio, target."""
    at = machine()
    table = Table(title=f"{at['device']}, Python {at['python']}, torch {at['torch']}, {at['date']}")
    for name in ("what", "ours", "reference", "ours / reference", "target"):
        table.add_column(name, justify="left" if name == "what" else "right", overflow="fold")
    for _, line in found:
        ratio = "" if line.reference is None else f"{line.ours / line.reference:.3g}"
        reference = "" if line.reference is None else f"{line.reference:.3g} {line.unit}"
        verdict = "" if line.met is None else ": met" if line.met else ": MISSED"
        table.add_row(line.what, f"{line.ours:.3g} {line.unit}", reference, ratio, line.target + verdict)
    console = Console()
    # In a file or a pipe rich assumes 80 columns, which would fold every line.
    Console(width=max(console.width, 140) if not console.is_terminal else None).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
