"""The probe: measured on real rows, of the whole dataset; said before a large one is started."""

from typing import Any

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import QualityScorer, Recipe, stages
from car_datasets.cli import app
from car_datasets.scoring import engines
from car_datasets.scoring.engines import Estimate, estimate_scoring


def test_an_estimate_counts_what_the_scorer_reads(tiny_iqs: str, pairs: Dataset) -> None:
    scorer = QualityScorer(tiny_iqs, diagnostics=True)
    found = estimate_scoring(pairs, scorer)
    assert (found.rows, found.sample, found.device) == (6, 6, "cpu")
    assert found.tokens == sum(scorer(pairs[:])["iqs_tokens"])  # no row is longer than the model reads
    assert 0 < found.seconds < 60
    assert 0 < found.waste < 1
    assert estimate_scoring(pairs, QualityScorer(tiny_iqs, diagnostics=True, batch_tokens=1)).waste == 0
    assert estimate_scoring(pairs, scorer, 2).sample == 2


def test_a_chat_counts_every_exchange_up_to_the_models_limit(tiny_iqs: str) -> None:
    turns = [{"role": role, "content": "sea " * 60} for role in ("user", "assistant")] * 3
    chats = Dataset.from_dict({"messages": [turns] * 4})
    assert estimate_scoring(chats, QualityScorer(tiny_iqs)).tokens == 4 * 3 * 48


def test_minutes_are_those_of_the_whole_dataset() -> None:
    found = Estimate(rows=60_000, sample=200, seconds=2.0, tokens=20_000, waste=0.05, device="cpu")
    assert found.rows_per_second == 100
    assert found.minutes == 10
    assert str(found) == (
        "100.0 rows/s (10,000 tokens/s, 5% padding) on cpu, timed on 200 rows: about 10.0 minutes to score 60,000 rows in one "
        "process."
    )
    assert "10.0 hours" in str(found._replace(rows=3_600_000))


def test_what_it_cannot_time_is_refused(tiny_iqs: str, pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="sample=0"):
        estimate_scoring(pairs, QualityScorer(tiny_iqs, diagnostics=True), 0)
    with pytest.raises(ValueError, match="has no rows"):
        estimate_scoring(pairs.select([]), QualityScorer(tiny_iqs))
    empty = Dataset.from_list([{**row, "output": None} for row in pairs])
    with pytest.raises(ValueError, match="None of 6 rows"):
        estimate_scoring(empty, QualityScorer(tiny_iqs, diagnostics=True, on_invalid="mark"))


def test_the_command_prints_one_line(tiny_iqs: str, pairs: Dataset, tmp_path: Any) -> None:
    pairs.to_json(str(tmp_path / "rows.jsonl"))
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "rows.jsonl"), "--scorer", tiny_iqs, "--rows", "4"])
    assert done.exit_code == 0, done.output
    assert "timed on 4 rows" in done.output
    assert "to score 6 rows" in done.output


def test_the_command_times_the_engine_that_it_is_given(
    tiny_iqs: str, tiny_engine: str, pairs: Dataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    monkeypatch.setattr(
        engines, "estimate_scoring", lambda dataset, scorer, rows: timed.append(scorer.engine) or "a line"
    )
    pairs.to_json(str(tmp_path / "rows.jsonl"))
    options = ["--scorer", tiny_iqs, "--engine", tiny_engine, "--no-embeddings"]
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "rows.jsonl"), *options])
    assert done.exit_code == 0, done.output
    assert timed == [tiny_engine]


@pytest.mark.parametrize("large", [6, 7])
def test_a_large_dataset_is_announced(
    large: int, tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "LARGE", large)
    stages.resolve(Recipe(scorer=tiny_iqs), embed=False).score(pairs)
    assert ("to score 6 rows" in capsys.readouterr().err) == (large == 6)
    assert engines.LARGE >= 1000
