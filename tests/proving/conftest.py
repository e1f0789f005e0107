"""A selection from planted rows, which every test of a proof may read and none may change, and a model to train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from car_datasets import curate
from tests.proving.tiny import DIGITS, save_llama

SUBJECTS = ("rivers", "bread", "clocks", "moss", "violins", "tides", "chess", "glass", "wool", "kites")


def planted_rows(count: int = 60) -> list[dict[str, str]]:
    """Return rows with answers of 3 to 40 words, from two sources of which one is small."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        # Every other word is one that the model to train knows.
        places = range(int(rng.integers(3, 41)))
        words = [f"{SUBJECTS[j % 10]}{j * i % 17}" if j % 2 else DIGITS[j * (i + 1) % 10] for j in places]
        source = "small" if i % 10 == 0 else "large"
        rows.append(
            {"instruction": f"Tell me of {SUBJECTS[i % 10]} and {i}.", "output": " ".join(words), "from": source}
        )
    return rows


@pytest.fixture(scope="session")
def result(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a selection from `planted_rows` and a row without an answer; `rows.json` is next to it."""
    folder = tmp_path_factory.mktemp("proving") / "out"
    source = folder.with_name("rows.json")
    rows = [*planted_rows(), {"instruction": "Say nothing.", "output": "", "from": "large"}]
    source.write_text(json.dumps(rows))
    curate(source, folder, scorer=tiny_iqs, embedder=tiny_embedder, n1=12, n2=1, k=4)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a random Llama of 3 layers, without a chat template."""
    folder = str(tmp_path_factory.mktemp("llama"))
    save_llama(folder)
    return folder
