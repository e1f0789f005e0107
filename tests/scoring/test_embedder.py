"""TextEmbedder equals sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features
from sentence_transformers import SentenceTransformer

from car_datasets import TextEmbedder
from car_datasets.loading.templates import Exchange, render
from car_datasets.scoring import embedder
from car_datasets.scoring.embedder import reads_plain_tokens
from car_datasets.utils import revisions
from tests.conftest import DAMAGED_MODELS, SIZES, damaged_copy


def encode(folder: str, texts: list[str]) -> np.ndarray:
    return SentenceTransformer(folder, device="cpu").encode(texts)


def test_equal_to_encode(tiny_embedder: str, pairs: Dataset) -> None:
    texts = [render(Exchange(r["instruction"], r["input"] or "", r["output"])).whole for r in pairs]
    embedded = pairs.map(TextEmbedder(tiny_embedder), batched=True, with_rank=True)
    assert np.abs(np.array(embedded["embedding"][:]) - encode(tiny_embedder, texts)).max() < 1e-5
    assert embedded.features["embedding"].feature.dtype == "float32"


def test_equal_to_encode_without_padding_too(
    tiny_embedder: str, pairs: Dataset, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embed texts end to end, as a GPU does in half precision."""
    texts = [render(Exchange(r["instruction"], r["input"] or "", r["output"])).whole for r in pairs]
    expected = encode(tiny_embedder, texts)
    monkeypatch.setattr(embedder, "can_pack", lambda *_: True)
    assert np.allclose(TextEmbedder(tiny_embedder).embed_texts(texts), expected, atol=1e-5)


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


DAMAGES: dict[str, tuple[str, Any]] = {
    **DAMAGED_MODELS,
    **{f"{name} {value}": ("config.json", {name: value}) for name, values in SIZES.items() for value in values},
    **{f"at most {n} tokens": ("sentence_bert_config.json", {"max_seq_length": n}) for n in (-5, 0, "x", 10**9)},
    "an unknown module": ("modules.json", '[{"name": "0", "path": "", "type": "sentence_transformers.models.Nope"}]'),
    "a module that is a number": ("modules.json", "[5]"),
    "no modules": ("modules.json", "[]"),
    "no pooling": ("1_Pooling/config.json", "x"),
}


@pytest.mark.parametrize(("name", "change"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_named_in_one_line(name: str, change: Any, tiny_embedder: str, tmp_path: Path) -> None:
    folder = damaged_copy(tiny_embedder, tmp_path / "model", name, change)
    with pytest.raises(ValueError, match=r"cannot be loaded: .+\. (Download or save|Install)") as error:
        TextEmbedder(folder).embed_texts(["a list", "the sea " * 100])
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_that_is_missing_does_not_make_all_texts_equal(tiny_embedder: str, tmp_path: Path) -> None:
    folder = damaged_copy(tiny_embedder, tmp_path / "model", "config.json", lambda content: content)
    for file in Path(folder).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEmbedder(folder).embed_texts(["a list"])


def test_a_module_that_a_model_brings_is_not_run(tiny_embedder: str, tmp_path: Path) -> None:
    modules = json.loads((Path(tiny_embedder) / "modules.json").read_text())
    modules[-1]["type"] = "evil.Module"
    folder = damaged_copy(tiny_embedder, tmp_path / "model", "modules.json", json.dumps(modules))
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Module: pass\n")
    with pytest.raises(ValueError, match=r"modules\.json names Python code .*type: evil\.Module.*never run"):
        TextEmbedder(folder)
    assert not (tmp_path / "ran").exists()
