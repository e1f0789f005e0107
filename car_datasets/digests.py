"""Digests: names that never mean something else, for files and for models in a folder.

Does: sha256 over files; find the original's checkpoint in a folder.
Does not: ask a Hub (hub.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

# What a model is made of. Pickled weights are not on the list: they are converted first (convert_comet.py).
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


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


def weights_digest(folder: Path) -> str:
    """`"sha256:..."` over the weights alone of a model's folder, wherever it lies and whatever lies beside them."""
    checkpoint = find_checkpoint(folder)
    files = sorted(folder.rglob("*.safetensors")) if checkpoint is None else [checkpoint]
    return files_digest(folder if checkpoint is None else checkpoint.parent, files)
