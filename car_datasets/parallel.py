"""Several processes: `.map` workers (rank to device, spawn) and those of `accelerate launch` or `torchrun`.

Does: say which device and which process this is, run a `.map` on every GPU, have the main process compute for all.
Does not: join sums (collectives.py); deal out texts to score; processes take shards of them by themselves (shards.py).
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import contextvars
import datetime
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from car_datasets.collectives import Processes

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=7)  # for the main process to come back; if it dies, the others end at once
# What launchers set, as accelerate reads it: where none is above 1, it need not be imported.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_alone = contextvars.ContextVar("alone", default=False)
_IMPORTED_IN = os.getpid()


def device_for(rank: int | None = None) -> torch.device:
    """The device that a map worker or an accelerate process runs on.

    Args:
        rank (`int`, *optional*): the rank that `.map(with_rank=True, num_proc=n)` passes; `None` in one process. Ranks
            beyond the number of GPUs wrap around (`datasets` reuses old ranks when it resumes).

    Returns:
        `torch.device`: `cuda:rank`; without a rank, the device of this accelerate process (`accelerate launch`, `torchrun`
        or a plain one: the first GPU, Apple's, or the CPU).

    Raises:
        ValueError: in a worker that was forked after its parent had asked for a device, and so has run torch.
    """
    if _forks["after torch ran"]:
        raise ValueError(
            "This worker was forked from a process that had run a model already, in which torch hangs. Start workers with "
            "map_across_gpus(dataset, fn, num_proc=...), which spawns them; a DataLoader's with multiprocessing_context='spawn'."
        )
    note_that_torch_runs()
    if rank is not None and torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    device: torch.device = _accelerate_state().device
    if device.type == "cuda" and device.index is None:  # one name for one device: models and budgets are kept by it
        return torch.device("cuda", torch.cuda.current_device())
    return device


def note_that_torch_runs() -> None:
    """Call before work that starts threads, torch's or scikit-learn's: workers forked afterwards cannot run a model."""
    _forks["torch ran"] = True


_forks = {"torch ran": False, "after torch ran": False}
os.register_at_fork(after_in_child=lambda: _forks.update({"after torch ran": _forks["torch ran"]}))


def process_rank() -> tuple[int, int]:
    """The number of this process and the count of all that one `accelerate launch` or `torchrun` started: `(0, 1)` without, and
    inside [`alone`]."""
    if _alone.get():
        return 0, 1
    _accelerate_state()
    distributed = torch.distributed
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")  # after a plain Accelerator() on the CPU accelerate sees one process
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    atexit.unregister(_leave_gloo)
    atexit.register(_leave_gloo)
    return distributed.get_rank(), distributed.get_world_size()


def _leave_gloo() -> None:
    """Else a process that is through may end by SIGABRT (pytorch issue 190489): gloo's threads are still there."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def is_main_process() -> bool:
    """Whether this process is the one that writes, prints and pushes."""
    return process_rank()[0] == 0


@contextlib.contextmanager
def all_processes() -> Iterator[Processes]:
    """Those that one launcher started; all must come here. Only this one inside [`from_main`], [`alone`], or a plain script."""
    distributed = torch.distributed
    begun = distributed.is_available() and distributed.is_initialized()
    launched = begun or any(int(os.environ.get(name, "1")) > 1 for name in SIZES)
    rank, count = process_rank() if launched and not _alone.get() else (0, 1)
    if count == 1:
        yield Processes()
        return
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)  # NCCL's own would give up after ten minutes
    try:
        yield Processes(rank, count, group)
    finally:
        distributed.destroy_process_group(group)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Whatever is called in here is this process's own business: it waits for no other."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def from_main(compute: Callable[[], T]) -> T:
    """What `compute()` gives on the main process, on every process; all must call this, and only the main one computes.

    Args:
        compute (`Callable`): takes nothing; what it gives can be pickled. It starts when all processes have arrived.

    Raises:
        Exception: what `compute()` raised, on every process, so that none waits for one that has failed.
    """

    def join(_: list[None]) -> T:
        with alone():
            return compute()

    with all_processes() as processes:
        return processes.joined(lambda: None, join)


