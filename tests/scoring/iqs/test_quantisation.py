"""quantisation.py: an engine is made from given texts, names its scorer, and is compared with float32."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.loading.templates import Exchange, Text, render
from car_datasets.scoring.iqs.quantisation import compare_engines, quantise_encoder, sample_texts

pytestmark = pytest.mark.usefixtures("on_cpu")  # the int8 encoder refuses a GPU


def texts_of(rows: list[dict[str, Any]]) -> list[Text]:
    return [render(Exchange(row["instruction"], row["input"], row["output"])) for row in rows]


def test_the_record_says_whose_encoder_it_is_and_what_made_it(tiny_iqs: str, tiny_engine: str) -> None:
    record = json.loads((Path(tiny_engine) / "engine.json").read_text(encoding="utf-8"))
    assert record["model"] == tiny_iqs
    assert record["revision"] == QualityScorer(tiny_iqs).revision
    assert record["texts"] == 32
    assert len(record["texts_sha256"]) == 64
    assert {"openvino", "nncf", "torch", "transformers"} <= set(record)


def test_scores_agree_with_float32_and_are_not_the_same(
    tiny_iqs: str, tiny_engine: str, sample_rows: list[dict[str, Any]]
) -> None:
    scorer = QualityScorer(tiny_iqs)
    found = compare_engines(scorer, QualityScorer(tiny_iqs, engine=tiny_engine), texts_of(sample_rows[32:160]))
    assert found.texts == 128
    assert found.spearman > 0.98
    assert found.top_tenth >= 0.75
    assert 0 < found.largest < 0.5
    assert min(found.int8_rows_per_second, found.float32_rows_per_second) > 0


@pytest.mark.slow
def test_the_default_scorer_keeps_its_order_and_a_row_its_score(
    needs_openvino: None, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    scorer, texts = QualityScorer(), texts_of(sample_rows)
    engine = str(quantise_encoder(scorer, texts[:160], tmp_path))
    quick, alone = QualityScorer(engine=engine), QualityScorer(engine=engine, batch_tokens=1)
    found = compare_engines(scorer, quick, texts[160:])
    assert found.spearman >= 0.99  # README: 0.996 on a thousand rows
    assert found.top_tenth >= 0.85
    assert np.abs(quick.score_texts(texts[160:]).scores - alone.score_texts(texts[160:]).scores).max() < 1e-5


def test_a_scorer_agrees_with_itself(tiny_iqs: str, sample_rows: list[dict[str, Any]]) -> None:
    scorer = QualityScorer(tiny_iqs)
    found = compare_engines(scorer, scorer, texts_of(sample_rows[:25]))
    assert (found.spearman, found.top_tenth, found.largest) == (pytest.approx(1), 1, 0)


@pytest.mark.slow
def test_a_ranking_model_is_calibrated_on_questions_and_answers(
    needs_openvino: None, make_tiny_iqs: Any, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = make_tiny_iqs(objective="ranking")
    scorer, texts = QualityScorer(model), texts_of(sample_rows[:48])
    quick = QualityScorer(model, engine=str(quantise_encoder(scorer, texts[:24], tmp_path / "int8")))
    both = [one.score_texts(texts[24:]).scores for one in (scorer, quick)]
    assert np.corrcoef(*both)[0, 1] > 0.95
    assert not np.array_equal(*both)


def test_the_users_logging_stays_as_it_was(
    needs_openvino: None,
    tiny_iqs: str,
    sample_rows: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = logging.getLogger()
    caplog.set_level(logging.INFO)
    before = (root.level, root.filters[:], [(handler, handler.level) for handler in root.handlers])
    quantise_encoder(QualityScorer(tiny_iqs), texts_of(sample_rows[:20]), tmp_path / "int8")
    assert (root.level, root.filters, [(handler, handler.level) for handler in root.handlers]) == before


def test_sampled_texts_are_drawn_by_seed_and_leave_out_what_has_no_score(tiny_iqs: str) -> None:
    rows = [{"instruction": f"name {i}", "output": None if i == 3 else "red"} for i in range(40)]
    scorer = QualityScorer(tiny_iqs)
    drawn, others = sample_texts(Dataset.from_list(rows), scorer, 20, seed=1)
    assert (drawn, others) == sample_texts(Dataset.from_list(rows), scorer, 20, seed=1)
    assert drawn != sample_texts(Dataset.from_list(rows), scorer, 20, seed=2)[0]
    assert len(set(drawn + others)) == len(drawn + others) == 39
    assert sample_texts(Dataset.from_list(rows), scorer, 100) == (
        sample_texts(Dataset.from_list(rows), scorer, 40)[0],
        [],
    )
    assert len(sample_texts(Dataset.from_list(rows), scorer, 20, 5, seed=1)[1]) <= 5


def test_the_exchanges_of_a_chat_stay_on_one_side(tiny_iqs: str) -> None:
    chats = [
        [{"role": role, "content": f"{i} {turn}"} for turn in range(3) for role in ("user", "assistant")]
        for i in range(9)
    ]
    sides = sample_texts(Dataset.from_dict({"messages": chats}), QualityScorer(tiny_iqs), 4, 5)
    assert [len(side) for side in sides] == [12, 15]
    first, second = ({text.answer.split()[1] for text in side} for side in sides)
    assert not first & second


def test_mistakes_are_named_before_anything_is_converted(
    tiny_iqs: str, tiny_engine: str, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    texts = texts_of(sample_rows[:20])
    with pytest.raises(ValueError, match=r"folder=.* already holds a result \(engine\.json"):
        quantise_encoder(QualityScorer(tiny_iqs), texts, tiny_engine)
    with pytest.raises(ValueError, match="19 given; calibration needs at least 20"):
        quantise_encoder(QualityScorer(tiny_iqs), texts[1:], tmp_path / "new")
    for options in ({"dtype": "bfloat16"}, {"engine": tiny_engine}):
        with pytest.raises(ValueError, match=r"quantise QualityScorer\(model_id\) itself"):
            quantise_encoder(QualityScorer(tiny_iqs, **options), texts, tmp_path / "new")
    with pytest.raises(ValueError, match="9 given; a rank correlation"):
        compare_engines(QualityScorer(tiny_iqs), QualityScorer(tiny_iqs, engine=tiny_engine), texts[:9])
    assert not (tmp_path / "new").exists()


# --- the commands


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_quantise_then_score_and_evaluate(
    needs_openvino: None, tiny_iqs: str, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows, pairs, int8 = tmp_path / "rows.json", tmp_path / "pairs.jsonl", tmp_path / "int8"
    rows.write_text(json.dumps(sample_rows[:60]))
    done = run("quantise", rows, "--output", int8, "--scorer", tiny_iqs, "--rows", 24)
    assert done.exit_code == 0, done.output
    assert "calibrated on 24 texts" in done.stdout
    assert "rows per second" in done.stdout
    done = run("quantise", rows, "--output", tmp_path / "all", "--scorer", tiny_iqs, "--rows", 60)
    assert done.stdout.endswith("Not compared with float32: 0 texts are left, and it takes 20.\n"), done.output
    assert sorted(path.name for path in int8.iterdir()) == ["encoder.bin", "encoder.xml", "engine.json"]
    again = run("quantise", rows, "--output", int8, "--scorer", tiny_iqs)
    assert again.exit_code == 2
    assert "already holds a result" in again.stderr

    options = ("--scorer", tiny_iqs, "--no-embeddings")
    for name, more in (("float32", ()), ("int8", ("--engine", int8))):
        done = run("score", rows, "--output", tmp_path / f"{name}.parquet", *options, *more)
        assert done.exit_code == 0, done.output
    found = [pd.read_parquet(tmp_path / f"{name}.parquet")["iqs_score"] for name in ("float32", "int8")]
    assert found[0].corr(found[1], method="spearman") > 0.98
    assert not found[0].equals(found[1])

    lines = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": row["output"][::-1]}
        for row in sample_rows[100:112]
    ]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    done = run("evaluate", tiny_iqs, "--pairs", pairs, "--engine", int8, "--samples", 5, "--json", tmp_path / "a.json")
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert figures["int8"]["beside_float32"]["texts"] == 24
    assert set(figures) - {"int8"} == set(figures["int8"]) - {"beside_float32"}
    assert (figures["engine"], figures["int8"]["engine"]) == (None, str(int8))
    assert "Spearman of the scores" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rows", 19), "--rows 19: calibration needs at least 20"),
        (("--scorer", "./none"), "no such folder"),
        ((), "19 given; calibration needs at least 20"),
    ],
)
def test_a_mistake_is_one_line(
    needs_openvino: None, options: tuple[Any, ...], message: str, sample_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(sample_rows[:19]))
    done = run("quantise", tmp_path / "rows.json", "--output", tmp_path / "int8", *options)
    assert done.exit_code == 2
    assert done.stderr.startswith("car-datasets: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "int8").exists()


LET_GO_IN_A_THREAD = """
import gc, os, signal, sys, threading
from car_datasets import QualityScorer
from car_datasets.scoring.inference import load_scorer
from car_datasets.scoring.iqs.quantisation import quantise_encoder
from car_datasets.loading.templates import Exchange, render

model, folder = sys.argv[1:]
texts = [render(Exchange(f"Name {i} things.", "", "One, two, three. " * i)) for i in range(1, 25)]
engine = str(quantise_encoder(QualityScorer(model), texts, folder))
QualityScorer(model, engine=engine).score_texts(texts)
elsewhere = threading.Thread(target=lambda: (load_scorer.cache_clear(), gc.collect()))
elsewhere.start()
elsewhere.join()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""


@pytest.mark.slow
def test_a_signal_after_an_engine_went_in_another_thread(needs_openvino: None, tiny_iqs: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LET_GO_IN_A_THREAD, tiny_iqs, str(tmp_path / "int8")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["handled"]), done.stderr[-2000:]
