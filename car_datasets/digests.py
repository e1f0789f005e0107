"""Compute sha256 digests of files and of model folders.

Does: hash each file once per process and content; find the checkpoint in a folder of the original CaR project.
Does not: ask the Hub.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

# The files that make up a model. Pickled weights are not among them: they are converted first.
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
SETTLED = 3.0  # seconds; the coarsest clock of a common file system (FAT) has ticks of 2


def find_checkpoint(path: Path) -> Path | None:
    """Return the `.ckpt` file in a folder of the original CaR project's layout, or `None` if it has another layout.

    The path may be the file itself, a folder with `checkpoints/` and `hparams.yaml`, or a folder of such folders, as on the
    Hub. There `instruction_score` (IQS) wins; pass `.../instruction_comet` for the ranking variant.

    Raises:
        ValueError: a folder contains more than one checkpoint.
    """
    if path.is_file():
        return path if path.suffix == ".ckpt" else None
    if (path / "config.json").is_file():
        return None
    for folder in (path, path / "instruction_score", path / "instruction_comet"):
        checkpoints = sorted([*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")])
        if len(checkpoints) > 1:
            raise ValueError(
                f"{folder} contains {len(checkpoints)} checkpoints: {[p.name for p in checkpoints]}. Pass the path of one."
            )
        if checkpoints:
            return checkpoints[0]
    return None


def file_digest(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal digits, from memory if this process has hashed the same content.

    Remembering is safe because the size and both time stamps are part of the key. A write changes the modification time; a
    tool that restores it (`cp -p`, `rsync -t`) still changes the status time, which no tool can set. Only a write in the
    same tick of the file system's clock as the hashing could go unnoticed, so a file that was modified just now is hashed
    without being remembered.
    """
    stat = path.stat()
    if time.time() - stat.st_mtime < SETTLED:
        return _sha256(path)
    return _remembered_sha256(path.absolute(), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, size: int, modified: int, changed: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):  # 4 MiB: weights may be larger than memory
            digest.update(block)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return `"sha256:..."` over the names and contents of a model's files; replacing weights in place changes it.

    Raises:
        ValueError: the folder contains neither a `config.json` nor a checkpoint of the original CaR project.
    """
    if (checkpoint := find_checkpoint(folder)) is not None:
        settings = [f / "hparams.yaml" for f in (checkpoint.parent, checkpoint.parent.parent)]
        return files_digest(checkpoint.parent.parent, [checkpoint, *(f for f in settings if f.is_file())])
    if not (folder / "config.json").is_file():
        names = sorted(p.name for p in folder.iterdir())[:8]
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json (it contains {names}). Pass a folder that "
            "`save_pretrained` wrote."
        )
    files = sorted({p for pattern in MODEL_FILES for p in folder.rglob(pattern) if p.is_file()})
    return files_digest(folder, files)


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """Return `"sha256:..."` over the contents of files and their names relative to `folder`, in the order given."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n" for path in files]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_digest(folder: Path) -> str:
    """Return `"sha256:..."` over the weights of a model folder alone, whatever its path and its other files."""
    checkpoint = find_checkpoint(folder)
    files = sorted(folder.rglob("*.safetensors")) if checkpoint is None else [checkpoint]
    return files_digest(folder if checkpoint is None else checkpoint.parent, files)
