"""Computations that the processes of a launcher share: `Processes`.

Does: deal out rows, sum and gather results over gloo, raise on every process what failed on one.
Does not: start processes, or find out how many there are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

Part = TypeVar("Part")
Joined = TypeVar("Joined")


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

    def each(self, compute: Callable[[], Part]) -> Part:
        """Return this process's `compute()`, once every process has finished its own."""
        if self.count == 1:
            return compute()
        result, error = _attempt(compute)
        errors: list[Exception | None] = [None] * self.count
        torch.distributed.all_gather_object(errors, error, self.group)
        _raise_first(errors)
        return cast("Part", result)

    def joined(self, compute: Callable[[], Part], join: Callable[[list[Part]], Joined]) -> Joined:
        """Gather `compute()` of every process, and return `join` of them on every process.

        Args:
            compute (`Callable`): called on every process; the result must be picklable.
            join (`Callable`): called on the main process alone, with the results in the order of the ranks.
        """
        if self.count == 1:
            return join([compute()])
        mine = _attempt(compute)
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        torch.distributed.gather_object(mine, parts, 0, self.group)
        outcome: list[Any] = [None]
        if parts is not None:  # the main process
            failed = [part for part in parts if part[1] is not None]
            outcome = [failed[0] if failed else _attempt(lambda: join([part for part, _ in parts]))]
        torch.distributed.broadcast_object_list(outcome, 0, self.group)
        result, error = outcome[0]
        _raise_first([error])
        return cast("Joined", result)

    def added(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the sum of `compute()` over all processes, bit for bit the same on each; all shapes must be equal."""
        total = self.each(compute)
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
