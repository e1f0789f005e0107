"""`Stage`: the interface of callables that add columns, `add_columns`, and the parts that scorer and embedder share.

Does: define the protocol that shards, estimates, Ray and verification rely on; add the columns of a stage to a dataset
without copying its own, and show its progress; turn a batch of rows into texts, and values per text back into one value
per row.
Does not: run a model, start processes, or depend on any particular stage.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from car_datasets.loading.chats import is_scored
from car_datasets.loading.schemas import ON_INVALID, Schema, find_schema, format_batch, invalid_rows_message
from car_datasets.loading.templates import TEMPLATES, Text
from car_datasets.scoring.batching import current_watch, watching
from car_datasets.scoring.iqs.float8 import FLOAT8
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import join_columns, refuse_overwrite
from car_datasets.utils.digests import public
from car_datasets.utils.files import printable
from car_datasets.utils.processes import is_main_process, process_rank

if TYPE_CHECKING:
    from datasets import Dataset, Features


@public
@runtime_checkable
class Stage(Protocol):
    """A callable for `dataset.map(stage, batched=True, with_rank=True)` that returns new columns only.

    Implement it as a frozen dataclass of plain values, so that equal stages have equal fingerprints in every process.
    Model weights belong in a module-level cache, never in a field. [`QualityScorer`] and [`TextEmbedder`] are stages.

    A stage may also have a method `read_columns(column_names) -> list[str]`: it is then given those columns alone, and
    a run in shards is bound to their content. Without it, the stage is given all columns. A class attribute
    `free_fields` names fields that change no result, with other values of which a run in shards may be resumed.
    """

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that the stage adds."""

    # A method, not a property: a stage may have to load its model to know the dimension of its vectors.
    def output_features(self) -> Features:
        """Return the types of the columns that the stage adds."""

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of columns; `rank` is the index of the process."""


def add_columns(dataset: Dataset, stage: Stage, description: str) -> Dataset:
    """Return what `dataset.map(stage, batched=True)` gives, computed from only the columns that it reads.

    The new columns have the stage's own types (`.map` would infer lists of any length for embeddings, and fail on a
    first batch of nulls). Like those of `.map`, they are read from the cache the second time.

    Args:
        dataset (`Dataset`): without the columns that the stage adds.
        stage (`Stage`): such as [`QualityScorer`] or [`TextEmbedder`].
        description (`str`): of the progress bar.

    Raises:
        ValueError: the dataset already has a column that the stage adds, or the stage refuses the rows.
    """
    refuse_taken(dataset.column_names, stage)
    read = read_columns(dataset.column_names, stage)
    # Stages with one of these fields, models and judges, tell how far they are within a batch.
    own_bar = hasattr(stage, "batch_tokens") or hasattr(stage, "concurrency")
    with Progress(description, len(dataset)) if own_bar else contextlib.nullcontext() as progress:
        with watching(progress.passed if progress else lambda rows: None) as watch, _bars_of_map(not own_bar):
            added = dataset.select_columns(read).map(
                stage,
                batched=True,
                batch_size=batch_rows(),
                with_rank=True,
                desc=description,
                features=stage.output_features(),
                remove_columns=read,  # the cached file then holds the new columns alone
            )
        if progress and watch.called:
            progress.to(len(dataset))
        elif progress and len(dataset):
            say(f"{description}: these {len(dataset):,} rows were computed before, and are read from the cache.")
    return join_columns(dataset, added)


@contextlib.contextmanager
def _bars_of_map(shown: bool) -> Iterator[None]:
    """Switch the progress bars of `datasets` off in this block, unless they are to be shown or cannot be switched."""
    from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars

    # With HF_DATASETS_DISABLE_PROGRESS_BARS=0 they are always on.
    if shown or are_progress_bars_disabled() or config.HF_DATASETS_DISABLE_PROGRESS_BARS is False:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def say(text: str) -> None:
    """Print a line to standard error, without breaking a progress bar; silent where progress bars are switched off."""
    if is_main_process() and not _bars_are_off():
        _write(text)


def _write(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(printable(text), file=sys.stderr)


def _bars_are_off() -> bool:
    from datasets import are_progress_bars_disabled

    return are_progress_bars_disabled() or os.environ.get("TQDM_DISABLE", "").lower() in ("1", "true", "yes")


def _can_draw() -> bool:
    """Return True if a progress bar can be redrawn in its line: on a terminal, in a notebook, or if it is forced."""
    from datasets import config
    from tqdm.auto import tqdm

    # `tqdm.auto` chooses the notebook's class when it is imported in one.
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return in_notebook or sys.stderr.isatty() or config.HF_DATASETS_DISABLE_PROGRESS_BARS is False


LINE_EVERY = 30.0  # seconds between the lines that replace a progress bar where none can be drawn
FIRST_ESTIMATE = 5.0  # seconds of forward passes after which the time left is told


class Progress:
    """The progress of a stage: a bar, or a line every half minute where the output is not a terminal.

    Only the main process shows it, and nobody where the progress bars of `datasets` or tqdm are switched off.

    Args:
        description (`str`): label of the bar.
        total (`int`, *optional*): number of rows, if known.
    """

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total = description, total
        self.shown = is_main_process() and not _bars_are_off()
        self._draws = self.shown and _can_draw()
        self.rows = 0
        self._bar: Any = None
        self._begun = False
        self._started: tuple[float, int] | None = None  # time and rows of the first forward pass of this run
        self._next_line = 0.0
        self._estimated = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def to(self, rows: int) -> None:
        """Show that so many rows are done; fewer than before are ignored, since a bar cannot go back."""
        self.rows = max(self.rows, rows)
        if not self.shown:
            return
        # Other processes of this run may have finished rows before this one looks, which says nothing new.
        found = rows if process_rank()[1] == 1 else 0
        if not self._begun and found:
            _write(f"{self.description}: {found:,} rows are finished already, by an earlier run or other workers.")
        self._begun = True
        if self._bar is None and self._draws:
            from tqdm.auto import tqdm  # not that of `datasets`, whose bars are off while `.map` runs

            # Made with the first number: a run that is read from the cache shows no bar.
            self._bar = tqdm(total=self.total, desc=self.description, unit=" examples", initial=found)
        if self._bar is not None and self.rows > self._bar.n:  # an update by 0 would draw the same line again
            self._bar.update(self.rows - self._bar.n)

    def passed(self, rows: int) -> None:
        """Show that so many rows are done, from the loop of forward passes, whose speed gives the time left."""
        now = time.monotonic()
        self._begun = True
        self.to(rows)
        if not self.shown:
            return
        # From the first pass on: the time before it went into loading the model.
        if self._started is None:
            self._started, self._next_line = (now, self.rows), now + LINE_EVERY
            return
        if not self._estimated and now - self._started[0] >= FIRST_ESTIMATE and self.rows > self._started[1]:
            self._estimated = True
            _write(self._line(now))
        elif self._bar is None and now >= self._next_line:
            self._next_line = now + LINE_EVERY
            _write(self._line(now))

    def _line(self, now: float) -> str:
        assert self._started is not None
        since, before = self._started
        # Only rows of this run: those that were found finished took no time now.
        rate = (self.rows - before) / max(now - since, 1e-9)
        done = f"{self.rows:,} rows" if self.total is None else f"{self.rows:,} of {self.total:,} rows"
        left = "" if self.total is None or not rate else f", about {in_words((self.total - self.rows) / rate)} left"
        return f"{self.description}: {done}, {rate:,.1f} rows/s{left}."


def in_words(seconds: float) -> str:
    """Return a duration rounded for a reader: `"40 seconds"`, `"12 minutes"`, `"3.5 hours"`."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def read_columns(column_names: Sequence[str], stage: Stage, with_index: bool = True) -> list[str]:
    """Return the columns that a stage is given: those that its `read_columns` method names, or all if it has none.

    Args:
        column_names (`Sequence[str]`): columns of the dataset.
        stage (`Stage`): such as [`QualityScorer`].
        with_index (`bool`): also `source_index` if the dataset has it. It names rows in messages and changes no result,
            so the content that a run in shards is bound to leaves it out.

    Raises:
        ValueError: the stage finds no column that it can read.
    """
    own = getattr(stage, "read_columns", None)
    read = list(column_names) if own is None else list(own(column_names))
    if with_index and ColumnNames.index in column_names and ColumnNames.index not in read:
        read.append(ColumnNames.index)
    return read


