"""Several processes: the ranks of `accelerate launch` or `torchrun`, their devices, and what they compute together.

Does: tell the rank and the device of a process; divide rows among processes; sum and gather results over gloo; raise an
error of one process on all of them; tell whether a process still runs; let a signal or the end of a parent end one.
Does not: start processes, or hand out shards of rows.

torch is imported where it is needed, since the command line reads its rank from this module before it prints help.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import datetime
import os
import pickle
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import torch

Part = TypeVar("Part")
Joined = TypeVar("Joined")
Result = TypeVar("Result")

# Launchers tell each process its rank in environment variables. These are the ones that accelerate reads, in its order:
# those of torchrun, of MPICH and Intel MPI, of Open MPI, and of MVAPICH. PMI has no
# rank within a machine; the launcher of MPICH and Intel MPI (Hydra) sets variables of its own for it.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_COUNTS = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

# Time that processes wait for the main one, which may compute for days; if it dies, the launcher ends the others.
PATIENCE = datetime.timedelta(days=7)

_PARENTS = ("multiprocessing.process", "multiprocess.process")

_alone = contextvars.ContextVar("alone", default=False)  # set inside `alone()`
_IMPORTED_IN = os.getpid()  # another number now means that this process was forked

# A fork copies memory but not threads: OpenMP in the child would wait forever for the threads of its parent.
_forks = {"torch ran": False, "after torch ran": False}
os.register_at_fork(after_in_child=lambda: _forks.update({"after torch ran": _forks["torch ran"]}))


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others: its `host`, `pid` and time of `started`, all plain values."""
    import psutil

    process = psutil.Process()
    return {"host": _host(), "pid": process.pid, "started": process.create_time()}


def has_ended(owner: Mapping[str, Any]) -> bool:
    """Return True if a process ran on this machine and has ended; False if it runs, or if that cannot be told.

    Args:
        owner (`Mapping`): what [`this_process`] returned in that process; it may be damaged.
    """
    import psutil

    pid, started = owner.get("pid", -1), owner.get("started", -1)
    known = type(pid) is int and 0 <= pid < 2**31 and type(started) in (int, float) and 0 <= started < 2**40
    if not known or owner.get("host") != _host():
        return False
    try:
        process = psutil.Process(pid)
        # A zombie has ended, and waits for its parent to notice. The start time tells a process from a later one of the
        # same id, within some seconds, as psutil derives it from the time of the boot, which shifts when the system's
        # clock is set.
        return bool(process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - started) >= 2)
    except psutil.NoSuchProcess:
        return True


def _host() -> str:
    """Return a name for this machine since its boot, and its container: within it a process id means one process."""
    names = [platform.node()]
    with contextlib.suppress(OSError):  # Linux only
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, raised where Ctrl-C would raise KeyboardInterrupt.

    Args:
        number (`int`): the number of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        """Keep the number, which gives the exit code."""
        super().__init__()
        self.number = number


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end this block as Ctrl-C does; a second signal of any kind ends the process at once."""
    # Not under a launcher, whose SIGTERM must end a process that waits for others without ever returning to Python.
    if launched_rank()[1] > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        # While the first signal is handled, a second one would be a traceback in the middle of that.
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # One that is ignored stays so: SIGHUP under nohup, SIGINT in the background of a script.
    before = {each: found for each in numbers if (found := signal.getsignal(each)) not in (signal.SIG_IGN, None)}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the exit code of a process that a signal has ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + int(stop.number if isinstance(stop, Terminated) else signal.SIGINT)


def end_with_parent() -> None:
    """Let the system end this process when the one that started it has ended, even by SIGKILL; on Linux only."""
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        with contextlib.suppress(OSError, AttributeError):  # without a C library that has it
            ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL))


def launched_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes on all machines; `(0, 1)` without a launcher."""
    return _launched(_RANKS, _COUNTS)


