"""languages.py: languages of texts and rows, and what `curate`, `score` and `select` do with a pool of several."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import IQSConfig, QualityScorer, Recipe, curate, explain, verify
from car_datasets.cli import app
from car_datasets.loading.languages import (
    count_languages,
    detect_languages,
    languages_not_read,
    languages_of_rows,
    refuse_languages,
    sample_of,
)
from car_datasets.loading.schemas import find_schema
from tests.benchmarks.languages import ANSWERS, NO_LANGUAGE

CODE = (
    "def add(a, b):\n    return a + b",
    "```python\nfor row in table:\n    print(row['name'], row['age'])\n```",
    "SELECT name, COUNT(*) FROM orders GROUP BY name;",
    "const double = (xs) => xs.map((x) => 2 * x);",
    "x = (-b ± √(b² - 4ac)) / (2a)",
)


# --- texts


@pytest.mark.parametrize("language", ANSWERS)
def test_sentences_get_their_language_and_a_few_words_no_other(language: str) -> None:
    words, *sentences = ANSWERS[language]
    assert detect_languages(sentences) == [language] * len(sentences)
    assert detect_languages([words])[0] in (language, "und")


@pytest.mark.parametrize("text", [*NO_LANGUAGE, *CODE])
def test_code_lists_numbers_and_names_are_undetermined(text: str) -> None:
    assert detect_languages([text]) == ["und"]


def test_a_text_gets_the_same_code_whatever_comes_before_it() -> None:
    texts = [text for answers in ANSWERS.values() for text in answers] + list(NO_LANGUAGE)
    assert detect_languages(texts) == detect_languages(texts[::-1])[::-1]


# --- rows


def test_an_answer_without_a_language_leaves_it_to_the_instruction() -> None:
    german, arabic = ANSWERS["de"][1], ANSWERS["ar"][1]
    rows = [(german, arabic), (german, CODE[0]), (CODE[0], "42"), (arabic, ""), (arabic, None)]
    dataset = Dataset.from_list([{"instruction": i, "output": o} for i, o in rows])
    languages = languages_of_rows(dataset, find_schema(dataset.column_names))
    assert languages == ["ar", "de", "und", "ar", "und"]  # the last row cannot be scored


def test_of_a_chat_the_last_answer_is_read() -> None:
    chat = [("user", "hi"), ("assistant", ANSWERS["en"][2]), ("user", "?"), ("assistant", ANSWERS["fr"][2])]
    dataset = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in chat]}])
    assert languages_of_rows(dataset, find_schema(dataset.column_names)) == ["fr"]


def test_a_sample_is_spread_over_the_rows() -> None:
    dataset = Dataset.from_dict({"row": list(range(1_000))})
    assert sample_of(dataset, 4)["row"][:] == [0, 333, 666, 999]
    assert sample_of(dataset, 1_000) is dataset


def test_five_per_cent_of_the_determined_rows_are_tolerated() -> None:
    assert count_languages(["und", "ar", "en", "en", "und", "und"]) == {"en": 2, "ar": 1, "und": 3}
    assert languages_not_read({"en": 95, "ar": 5, "und": 900}, ["en"]) is None
    assert languages_not_read({"ar": 94, "und": 900}, []) is None  # a scorer whose languages are not known
    assert languages_not_read({"pt": 94}, ["pt-BR"]) is None
    with pytest.raises(ValueError, match=r"Of 100 rows .*: 4 Arabic \(4\.0 %\), 2 tlh \(2\.0 %\)\. It reads English"):
        refuse_languages({"en": 94, "ar": 4, "tlh": 2, "und": 900}, ["en"])


# --- the scorer's languages


def test_the_languages_of_a_scorer_are_in_its_configuration(tiny_iqs: str) -> None:
    assert QualityScorer().languages == ("en",)
    assert QualityScorer(tiny_iqs).languages == ()
    with pytest.raises(ValueError, match="languages='en' must be a list of codes"):
        IQSConfig(languages="en")


# --- the pipeline


@pytest.fixture(scope="module")
def mixed(sample_rows: list[dict[str, Any]]) -> Dataset:
    """Return 36 rows in English and 12 in Arabic."""
    texts = [f"{ANSWERS['ar'][1 + i % 2]} {ANSWERS['ar'][2 - i % 2]} {i}" for i in range(12)]
    arabic = [{"instruction": ANSWERS["ar"][0], "input": "", "output": text} for text in texts]
    columns = ("instruction", "input", "output")
    # The others hold code or numbers, which are another test's subject.
    told = [row for row in sample_rows[:60] if detect_languages([row["output"]]) == ["en"]]
    english = [{name: row[name] for name in columns} for row in told]
    return Dataset.from_list([row for i in range(12) for row in (*english[3 * i : 3 * i + 3], arabic[i])])


@pytest.fixture(scope="module")
def models(make_tiny_iqs: Any, tiny_embedder: str) -> dict[str, Any]:
    return {"scorer": make_tiny_iqs(languages=["en"]), "embedder": tiny_embedder, "k": 3}


def test_a_mixed_pool_is_refused_before_a_row_is_scored(
    mixed: Dataset, models: dict[str, Any], calls: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"48 rows .*: 12 Arabic \(25\.0 %\)\. .* languages='within' .*'across'"):
        curate(mixed, n1=8, **models)
    assert calls == []


def test_code_under_english_instructions_is_not_refused(mixed: Dataset, models: dict[str, Any]) -> None:
    rows = [{**row, "output": CODE[i % len(CODE)]} for i, row in enumerate(mixed) if i % 4 != 3]
    report = curate(Dataset.from_list(rows), n1=8, **models).report
    assert set(report.languages) <= {"en", "und"} and sum(report.languages.values()) == 36
    assert "languages of" not in report.to_markdown()


def test_across_compares_all_scores_and_counts_the_languages(mixed: Dataset, models: dict[str, Any]) -> None:
    selected, scored, report = curate(mixed, n1=8, languages="across", **models)
    assert "language" not in scored.column_names
    assert report.languages == {"en": 36, "ar": 12} and not report.within_languages
    assert sum(report.selected_languages.values()) == len(selected)
    assert "languages of the pool: 36 English, 12 Arabic; of the selection: " in report.to_markdown()


def test_within_divides_n1_among_the_languages(mixed: Dataset, models: dict[str, Any], tmp_path: Path) -> None:
    mixed.to_json(tmp_path / "rows.jsonl")
    folder = tmp_path / "out"
    across = curate(mixed, n1=8, n2=1, languages="across", **models).scored
    selected, scored, report = curate(tmp_path / "rows.jsonl", folder, n1=8, n2=1, languages="within", **models)
    assert scored["language"][:] == ["en", "en", "en", "ar"] * 12
    assert scored["iqs_score"][:] == across["iqs_score"][:]  # the written scores are the raw ones
    by_score = selected.filter(lambda row: row["selected_by"] != "cluster")
    assert Counter(by_score["language"][:]) == {"en": 6, "ar": 2}
    scores, languages = np.array(scored["iqs_score"][:]), np.array(scored["language"][:])
    for language, best in (("en", 6), ("ar", 2)):
        rows = np.flatnonzero(languages == language)
        wanted = rows[np.argsort(-scores[rows], kind="stable")][:best]
        taken = by_score.filter(lambda row, language=language: row["language"] == language)
        assert set(taken["source_index"][:]) == set(wanted.tolist())
    # Each cluster gives its best by the same rank.
    within = np.array(scored["iqs_score_within"][:])
    for cluster in set(scored["cluster"][:]):
        members = np.flatnonzero(np.array(scored["cluster"][:]) == cluster)
        assert int(members[np.argmax(within[members])]) in selected["source_index"][:]
    assert report.within_languages and "; ranked within each language" in report.to_markdown()
    # What reads the result later ranks alike.
    assert verify(folder, source=tmp_path / "rows.jsonl").matches
    first = selected[0]
    assert explain(scored, selected, first["source_index"]).score_rank == first["score_rank"] == 1


def test_score_warns_and_select_ranks_within(mixed: Dataset, models: dict[str, Any], tmp_path: Path) -> None:
    mixed.to_json(tmp_path / "rows.jsonl")
    scored, clustered, chosen = (str(tmp_path / f"{name}.parquet") for name in ("scored", "clustered", "chosen"))
    options = ["--scorer", models["scorer"], "--embedder", models["embedder"], "--language-column", "lang"]
    done = CliRunner().invoke(app, ["score", str(tmp_path / "rows.jsonl"), "-o", scored, *options])
    assert done.exit_code == 0, done.output
    assert "12 Arabic (25.0 %)" in done.stderr
    assert CliRunner().invoke(app, ["cluster", scored, "-o", clustered, "--k", "3"]).exit_code == 0
    select = ["select", clustered, "-o", chosen, "--n1", "8", "--n2", "0", "--allow-worse", "--languages", "within"]
    missing = CliRunner().invoke(app, select)
    assert missing.exit_code == 2 and "needs the column 'language'" in missing.stderr
    done = CliRunner().invoke(app, [*select, "--language-column", "lang"])
    assert done.exit_code == 0, done.output
    assert Counter(Dataset.from_parquet(chosen)["lang"][:]) == {"en": 6, "ar": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"languages": "ignore"}, "languages='ignore' is not known; choose one of"),
        ({"languages": "within", "procedure": "paper"}, "languages='within' needs another procedure"),
        ({"languages": "within", "language_column": "output"}, r"output.* language_column= \(--language-column\)"),
        ({"language_column": "cluster"}, "language_column='cluster' is the name of another new column"),
    ],
)
def test_wrong_settings_are_refused(mixed: Dataset, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curate(mixed, recipe=Recipe(n1=8), **settings)
