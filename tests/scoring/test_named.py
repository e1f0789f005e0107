"""named.py: a scorer of each kind by its name, and several of them compared on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from car_datasets import IFDScorer, PerplexityScorer, QualityScorer, RewardScorer
from car_datasets.cli import app
from car_datasets.scoring.named import find_scorer


def test_a_name_gives_a_scorer_of_its_kind(
    tiny_iqs: str, classifiers: dict[str, str], language_models: dict[str, str]
) -> None:
    gpt2 = language_models["gpt2"]
    found = {
        tiny_iqs: QualityScorer,
        f"iqs:{tiny_iqs}": QualityScorer,
        f"reward:{classifiers['bert']}": RewardScorer,
        f"ifd:{gpt2}": IFDScorer,
        f"perplexity:{gpt2}": PerplexityScorer,
    }
    for name, kind in found.items():
        assert type(find_scorer(name, on_invalid="mark")) is kind
    with pytest.raises(ValueError, match="write ifd:MODEL"):
        find_scorer("ifd:")


def test_several_are_compared_in_the_same_tables(
    tiny_iqs: str, classifiers: dict[str, str], language_models: dict[str, str], tmp_path: Path
) -> None:
    ratings = tmp_path / "ratings.jsonl"
    rows = [
        {
            "instruction": f"Name the colour {i}",
            "input": "",
            "output": "It is " + "blue " * (1 + i % 4),
            "soundness": 2 + 7 * (i % 2),
            "worth": 1 + i % 9,
            "fault": "none" if i % 2 else "wrong",
        }
        for i in range(24)
    ]
    ratings.write_text("\n".join(map(json.dumps, rows)))
    names = [tiny_iqs, f"reward:{classifiers['bert']}", f"ifd:{language_models['gpt2']}"]
    options = ["--ratings", str(ratings), "--samples", "5", "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, ["evaluate", *names, *options])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["scorers"]) == names and list(figures["agreement"]) == [*names, "length", "random"]
    assert figures["rows"] == 24 and len(figures["between"]) == 10 and figures["corruptions"] == {}
    for arguments, message in (
        ([names[0], names[0], *options[:2]], "named twice"),
        ([*names, *options[:2], "--former", tiny_iqs], "--former is for one IQS model alone"),
        ([*names], "name at least one"),
        ([names[0], *options[:2], "--no-corruptions"], "--corruptions is for several"),
    ):
        failed = CliRunner().invoke(app, ["evaluate", *arguments])
        assert failed.exit_code == 2 and message in failed.stderr, failed.stderr
