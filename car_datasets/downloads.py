"""From the Hub to its cache on this machine: models at a commit, single files. Nothing pickled, but the original's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from car_datasets.asking import asking
from car_datasets.digests import MODEL_FILES
from car_datasets.retrying import READING_WAITS, retry
from car_datasets.tokens import clean_token


def is_cached(model_id: str, revision: str) -> bool:
    """Whether a commit of a model was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str)


def download_file(model_id: str, name: str, token: str | None = None) -> Path | None:
    """One file of a Hub repository, from the cache where it is there; `None` if it cannot be had."""
    if not model_id:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model_id, name, token=token))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None


def download_model(model_id: str, revision: str, token: str | None, inner: str = "") -> Path:
    """The folder of a model at a commit, from the cache where it is whole there.

    Args:
        model_id (`str`): `"owner/name"`.
        revision (`str`): a commit.
        token (`str`, *optional*): for a private model.
        inner (`str`): of a repository in the original's layout, the folder that is wanted.

    Raises:
        ValueError: the Hub refuses, or there are only pickled weights.
        ConnectionError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    # Sub-folders hold the same weights for other engines (onnx/, openvino/); sentence-transformers' own are small.
    patterns = [*MODEL_FILES, "[0-9]_*/*"]
    token = clean_token(token)
    try:
        files = HfApi(token=token).model_info(model_id, revision=revision).siblings or []
        names = [file.rfilename for file in files]
    except (HTTPError, OSError):  # offline: what is in the cache must do
        names = ["config.json", "model.safetensors"]
    if not any(name.endswith((".safetensors", ".ckpt")) for name in names):
        raise ValueError(
            f"model_id={model_id!r} holds no safetensors (it holds {sorted(names)[:8]}). Pickled weights can run code when "
            "they are loaded, and are not; save it again with `save_pretrained`."
        )
    if "config.json" not in names:  # the original's layout
        part = inner or "instruction_score"
        patterns = [f"{part}/*.ckpt", f"{part}/*hparams.yaml"]
    place: dict[str, Any] = {"revision": revision, "token": token, "ignore_patterns": ["onnx/*", "openvino/*"]}
    with asking(f"model_id={model_id!r}", "model", revision):
        return Path(retry(lambda: snapshot_download(model_id, allow_patterns=patterns, **place), READING_WAITS))