def map_across_gpus(
    dataset: Dataset, fn: Callable[..., Any], *, num_proc: int | None = None, batched: bool = True, **options: Any
) -> Dataset:
    """`dataset.map(fn, with_rank=True)` with one worker per GPU, each of which loads its model once.

    ```python
    if __name__ == "__main__":
        scored = map_across_gpus(dataset, QualityScorer())
    ```

    Workers are spawned, not forked (a forked one cannot use CUDA, and hangs after the parent has run torch); the start
    method is what it was when this returns. In one process of `accelerate launch`, call [`score_in_shards`] instead.

    Args:
        dataset (`Dataset`): any.
        fn (`Callable`): a function of a batch, such as [`QualityScorer`], importable by its name.
        num_proc (`int`, *optional*): workers; as many as there are GPUs, at least 1. More than GPUs share them.
        batched (`bool`): as in `.map`, but `True` unless told otherwise.
        options: of `.map`. `with_rank` is on where `fn` takes a `rank`.

    Returns:
        `Dataset`: what `dataset.map(fn)` gives, rows in order.

    Raises:
        ValueError: `fn` needs all rows at once, or no worker could load it; the calling script has no
            `if __name__ == "__main__":`; a launcher started several processes already.
    """
    workers = max(1, torch.cuda.device_count()) if num_proc is None else num_proc
    _refuse_what_cannot_spawn(dataset, fn, workers, {"batched": batched, "batch_size": 1000, **options})
    takes_rank = "rank" in inspect.signature(fn).parameters
    with _spawning():
        return dataset.map(fn, **{"with_rank": takes_rank, "batched": batched, "num_proc": workers, **options})


def _accelerate_state() -> Any:
    """accelerate's; without a GPU it must be told so, or it sees one process where torchrun started several."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def mend_threads_after_fork() -> None:
    """In a forked process (`.map(num_proc=n)`), let torch compute on one thread.

    A fork does not inherit the threads that torch has started in its parent, and would wait for them without end.
    """
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(1)


@contextlib.contextmanager
def _spawning() -> Iterator[None]:
    import multiprocess  # the fork of multiprocessing that datasets uses

    before = multiprocess.get_start_method(allow_none=True)
    multiprocess.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocess.set_start_method(before, force=True)


def _refuse_what_cannot_spawn(dataset: Any, fn: Any, workers: int, options: dict[str, Any]) -> None:
    from datasets import Dataset

    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, which has no num_proc; pass a Dataset (of one split)."
        )
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"num_proc={workers!r} must be a number of workers, at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"num_proc={workers}: a launcher started {os.environ['WORLD_SIZE']} processes already, and each would start "
            "workers of its own. Call score_in_shards(dataset, fn) in all of them, or start the script with plain python."
        )
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    first = next(iter(inspect.signature(inner).parameters), "")
    if first == "dataset" or (options["batched"] and (options["batch_size"] or 0) < 1):
        raise ValueError(
            f"fn={name} needs all rows at once, and num_proc={workers} would give every worker a part of them. Call it on "
            f"the dataset itself: {name}(dataset, ...)."
        )
    home = getattr(inner, "__module__", None) if inspect.isroutine(inner) else type(inner).__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    if (home == "__main__" and script is None) or (script is not None and not Path(script).is_file()):
        raise ValueError(
            f"fn={name} is defined in a notebook, a prompt or a pipe, where a spawned worker cannot find it. Write it into a "
            "file (in a notebook: a cell that starts with %%writefile my_stage.py), import it from there, and pass that."
        )
    _refuse_unguarded_main()


def _refuse_unguarded_main() -> None:
    """A worker imports the script that started it; without a guard it would come to this call again, and so without end."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals is vars(sys.modules["__main__"]):
            path = frame.f_globals.get("__file__")
            if path is not None and Path(path).is_file() and not _is_guarded(Path(path), frame.f_lineno):
                raise ValueError(
                    f"{path}, line {frame.f_lineno}: every worker imports this script, and would start workers again. Put "
                    'the call under `if __name__ == "__main__":`.'
                )
        frame = frame.f_back


def _is_guarded(path: Path, line: int) -> bool:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            ends = node.body[-1].end_lineno or line
            if node.body[0].lineno <= line <= ends:
                return True
    return False
