"""RECEIPT: `receipt.json`, what a selection was made from and with, so that others can make and check it again.

Does: record source, models, settings, versions and counts; write and read that. Equal runs give equal receipts.
Does not: keep a time, a token, or a path of this machine (of a file or folder, its name and digest); check (verification.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from car_datasets import digests, hub
from car_datasets.formatting import find_schema
from car_datasets.recipe_stages import scorer_of
from car_datasets.selection import numbers_of
from car_datasets.settings import is_whole_number
from car_datasets.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.recipe import Recipe
    from car_datasets.reporting import SelectionReport
    from car_datasets.scoring import QualityScorer

RECEIPT_FILE = "receipt.json"
FORMAT = 1
PACKAGES = (
    "datasets",
    "huggingface_hub",
    "numpy",
    "pyarrow",
    "scikit-learn",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)
PINS = ("scorer_revision", "embedder_revision")  # filled in by a run
MODELS = ("scorer", "embedder", "tokenizer", "engine")  # settings that may be paths
SOURCES = {"hub": ("id",), "file": ("name", "sha256"), "folder": ("name", "sha256"), "memory": ("sha256",)}
KINDS = {str: "text", dict: "a record", int: "a whole number"}


@dataclass(frozen=True)
class Receipt:
    """What a selection was made from and with.

    Args:
        source (`dict`): `kind` (`"hub"`, `"file"`, `"folder"` or `"memory"`), and `id` and `revision` on the Hub, `name` and
            `sha256` of a file or folder, `sha256` over the rows of a dataset in memory.
        schema, template (`str`): how its rows were read.
        scorer, embedder (`dict`): `model_id`, `revision` (commit, or digest of a folder) and `weights` (digest).
        recipe (`dict`): all settings, seeds, k, n1 and n2 among them; models that were folders by name.
        counts (`dict`): rows after each stage.
        selected_sha256 (`str`): over the source indices of the selected rows, in order, see [`indices_digest`].
        versions (`dict[str, str]`): of this package and those whose numbers it depends on.
        scored_sha256 (`str`): over indices, scores and clusters of the pool, in order, see [`pool_digest`].
        format (`int`): of this record.
    """

    source: dict[str, Any]
    schema: str
    template: str
    scorer: dict[str, str]
    embedder: dict[str, str]
    recipe: dict[str, Any]
    counts: dict[str, Any]
    selected_sha256: str
    versions: dict[str, str]
    scored_sha256: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """The receipt as JSON, keys in the order of this class."""
        return json.dumps({"format": self.format, **asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, shown: str = RECEIPT_FILE) -> Receipt:
        """Read [`~Receipt.to_json`].

        Args:
            text (`str`): the content of the file.
            shown (`str`): what messages call it.

        Raises:
            ValueError: it is not a receipt, or one of another version, or something in it is not what it should be.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{shown} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{shown} is not a receipt: it holds a {type(content).__name__}, not a record.")
        names = {field.name for field in fields(cls)}
        if content.get("format") != FORMAT or set(content) != names:
            raise ValueError(
                f"{shown} is not a receipt of format {FORMAT}: it has the keys {sorted(content)}; missing are "
                f"{sorted(names - set(content))}. Another version wrote it: pip install --upgrade car-datasets, or curate again."
            )
        _refuse_malformed(content, shown)
        return cls(**content)

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """The receipt in a folder; a ValueError where there is none."""
        path = folder / RECEIPT_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {RECEIPT_FILE}; folders that `car-datasets curate` writes have one.")
        return cls.from_json(path.read_bytes(), str(path))


def _refuse_malformed(content: Mapping[str, Any], shown: str) -> None:
    """Raise a ValueError for a value of a kind that no receipt has there, of which JSON's and Python's errors say nothing."""
    wanted: dict[str, type] = dict.fromkeys(("schema", "template", "selected_sha256", "scored_sha256"), str)
    wanted |= dict.fromkeys(("source", "scorer", "embedder", "recipe", "counts", "versions"), dict)
    _refuse_others(content, wanted, f"{shown}: ")
    source = content["source"]
    if source.get("kind") not in SOURCES:
        raise ValueError(
            f"{shown}: source.kind is {source.get('kind')!r}; a receipt has one of {sorted(SOURCES)} there."
        )
    _refuse_others(source, dict.fromkeys(SOURCES[source["kind"]], str), f"{shown}: source.")
    for model in ("scorer", "embedder"):
        _refuse_others(content[model], dict.fromkeys(("model_id", "revision", "weights"), str), f"{shown}: {model}.")
        _refuse_others(content[model], dict.fromkeys(content[model], str), f"{shown}: {model}.")
    _refuse_others(
        content["counts"], dict.fromkeys(("rows", "scored", "clusters", "selected"), int), f"{shown}: counts."
    )
    _refuse_others(content["counts"], dict.fromkeys(("rejected", "marked", "selected_by"), dict), f"{shown}: counts.")


