"""comparison.py: planted stages whose figures are known; scikit-learn's AUC and SciPy's correlation as references."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from car_datasets.loading.templates import Exchange
from car_datasets.training.comparison import Comparison, Judge, compare_scorers
from car_datasets.training.corruptions import CORRUPTIONS
from car_datasets.training.pairs import Pair
from car_datasets.training.ratings import Ratings

ROWS = 90


@dataclass(frozen=True)
class Planted:
    """Score a row by the number in its instruction, times `sign`, less for a changed answer; none for an empty one."""

    sign: float
    output_columns = ("mine",)

    def output_features(self) -> Any:
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        asked = [int(text.split()[-1]) for text in batch["instruction"]]
        losses = [{answer_to(n): 0.0, "No.": 0.1}.get(a, 0.25) for n, a in zip(asked, batch["output"], strict=True)]
        scores = [self.sign * (n - loss) for n, loss in zip(asked, losses, strict=True)]
        return {"mine": [s if answer else None for s, answer in zip(scores, batch["output"], strict=True)]}


def answer_to(number: int) -> str:
    return f"The tide of day {number} came late. {'It rose along the coast. ' * (number % 5)}It fell again at noon."


@pytest.fixture(scope="module")
def ratings() -> Ratings:
    rng = np.random.default_rng(1)
    soundness = rng.permutation(np.repeat([2.0, 5.0, 9.0], ROWS // 3)).astype(np.float32)
    rows = [Exchange(f"When was the tide of day {i}", "", answer_to(i)) for i in range(ROWS)]
    return Ratings(rows, soundness, np.where(soundness >= 8, 0, 1), soundness, ["all"] * ROWS, [])


@pytest.fixture(scope="module")
def compared(ratings: Ratings) -> Comparison:
    pairs = [Pair(Exchange(f"Day {i}", "", "No."), Exchange(f"Day {i}", "", answer_to(i))) for i in range(20)]
    judges = {"up": Judge(Planted(1.0), "mine"), "down": Judge(Planted(-1.0), "mine")}
    return compare_scorers(judges, ratings=ratings, pairs=pairs, samples=20)


def test_every_table_has_every_scorer_and_the_references_agree(compared: Comparison, ratings: Ratings) -> None:
    assert (
        compared.rows == ROWS
        and compared.pairs == 20
        and list(compared.agreement) == ["up", "down", "length", "random"]
    )
    numbers = np.arange(ROWS)
    apart = (ratings.soundness <= 4) | (ratings.soundness >= 8)
    auc = roc_auc_score(ratings.soundness[apart] >= 8, numbers[apart])
    found = {name: compared.agreement[name]["faulty"]["value"] for name in ("up", "down")}
    assert found == pytest.approx({"up": auc, "down": 1 - auc})
    rho = spearmanr(numbers, ratings.soundness).statistic
    assert compared.agreement["down"]["soundness"]["value"] == pytest.approx(-rho, abs=1e-6)
    assert compared.in_order["up"]["value"] == 1.0 and compared.in_order["down"]["value"] == 0.0
    assert compared.between["up, down"]["spearman"] < -0.9 and compared.between["up, down"]["overlap"] == 0.0
    assert all(of["rows_per_second"] > 0 and of["unscored"] == 0 for of in compared.scorers.values())


def test_a_copy_that_is_changed_scores_less_by_one_and_more_by_the_other(compared: Comparison) -> None:
    kinds = [kind for kind in CORRUPTIONS if not np.isnan(compared.corruptions[kind]["up"]["value"])]
    assert len(kinds) > 4
    for kind in kinds:
        assert compared.corruptions[kind]["up"]["value"] == 1.0
        # A copy without an answer has no score, and is below the row for both.
        assert compared.corruptions[kind]["down"]["value"] == (1.0 if kind == "empty" else 0.0)
    for shifts in compared.styles.values():
        assert shifts["up"]["value"] == pytest.approx(-shifts["down"]["value"], nan_ok=True)


def test_copies_can_be_left_out(ratings: Ratings) -> None:
    judges = {"up": Judge(Planted(1.0), "mine")}
    found = compare_scorers(judges, ratings=ratings, corruptions=False, samples=2)
    assert found.corruptions == {} == found.styles and "random" in str(list(found.between))
    assert len(found.to_tables()) == 4


def test_likes_tell_length_and_kinds(compared: Comparison) -> None:
    assert compared.likes["length"]["length"] > 0.7 > 0.2 > compared.likes["random"]["length"]
    shares = {name: sum(share for kind, share in of.items() if kind != "length" and kind != "kind")
              for name, of in compared.likes.items()}  # fmt: skip
    assert shares == pytest.approx(dict.fromkeys(shares, 1.0))


def test_figures_are_json_and_tables(compared: Comparison) -> None:
    assert json.loads(compared.to_json())["pairs"] == 20
    out = Console(file=StringIO(), width=200)
    for table in compared.to_tables():
        out.print(table)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for word in ("rows/s", "in order", "best tenths in common", "what it likes"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scorers": {}}, "names none"),
        ({"scorers": {"length": Judge(Planted(1.0), "mine")}}, "the name of a baseline"),
        ({"scorers": {"a": Judge(Planted(1.0), "yours")}}, "and not 'yours'"),
        ({"ratings": None}, "there are no rows"),
        ({"ratings": None, "pairs": [Pair(Exchange("Day 1", "", ""), Exchange("Day 2", "", ""))]}, "two are needed"),
    ],
)
def test_refused(ratings: Ratings, given: dict[str, Any], message: str) -> None:
    arguments = {"scorers": {"a": Judge(Planted(1.0), "mine")}, "ratings": ratings, **given}
    with pytest.raises(ValueError, match=message):
        compare_scorers(arguments.pop("scorers"), **arguments)
