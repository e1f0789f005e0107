"""Runs every benchmark of this folder and prints one table: `python -m tests.benchmarks [NAME ...]`.

A benchmark is a module with `measure()`, which yields tuples `(what, ours, reference, target)`: a description, seconds of
the package, seconds of the plain way (or None), and the most seconds that are wanted (or None). Run nothing else meanwhile.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import sys

from rich.console import Console
from rich.table import Table

import tests.benchmarks as folder


def main(wanted: list[str]) -> None:
    known = sorted(module.name for module in pkgutil.iter_modules(folder.__path__) if module.name != "__main__")
    unknown = set(wanted) - set(known)
    if unknown:
        sys.exit(f"There is no benchmark {sorted(unknown)}; there are {known}.")
    table = Table(title=f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for name in ("what", "ours", "reference", "ours / reference", "target"):
        table.add_column(name, justify="left" if name == "what" else "right", overflow="fold")
    for name in wanted or known:
        for what, ours, reference, target in importlib.import_module(f"tests.benchmarks.{name}").measure():
            ratio = "" if reference is None else f"{ours / reference:.2f}"
            verdict = "" if target is None else f"<= {target:g} s: {'met' if ours <= target else 'MISSED'}"
            table.add_row(what, f"{ours:.2f} s", "" if reference is None else f"{reference:.2f} s", ratio, verdict)
    console = Console()
    Console(width=max(console.width, 140) if not console.is_terminal else None).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
