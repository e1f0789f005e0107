"""The shipped head is what training makes: learns from clean text, is deterministic, refuses bad files."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.training.evaluation import evaluate_scorer
from car_datasets.training.head import (
    Copies,
    HeadTraining,
    Voters,
    fit_integrity,
    fit_quality,
    fit_words,
    principal_axes,
    train_head,
)
from car_datasets.training.pairs import read_pairs
from car_datasets.utils import digests, files, revisions

SMALL = {"seeds": 1, "corruption_draws": 1, "axes": 16, "epochs": 20, "integrity_epochs": 4, "pairs_per_batch": 4}


def write_pairs(path: Path, pairs: int, start: int) -> Path:
    """Return made-up pairs with something to learn: the better text gives a reason."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["src", "score"])
        for i in range(start, start + pairs):
            question = f"Instruction: Is {i} an even number? Response: "
            answer = "yes" if i % 2 == 0 else "no"
            writer.writerow([f"{question}{answer}, it is so.", 0])
            reason = f"{answer}, because dividing {i} by two leaves {'nothing' if i % 2 == 0 else 'one'} over."
            writer.writerow([question + reason, 1])
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> HeadTraining:
    folder = tmp_path_factory.mktemp("pairs")
    train, valid = write_pairs(folder / "train.csv", 16, 0), write_pairs(folder / "valid.csv", 6, 100)
    return HeadTraining(train=str(train), valid=str(valid), **SMALL)


@pytest.mark.slow
def test_training_learns_and_is_deterministic(settings: HeadTraining, tmp_path: Path) -> None:
    figures = train_head(settings.changed(output=str(tmp_path / "one"), seeds=2, folds=2))
    train_head(settings.changed(output=str(tmp_path / "two")))
    train_head(settings.changed(output=str(tmp_path / "three"), seed=2))
    pairs = figures["accuracy"]["cleaned"]["pairs"]["value"]
    assert pairs == 1.0
    found = [digests.file_digest(tmp_path / name / "model.safetensors") for name in ("one", "two", "three")]
    assert found[0] == found[1] != found[2]
    again = evaluate_scorer(QualityScorer(str(tmp_path / "one")), read_pairs(settings.valid))
    assert again.accuracy == figures["accuracy"]  # what is written is what was measured
    assert set(figures["seeds"]["pairs"]) == {"mean", "deviation"}
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "| this model | cleaned | 100.0 % (100.0 to 100.0) |" in card
    crossed = figures["cross_validation"]["pairs"]
    assert crossed["runs"] == 2 * 2 and crossed["mean"] == 1.0
    assert "| cross-validated, 2 folds x 2 seeds, both files | cleaned | 100.0 ± 0.0 % |" in card
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "README.md",
        "config.json",
        "figures.json",
        "model.safetensors",
    ]


