"""CaR's rule within a budget, quotas and pins."""

from __future__ import annotations

import numpy as np
import pytest

from car_datasets.selection.constrained import choose_within
from car_datasets.selection.limits import Limits, parse_tokens
from car_datasets.selection.rule import choose
from car_datasets.selection.strata import quotas_of


def pool(rows: int, clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=rows).round(2)  # rounded, so that some are equal
    scores[rng.random(rows) < 0.1] = np.nan
    return scores, rng.integers(-1, clusters, rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n2", [0, 1, 3])
def test_a_budget_in_rows_alone_gives_what_the_rule_gives(n2: int, seed: int) -> None:
    scores, clusters = pool(300, 12, seed)
    expected = choose(scores, clusters, n2=n2, budget=80)
    seen = choose_within(scores, clusters, n2, Limits(80))
    assert seen.selected_by == expected.selected_by
    for name in ("positions", "score_rank", "cluster_rank"):
        assert getattr(seen, name).tolist() == getattr(expected, name).tolist()


def test_quotas_are_exact_and_pinned_rows_count() -> None:
    scores, clusters = pool(500, 10, 5)
    values = np.random.default_rng(1).choice(["a", "b", "c"], 500, p=[0.8, 0.15, 0.05])
    eligible = ~np.isnan(scores)
    shares = quotas_of(values.tolist(), None, eligible, 60, {"a": 0.25, "b": 0.5})
    pinned = np.zeros(500, dtype=bool)
    worst = np.argsort(np.where(eligible & (values == "b"), scores, np.inf))[:7]
    pinned[worst] = True
    choice = choose_within(scores, clusters, 2, Limits(60, None, shares.strata, shares.quotas, pinned))
    counts = {name: int((values[choice.positions] == name).sum()) for name in "abc"}
    assert counts == {"a": 15, "b": 30, "c": 15}
    by = dict(zip(choice.positions.tolist(), choice.selected_by, strict=True))
    assert [by[row] for row in worst.tolist()] == ["pin"] * 7
    # A pinned row is one of the n2 rows of its cluster.
    own = clusters[worst]
    taken = [
        int((clusters[choice.positions[np.isin(choice.selected_by, ["cluster", "both"])]] == c).sum()) for c in own
    ]
    assert all(n <= 2 - min(2, int((own == c).sum())) for n, c in zip(taken, own, strict=True) if c >= 0)


@pytest.mark.parametrize("budget", [2_000, 30_000, 200_000])
@pytest.mark.parametrize("shared", [False, True])
def test_a_budget_in_tokens_is_used_and_never_exceeded(budget: int, shared: bool) -> None:
    scores, clusters = pool(2_000, 30, budget)
    rng = np.random.default_rng(0)
    costs = np.maximum(1, rng.lognormal(5, 1, 2_000)).astype(np.int64)
    limits = Limits(budget, costs)
    if shared:
        values = rng.choice(["a", "b"], 2_000, p=[0.9, 0.1]).tolist()
        shares = quotas_of(values, costs, ~np.isnan(scores), budget, {"a": 0.3, "b": 0.2})
        limits = Limits(budget, costs, shares.strata, shares.quotas)
    choice = choose_within(scores, clusters, 1, limits)
    used = int(costs[choice.positions].sum())
    assert 0.999 * budget <= used <= budget
    assert len(set(choice.positions.tolist())) == len(choice.positions)
    if shared:
        each = np.bincount(shares.strata[choice.positions], costs[choice.positions], minlength=3)
        assert (each <= shares.quotas).all()


def test_a_good_row_is_not_given_up_for_a_few_tokens() -> None:
    scores, costs = -np.arange(100.0), np.full(100, 10)
    costs[8:] = 17
    # The best two leave seven tokens, which row 8 in place of row 1 would use, and it ranks seven places behind it.
    assert choose_within(scores, np.full(100, -1), 0, Limits(27, costs)).positions.tolist() == [0, 1]
    costs[5] = 15
    assert choose_within(scores, np.full(100, -1), 0, Limits(27, costs)).positions.tolist() == [0, 5]


def test_pins_that_cannot_be_kept_are_refused() -> None:
    scores, clusters = np.array([0.5, np.nan, 0.1]), np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match="pinned"):
        choose_within(scores, clusters, 1, Limits(1, pinned=np.array([True, False, True])))
    with pytest.raises(ValueError, match="pinned"):
        strata, quotas = np.array([0, 0, 1]), np.array([0, 2])
        choose_within(scores, clusters, 1, Limits(2, None, strata, quotas, np.array([True, False, False])))
    with pytest.raises(ValueError, match="no score"):
        choose_within(scores, clusters, 1, Limits(2, pinned=np.array([False, True, False])))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("500k", 500_000), ("2M", 2_000_000), ("1.1m", 1_100_000), ("1_000", 1_000), (7, 7), ("2B", 2 * 10**9)],
)
def test_budgets_in_tokens_are_read(text: int | str, tokens: int) -> None:
    assert parse_tokens(text) == tokens
    for wrong in (0, -1, "0", "many", "2T", "", True, "1e6"):
        with pytest.raises(ValueError, match="pass a number of tokens above 0"):
            parse_tokens(wrong)
