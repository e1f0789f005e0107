"""Check all runs together, where the answer is known: right answers win, wrong ones lose, equal arms do not differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.proving.tiny import DIGITS, asked, rows_with

pytest.importorskip("trl")

from car_datasets.proving.base_model import BaseModel, load_base_model
from car_datasets.proving.examples import shuffle_words
from car_datasets.proving.experiment import Experiment, Outcome, Run, carry_out
from car_datasets.proving.statistics import compare
from car_datasets.proving.token_rows import tokenise
from car_datasets.proving.trainer import Schedule
from car_datasets.proving.training import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")
ARMS = {"random": 0.5, "selection": 1.0, "equal": 0.5, "control": 0.0}  # arm to the share of right answers
MEASURED = 24
ROWS = 60


def experiment(base: BaseModel, seeds: int, arms: dict[str, float], rates: tuple[float, ...] = (1e-2,)) -> Experiment:
    rows, runs = [], []
    for seed in range(seeds):
        for number, (arm, right) in enumerate(arms.items()):
            runs.append(Run("tokens", arm, seed, range(len(rows), len(rows) + ROWS)))
            rows += rows_with(right, ROWS, 100 * seed + number)
    measured = range(len(rows), len(rows) + MEASURED)
    validation = range(len(rows) + MEASURED, len(rows) + 2 * MEASURED)
    rows += rows_with(1.0, MEASURED, 7) + rows_with(0.5, MEASURED, 8)
    return Experiment(tokenise(rows, base.tokenizer, 64), runs, {"known": measured}, validation, rates=rates)


def outcome_of(design: Experiment, base: BaseModel, folder: Path, updates: int = 40) -> Outcome:
    return carry_out(design, base, Schedule(batch_tokens=4_096, updates=updates), torch.device("cpu"), folder)


def verdicts(outcome: Outcome, tokens: int = 2) -> dict[str, str]:
    losses: dict[str, dict[int, list[float]]] = {}
    for each in outcome.runs:
        losses.setdefault(each.run.arm, {})[each.run.seed] = each.nats["known"]
    return compare(losses, [tokens] * MEASURED, ["digits"] * MEASURED).verdicts


@pytest.mark.slow
def test_right_answers_win_wrong_ones_lose_and_equal_arms_do_not_differ(tiny_llama: str, tmp_path: Path) -> None:
    base = load_base_model(tiny_llama)
    found = verdicts(outcome_of(experiment(base, 4, ARMS), base, tmp_path))
    assert found["selection"].startswith("better than random by")
    assert found["control"].startswith("worse than random by")
    assert found["equal"] == "no difference shown"


@pytest.mark.slow
def test_answers_with_shuffled_words_lose(tiny_llama: str, tmp_path: Path) -> None:
    base = load_base_model(tiny_llama)
    design = experiment(base, 3, {"random": 0.5, "control": 1.0})
    draw, taught = np.random.default_rng(0), []
    controls = {place for run in design.runs if run.arm == "control" for place in run.rows}
    for place in range(len(design.rows)):
        start = int(draw.integers(4))
        words = " ".join(DIGITS[start + 1 : start + 5])
        taught.append(asked(start, shuffle_words(words, draw) if place in controls else words))
    rows = tokenise(taught, base.tokenizer, 64)
    found = verdicts(outcome_of(replace(design, rows=rows), base, tmp_path), tokens=5)
    assert found["control"].startswith("worse than random by")


@pytest.mark.slow
def test_equal_arms_show_no_difference_in_9_of_10_experiments(tiny_llama: str, tmp_path: Path) -> None:
    base = load_base_model(tiny_llama)
    # Pairs that share no arm: against one random arm, an unlucky draw of it would differ from all others at once.
    arms = {f"{arm} {number}": 0.5 for number in range(10) for arm in ("random", "equal")}
    found = outcome_of(experiment(base, 3, arms), base, tmp_path, updates=6)
    said = []
    for number in range(10):
        pair = [each for each in found.runs if each.run.arm.endswith(f" {number}")]
        runs = [each._replace(run=each.run._replace(arm=each.run.arm.split()[0])) for each in pair]
        said.append(verdicts(found._replace(runs=runs))["equal"])
    assert said.count("no difference shown") >= 9, said


def test_the_rate_is_chosen_once_and_finished_runs_are_read(
    tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base_model(tiny_llama)
    design = experiment(base, 2, {"random": 0.5, "selection": 1.0}, rates=(1e-5, 1e-2))
    first = outcome_of(design, base, tmp_path, updates=4)
    assert first.rate == 1e-2
    assert set(first.validation) == {"1e-05", "0.01"}
    missing = sorted(tmp_path.glob("run-*.json"))[0]
    missing.write_text("{")  # cut off, as nothing of ours would leave it
    calls: list[Any] = []
    ordinary = Tuner.train

    def counted(self: Tuner, *arguments: Any) -> Any:
        calls.append(arguments)
        return ordinary(self, *arguments)

    monkeypatch.setattr(Tuner, "train", counted)
    again = outcome_of(design, base, tmp_path, updates=4)
    assert len(calls) <= 1
    assert [each.nats for each in again.runs] == [each.nats for each in first.runs]
    assert json.loads(missing.read_text())


def test_seeds_that_would_take_too_long_are_left_out(tiny_llama: str, tmp_path: Path) -> None:
    base = load_base_model(tiny_llama)
    design = experiment(base, 3, {"random": 0.5, "selection": 1.0})
    schedule = Schedule(batch_tokens=4_096, updates=1)
    found = carry_out(design, base, schedule, torch.device("cpu"), tmp_path, seconds=1e-3)
    assert [(each.run.arm, each.run.seed) for each in found.runs] == [("random", 0), ("selection", 0)]