def test_bad_input_ends_before_training(settings: HeadTraining, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        train_head(settings.changed(output=str(tmp_path)))
    with pytest.raises(ValueError, match="The split crosses"):
        train_head(settings.changed(output=str(tmp_path / "new"), valid=settings.train))
    with pytest.raises(ValueError, match="members=0 must be at least 1"):
        settings.changed(members=0)
    with pytest.raises(ValueError, match="folds=1 leaves nothing to train on"):
        settings.changed(folds=1)


def test_the_shipped_settings_are_the_defaults() -> None:
    assert HeadTraining.from_yaml(files.data_folder("configs") / "train_iqs_minilm.yaml") == HeadTraining()


def test_the_command_trains_a_scorer_that_works(
    settings: HeadTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("head", "head_fitting"):  # the progress bars of datasets are disabled in tests
        monkeypatch.setattr(f"car_datasets.training.{module}.tqdm", tqdm)
    config = str(files.data_folder("configs") / "train_iqs_minilm.yaml")
    options = ["--train", settings.train, "--valid", settings.valid, "--output", str(tmp_path / "out")]
    options += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    done = CliRunner().invoke(app, ["train", config, *options])
    assert done.exit_code == 0, done.output
    assert "validation pairs right (95 % interval" in done.stdout
    for part in ("Encoding", "Fitting words", "Fitting quality", "Fitting integrity"):
        assert re.search(rf"{part}: 100%\|.*\| (\d+)/\1 ", done.stderr), part
    assert len(QualityScorer(str(tmp_path / "out"))({"prompt": ["a"], "completion": ["b"]})["iqs_score"]) == 1
    assert CliRunner().invoke(app, ["train", config, *options]).exit_code == 2  # nothing is overwritten


@pytest.mark.parametrize(
    ("option", "message"),
    [("epochs", "write key=value"), ("epoch=2", "did you mean 'epochs'"), ("kind=iqs", "kind='iqs'")],
)
def test_a_bad_setting_on_the_command_line_is_named(option: str, message: str) -> None:
    config = str(files.data_folder("configs") / "train_iqs_minilm.yaml")
    done = CliRunner().invoke(app, ["train", config, "--set", option])
    assert done.exit_code == 2
    assert message in done.output


def test_a_file_of_no_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("n1: 10\n")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 2
    assert "needs one of ['head', 'parts', 'iqs', 'ranking']" in done.output


def copies(rows: torch.Tensor, styled: torch.Tensor, corrupted: torch.Tensor) -> Copies:
    return Copies(rows, [styled], [corrupted])


def test_each_part_learns_what_it_is_for() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0.0, 1.0]).repeat(60)
    rows = torch.randn(120, 3) * 0.1
    rows[:, 0] += labels - 0.5  # expertise
    style, broken = rows.clone(), rows.clone()
    style[:, 1] += 2.0
    broken[:, 2] += 2.0
    features, more = copies(rows, style, broken), copies(*[torch.zeros(120, 1)] * 3)
    schedule = {"epochs": 40, "pairs_per_batch": 16, "learning_rate": 2e-2, "weight_decay": 0.0}
    voters = Voters(3, 2, 8, 0.0)
    quality = fit_quality(features, more, labels, voters, consistency=5.0, margin_weight=0.0, **schedule)
    found = quality(rows).mean(dim=1)
    assert ((found > 0) == (labels > 0.5)).float().mean() > 0.95
    assert (quality(style).mean(dim=1) - found).abs().mean() < 0.3
    integrity = fit_integrity(features, Voters(3, 1, 8, 0.0), 60, **schedule)
    assert (integrity(rows) > integrity(broken)).all()
    assert (integrity(style) > 0).float().mean() > 0.95


def test_words_are_judged_by_models_that_have_not_seen_the_pair() -> None:
    from scipy.sparse import identity

    labels = np.tile(np.array([0, 1], dtype=np.float32), 10)
    own = identity(20, format="csr")  # every row has a word of its own: only memory could tell
    weights, intercept, logits = fit_words(Copies(own, [own], [own]), labels, 100.0, 1.0)
    assert ((weights + intercept > 0) == (labels > 0.5)).all()
    assert logits.rows.shape == (20, 1)
    assert logits.rows.std() < 1e-3


def test_a_projection_keeps_the_axes_of_the_largest_variance() -> None:
    torch.manual_seed(0)
    scaled = torch.randn(200, 4) * torch.tensor([9.0, 4.0, 0.1, 0.1])
    found = scaled @ principal_axes(scaled, 2)
    spread = found.std(dim=0)
    assert torch.allclose(spread, torch.tensor([9.0, 4.0]).sqrt() / 3, rtol=0.15)


@pytest.mark.slow
@pytest.mark.shared
def test_the_shipped_figures_hold_on_the_real_validation_pairs(shared: Path) -> None:
    pairs = read_pairs(shared / "data" / "expert_score_valid.csv")
    figures = json.loads((revisions.default_scorer_folder() / "figures.json").read_text(encoding="utf-8"))
    found = evaluate_scorer(QualityScorer(), pairs, samples=100)
    for name in ("pairs", "rows", "auc"):
        measured = found.accuracy["cleaned"][name]["value"]
        assert measured == pytest.approx(figures["accuracy"]["cleaned"][name]["value"], abs=0.005)
    for kind, row in found.corruptions.items():
        assert row["outranked"]["value"] == pytest.approx(figures["corruptions"][kind]["outranked"]["value"], abs=0.01)
    assert found.escapes["changed"] == 0
