"""Run a stage in one worker per GPU (`map_across_gpus`), in Ray's actors (`OnRay`) or on a sample (`estimate_scoring`).

Does: spawn the workers of `.map`; give Ray's actors the columns that a stage reads; estimate the time of all rows from
that of a sample.
Does not: resume an interrupted run (shards do), start Ray, or predict the speed of another machine.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from car_datasets.loading.schemas import find_schema
from car_datasets.loading.values import carried
from car_datasets.scoring.batching import padding_waste, token_budget
from car_datasets.scoring.scorer import QualityScorer
from car_datasets.scoring.stage import Rows, Stage, read_columns, refuse_taken
from car_datasets.utils.processes import device_for, launched_rank
from car_datasets.utils.settings import ESTIMATE_ROWS, is_integer

if TYPE_CHECKING:
    from datasets import Dataset


WARM_UP = 4  # rows or texts of the call that loads the model and compiles kernels, which is not timed


def map_across_gpus(
    dataset: Dataset, fn: Callable[..., Any], *, num_proc: int | None = None, batched: bool = True, **options: Any
) -> Dataset:
    """Run `dataset.map(fn, with_rank=True)` with one worker per GPU, each of which loads its model once.

    ```python
    if __name__ == "__main__":
        scored = map_across_gpus(dataset, QualityScorer())
    ```

    Workers are spawned, because a forked one cannot use CUDA and hangs if its parent has run torch. Under `accelerate
    launch` call [`score_in_shards`] instead.

    Args:
        dataset (`Dataset`): any rows.
        fn (`Callable`): a function of a batch, such as [`QualityScorer`]; workers must be able to import it by its
            name.
        num_proc (`int`, *optional*): number of workers; by default the number of GPUs, at least 1. Workers beyond the
            number of GPUs share them.
        batched (`bool`): as in `.map`, but `True` by default.
        options: further arguments of `.map`. `with_rank` is set if `fn` takes a `rank`.

    Returns:
        `Dataset`: the result of `dataset.map(fn)`, rows in order.

    Raises:
        ValueError: `fn` needs all rows at once or cannot be imported by a worker, the calling script has no
            `if __name__ == "__main__":`, or a launcher has started several processes.
    """
    workers = max(1, torch.cuda.device_count()) if num_proc is None else num_proc
    # 1000 is the default of `.map`; `batch_size=None` and -1 mean all rows at once.
    _refuse_what_cannot_spawn(dataset, fn, workers, {"batched": batched, "batch_size": 1000, **options})
    takes_rank = "rank" in inspect.signature(fn).parameters
    with _spawning():
        return dataset.map(fn, **{"with_rank": takes_rank, "batched": batched, "num_proc": workers, **options})


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    """Spawn workers, and explain the error of a script that starts workers when it is imported."""
    import multiprocess  # the fork of multiprocessing that datasets uses

    before = multiprocess.get_start_method(allow_none=True)
    multiprocess.set_start_method("spawn", force=True)
    try:
        yield
    except EOFError as error:
        if error.__cause__ is not None:  # raised by fn in a worker, whose traceback is the cause
            raise
        # Here the pipe of a worker closed too early. The worker itself prints Python's error ("before the current
        # process has finished its bootstrapping phase").
        raise ValueError(
            "The workers ended before they could start (their error is printed above). Every worker imports the "
            'calling script, and would start workers again. Put the call under `if __name__ == "__main__":`.'
        ) from error
    finally:
        multiprocess.set_start_method(before, force=True)  # None, if nobody had set one, restores the default


def _refuse_what_cannot_spawn(dataset: Any, fn: Any, workers: int, options: dict[str, Any]) -> None:
    """Raise ValueError if spawned workers could not compute `dataset.map(fn, num_proc=workers, **options)`."""
    from datasets import Dataset

    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, which has no num_proc. Pass a Dataset, for example one split of a "
            "DatasetDict."
        )
    if not is_integer(workers) or workers < 1:
        raise ValueError(f"num_proc={workers!r} must be a number of workers, at least 1.")
    launched = launched_rank()[1]
    if launched > 1:
        raise ValueError(
            f"num_proc={workers}: a launcher started {launched} processes already, and each would "
            "start workers of its own. Call score_in_shards(dataset, fn) in all of them, or start the script "
            "with plain python."
        )
    # A partial hides the name and the module of its function, which are what a worker imports.
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    # Functions of an entire dataset, such as `select_car`, name their first parameter `dataset`.
    first = next(iter(inspect.signature(inner).parameters), "")
    if first == "dataset" or (options["batched"] and (options["batch_size"] or 0) < 1):
        raise ValueError(
            f"fn={name} needs all rows at once, but num_proc={workers} would give every worker a part of them. Call it "
            f"on the dataset itself: {name}(dataset, ...)."
        )
    home = getattr(inner, "__module__", None) if inspect.isroutine(inner) else type(inner).__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    # A notebook and a prompt have no file; a script from a pipe has the file `<stdin>`, which does not exist, so a
    # worker could not even run the script again, wherever `fn` is defined.
    if (home == "__main__" and script is None) or (script is not None and not Path(script).is_file()):
        raise ValueError(
            f"fn={name} is defined in a notebook, a prompt or a pipe, where a spawned worker cannot import it. Write "
            "it into a file (in a notebook: a cell that starts with %%writefile my_stage.py), import it "
            "from there, and pass that."
        )


class OnRay:
    """A class of Ray actors that run a stage, such as [`QualityScorer`]; each actor loads the model once.

    ```python
    import ray
    from car_datasets import QualityScorer
    from car_datasets.scoring import OnRay

    rows = ray.data.read_parquet("s3://pool/")
    scored = rows.map_batches(
        OnRay,
        fn_constructor_args=(QualityScorer(embedding_column="embedding"),),
        batch_format="pyarrow",
        batch_size=4096,
        compute=ray.data.ActorPoolStrategy(size=8),
        num_gpus=1,
    )
    scored.write_parquet("s3://scored/")
    ```

    Ray returns all rows, in any order. Sort by `source_index` (or an id of your own, which the rows must have before
    they are scored) before you select, as ties are broken by order. Ray restarts a worker that dies.

    Args:
        stage (`Stage`): its model must be on the Hub or at the same path on all machines.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, table: pa.Table) -> pa.Table:
        """Append the columns of the stage to a batch of rows.

        Raises:
            ValueError: the batch is not an Arrow table, it already has a column that the stage adds, or the stage
                refuses the rows.
        """
        from datasets import Dataset

        if not isinstance(table, pa.Table):
            raise ValueError(
                f"batch is a {type(table).__name__}, not an Arrow table: map_batches(..., batch_format='pyarrow')."
            )
        refuse_taken(table.column_names, self.stage)
        # The declared types, not inferred ones: blocks of one Ray dataset must agree, even if a batch is all null.
        types = self.stage.output_features()
        new = self.stage(table.select(read_columns(table.column_names, self.stage)).to_pydict())
        # As a Dataset, which encodes values as `.map` does.
        added = Dataset.from_dict(new, features=types).with_format("arrow")[:]
        for name in types:
            table = table.append_column(added.schema.field(name), added.column(name))
        return table


