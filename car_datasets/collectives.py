"""What the processes of a launcher compute together: `Processes`.

Does: say which part of the rows is whose, add and join what all have found, raise on all what failed on one.
Does not: start processes, or know which there are (parallel.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Processes:
    """The processes of a launcher at work on one thing: each calls the same methods in the same order, and what fails on one
    is raised on all, so that none waits for one that has failed. Alone nothing is sent.

    Args:
        rank (`int`): the number of this process; count (`int`): of all.
        group (`ProcessGroup`, *optional*): what they speak through, over gloo.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    def share(self, rows: int, step: int) -> range:
        """This process's part of `rows`: in the order of the ranks, cut at multiples of `step`, so that it may be empty."""
        first, after = (-(-rank * -(-rows // step) // self.count) * step for rank in (self.rank, self.rank + 1))
        return range(first, min(after, rows)) if first < rows else range(0)

    def each(self, compute: Callable[[], T]) -> T:
        """What `compute()` gives here, once it is through on every process."""
        if self.count == 1:
            return compute()
        found, error = _attempt(compute)
        errors: list[Exception | None] = [None] * self.count
        torch.distributed.all_gather_object(errors, error, self.group)
        _raise_first(errors)
        return cast("T", found)

    def joined(self, compute: Callable[[], T], join: Callable[[list[T]], U]) -> U:
        """`join` of what `compute()` gives on each, in the order of the ranks; the main process joins, all get the result."""
        if self.count == 1:
            return join([compute()])
        mine = _attempt(compute)
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        torch.distributed.gather_object(mine, parts, 0, self.group)
        found: list[Any] = [None]
        if parts is not None:
            failed = [part for part in parts if part[1] is not None]
            found = [failed[0] if failed else _attempt(lambda: join([part for part, _ in parts]))]
        torch.distributed.broadcast_object_list(found, 0, self.group)
        result, error = found[0]
        _raise_first([error])
        return cast("U", result)

    def added(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The sum of what `compute()` gives on each, tensors of one shape, to the same bits on all."""
        total = self.each(compute)
        if self.count > 1:
            over_nccl = total.is_cuda and "nccl" in torch.distributed.get_backend_config()
            torch.distributed.all_reduce(total, group=None if over_nccl else self.group)
        return total


def _attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What it gives, or the error that it raises, as one that can be sent."""
    try:
        return compute(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _raise_first(errors: list[Exception | None]) -> None:
    for error in errors:
        if error is not None:
            raise error
