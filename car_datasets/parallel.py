"""From a `.map` rank or an accelerate process to a device; torch in a forked process."""

from __future__ import annotations

import os

import torch

_IMPORTED_IN = os.getpid()


def device_for(rank: int | None = None) -> torch.device:
    """The device that a map worker or an accelerate process runs on.

    Args:
        rank (`int`, *optional*): the rank that `.map(with_rank=True, num_proc=n)` passes; `None` in one process. Ranks
            beyond the number of GPUs wrap around (`datasets` reuses old ranks when it resumes).

    Returns:
        `torch.device`: `cuda:rank`; without a rank, the device of this accelerate process (`accelerate launch`, `torchrun`
        or a plain one: the first GPU, Apple's, or the CPU).
    """
    if rank is not None and torch.cuda.is_available():
        return torch.device("cuda", rank % torch.cuda.device_count())
    from accelerate import PartialState

    device: torch.device = PartialState().device
    return device


def mend_threads_after_fork() -> None:
    """In a forked process (`.map(num_proc=n)`), let torch compute on one thread.

    A fork does not inherit the threads that torch has started in its parent, and would wait for them without end.
    """
    if os.getpid() != _IMPORTED_IN:
        torch.set_num_threads(1)
