"""Contract 1: a callable is a record of plain values, so `datasets` caches its work, and only its work."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from datasets.fingerprint import Hasher

from car_datasets import IQSConfig, IQSModel, QualityScorer, TextEmbedder
from car_datasets.scoring import inference
from car_datasets.scoring import scorer as scoring

HASH = """
import sys
from datasets.fingerprint import Hasher
from car_datasets import QualityScorer, TextEmbedder
print(Hasher.hash(QualityScorer(sys.argv[1])), Hasher.hash(TextEmbedder(sys.argv[2])), Hasher.hash(QualityScorer()))
"""


def hashes_in_new_process(tiny_iqs: str, tiny_embedder: str, seed: str) -> list[str]:
    import os

    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [sys.executable, "-c", HASH, tiny_iqs, tiny_embedder],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.slow
def test_same_hash_in_every_process_and_after_a_call(tiny_iqs: str, tiny_embedder: str, pairs: Dataset) -> None:
    scorer, embedder = QualityScorer(tiny_iqs), TextEmbedder(tiny_embedder)
    fresh = [Hasher.hash(scorer), Hasher.hash(embedder), Hasher.hash(QualityScorer())]
    scorer(pairs[:])
    embedder(pairs[:])
    assert [Hasher.hash(scorer), Hasher.hash(embedder)] == fresh[:2]
    assert hashes_in_new_process(tiny_iqs, tiny_embedder, "1") == fresh
    assert hashes_in_new_process(tiny_iqs, tiny_embedder, "2") == fresh


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "bfloat16"},
        {"template": "paper"},
        {"turns": "min"},
        {"schema": "alpaca"},
        {"columns": {"instruction": "output", "response": "output"}},
        {"output_column": "other_score"},
        {"diagnostics": True},
        {"score_thoughts": True},
        {"on_invalid": "mark"},
    ],
)
def test_what_changes_the_columns_changes_the_hash(tiny_iqs: str, other: dict[str, Any]) -> None:
    assert Hasher.hash(QualityScorer(tiny_iqs)) != Hasher.hash(QualityScorer(tiny_iqs, **other))


def test_weights_replaced_in_place_change_the_hash(make_tiny_iqs: Any) -> None:
    folder = make_tiny_iqs(seed=1)
    before = QualityScorer(folder)
    model = IQSModel.from_pretrained(folder)
    with torch.no_grad():
        model.head[0].bias.add_(0.5)
    model.save_pretrained(folder)
    after = QualityScorer(folder)
    assert before.revision != after.revision
    assert Hasher.hash(before) != Hasher.hash(after)
    batch = {"instruction": ["a"], "output": ["b"]}
    assert after(batch)["iqs_score"] == pytest.approx([score_alone(folder, "Instruction: a Response: b")], abs=1e-5)


def score_alone(folder: str, text: str) -> float:
    from transformers import AutoTokenizer

    model, tokenizer = IQSModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return model(**tokenizer(text, return_tensors="pt")).logits.item()


def test_a_new_cache_version_is_a_new_hash(tiny_iqs: str, tiny_embedder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from car_datasets.scoring import embedder as embedding

    before = [Hasher.hash(QualityScorer(tiny_iqs)), Hasher.hash(TextEmbedder(tiny_embedder))]
    monkeypatch.setattr(scoring, "CACHE_VERSION", "next")
    monkeypatch.setattr(embedding, "CACHE_VERSION", "next")
    after = [Hasher.hash(QualityScorer(tiny_iqs)), Hasher.hash(TextEmbedder(tiny_embedder))]
    assert set(before).isdisjoint(after)


def test_pickle_round_trip_is_small_and_equal(tiny_iqs: str, tiny_embedder: str) -> None:
    for spec in (QualityScorer(tiny_iqs, columns={"instruction": "a", "response": "b"}), TextEmbedder(tiny_embedder)):
        content = pickle.dumps(spec)
        assert pickle.loads(content) == spec
        assert len(content) < 2000


def test_the_token_is_nowhere(tiny_iqs: str, tiny_embedder: str) -> None:
    secret = "hf_thisIsASecret"
    for spec in (
        QualityScorer(tiny_iqs, token=secret),
        TextEmbedder(tiny_embedder, token=secret),
        QualityScorer(token=secret),
    ):
        assert secret.encode() not in pickle.dumps(spec)
        assert secret not in repr(spec) + str(vars(spec))
    assert Hasher.hash(QualityScorer(tiny_iqs, token=secret)) == Hasher.hash(QualityScorer(tiny_iqs))


def test_a_copy_asks_no_hub_and_reads_no_configuration(
    tiny_iqs: str, tiny_embedder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check Hub models, which are resolved with a token that a copy does not have."""
    asked: list[tuple[str, str | None]] = []

    def pin(model_id: str, revision: str | None = None, token: str | None = None) -> str:
        asked.append((model_id, token))
        return "c" * 40

    folders = {"me/scorer": Path(tiny_iqs), "me/embedder": Path(tiny_embedder)}
    ordinary = inference.revisions.model_folder
    monkeypatch.setattr(inference.revisions, "pin_revision", pin)
    monkeypatch.setattr(
        inference.revisions, "model_folder", lambda name, *rest: folders.get(name) or ordinary(name, *rest)
    )
    monkeypatch.setattr(inference.revisions, "_HUB_FOLDERS", {})
    scorer, embedder = QualityScorer("me/scorer", token="hf_a"), TextEmbedder("me/embedder", token="hf_a")
    assert asked == [("me/scorer", "hf_a"), ("me/embedder", "hf_a")]
    misses = inference.read_scorer_config.cache_info().misses
    assert replace(scorer, output_column="other_score").revision == "c" * 40
    assert replace(embedder, output_column="other").revision == "c" * 40
    assert replace(scorer) == scorer
    assert Hasher.hash(replace(scorer)) == Hasher.hash(scorer)
    assert copy.deepcopy(scorer) == pickle.loads(pickle.dumps(scorer)) == scorer
    assert len(asked) == 2
    assert inference.read_scorer_config.cache_info().misses == misses
    QualityScorer("me/scorer", token="hf_b")  # without a revision it is the latest that is meant
    assert asked[2:] == [("me/scorer", "hf_b")]