def refuse_taken(column_names: Container[str], stage: Stage) -> None:
    """Raise ValueError if the dataset already has a column that the stage adds."""
    # The options of scorer and embedder; another stage may have neither.
    options = [f"{name}=..." for name in ("output_column", "embedding_column") if hasattr(stage, name)]
    option = " and ".join(options) or f"other output columns to {type(stage).__name__}"
    refuse_overwrite(column_names, stage.output_columns, option)


# Rows per call of a stage. A GPU needs many, as it finishes a thousand rows before the next thousand are tokenised. On
# a CPU more rows would delay the progress bar, and fewer would leave more padding (3.5 % of the tokens at 1,000 rows of
# Alpaca, 2.0 % at 2,000, 1.2 % at 4,000).
CPU_ROWS, ACCELERATOR_ROWS = 2_000, 16_384


def batch_rows() -> int:
    """Return how many rows a stage is given at a time on this machine."""
    return ACCELERATOR_ROWS if torch.accelerator.is_available() else CPU_ROWS


def set_fields(record: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass, before anything else sees the record, which must not change afterwards."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


DTYPES = ("float32", "bfloat16", "float16", FLOAT8)
EMBEDDING_DTYPES = ("float32", "float16")


def check_options(
    *,
    template: str | None,
    on_invalid: str,
    dtype: str,
    embedding_dtype: str,
    batch_tokens: int | None,
    new_columns: Sequence[str],
) -> None:
    """Raise ValueError for an invalid option, which would otherwise fail in a worker after the models are loaded."""
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 1.")
    if len(set(new_columns)) < len(new_columns):
        raise ValueError(f"The new columns {list(new_columns)} must have different names.")
    for option, value, allowed in (
        ("template", template, (None, *sorted(TEMPLATES))),  # None: the template the model was trained with
        ("on_invalid", on_invalid, ON_INVALID),
        ("dtype", dtype, DTYPES),
        ("embedding_dtype", embedding_dtype, EMBEDDING_DTYPES),
    ):
        if value not in allowed:
            choices = [choice for choice in allowed if choice is not None]  # None is the default, not a name
            raise ValueError(f"{option}={value!r} is not known; choose one of {choices}.")


def text_columns(column_names: Iterable[str], schema: str, columns: Any) -> list[str]:
    """Return the columns that hold the text of a row.

    Args:
        column_names (`Iterable[str]`): all columns of the dataset.
        schema (`str`): name of the schema, or `"auto"`.
        columns: names that the dataset gives to the schema's columns, where they differ from the schema's own.

    Raises:
        ValueError: no schema fits.
    """
    return list(find_schema(column_names, schema, columns).read_columns)


@dataclass(frozen=True)
class Rows:
    """The texts of a batch in one flat list, and how many of them belong to each row.

    Args:
        texts (`list[Text]`): one per exchange.
        counts (`list[int]`): texts per row; 0 for a row that cannot be scored.
        status (`list[str]`): per row, `"ok"` or why the row has no score or deserves a look.
    """

    texts: list[Text]
    counts: list[int]
    status: list[str]

    @classmethod
    def from_batch(
        cls,
        batch: Mapping[str, Sequence[Any]],
        schema: Schema,
        template: str,
        on_invalid: str,
        score_thoughts: bool = False,
    ) -> Rows:
        """Format a batch.

        Raises:
            ValueError: with `on_invalid="error"`, some rows cannot be scored; the message counts and names them.
        """
        rows = format_batch(batch, schema, template, score_thoughts)
        refuse_invalid(batch, [row.status for row in rows], on_invalid)
        texts = [text for row in rows for text in row.texts]
        if (watch := current_watch()) is not None:
            watch.begin(len(rows), len(texts))
        return cls(texts, [len(row.texts) for row in rows], [row.status for row in rows])

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Split values per text, shape `(texts, ...)`, into one slice per row."""
        ends = np.cumsum(self.counts)
        return [values[end - count : end] for end, count in zip(ends, self.counts, strict=True)]

    @property
    def are_texts(self) -> bool:
        """Return True if every row has one text, so that values per text are in row order already: no chats."""
        return len(self.texts) == len(self.counts) and all(count == 1 for count in self.counts)

    def fold(self, values: npt.NDArray[Any], function: Callable[[Any], Any]) -> list[np.float32 | None]:
        """Reduce values per text, shape `(texts, ...)`, to one float32 per row; `None` for a row without texts."""
        return [np.float32(function(part)) if len(part) else None for part in self.split(values)]

    def mean_vectors(self, vectors: npt.NDArray[np.float32], dtype: str = "float32") -> Any:
        """Average vectors per text into one per row, rescaled to the mean length of the row's vectors.

        Returns:
            An array of shape `(rows, dimension)`, which `datasets` stores without a Python object per number; if some
            rows have no vector, a list with `None` for those.
        """
        if self.are_texts:
            return vectors.astype(dtype)
        means = [_mean_vector(part) for part in self.split(vectors)]
        present = [mean.astype(dtype) for mean in means if mean is not None]
        if present and len(present) == len(means):
            return np.stack(present)
        return [None if mean is None else mean.astype(dtype) for mean in means]


def _mean_vector(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
    if len(vectors) == 0:
        return None
    if len(vectors) == 1:
        return vectors[0]
    mean = vectors.mean(axis=0)
    # The mean of vectors of different directions is shorter than they are: k-means would take a chat for an outlier.
    length = float(np.linalg.norm(mean))
    scale = float(np.linalg.norm(vectors, axis=1).mean()) / length if length > 0 else 1.0
    return np.asarray(mean * scale, dtype=np.float32)


def refuse_one_text(texts: Any) -> None:
    """Raise ValueError if this is one text, whose characters would be taken for texts."""
    if isinstance(texts, str):
        raise ValueError("texts is one text; pass a list of texts: [text].")


def refuse_invalid(batch: Mapping[str, Sequence[Any]], statuses: Sequence[str], on_invalid: str) -> None:
    """Raise ValueError if rows of a batch cannot be scored and `on_invalid="error"`; the message names them.

    Args:
        batch (`Mapping[str, Sequence]`): the rows.
        statuses (`Sequence[str]`): one per row.
        on_invalid (`str`): `"error"` or `"mark"`.
    """
    bad = [i for i, status in enumerate(statuses) if not is_scored(status)]
    if bad and on_invalid == "error":
        # Without `source_index` the rows are numbered within the batch, and the message has to say so.
        where = "" if ColumnNames.index in batch else " of this batch"
        names = row_names(batch, bad)
        raise ValueError(invalid_rows_message([statuses[i] for i in bad], names, len(statuses), where))


def refuse_not_finite(batch: Mapping[str, Sequence[Any]], positions: Sequence[int]) -> None:
    """Raise ValueError if these rows of a batch, whose scores are not finite, are any; the message names them."""
    if positions:
        raise ValueError(
            f"{len(positions)} scores are not finite, rows {row_names(batch, positions)[:5]}. The weights are broken: what "
            "overflows in half precision was scored again in float32."
        )


def row_names(batch: Mapping[str, Sequence[Any]], positions: Iterable[int]) -> list[Any]:
    """Return how a message names these rows: by `source_index` if the batch has it, else by position in the batch."""
    index = batch.get(ColumnNames.index)
    return [index[i] if index is not None else i for i in positions]
