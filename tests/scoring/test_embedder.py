"""TextEmbedder equals sentence-transformers."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features
from sentence_transformers import SentenceTransformer

from car_datasets import TextEmbedder
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring.embedder import reads_plain_tokens
from car_datasets.utils import revisions


def encode(folder: str, texts: list[str]) -> np.ndarray:
    return SentenceTransformer(folder, device="cpu").encode(texts)


def test_equal_to_encode(tiny_embedder: str, pairs: Dataset) -> None:
    texts = [render(Exchange(r["instruction"], r["input"] or "", r["output"])).whole for r in pairs]
    embedded = pairs.map(TextEmbedder(tiny_embedder), batched=True, with_rank=True)
    assert np.abs(np.array(embedded["embedding"][:]) - encode(tiny_embedder, texts)).max() < 1e-5
    assert embedded.features["embedding"].feature.dtype == "float32"


def test_map_gives_lists_of_fixed_size_when_told_the_features(tiny_embedder: str, pairs: Dataset) -> None:
    embedder = TextEmbedder(tiny_embedder)
    features = Features({**pairs.features, **embedder.output_features()})
    embedded = pairs.map(embedder, batched=True, with_rank=True, features=features)
    assert embedded.data.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    inferred = pairs.map(embedder, batched=True, with_rank=True)
    assert inferred["embedding"][:] == embedded["embedding"][:]


def test_the_default_equals_encode_on_shipped_rows_long_ones_too(sample_rows: list[dict]) -> None:
    texts = [r["output"] for r in sample_rows[:20]] + [" ".join(r["output"] for r in sample_rows[:15]), ""]
    found = TextEmbedder().embed_texts(texts)
    assert np.abs(found - encode(str(revisions.default_encoder_folder()), texts)).max() < 1e-5


def test_a_model_with_a_prompt_of_its_own_is_left_to_encode(tiny_embedder: str, tmp_path: Path) -> None:
    texts = ["the sea", "", "a list of good and bad " * 30]
    plain = SentenceTransformer(tiny_embedder, device="cpu")
    assert reads_plain_tokens(plain)
    prompted = SentenceTransformer(tiny_embedder, device="cpu", prompts={"q": "write a poem "}, default_prompt_name="q")
    assert not reads_plain_tokens(prompted)
    prompted.save(str(tmp_path))
    found = TextEmbedder(str(tmp_path)).embed_texts(texts)
    assert np.abs(found - prompted.encode(texts)).max() < 1e-5
    assert np.abs(found - plain.encode(texts)).max() > 1e-3


def test_a_chat_is_the_mean_of_its_exchanges_at_their_length(tiny_embedder: str) -> None:
    embedder = TextEmbedder(tiny_embedder)
    turns = [("user", "write a list"), ("assistant", "a, the"), ("user", "name the sea"), ("assistant", "good")]
    chat = {"messages": [[{"role": r, "content": c} for r, c in turns]]}
    parts = embedder.embed_texts(
        ["Instruction: write a list Response: a, the", "Instruction: write a list a, the name the sea Response: good"]
    )
    mean = parts.mean(axis=0)
    found = embedder(chat)["embedding"][0]
    assert np.allclose(found, mean / np.linalg.norm(mean), atol=1e-6)


def test_null_rows_have_no_embedding(tiny_embedder: str) -> None:
    rows = Dataset.from_dict({"prompt": ["a", None], "completion": ["b", "c"]})
    embedded = rows.map(TextEmbedder(tiny_embedder, on_invalid="mark"), batched=True)
    assert embedded["embedding"][1] is None
    assert len(embedded["embedding"][0]) == 32


def test_an_existing_column_is_not_overwritten(tiny_embedder: str, pairs: Dataset) -> None:
    once = pairs.map(TextEmbedder(tiny_embedder), batched=True)
    with pytest.raises(ValueError, match="already has the column"):
        once.map(TextEmbedder(tiny_embedder), batched=True)


def test_a_model_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no such folder"):
        TextEmbedder("/no/such/model")
