"""Count the tokens of rows by a named tokenizer, for a budget: `count_tokens`.

Does: read a `tokenizer.json` from a folder or the Hub; count the tokens of prompt and answer of each row.
Does not: add a model's special tokens or a chat's markup, or run code that came with a tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.loading.schemas import Schema, exchanges_of
from car_datasets.loading.templates import join_lines
from car_datasets.loading.values import carried
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import user_path
from car_datasets.utils.revisions import download_file

if TYPE_CHECKING:
    from datasets import Dataset


def load_tokenizer_file(name: str, token: str | None = None) -> Any:
    """Load the `tokenizer.json` of a model.

    Args:
        name (`str`): a folder, or a Hub id, of which this one file is fetched.
        token (`str`, *optional*): for a private repository.

    Raises:
        ValueError: there is no such file, or it cannot be read.
    """
    from tokenizers import Tokenizer

    folder = user_path(name)
    file: Path | None = folder / "tokenizer.json" if folder.is_dir() else download_file(name, "tokenizer.json", token)
    if file is None or not file.is_file():
        raise ValueError(
            f"budget_tokenizer={name!r} has no tokenizer.json, or cannot be fetched. Pass the folder or the Hub id of a "
            "model that has one (--budget-tokenizer), or leave it out to count as the scorer does."
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"budget_tokenizer={name!r}: its tokenizer.json cannot be read: {error}") from error


def count_tokens(dataset: Dataset, schema: Schema, tokenizer: Any) -> Dataset:
    """Return a dataset with the column `budget_tokens`: the tokens of all prompts and answers of each row, int64.

    Args:
        dataset (`Dataset`), schema ([`Schema`]): rows, and how they are read. A row without text has null.
        tokenizer (`tokenizers.Tokenizer`): what [`load_tokenizer_file`] returned.
    """
    from datasets import Value

    tokenizer.no_truncation()
    counts: list[int | None] = []
    for batch in carried(dataset.select_columns(list(schema.read_columns)).with_format(None)).iter(batch_size=1_000):
        rows = exchanges_of(batch, schema)
        texts = [
            [text for each in row for text in (join_lines(each.instruction, each.input), each.response)]
            for row in rows
            if not isinstance(row, str)
        ]
        encoded = tokenizer.encode_batch([text for row in texts for text in row], add_special_tokens=False)
        lengths = iter([len(each.ids) for each in encoded])
        sums = iter([sum(next(lengths) for _ in row) for row in texts])
        counts += [None if isinstance(row, str) else next(sums) for row in rows]
    return dataset.add_column(ColumnNames.budget_tokens, counts, feature=Value("int64"))
