"""Several processes: workers of `.map(num_proc=n)`, and the processes of `accelerate launch` or `torchrun`.

Does: tell the rank and the device of a process, join the processes of a launcher, run a `.map` on every GPU.
Does not: compute sums over processes, or deal out shards of rows.
"""

from __future__ import annotations

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

Result = TypeVar("Result")
# Time that processes wait for the main one, which may compute for days; if it dies, the launcher ends the others.
PATIENCE = datetime.timedelta(days=7)
# Environment variables in which launchers state the number of processes, as accelerate reads them. If none is above 1,
# accelerate need not be imported.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_alone = contextvars.ContextVar("alone", default=False)
_IMPORTED_IN = os.getpid()


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that `accelerate launch` or `torchrun` started.

    The answer comes from an initialised torch.distributed, else from `RANK` and `WORLD_SIZE`; nothing is initialised.
    It is `(0, 1)` without a launcher and inside [`alone`].
    """
    if _alone.get():
        return 0, 1
    if _has_joined():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")), count) if count > 1 else (0, 1)


def is_main_process() -> bool:
    """Return True if this process is the one that writes, prints and pushes."""
    return process_rank()[0] == 0


def start_processes() -> None:
    """Join the other processes of a launcher through torch.distributed; do nothing without one, or if done before.

    The first call waits for all processes, so call it early, where all arrive at about the same time.
    """
    if _alone.get():
        return
    if _is_launched() and not _has_joined():
        _accelerate_state()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _has_joined():
            # A plain Accelerator() on a machine without a GPU has told accelerate that there is one process.
            torch.distributed.init_process_group("gloo")
    if _has_joined():
        atexit.unregister(_leave_gloo)  # so that it is registered once
        atexit.register(_leave_gloo)


def _is_launched() -> bool:
    return any(int(os.environ.get(name, "1")) > 1 for name in SIZES)


def _has_joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _accelerate_state() -> Any:
    """Return accelerate's state; without a GPU it must be told so, or it sees one process under torchrun."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def _leave_gloo() -> None:
    """Close the process group at exit: gloo's threads could end the process by SIGABRT (pytorch issue 190489)."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def all_processes() -> Iterator[Processes]:
    """Open a group of all processes of the launcher, each of which must call this.

    The group holds this process alone inside [`from_main`] and [`alone`], and without a launcher.
    """
    start_processes()
    if _alone.get() or not _has_joined() or torch.distributed.get_world_size() == 1:
        yield Processes()
        return
    rank, count = process_rank()
    # A group of our own: the launcher's NCCL group would give up after ten minutes, and cannot send Python objects.
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Processes(rank, count, group)
    finally:
        torch.distributed.destroy_process_group(group)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the enclosed code run as if this were the only process, so that it waits for no other."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def from_main(compute: Callable[[], Result]) -> Result:
    """Call `compute()` on the main process alone and return its result on every process; all must call this.

    Args:
        compute (`Callable`): takes no argument and returns something picklable. It starts when all processes have
            arrived.

    Raises:
        Exception: what `compute()` raised, on every process, so that none waits for one that has failed.
    """

    def join(_: list[None]) -> Result:
        with alone():
            return compute()

    with all_processes() as processes:
        return processes.joined(lambda: None, join)


def device_for(rank: int | None = None) -> torch.device:
    """Return the device that a `.map` worker or a process of a launcher computes on.

    Args:
        rank (`int`, *optional*): the rank that `.map(with_rank=True, num_proc=n)` passes. Ranks beyond the number of
            GPUs wrap around (`datasets` reuses old ranks when it resumes).

    Returns:
        `torch.device`: `cuda:rank`; without a rank `cuda:LOCAL_RANK` under a launcher, else the first GPU, Apple's GPU,
        or the CPU.

    Raises:
        ValueError: this worker was forked after its parent had run torch.
    """
    if _forks["after torch ran"]:
        raise ValueError(
            "This worker was forked from a process that had run a model already, in which torch hangs. Start workers "
            "with map_across_gpus(dataset, fn, num_proc=...), which spawns them, or a DataLoader with "
            "multiprocessing_context='spawn'."
        )
    note_that_torch_runs()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if rank is None and _is_launched() and not _has_joined():
        # accelerate's state would wait here for all processes, though this one may be the only one to compute.
        rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(accelerator.type) if rank is not None else _accelerate_state().device
    if device.type == "cuda" and device.index is None:  # models and batch sizes are kept by device: one name for each
        return torch.device("cuda", torch.cuda.current_device() if rank is None else rank % torch.cuda.device_count())
    return device


# A fork copies memory but not threads: OpenMP in the child would wait forever for the threads of its parent.
_forks = {"torch ran": False, "after torch ran": False}
os.register_at_fork(after_in_child=lambda: _forks.update({"after torch ran": _forks["torch ran"]}))


def note_that_torch_runs() -> None:
    """Record that torch or scikit-learn starts threads now, so that workers forked later refuse to run a model.

    [`device_for`] does so for every model; call it before other work on several threads. It cannot be found out
    afterwards: neither torch nor OpenMP tells whether its threads have been started.
    """
    _forks["torch ran"] = True


def mend_threads_after_fork() -> None:
    """Restrict torch to one thread in a forked process (`.map(num_proc=n)`), which lacks its parent's threads."""
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(1)


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
        # Python's own error ("before the current process has finished its bootstrapping phase") is printed by the
        # worker.
        raise ValueError(
            "The workers ended before they could start (their error is printed above). Every worker imports the "
            'calling script, and would start workers again. Put the call under `if __name__ == "__main__":`.'
        ) from error
    finally:
        multiprocess.set_start_method(before, force=True)


def _refuse_what_cannot_spawn(dataset: Any, fn: Any, workers: int, options: dict[str, Any]) -> None:
    """Raise ValueError if spawned workers could not compute `dataset.map(fn, num_proc=workers, **options)`."""
    from datasets import Dataset

    name = getattr(fn, "__qualname__", type(fn).__qualname__)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, which has no num_proc. Pass a Dataset, for example one split of a "
            "DatasetDict."
        )
    if not isinstance(workers, int) or workers < 1:
        raise ValueError(f"num_proc={workers!r} must be a number of workers, at least 1.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"num_proc={workers}: a launcher started {os.environ['WORLD_SIZE']} processes already, and each would "
            "start workers of its own. Call score_in_shards(dataset, fn) in all of them, or start the script "
            "with plain python."
        )
    inner = fn
    while isinstance(inner, functools.partial):
        inner = inner.func
    first = next(iter(inspect.signature(inner).parameters), "")
    if first == "dataset" or (options["batched"] and (options["batch_size"] or 0) < 1):
        raise ValueError(
            f"fn={name} needs all rows at once, but num_proc={workers} would give every worker a part of them. Call it "
            f"on the dataset itself: {name}(dataset, ...)."
        )
    home = getattr(inner, "__module__", None) if inspect.isroutine(inner) else type(inner).__module__
    script = getattr(sys.modules["__main__"], "__file__", None)
    # A notebook and a prompt have no file; a script from a pipe claims a file `<stdin>`, which does not exist.
    if (home == "__main__" and script is None) or (script is not None and not Path(script).is_file()):
        raise ValueError(
            f"fn={name} is defined in a notebook, a prompt or a pipe, where a spawned worker cannot import it. Write "
            "it into a file (in a notebook: a cell that starts with %%writefile my_stage.py), import it "
            "from there, and pass that."
        )