def local_rank() -> tuple[int, int]:
    """Return the rank of this process among those on this machine, and their number; `(0, 1)` without a launcher."""
    return _launched(_LOCAL_RANKS, _LOCAL_COUNTS)


def _launched(ranks: Sequence[str], counts: Sequence[str]) -> tuple[int, int]:
    return _first_set(ranks, 0), _first_set(counts, 1)


def _first_set(names: Sequence[str], default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that a launcher started.

    The answer comes from an initialised torch.distributed, else from the launcher's environment variables (`RANK` and
    `WORLD_SIZE` of `accelerate launch` and `torchrun`, or those of MPI); nothing is initialised. It is `(0, 1)` without
    a launcher and inside [`alone`].
    """
    if _alone.get():
        return 0, 1
    import torch

    if _has_joined():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, count = launched_rank()
    return (rank, count) if count > 1 else (0, 1)


def is_main_process() -> bool:
    """Return True if this process is the one that writes, prints and pushes."""
    return process_rank()[0] == 0


def start_processes() -> None:
    """Join the other processes of a launcher through torch.distributed; do nothing without one, or if done before.

    The first call waits for all processes, so call it early, where all arrive at about the same time.

    Raises:
        ValueError: several of the processes would share a GPU, which NCCL cannot do.
    """
    if _alone.get():
        return
    import torch

    if _is_launched() and not _has_joined():
        _refuse_shared_gpus()
        _accelerate_state()
        if not _has_joined():
            # A plain Accelerator() on a machine without a GPU has told accelerate that there is one process; and on
            # GPUs accelerate does not read MPI's variables, nor does torch, hence the explicit rank.
            rank, count = launched_rank()
            torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    if _has_joined():
        atexit.unregister(_leave_gloo)  # so that it is registered once
        atexit.register(_leave_gloo)


def _refuse_shared_gpus() -> None:
    """Raise ValueError if accelerate would start NCCL with more processes on this machine than GPUs."""
    import torch

    # accelerate takes NCCL only if the launcher set this, and gloo if it was told to stay on the CPU.
    if "LOCAL_RANK" not in os.environ or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return
    rank, count = local_rank()
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # A single GPU in this variable may be another one in each process: a wrapper can hide all others from each.
    hidden = cards == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if 0 < cards < count and not hidden:
        seen = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(cards))
        raise ValueError(
            f"The launcher started {count} processes on this machine, ranks 0 to {count - 1} (this is {rank}), which are more "
            f"than its GPUs: {seen}. NCCL needs one GPU per process: pass --nproc_per_node {cards} to torchrun, or "
            f"--num_processes {cards} to accelerate launch. Processes can share a GPU without a launcher: start the same "
            "command several times with one --shards DIR."
        )


def _is_launched() -> bool:
    return launched_rank()[1] > 1


def _has_joined() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _accelerate_state() -> Any:
    """Return accelerate's state; without a GPU it must be told so, or it sees one process under torchrun."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def _leave_gloo() -> None:
    """Close the process group at exit: gloo's threads could end the process by SIGABRT (pytorch issue 190489)."""
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def all_processes() -> Iterator[Processes]:
    """Open a group of all processes of the launcher, each of which must call this.

    The group holds this process alone inside [`from_main`] and [`alone`], and without a launcher.
    """
    import torch

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
        return processes.gather(lambda: None, join)


