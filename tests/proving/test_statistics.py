"""statistics.py: differences that are there are found, those that are not are not, and the words say which."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from car_datasets.proving.statistics import (
    CANNOT_TELL,
    NO_DIFFERENCE,
    SHARE,
    Difference,
    compare,
    short,
    verdict,
)

ROWS = 80
TOKENS = np.random.default_rng(0).integers(10, 200, ROWS).astype(float)
DOMAINS = ["code", "maths"] * (ROWS // 2)


def losses(gains: dict[str, float], seed: int, seeds: int = 3, between: float = 0.006) -> dict[str, dict[int, Any]]:
    """Return losses of arms that are better than random by so many nats, with noise of seeds, rows and both."""
    rng = np.random.default_rng(seed)
    found: dict[str, dict[int, Any]] = {}
    for arm, gain in {"random": 0.0, **gains}.items():
        taste = rng.normal(scale=0.03, size=ROWS)  # what an arm is better at, whatever the seed
        runs = [2 - gain + taste + rng.normal(scale=between) + rng.normal(scale=0.02, size=ROWS) for _ in range(seeds)]
        found[arm] = {run: TOKENS * nats for run, nats in enumerate(runs)}
    return found


def test_planted_differences_are_found_in_nats_per_token() -> None:
    found = compare(losses({"selection": 0.08, "longest": -0.08, "control": -0.3}, 3), TOKENS, DOMAINS)
    for arm, gain in {"selection": 0.08, "longest": -0.08, "control": -0.3}.items():
        difference = found.differences[arm]["all"]
        assert difference.low < gain < difference.high
        assert difference.high - difference.low < 0.1
    assert found.verdicts["selection"].startswith("better than random by .0")
    assert found.verdicts["longest"].startswith("worse than random by .0")
    assert found.can_tell
    assert list(found.differences["selection"]) == ["all", "code", "maths"]
    assert found.differences["selection"]["code"].rows == ROWS // 2
    assert found.means["random"] == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("between", [0.0, 0.006, 0.03], ids=["none", "as rows", "most"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_arms_show_no_difference_in_19_of_20_runs(between: float, seeds: int) -> None:
    runs = 200
    shown = [
        compare(
            losses({"selection": 0.0}, 1_000 + run, seeds, between), TOKENS, ["all of one kind"] * ROWS, samples=100
        ).verdicts
        for run in range(runs)
    ]
    wrong = sum(each["selection"] != NO_DIFFERENCE for each in shown)
    # 5 of 100 are expected at most, and 200 runs of a level of 5 % exceed 19 with a probability of 1 %.
    assert wrong <= 19


def test_a_control_that_does_not_lose_silences_the_others() -> None:
    found = compare(losses({"selection": 0.1, "control": 0.0}, 5), TOKENS, DOMAINS)
    assert not found.can_tell
    assert set(found.verdicts.values()) == {CANNOT_TELL}
    assert "--tokens" in found.advice
    assert "--seeds" in found.advice


def test_power_says_what_would_halve_the_smallest_difference() -> None:
    by_seeds = compare(losses({"selection": 0.0}, 7, between=0.05), TOKENS, DOMAINS).power
    by_rows = compare(losses({"selection": 0.0}, 7, seeds=9, between=0.0), TOKENS, DOMAINS).power
    assert by_seeds.seeds is not None
    assert 2 <= by_seeds.seeds <= 4
    assert by_seeds.rows is None
    assert by_rows.rows is not None
    assert 4 <= by_rows.rows <= 6
    assert by_rows.seeds is None
    assert by_seeds.smallest > by_rows.smallest > 0


def test_shares_of_constraints_are_better_when_higher() -> None:
    rng = np.random.default_rng(0)
    kept = {
        arm: {seed: rng.random(ROWS) < share for seed in range(3)} for arm, share in (("random", 0.2), ("own", 0.9))
    }
    found = compare(kept, np.ones(ROWS), DOMAINS, unit=SHARE)
    assert found.verdicts["own"].startswith("better than random by ")
    assert "points" in found.verdicts["own"]
    assert found.differences["own"]["all"].value == pytest.approx(0.7, abs=0.08)


def test_equal_input_gives_equal_numbers() -> None:
    one, again = (compare(losses({"selection": 0.01}, 9), TOKENS, DOMAINS).to_dict() for _ in range(2))
    assert one == again


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.012, 0.030, "better than random by .021 nats (.012 to .030)"),
        (-0.030, -0.012, "worse than random by .021 nats (.012 to .030)"),
        (-0.001, 0.043, NO_DIFFERENCE),
        (0.9996, 1.1, "better than random by 1.050 nats (1.000 to 1.100)"),
    ],
)
def test_verdicts_in_words(low: float, high: float, said: str) -> None:
    assert verdict(Difference((low + high) / 2, low, high, 3, 100)) == said
    assert short(-0.0044) == "-.004"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"random": None}, "'random' and one more are needed"),
        ({"selection": {0: TOKENS, 1: TOKENS}}, r"has the seeds \[0, 1\]"),
        ({"selection": dict.fromkeys(range(3), TOKENS[:-1])}, "finite ones are needed"),
        ({"selection": dict.fromkeys(range(3), TOKENS * np.nan)}, "finite ones are needed"),
    ],
)
def test_losses_that_do_not_pair_are_refused(change: dict[str, Any], message: str) -> None:
    changed = {arm: runs for arm, runs in {**losses({"selection": 0.0}, 0), **change}.items() if runs is not None}
    with pytest.raises(ValueError, match=message):
        compare(changed, TOKENS, DOMAINS)


def test_one_seed_is_too_few() -> None:
    with pytest.raises(ValueError, match="--seeds 3"):
        compare(losses({"selection": 0.0}, 0, seeds=1), TOKENS, DOMAINS)
