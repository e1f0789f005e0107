"""likes.py: planted preferences of a score are found, groups that it loses are named, and chance is not taken for one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import SelectionReport, select_car
from car_datasets.reporting import likes
from car_datasets.reporting.likes import LOST, ScoreByGroup, lost_groups, shares_table
from car_datasets.results import first_other_figure
from car_datasets.utils.column_names import ColumnNames

ROWS = 1000
TEXTS = {  # a kind of answer in every fourth row
    "code": ("Write a function that adds {}.", "def add(x):\n    return x + {}"),
    "short facts": ("Which town has the number {}?", "Number {}."),
    "lists": ("How do I paint fence {}?", "1. Wash it.\n2. Dry it.\n3. Paint it {} times."),
    "other": (
        "Why is row {} here?",
        "Because a test needs rows of some length that are not code, in this case row {}.",
    ),
}
KINDS = list(TEXTS)


def make_pool(score: np.ndarray, rows: int = ROWS, **columns: Any) -> Dataset:
    """Return rows whose kinds take turns, with these scores and lengths that no group follows."""
    pairs = [tuple(part.format(i) for part in TEXTS[KINDS[i % 4]]) for i in range(rows)]
    lengths = np.random.default_rng(1).integers(10, 500, rows)
    texts = {"instruction": [asked for asked, _ in pairs], "output": [answer for _, answer in pairs]}
    return Dataset.from_dict(
        {**texts, "iqs_score": score, "iqs_tokens": lengths, "cluster": [i % 7 for i in range(rows)], **columns}
    )


def report_of(pool: Dataset, n1: int = 100, **options: Any) -> SelectionReport:
    return SelectionReport.from_selection(pool, select_car(pool, n1), **options)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).normal(size=ROWS)


@pytest.fixture(scope="module")
def planted(noise: np.ndarray) -> SelectionReport:
    """Return the report of a score that puts code last; `source` says what is code, and `writer` says nothing."""
    is_code = np.arange(ROWS) % 4 == 0
    writer = np.random.default_rng(2).choice(["ann", "ben"], ROWS).tolist()
    source = ["forum" if code else "book" for code in is_code]
    return report_of(make_pool(noise - 4.0 * is_code, source=source, writer=writer))


def test_a_planted_kind_is_found_and_named(planted: SelectionReport) -> None:
    kinds = planted.score_by["kind of answer"]
    assert (kinds.rows, kinds.best_rows, kinds.selected_rows) == (1000, 100, 100)
    assert kinds.pool == pytest.approx({kind: 0.25 for kind in KINDS})
    assert kinds.best_tenth["code"] == kinds.selected["code"] == 0
    assert sum(kinds.best_tenth.values()) == pytest.approx(1)
    # The variance between the groups is 16 x .25 x .75 = 3, that of the noise 1.
    assert kinds.explained == pytest.approx(0.75, abs=0.03)
    assert planted.score_by["column source"].explained == pytest.approx(kinds.explained, abs=0.005)
    assert lost_groups(kinds) == ["code"] and lost_groups(planted.score_by["column source"]) == ["forum"]
    said = "all but lost: code (kind of answer), 25.0 % of the pool, 0.0 % of its best tenth by score, and 0.0 % of the"
    assert sum(sentence.startswith(said) for sentence in planted.sentences()) == 1


def test_what_says_nothing_explains_nothing(planted: SelectionReport, noise: np.ndarray) -> None:
    names = ["kind of answer", "form of answer", "length in tokens", "column source", "column writer"]
    assert list(planted.score_by) == names
    forms = planted.score_by["form of answer"]  # which the planted kinds have by turns
    assert forms.pool == pytest.approx({form: 0.25 for form in ("a few words", "code", "list", "one paragraph")})
    for name in ("length in tokens", "column writer"):
        assert planted.score_by[name].explained < 0.01
        assert lost_groups(planted.score_by[name]) == []
    report = report_of(make_pool(noise))
    assert max(by_group.explained for by_group in report.score_by.values()) < 0.02
    assert not any("all but lost" in sentence for sentence in report.sentences())


def test_length_and_languages_are_found_where_a_column_tells_them(noise: np.ndarray) -> None:
    pool = make_pool(noise)
    length = np.array(pool["iqs_tokens"][:])
    code = ["de" if i % 5 == 0 else "en" for i in range(ROWS)]
    by_length = report_of(make_pool(length / 100.0, language=code), names=ColumnNames(language="language")).score_by
    assert by_length["length in tokens"].explained > 0.9
    assert set(by_length["language"].pool) == {"de", "en"}
    starts = [int(name.split()[0]) for name in by_length["length in tokens"].pool]
    assert starts == sorted(starts)
    assert next(iter(by_length["length in tokens"].pool)) in lost_groups(by_length["length in tokens"])
    assert "column language" not in by_length


def test_languages_are_read_where_there_are_several(noise: np.ndarray) -> None:
    pool = make_pool(noise).remove_columns("output")
    english = "The old bridge over the river was built by the people of the town a long time ago."
    german = "Die alte Brücke über den Fluss haben die Leute aus der Stadt vor langer Zeit gebaut."
    mixed = pool.add_column("output", [german if i % 3 == 0 else english for i in range(ROWS)])
    assert report_of(mixed).score_by["language"].pool == pytest.approx({"de": 1 / 3, "en": 2 / 3}, abs=0.001)
    assert "language" not in report_of(pool.add_column("output", [english] * ROWS)).score_by


def group(pool: float, best: float, selected: float, rows: int = 100) -> ScoreByGroup:
    return ScoreByGroup(10 * rows, rows, rows, 0.1, {"a": pool}, {"a": best}, {"a": selected})


@pytest.mark.parametrize(
    ("found", "lost"),
    [
        (group(0.2, 0.2 * LOST - 0.001, 0.2), True),
        (group(0.2, 0.2, 0.2 * LOST - 0.001), True),
        (group(0.2, 0.2 * LOST + 0.001, 0.2 * LOST + 0.001), False),
        (group(0.09, 0.0, 0.0), False),  # nine rows would be there by chance: too few to tell
        (group(0.09, 0.0, 0.0, rows=200), True),
    ],
)
def test_a_group_is_lost_below_a_quarter_with_enough_rows_to_tell(found: ScoreByGroup, lost: bool) -> None:
    assert lost_groups(found) == (["a"] if lost else [])


def test_it_is_in_the_files(planted: SelectionReport, noise: np.ndarray) -> None:
    assert SelectionReport.from_dict(json.loads(planted.to_json())) == planted
    earlier = {name: value for name, value in planted.to_dict().items() if name != "score_by"}
    assert SelectionReport.from_dict(earlier).score_by == {}
    header, first, *rest = shares_table(planted.score_by)
    assert len(header) == len(first) == 6
    assert [first[0], *first[2:]] == ["kind of answer", "code (all but lost)", "25.0 %", "0.0 %", "0.0 %"]
    assert len(rest) == 3 + 4 + 5 + 2 + 2
    pool = make_pool(noise)
    page = planted.to_html(pool, select_car(pool, 100))
    assert '<table id="likes">' in page and '<th scope="row">code (all but lost)</th>' in page


def test_it_is_compared_where_a_report_is_verified(planted: SelectionReport) -> None:
    kinds = planted.score_by["kind of answer"]
    forged = replace(planted, score_by={**planted.score_by, "kind of answer": replace(kinds, explained=0.0)})
    assert first_other_figure(planted, planted, languages=False) is None
    assert "score_by.kind of answer.explained 0.0" in str(first_other_figure(planted, forged, languages=False))
    # Reports of earlier versions have nothing to compare, or fewer groupings.
    fewer = {name: found for name, found in planted.score_by.items() if name != "form of answer"}
    assert first_other_figure(planted, replace(planted, score_by=fewer), languages=False) is None
    assert first_other_figure(planted, replace(planted, score_by={}), languages=False) is None


def test_names_of_groups_cannot_carry_markup(noise: np.ndarray) -> None:
    source = ["<b>[x](y)|`" if i % 2 else "z" * 99 for i in range(ROWS)]
    found = report_of(make_pool(noise, source=source)).score_by["column source"]
    assert list(found.pool) == ["b x (y)", "z" * 39 + "…"]


def test_a_small_pool_says_nothing_and_a_large_one_is_sampled(noise: np.ndarray, monkeypatch: Any) -> None:
    assert report_of(make_pool(noise[:99], rows=99), n1=10).score_by == {}
    monkeypatch.setattr(likes, "ROWS_READ", 400)
    pool = make_pool(noise - 4.0 * (np.arange(ROWS) % 4 == 0))
    kinds = report_of(pool).score_by["kind of answer"]
    assert (kinds.rows, kinds.selected_rows) == (400, 100)
    assert kinds.pool["code"] == pytest.approx(0.25, abs=0.06)
    assert kinds.explained == pytest.approx(0.75, abs=0.05)
    assert report_of(pool).score_by == report_of(pool).score_by


def test_rows_of_no_known_schema_are_grouped_by_the_rest(noise: np.ndarray) -> None:
    pool = make_pool(noise, source=["a", "b"] * (ROWS // 2)).rename_columns({"instruction": "x", "output": "y"})
    assert list(report_of(pool).score_by) == ["length in tokens", "column source"]
