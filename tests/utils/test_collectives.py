"""How rows are dealt out to processes, and what one process alone does; several are in test_launched.py."""

from __future__ import annotations

import pytest
import torch

from car_datasets.utils.processes import Processes, _attempt, all_processes


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64, 65, 1_000])
@pytest.mark.parametrize("step", [1, 7, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_all_rows_in_order_cut_at_steps(rows: int, step: int, count: int) -> None:
    shares = [Processes(rank, count).share(rows, step) for rank in range(count)]
    assert [row for share in shares for row in share] == list(range(rows))
    assert all(share.start % step == 0 for share in shares)
    steps = [-(-len(share) // step) for share in shares]
    assert max(steps) - min(steps) <= 1


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "new_group", None)
    with all_processes() as processes:
        assert processes == Processes(0, 1)
        assert processes.each(lambda: 3) == 3
        assert processes.joined(lambda: 3, lambda found: found) == [3]
        total = torch.ones(2)
        assert processes.added(lambda: total) is total
        with pytest.raises(ZeroDivisionError):
            processes.joined(lambda: 1 / 0, len)


class Unpicklable(ValueError):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


@pytest.mark.parametrize(
    ("error", "sent"),
    [(ValueError("no"), "ValueError('no')"), (Unpicklable(3, "no"), "RuntimeError('Unpicklable: no')")],
)
def test_an_error_can_be_sent(error: Exception, sent: str) -> None:
    def fail() -> None:
        raise error

    assert repr(_attempt(fail)[1]) == sent
