"""The shipped head is what training makes: learns from clean text, is deterministic, refuses bad files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from car_datasets import QualityScorer, hub
from car_datasets.cli import app
from car_datasets.templates import clean
from car_datasets.training import HeadTraining, accuracy, read_score_csv, train_head


def write_pairs(path: Path, pairs: int, start: int) -> Path:
    """Made-up pairs with something to learn: the better text gives a reason."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["src", "score"])
        for i in range(start, start + pairs):
            question = f"Instruction: Is {i} an even number? Response: "
            answer = "yes" if i % 2 == 0 else "no"
            writer.writerow([question + answer, 0])
            reason = f"{answer}, because dividing {i} by two leaves {'nothing' if i % 2 == 0 else 'one'} over."
            writer.writerow([question + reason, 1])
    return path


def test_training_learns_and_is_deterministic(tmp_path: Path) -> None:
    train, valid = write_pairs(tmp_path / "train.csv", 60, 0), write_pairs(tmp_path / "valid.csv", 20, 100)
    settings = HeadTraining(train=str(train), valid=str(valid), seed=1)
    figures = train_head(settings.changed(output=str(tmp_path / "one")))
    train_head(settings.changed(output=str(tmp_path / "two")))
    train_head(settings.changed(output=str(tmp_path / "three"), seed=2))
    assert figures["cleaned"]["pairs"] > 0.95
    digests = [hub.folder_digest(tmp_path / name) for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    rows = read_score_csv(valid)
    scores = QualityScorer(str(tmp_path / "one")).score_texts(rows.texts).scores
    assert accuracy(scores, rows.labels) == pytest.approx(figures["cleaned"])  # the scaling was folded in rightly
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert f"{100 * figures['cleaned']['pairs']:.1f} %" in card


def test_accuracy_by_hand() -> None:
    found = accuracy([0.1, 0.9, 0.6, 0.4, 0.2, 0.3], [0, 1, 0, 1, 0, 1])
    assert found == {"pairs": pytest.approx(2 / 3), "rows": pytest.approx(3 / 6), "auc": pytest.approx(7 / 9)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("src,label\na,0\nb,1\n", r"columns src and score; it has \['src', 'label'\]"),
        ("src,score\n", "no rows"),
        ("src,score\na,1\nb,0\n", "0, 1, 0, 1"),
        ("src,score\na,0\n", "0, 1, 0, 1"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_score_csv(tmp_path / "bad.csv")


def test_an_existing_output_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is there already"):
        train_head(HeadTraining(output=str(tmp_path)))


def test_the_shipped_settings_are_the_defaults() -> None:
    assert HeadTraining.from_yaml(hub.data_folder("configs") / "train_iqs_minilm.yaml") == HeadTraining()


def test_the_command_trains_a_scorer_that_works(tmp_path: Path) -> None:
    files = [str(write_pairs(tmp_path / name, 12, start)) for name, start in (("train.csv", 0), ("valid.csv", 50))]
    config = str(hub.data_folder("configs") / "train_iqs_minilm.yaml")
    options = ["--train", files[0], "--valid", files[1], "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["train", config, *options])
    assert done.exit_code == 0, done.output
    assert len(QualityScorer(str(tmp_path / "out"))({"prompt": ["a"], "completion": ["b"]})["iqs_score"]) == 1
    assert CliRunner().invoke(app, ["train", config, *options]).exit_code == 2  # nothing is overwritten


@pytest.mark.slow
@pytest.mark.shared
def test_the_shipped_figures_hold_on_the_real_validation_pairs(shared: Path) -> None:
    rows = read_score_csv(shared / "data" / "expert_score_valid.csv")
    figures = json.loads((hub.default_scorer_folder() / "figures.json").read_text(encoding="utf-8"))
    scores = QualityScorer().score_texts([clean(t) for t in rows.texts]).scores
    found = accuracy(scores, rows.labels)
    assert found["pairs"] >= 0.85
    assert found == pytest.approx(figures["cleaned"], abs=0.005)
    assert np.isfinite(scores).all()
