"""Download models and single files from the Hub to the local cache.

Does: fetch a model at a commit, without pickled weights other than checkpoints of the original CaR project.
Does not: resolve a revision, or load weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from car_datasets.asking import asking
from car_datasets.digests import MODEL_FILES
from car_datasets.retrying import READING_WAITS, retry
from car_datasets.tokens import clean_token


def is_cached(model_id: str, revision: str) -> bool:
    """Return True if this commit of a model was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str)


def download_file(model_id: str, name: str, token: str | None = None) -> Path | None:
    """Return the path of one file of a Hub repository, downloaded or cached, or `None` if it cannot be fetched."""
    if not model_id:
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model_id, name, token=token))
    except (HFValidationError, HfHubHTTPError, OSError):
        return None


def download_model(model_id: str, revision: str, token: str | None, inner: str = "") -> Path:
    """Return the folder of a model at a commit, downloading the files that are not cached.

    Args:
        model_id (`str`): `"owner/name"`.
        revision (`str`): a commit.
        token (`str`, *optional*): a token for a private model.
        inner (`str`): the folder to fetch from a repository in the layout of the original CaR project.

    Raises:
        ValueError: the Hub refuses the request, or the only weights are pickled.
        ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    # sentence-transformers keeps its own small modules in numbered sub-folders (1_Pooling/, 2_Normalize/).
    patterns = [*MODEL_FILES, "[0-9]_*/*"]
    token = clean_token(token)
    try:
        files = HfApi(token=token).model_info(model_id, revision=revision).siblings or []
        names = [file.rfilename for file in files]
    except (HTTPError, OSError):  # offline: assume an ordinary model, and let the cache tell
        names = ["config.json", "model.safetensors"]
    if not any(name.endswith((".safetensors", ".ckpt")) for name in names):
        raise ValueError(
            f"model_id={model_id!r} has no safetensors (it has {sorted(names)[:8]}). Pickled weights can run code when they "
            "are loaded, and are refused; save the model again with `save_pretrained`."
        )
    if "config.json" not in names:  # the layout of the original: one folder per variant, with a checkpoint
        part = inner or "instruction_score"
        patterns = [f"{part}/*.ckpt", f"{part}/*hparams.yaml"]
    # These sub-folders contain the same weights once more, for other engines.
    options: dict[str, Any] = {"revision": revision, "token": token, "ignore_patterns": ["onnx/*", "openvino/*"]}
    with asking(f"model_id={model_id!r}", "model", revision):
        return Path(retry(lambda: snapshot_download(model_id, allow_patterns=patterns, **options), READING_WAITS))