class Estimate(NamedTuple):
    """The speed of a stage on a sample of rows.

    Args:
        rows (`int`): number of rows of the dataset.
        sample (`int`): number of rows that were timed.
        seconds (`float`): time that the sample took.
        tokens (`int`, *optional*): tokens of the sample that the model read; for a [`QualityScorer`] only.
        waste (`float`, *optional*): share of padding among the tokens that the encoder computed; for a
            [`QualityScorer`] only.
        device (`str`): such as `"cpu"` or `"cuda:0"`.
    """

    rows: int
    sample: int
    seconds: float
    tokens: int | None
    waste: float | None
    device: str

    @property
    def rows_per_second(self) -> float:
        """Return the number of rows that the stage processes per second."""
        return self.sample / self.seconds

    @property
    def minutes(self) -> float:
        """Return the minutes that all rows take in one process."""
        return self.rows / self.rows_per_second / 60

    def __str__(self) -> str:
        minutes = self.minutes
        duration = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
        speed = f"{self.rows_per_second:.1f} rows/s"
        if self.tokens is not None and self.waste is not None:
            speed += f" ({self.tokens / self.seconds:,.0f} tokens/s, {self.waste:.0%} padding)"
        timed = f"timed on {self.sample} rows"
        return f"{speed} on {self.device}, {timed}: about {duration} to score {self.rows:,} rows in one process."


def estimate_scoring(dataset: Dataset, scorer: Stage, sample: int = ESTIMATE_ROWS, seed: int = 0) -> Estimate:
    """Time a stage on rows drawn at random, after a first call that loads its model.

    Args:
        dataset (`Dataset`): the rows to score. Those that a [`QualityScorer`] cannot score are not timed, but counted.
        scorer (`Stage`): such as a [`QualityScorer`], whose `embedding_column` is timed as well.
        sample (`int`): rows to time.
        seed (`int`): of the draw.

    Raises:
        ValueError: the dataset is empty, no row of the sample can be scored, or `sample` is below 1.
    """
    if sample < 1:
        raise ValueError(f"sample={sample} must be at least 1.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows, so there is nothing to time.")
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:sample]
    rows = carried(dataset.with_format(None))[np.sort(drawn).tolist()]  # sorted: Arrow reads ascending rows faster
    device = str(device_for())
    # Not by the protocol: of all stages, only this one can tell how many tokens its model reads.
    if isinstance(scorer, QualityScorer):
        seconds, tokens, waste = _time_scorer(scorer, rows, len(drawn))
        return Estimate(len(dataset), len(drawn), seconds, tokens, waste, device)
    batch = {name: rows[name] for name in read_columns(dataset.column_names, scorer)}
    scorer({name: values[:WARM_UP] for name, values in batch.items()})
    return Estimate(len(dataset), len(drawn), _seconds(lambda: scorer(batch))[0], None, None, device)


def _time_scorer(scorer: QualityScorer, rows: dict[str, Any], count: int) -> tuple[float, int, float]:
    """Time a scorer on its texts; return seconds, tokens read by the model, and the share of padding."""
    schema = find_schema(rows, scorer.schema, scorer.columns)
    texts = Rows.from_batch(rows, schema, str(scorer.template), "mark", scorer.score_thoughts).texts
    if not texts:
        raise ValueError(f"None of {count} rows, drawn at random, can be scored.")
    loaded = scorer.load()
    scorer.score_texts(texts[:WARM_UP])
    seconds, scores = _seconds(lambda: scorer.score_texts(texts))
    config = loaded.model.config
    # The length of a text includes what the model cuts off, which costs no time.
    lengths = np.minimum(scores.tokens, config.max_tokens).tolist()
    waste = 0.0  # packed texts need no padding
    if not loaded.packed:
        budget = token_budget(loaded.device, config.encoder_config.hidden_size, scorer.batch_tokens)
        waste = padding_waste(lengths, budget.tokens)
    return seconds, sum(lengths), waste


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long `work` took, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
