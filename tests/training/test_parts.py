"""parts.py: rated rows and pairs are merged, settings and files are checked first, and training writes a scorer."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from car_datasets import QualityScorer
from car_datasets.cli import app
from car_datasets.scoring.iqs.heads import FAULTS
from car_datasets.training.parts import PartsTraining, gather, read_files, train_parts
from car_datasets.utils import digests

SMALL = {
    **{"epochs": 1, "fork_layers": 1, "max_tokens": 24, "corruption_draws": 1, "queries": 2, "members": 2},
    **{"hidden_size": 8, "units_per_batch": 8},
}


def write_files(folder: Path) -> dict[str, str]:
    """Write pairs and ratings: the better half gives a reason, and a rated row is sound if its sum is right."""
    names = {}
    for side, start in (("train", 0), ("valid", 100)):
        with (folder / f"{side}.csv").open("w", newline="") as file:
            rows = [
                [f"Instruction: Is {i} even? Response: {'yes' if i % 2 else 'no'}", 0] for i in range(start, start + 8)
            ]
            better = [[f"{text} because two divides it.", 1] for text, _ in rows]
            both = [row for pair in zip(rows, better, strict=True) for row in pair]
            csv.writer(file).writerows([["src", "score"], *both])
        sums = [
            {"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1 + i % 2}."}
            for i in range(start, start + 12)
        ]
        (folder / f"sums_{side}.json").write_text(json.dumps(sums))
        with (folder / f"ratings_{side}.csv").open("w", newline="") as file:
            rated = [[f"sums_{side}", i, 2 if i % 2 else 10, "wrong" if i % 2 else "none", i % 3] for i in range(9)]
            pairs = [[side, i, 9 if i % 2 else 6, "none", ""] for i in range(4)]
            csv.writer(file).writerows([["file", "row", "soundness", "fault", "worth"], *rated, *pairs])
        names |= {side: str(folder / f"{side}.csv")}
        names |= {"ratings" if side == "train" else "valid_ratings": str(folder / f"ratings_{side}.csv")}
    return names


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PartsTraining:
    return PartsTraining(**write_files(tmp_path_factory.mktemp("parts")), **SMALL)


def test_rated_rows_and_pairs_are_merged(settings: PartsTraining) -> None:
    material = gather(settings, read_files(settings))
    given = material.examples
    assert material.training == len(given.soundness) == 16 + 9  # four rated rows are halves of pairs
    assert np.isnan(given.soundness).sum() == 12
    assert (given.partner[:16] == np.arange(16) ^ 1).all() and (given.partner[16:] == -1).all()
    assert np.isnan(given.expert).sum() == 9
    assert [FAULTS[i] for i in given.fault[16:18]] == ["none", "wrong"]
    assert len(set(material.groups[:16].tolist())) == 8
    assert len(set(material.groups.tolist())) == 8 + 9
    assert all(copies for copies in given.styled)
    assert len(given.tokens.ids) == material.reference.stop
    with_valid = gather(settings.changed(folds=2), read_files(settings))
    assert with_valid.training == 25 and len(with_valid.examples.soundness) == 50


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fork_layers": 0, "axes": 6, "corruption_draws": 2}], ids=["fork", "kernel"])
def test_training_writes_a_scorer_with_parts_and_is_deterministic(
    changes: dict[str, int], settings: PartsTraining, tmp_path: Path
) -> None:
    settings = settings.changed(**changes)
    figures = train_parts(settings.changed(output=str(tmp_path / "one"), folds=2))
    train_parts(settings.changed(output=str(tmp_path / "two"), seed=1))
    train_parts(settings.changed(output=str(tmp_path / "three"), folds=2))
    found = [digests.file_digest(tmp_path / name / "model.safetensors") for name in ("one", "two", "three")]
    assert found[0] == found[2] != found[1]
    assert set(figures["ratings"]) >= {"faulty", "soundness", "worth_length_held", "product", "score"}
    assert figures["cross_validation"]["expert_pairs"]["runs"] == 2
    scorer = QualityScorer(str(tmp_path / "one"), parts=True, uncertainty=not settings.axes)
    assert scorer.shares_encoder
    columns = scorer({"instruction": ["Add 1 and 1."], "input": [""], "output": ["It is 2."]})
    assert 0 < columns["iqs_score"][0] < 1
    assert 0 <= columns["iqs_soundness"][0] <= 10 and columns["iqs_fault"][0] in FAULTS
    assert "rows that outrank their copy" in (tmp_path / "one" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combination": [1.0, 0.0]}, "must be 4 numbers"),
        ({"combination": [0.0, 0.0, 0.0, 0.0]}, "not all 0"),
        ({"folds": 1}, "leaves nothing to train on"),
        ({"fork_layers": 7}, "fork_layers=7 must be at least 0 and at most 6"),
        ({"axes": 8}, "a kernel reads the encoder as it is"),
        ({"kind": "head"}, "takes kind='parts' only"),
    ],
)
def test_settings_are_checked(changes: dict, message: str, settings: PartsTraining) -> None:
    with pytest.raises(ValueError, match=message):
        settings.changed(**changes)


def test_bad_ratings_stop_the_command_before_training(settings: PartsTraining, tmp_path: Path) -> None:
    ratings = Path(settings.ratings).with_name("bad.csv")
    ratings.write_text("file,row,soundness,fault,worth\nsums_train,0,12,none,1\n")
    config = tmp_path / "three.yaml"
    config.write_text(settings.to_yaml())
    done = CliRunner().invoke(app, ["train", str(config), "--ratings", str(ratings), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "row 1: soundness='12' must be a number from 0 to 10" in done.output
    assert not (tmp_path / "out").exists()
