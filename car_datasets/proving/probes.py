"""Read evaluation sets, and find the domain of each of their rows.

Does: load a file or a Hub dataset as the package loads any source; take domains from a column, or find kinds of tasks.
Does not: compare them with a pool, or run a model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from car_datasets.loading.schemas import find_schema
from car_datasets.loading.sources import Reading, open_rows
from car_datasets.proving.examples import as_examples, find_groups, kinds_of_rows
from car_datasets.utils.files import ASSETS

SHIPPED = ASSETS / "evaluation.json"  # prompts and answers of our own, 15 of each of eight kinds
SHIPPED_NAME = "shipped"
DOMAIN_COLUMNS = ("domain", "kind", "category", "task", "subset", "source")  # usual names, the first that is there


@dataclass(frozen=True, eq=False)
class Probe:
    """An evaluation set.

    Args:
        name (`str`): how reports call it.
        rows (`Dataset`): `prompt` and `completion`, lists of messages.
        domains (`list[str]`): one per row.
        domains_by (`str`): the name of the column of domains, or `"kind of task"`.
        left_out (`int`): rows of the source that have no answer to measure.
    """

    name: str
    rows: Dataset
    domains: list[str]
    domains_by: str
    left_out: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of rows of each domain, in the order of their first row."""
        return dict(Counter(self.domains))


def read_probe(
    source: str | Path | None = None, *, split: str | None = None, domain_column: str | None = None, name: str = ""
) -> Probe:
    """Read an evaluation set: prompts with answers whose losses are measured.

    Args:
        source (`str` or `Path`, *optional*): a file, a folder or a Hub id, as for [`load_instructions`]. Defaults to
            the set that the package ships.
        split (`str`, *optional*): the split of a source that has several, or a slice such as `"test[:500]"`.
        domain_column (`str`, *optional*): the column of domains. Defaults to the first of `DOMAIN_COLUMNS` that is
            there, else to the kinds of task that are found in the texts.
        name (`str`, *optional*): how reports call it. Defaults to the file's name without its end, or the id.

    Returns:
        [`Probe`]: the rows that have an answer.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: it cannot be read, has no such column, or no two rows with an answer.
    """
    shown = SHIPPED if source is None else source
    opened = open_rows(shown, Reading(split=split)).dataset.with_format(None)
    rows, problems = as_examples(opened, find_schema(opened.column_names))
    usable = np.flatnonzero([not problem for problem in problems])
    if len(usable) < 2:
        raise ValueError(
            f"evaluation={str(shown)!r} has {len(usable)} rows with a prompt and an answer; two are needed, and some hundred "
            "tell more. Pass another file: evaluation=[FILE] (--eval FILE)."
        )
    column = find_groups(opened, DOMAIN_COLUMNS, domain_column)
    rows = rows.select(usable)
    domains = [str(value) for value in opened.select(usable)[column][:]] if column else kinds_of_rows(rows)
    path = Path(str(shown))
    known = name or (SHIPPED_NAME if source is None else path.stem if path.suffix else str(source))
    return Probe(known, rows, domains, column or "kind of task", len(problems) - len(usable))
