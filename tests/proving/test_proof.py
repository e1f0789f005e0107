"""Check `prove` where the answer is known: right answers win, shuffled ones lose, equal arms show no difference."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import Recipe, curate
from car_datasets.cli import app
from car_datasets.results import SCORED_TABLE, SELECTED_TABLE, read_tables
from tests.proving.conftest import DIGITS, planted

pytest.importorskip("trl")

from car_datasets.proving import prove

SETTINGS: dict[str, Any] = {"seeds": 2, "trained": "all", "tokens": 160}


@pytest.fixture(scope="session")
def curated(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a result whose scores and selection the tests replace."""
    folder = tmp_path_factory.mktemp("curated") / "result"
    recipe = Recipe(scorer=tiny_iqs, embedder=tiny_embedder, n1=60, n2=1, k=2, on_invalid="mark")
    curate(Dataset.from_list(planted(right=0.5)), folder, recipe)
    return folder


def result(curated: Path, folder: Path, scores: str) -> Path:
    """Return a copy of a result that selects the right answers, or rows at random."""
    shutil.copytree(curated, folder)
    _, scored = read_tables(folder)
    right = np.array([row["right"] for row in scored], dtype=float)
    values = right if scores == "right" else np.random.default_rng(5).random(len(right))
    names = Recipe().names
    scored = scored.remove_columns([names.score]).add_column(names.score, values)
    chosen = np.argsort(-values, kind="stable")[:60]
    selected, _ = read_tables(folder)
    new = scored.select(chosen)
    for name in selected.column_names:
        if name not in new.column_names:
            new = new.add_column(name, selected[name][:1] * len(new))
    scored.to_parquet(str(folder / SCORED_TABLE))
    new.to_parquet(str(folder / SELECTED_TABLE))
    return folder


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """Return a file of right answers to questions that are in other words than those of the pool."""
    path = tmp_path / "held_out.json"
    rows = planted(right=1.0, rounds=2)
    for row in rows:
        row["instruction"] = f"{row['instruction'].split()[2]} what follows ?"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.proving.proof.RATES", (1e-2,))


def test_right_answers_win_and_shuffled_ones_lose(
    curated: Path, tmp_path: Path, tiny_llama: str, held_out: str
) -> None:
    folder = result(curated, tmp_path / "right", "right")
    proof = prove(folder, model=tiny_llama, evaluation=[held_out], **SETTINGS)
    found = proof["tables"]["tokens"]["probes"]["held_out"]
    print(json.dumps(found["verdicts"], indent=1), proof["before"], found["means"])
    assert found["verdicts"]["selection"].startswith("better than random by")
    assert found["verdicts"]["control"].startswith("worse than random by")
    assert DIGITS and json.loads((folder / "proof.json").read_text()) == proof