def _refuse_others(record: Mapping[str, Any], wanted: Mapping[str, type], shown: str) -> None:
    for name, kind in wanted.items():
        value = record.get(name)
        if not (is_whole_number(value) if kind is int else isinstance(value, kind)):
            seen = f"is {value!r:.80}" if name in record else "is missing"
            raise ValueError(
                f"{shown}{name} {seen}; a receipt has {KINDS[kind]} there. Take the file that was written."
            )


def make_receipt(
    source: Mapping[str, Any],
    settings: Recipe,
    scorer: QualityScorer,
    pool: Dataset,
    selected: Dataset,
    report: SelectionReport,
) -> Receipt:
    """The receipt of a run of [`curate`].

    Args:
        source (`Mapping`): see [`describe_source`].
        settings ([`Recipe`]), scorer ([`QualityScorer`]): as used, with the revisions of both models.
        pool, selected (`Dataset`), report ([`SelectionReport`]): the result.
    """
    return Receipt(
        source=dict(source),
        schema=find_schema(pool.column_names, settings.schema, settings.columns).name,
        template=str(scorer.template),
        scorer=scorer_record(scorer),
        embedder=embedder_record(settings, scorer),
        recipe=portable_settings(settings),
        counts=counts_of(report),
        selected_sha256=indices_digest(selected[settings.index_column][:]),
        versions={"car-datasets": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        scored_sha256=pool_digest(pool, settings.score_column, settings.cluster_column, settings.index_column),
    )


def counts_of(report: SelectionReport) -> dict[str, Any]:
    """The counts of a receipt, as a report has them."""
    return {
        "rows": report.rows_in,
        "scored": report.rows_scored,
        "rejected": report.rejected,
        "marked": report.marked,
        "clusters": report.clusters,
        "selected": report.selected.rows,
        "selected_by": report.selected_by,
    }


def describe_source(source: Any, opened: Dataset | None, settings: Recipe) -> dict[str, Any]:
    """Which rows these are, without saying where on this machine they lie.

    Args:
        source: what was opened: a path, a Hub id, or a dataset.
        opened (`Dataset`, *optional*): what [`open_dataset`] made of it; not needed for a path.
        settings ([`Recipe`]): its `name`, `split` and `revision`.
    """
    part = {name: getattr(settings, name) for name in ("name", "split") if getattr(settings, name) is not None}
    if not isinstance(source, (str, Path)):
        return {"kind": "memory", "sha256": rows_digest(source if opened is None else opened)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"kind": "file", "name": path.name, "sha256": digests.file_digest(path), **part}
    if path.is_dir():
        own = ("cache-", ".")  # what `datasets` leaves in folders of save_to_disk, and what tools hide in any
        files = sorted(each for each in path.rglob("*") if each.is_file() and not each.name.startswith(own))
        return {"kind": "folder", "name": path.resolve().name, "sha256": digests.files_digest(path, files), **part}
    return {"kind": "hub", "id": str(source), "revision": loaded_revision(opened) or settings.revision, **part}


def pinned_source(settings: Recipe, source: Any, opened: Dataset) -> Recipe:
    """The settings with the commit that a source on the Hub was read at: with them it gives the same rows later."""
    if not isinstance(source, (str, Path)) or Path(source).expanduser().exists():
        return settings
    return settings.changed(revision=loaded_revision(opened) or settings.revision)


def loaded_revision(opened: Dataset | None) -> str | None:
    """The commit that the rows of a Hub dataset were read from: `datasets` keeps them in a folder of that name."""
    for file in [] if opened is None else opened.cache_files:
        if found := re.search(r"[/\\]([0-9a-f]{40})[/\\][^/\\]+$", str(file["filename"])):
            return found[1]
    return None


def rows_digest(dataset: Dataset) -> str:
    """sha256 over the rows as JSON, for rows that no file holds."""
    digest = hashlib.sha256()
    for row in dataset.with_format(None):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def indices_digest(indices: list[Any]) -> str:
    """sha256 over the source indices of selected rows, in order, as a JSON list without spaces."""
    return hashlib.sha256(json.dumps(indices, separators=(",", ":")).encode()).hexdigest()


def pool_digest(pool: Dataset, score_column: str, cluster_column: str, index_column: str) -> str:
    """sha256 over a scored pool, in order: its indices as [`indices_digest`] takes them, then one byte per row for "has a
    score", the scores as little-endian float64 (NaN without one) and the clusters as int64 (-1 without one)."""
    names = list(dict.fromkeys((index_column, score_column, cluster_column)))
    table = pool.with_format(None).select_columns(names).with_format("arrow")[:]
    digest = hashlib.sha256(json.dumps(table[index_column].to_pylist(), separators=(",", ":"), default=str).encode())
    digest.update(np.asarray(table[score_column].is_valid().to_numpy(), dtype=np.uint8).tobytes())
    digest.update(numbers_of(table[score_column], score_column, np.nan).astype("<f8").tobytes())
    digest.update(numbers_of(table[cluster_column], cluster_column, -1).astype("<i8").tobytes())
    return digest.hexdigest()


def portable(name: str) -> str:
    """A model's Hub id; of a folder or file its name alone."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def portable_settings(settings: Recipe) -> dict[str, Any]:
    """The settings of a recipe as plain values; of models that are folders here, the name alone."""
    plain = {**asdict(settings), "columns": dict(settings.columns)}
    return plain | {name: portable(plain[name]) for name in MODELS if plain[name] is not None}


def made_by(receipt: Receipt, source: str, settings: Recipe, token: str | None = None) -> bool:
    """Whether `curate(source, ..., settings)` would read the same rows by the same models now, so that this is its receipt.

    Args:
        receipt ([`Receipt`]): of a result that is there.
        source (`str`), settings ([`Recipe`]), token (`str`, *optional*): see [`curate`]. The Hub is asked for the source's
            present commit, and files are read for their digests.
    """
    wanted = portable_settings(settings).items()
    given = {name: value for name, value in wanted if name != "revision" and (value or name not in PINS)}
    if any(receipt.recipe.get(name) != value for name, value in given.items()):
        return False
    if not _is_source(receipt.source, source, settings, token):
        return False
    scorer = scorer_of(settings, token)
    now = {"revision": str(scorer.revision), **_pins(scorer)}
    if any(receipt.scorer.get(name) != pin for name, pin in now.items()):
        return False
    if settings.embedder is None:
        return True
    return receipt.embedder["revision"] == hub.pin_revision(settings.embedder, settings.embedder_revision, token)


def _is_source(known: Mapping[str, Any], source: str, settings: Recipe, token: str | None) -> bool:
    if Path(source).expanduser().exists():
        return known == describe_source(source, None, settings)
    names = ("kind", "id", "name", "split")
    if [known.get(name) for name in names] != ["hub", source, settings.name, settings.split]:
        return False
    return bool(known["revision"] == hub.pin_dataset(source, settings.revision, token, FileNotFoundError))


def scorer_record(scorer: QualityScorer) -> dict[str, str]:
    """What a receipt says of the scorer."""
    return _model(scorer.model_id, str(scorer.revision)) | _pins(scorer)


def embedder_record(settings: Recipe, scorer: QualityScorer) -> dict[str, str]:
    """What a receipt says of the embedder, which may be the scorer's own encoder."""
    if settings.embedder is None and scorer.shares_encoder:
        shared = scorer.embedder()
        return _model(shared.model_id, str(shared.revision))
    name = settings.embedder or hub.DEFAULT_ENCODER
    return _model(name, hub.pin_revision(name, settings.embedder_revision))


def _model(name: str, revision: str) -> dict[str, str]:
    weights = digests.weights_digest(hub.model_folder(name, revision))
    return {"model_id": portable(name), "revision": revision, "weights": weights}


def _pins(scorer: QualityScorer) -> dict[str, str]:
    names = ("tokenizer_revision", "engine_revision")
    return {name: str(getattr(scorer, name)) for name in names if getattr(scorer, name) is not None}