@dataclass(frozen=True)
class Processes:
    """The processes of a launcher, each of which calls the same methods in the same order.

    If any process raises, every process raises, so that none blocks in a collective. With one process no communication
    takes place.

    Args:
        rank (`int`): index of this process.
        count (`int`): number of processes.
        group (`ProcessGroup`, *optional*): the gloo group they communicate in; unused if `count` is 1.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def share(self, rows: int, step: int) -> range:
        """Return the contiguous rows of this process, in the order of the ranks.

        Args:
            rows (`int`): number of rows of all processes.
            step (`int`): shares are cut at multiples of `step`, so a share can be empty.
        """
        # -(-a // b) rounds up, so that the shares of all ranks meet without a gap.
        first, after = (-(-rank * -(-rows // step) // self.count) * step for rank in (self.rank, self.rank + 1))
        return range(first, min(after, rows)) if first < rows else range(0)

    def barrier(self, compute: Callable[[], Part]) -> Part:
        """Return this process's `compute()`, once every process has finished its own."""
        if self.count == 1:
            return compute()
        import torch

        result, error = _attempt(compute)
        # Every process sends its error, or None, so that all know before any raises.
        errors: list[Exception | None] = [None] * self.count
        torch.distributed.all_gather_object(errors, error, self.group)
        _raise_first(errors)
        return cast("Part", result)

    def gather(self, compute: Callable[[], Part], join: Callable[[list[Part]], Joined]) -> Joined:
        """Gather `compute()` of every process, and return `join` of them on every process.

        Args:
            compute (`Callable`): called on every process; the result must be picklable.
            join (`Callable`): called on the main process alone, with the results in the order of the ranks.
        """
        if self.count == 1:
            return join([compute()])
        import torch

        mine = _attempt(compute)
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        torch.distributed.gather_object(mine, parts, 0, self.group)
        # The main process sends either the joined result or the first error; the others send nothing.
        outcome: list[Any] = [None]
        if parts is not None:  # the main process
            failed = [part for part in parts if part[1] is not None]
            outcome = [failed[0] if failed else _attempt(lambda: join([part for part, _ in parts]))]
        torch.distributed.broadcast_object_list(outcome, 0, self.group)
        result, error = outcome[0]
        _raise_first([error])
        return cast("Joined", result)

    def all_reduce(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the sum of `compute()` over all processes, bit for bit the same on each; all shapes must be equal."""
        import torch

        total = self.barrier(compute)
        if self.count > 1:
            # gloo cannot sum tensors on a GPU, so those go through the launcher's own NCCL group, where there is one.
            over_nccl = total.is_cuda and "nccl" in torch.distributed.get_backend_config()
            torch.distributed.all_reduce(total, group=None if over_nccl else self.group)
        return total


def _attempt(compute: Callable[[], Part]) -> tuple[Part | None, Exception | None]:
    """Return the result of `compute()` and no error, or no result and an error that can be pickled."""
    try:
        return compute(), None
    except Exception as error:
        try:
            # Some exceptions can be pickled but not restored, for example if __init__ takes other arguments than args.
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _raise_first(errors: list[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


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
    import torch

    note_that_torch_runs()
    # A worker of `.map`, which would compute its part to the end for a parent that was killed. `datasets` has a copy of
    # multiprocessing of its own.
    if any(getattr(sys.modules.get(name), "_parent_process", None) for name in _PARENTS):
        end_with_parent()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    if rank is None and _is_launched() and not _has_joined():
        # accelerate's state would wait here for all processes, though this one may be the only one to compute.
        rank = local_rank()[0]
    device = torch.device(accelerator.type) if rank is not None else _accelerate_state().device
    if device.type == "cuda" and device.index is None:  # models and batch sizes are kept by device: one name for each
        return torch.device("cuda", torch.cuda.current_device() if rank is None else rank % torch.cuda.device_count())
    return device


def note_that_torch_runs() -> None:
    """Record that torch or scikit-learn starts threads now, so that workers forked later refuse to run a model.

    [`device_for`] does so for every model; call it before other work on several threads. It cannot be found out
    afterwards: neither torch nor OpenMP tells whether its threads have been started.
    """
    _forks["torch ran"] = True


def mend_threads_after_fork() -> None:
    """Restrict torch to one thread in a forked process (`.map(num_proc=n)`), which lacks its parent's threads."""
    if os.getpid() != _IMPORTED_IN:
        import torch

        torch.set_num_threads(1)