def test_a_copy_of_a_folder_whose_weights_changed_is_refused(make_tiny_iqs: Any) -> None:
    folder = make_tiny_iqs(seed=2)
    scorer = QualityScorer(folder)
    model = IQSModel.from_pretrained(folder)
    with torch.no_grad():
        model.head[0].bias.add_(0.5)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="has the digest"):
        replace(scorer, output_column="other_score")


def test_public_classes_are_pickled_by_the_name_that_users_import(tiny_iqs: str) -> None:
    for value in (QualityScorer(tiny_iqs), IQSConfig()):
        content = pickle.dumps(value)
        assert b"car_datasets." not in content  # no module of ours, which may be moved
        assert f"car_datasets.{type(value).__name__}" == f"{type(value).__module__}.{type(value).__qualname__}"
        assert type(pickle.loads(content)) is type(value)
        assert all(not isinstance(kind, str) for kind in type(value).__annotations__.values())  # for the docs' sake


def test_the_second_map_calls_no_model(tiny_iqs: str, sample_file: Path) -> None:
    dataset = load_dataset("json", data_files=str(sample_file), split="train")
    scored = dataset.map(QualityScorer(tiny_iqs), batched=True, with_rank=True)
    inference.load_scorer.cache_clear()
    again = dataset.map(QualityScorer(tiny_iqs), batched=True, with_rank=True)
    assert inference.load_scorer.cache_info().misses == 0  # the model was not even loaded
    assert again["iqs_score"][:] == scored["iqs_score"][:]
    assert [f["filename"] for f in again.cache_files] == [f["filename"] for f in scored.cache_files]


@pytest.mark.slow
def test_spawned_workers_score_as_one_process(tiny_iqs: str, sample_file: Path) -> None:
    import multiprocess

    dataset = load_dataset("json", data_files=str(sample_file), split="train").select(range(100))
    one = dataset.map(QualityScorer(tiny_iqs), batched=True, with_rank=True, batch_size=20)
    before = multiprocess.get_start_method(allow_none=True)
    multiprocess.set_start_method("spawn", force=True)
    try:
        two = dataset.map(QualityScorer(tiny_iqs), batched=True, with_rank=True, batch_size=10, num_proc=2)
    finally:
        multiprocess.set_start_method(before, force=True)
    assert two["iqs_score"][:] == pytest.approx(one["iqs_score"][:], abs=1e-5)
