"""Record what a selection was made from, so that others can reproduce and verify it: `Receipt`, `receipt.json`.

Does: collect source, models, settings, versions, counts and digests; write and read them. Equal runs give equal receipts.
Does not: keep a time, a token or a path of this machine (only the name and digest of a file or folder); verify
anything.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from car_datasets import __version__
from car_datasets.loading.files import STANDARD_INPUT, is_address
from car_datasets.loading.sources import Origin, Reading, source_numbers
from car_datasets.loading.values import carried
from car_datasets.scoring.named import ScorerName, read_name
from car_datasets.selection.marks.exclusions import CONTAMINATED, DROPPED, DUPLICATE, KEEP, excluded_rows, pinned_values
from car_datasets.utils import digests, revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import numbers_of, read_numbers
from car_datasets.utils.digests import indices_digest, public, rows_digest
from car_datasets.utils.files import user_path
from car_datasets.utils.settings import is_integer

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.recipe import Recipe
    from car_datasets.reporting.report import SelectionReport
    from car_datasets.scoring.named import Scorer
    from car_datasets.selection.marks.contamination import Decontaminator

RECEIPT_FILE = "receipt.json"
FORMAT = 2  # version of the record; `from_json` reads this one and 1, which has no `DIGESTS`
DIGESTS = ("files", "columns", "sha256")  # the fields of a receipt that format 1 does not have
# The packages that scores, clusters and digests depend on.
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
MODELS = ("scorer", "embedder", "tokenizer", "engine")  # settings that may be paths
FILES = ("keep", "drop", "like", "budget_tokenizer")  # settings that may be paths, of which no other field has a digest

# The fields that identify a source of each kind. A Hub dataset also has a `revision`, which is None if it is unknown.
SOURCES = {
    "hub": ("id",),
    "file": ("name", "sha256"),
    "files": ("sha256",),
    "folder": ("name", "sha256"),
    "memory": ("sha256",),
    "topped up": ("selected_sha256", "scored_sha256"),
}
TOPPED_UP = "topped up"  # the rows of an earlier result, which these digests identify, and new ones
BEFORE_CHOICE = "before filter, select, shuffle or sort"  # what the row numbers of a dataset in memory count
KINDS = {str: "text", dict: "a record", int: "an integer"}  # for error messages


@public
@dataclass(frozen=True)
class Receipt:
    """The source, models, settings and counts of a selection; the content of `receipt.json`.

    Args:
        source (`dict`): `kind` (`"hub"`, `"file"`, `"files"`, `"folder"` or `"memory"`), and `id` and `revision` on the
            Hub, `name` and `sha256` of a file or folder, `sha256` over the rows of a dataset in memory; `files`, name
            and sha256 of each file that was read, in the order of the rows, unless there is one file, or `datasets`
            read a Hub dataset. Of [`top_up`] the kind is `"topped up"`, with the sources `old` and `new`, and both
            digests of the old receipt.
        schema, template (`str`): how its rows were read; a scorer that is no IQS model has a template of its own, and
            this one is that of the embedded text.
        scorer, embedder (`dict`): `model_id`, `revision` (commit, or digest of a folder) and `weights` (digest). Of a
            scorer that is no IQS model also `kind`, such as `"ifd"`, and `options`, if it has some.
        recipe (`dict`): all settings, including seeds, k, n1 and n2; the name alone of a model that was a folder, and
            `NAME@SHA256` of a file that tells which rows to select.
        counts (`dict`): rows after each stage; where there are any, `excluded` (scored rows that a mark keeps out, by the
            first mark: `drop`, `contaminated` or `duplicate`) and `pinned`.
        selected_sha256 (`str`): sha256 over the source indices of the selected rows, in order, as a JSON list.
        versions (`dict[str, str]`): versions of this package and of the packages that its numbers depend on.
        scored_sha256 (`str`): sha256 over the indices, scores and clusters of the pool, in order.
        proof (`dict`): what `car-datasets prove` found, as `summary_of` gives it; without a proof the file lacks it.
        files (`dict[str, str]`): name in the folder to sha256 of every other file of the result.
        columns (`dict[str, dict[str, str]]`): of `"selected"` and `"scored"`, the sha256 of each column's values.
        sha256 (`str`): over all other fields. It finds an edit by hand, but it is no signature: whoever edits the
            receipt can compute it anew.
        format (`int`): version of this record.
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
    proof: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    sha256: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """Return the receipt as JSON, with `format` first and the other keys in the order of this class."""
        content = {"format": self.format, **asdict(self)}
        if self.format == 1:
            content = {name: value for name, value in content.items() if name not in DIGESTS}
        if not self.proof:
            del content["proof"]
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    def head(self) -> dict[str, str]:
        """Return what the head of `report.html` says: dataset, models, settings that are not the defaults, and digests."""
        from car_datasets.recipe import Recipe

        source, usual = self.source, portable_settings(Recipe())
        name = (
            source.get("id") or source.get("name") or {"memory": "rows in memory"}.get(source["kind"], source["kind"])
        )
        version = source.get("revision") or source.get("sha256") or self.selected_sha256
        part = "".join(
            f", {what} {source[what]}" for what in ("name", "split") if what in source and source[what] != name
        )
        told = {"scorer", "scorer_revision", "embedder", "embedder_revision", "name", "split", "revision"}
        others = [f"{n} = {v}" for n, v in self.recipe.items() if n not in told and n in usual and v != usual[n]]
        return {
            "dataset": f"{name}{part} ({_short(version)})",
            "scorer": f"{ScorerName.of_record(self.scorer)} ({_short(self.scorer['revision'])})",
            "embedder": f"{self.embedder['model_id']} ({_short(self.embedder['revision'])})",
            "settings": ", ".join(others) or "all defaults",
            "made by": f"car-datasets {self.versions.get('car-datasets', '')}",
            "receipt": f"{RECEIPT_FILE} (selected rows: {_short(self.selected_sha256)}); check it: car-datasets verify DIR",
        }

    def digest(self) -> str:
        """Return the sha256 over the file's fields but `sha256`, as JSON with sorted keys and without spaces."""
        content = {name: value for name, value in json.loads(self.to_json()).items() if name != "sha256"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def sealed(self, files: Mapping[str, str], columns: Mapping[str, Mapping[str, str]]) -> Receipt:
        """Return the receipt with the digests of a result's files and columns, and with its own.

        Args:
            files (`Mapping[str, str]`): name in the folder to sha256.
            columns (`Mapping`): of each table, column to sha256.
        """
        each = {name: dict(digests) for name, digests in columns.items()}
        receipt = replace(self, files=dict(sorted(files.items())), columns=each)
        return replace(receipt, sha256=receipt.digest())

    @classmethod
    def from_json(cls, text: str | bytes, shown: str = RECEIPT_FILE) -> Receipt:
        """Parse what [`~Receipt.to_json`] returned.

        Args:
            text (`str`): the content of the file.
            shown (`str`): the name of the file in error messages.

        Raises:
            ValueError: it is not a receipt, is one of another version, or has an invalid value.
        """
        try:
            content = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{shown} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{shown} is not a receipt: it holds a {type(content).__name__}, not a record.")
        # Exactly these keys: a receipt with unknown ones says something that `verify` would not check.
        names = {each.name for each in fields(cls)}
        if content.get("format") == 1:
            names -= {*DIGESTS}
        if (
            not is_integer(content.get("format"))
            or content["format"] not in (1, FORMAT)
            or {*content, "proof"} != names
        ):
            raise ValueError(
                f"{shown} is not a receipt of format {FORMAT} or 1: it has the keys {sorted(content)}; missing are "
                f"{sorted(names - {*content, 'proof'})}. Another version wrote it: pip install --upgrade car-datasets, or "
                "curate again."
            )
        # Types too: a receipt from a repository may have been edited by hand, and `verify` computes with it.
        _refuse_malformed(content, shown)
        return cls(**content)

    @classmethod
    def read(cls, folder: Path) -> Receipt:
        """Read the receipt in a folder.

        Raises:
            ValueError: the folder has no receipt, or an invalid one.
        """
        path = folder / RECEIPT_FILE
        if not path.is_file():
            raise ValueError(f"{folder} has no {RECEIPT_FILE}; folders that `car-datasets curate` writes have one.")
        return cls.from_json(path.read_bytes(), str(path))


def _short(revision: str) -> str:
    """Return the beginning of a commit or digest."""
    return revision.removeprefix("sha256:")[:12]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for a repeated key, of which a reader and Python see different values."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"an object has a key twice: {[key for key, _ in pairs][:20]}")
    return content


def _refuse_malformed(content: Mapping[str, Any], shown: str) -> None:
    """Validate the types of all fields; raise ValueError naming the first wrong one."""
    wanted: dict[str, type] = dict.fromkeys(("schema", "template", "selected_sha256", "scored_sha256"), str)
    wanted |= dict.fromkeys(("source", "scorer", "embedder", "recipe", "counts", "versions"), dict)
    if content["format"] != 1:
        wanted |= {"files": dict, "columns": dict, "sha256": str}
    wanted |= {"proof": dict} if "proof" in content else {}
    _refuse_others(content, wanted, f"{shown}: ")
    # Files of these names are opened; none of them may lie outside of the result.
    outside = [name for name in content.get("files", {}) if not re.fullmatch(r"(?!\.)[^/\\:]+(/(?!\.)[^/\\:]+)?", name)]
    if outside:
        raise ValueError(f"{shown}: files has {outside[0]!r}, which is no name of a file in the folder of a result.")
    columns = content.get("columns", {})
    _refuse_others(columns, dict.fromkeys(columns, dict), f"{shown}: columns.")
    for name, each in {"files": content.get("files", {}), "versions": content["versions"], **columns}.items():
        _refuse_others(each, dict.fromkeys(each, str), f"{shown}: {name}.")
    source = content["source"]
    if source.get("kind") not in SOURCES:
        raise ValueError(
            f"{shown}: source.kind is {source.get('kind')!r}; a receipt has one of {sorted(SOURCES)} there."
        )
    _refuse_others(source, dict.fromkeys(SOURCES[source["kind"]], str), f"{shown}: source.")
    for model in ("scorer", "embedder"):
        _refuse_others(content[model], dict.fromkeys(("model_id", "revision", "weights"), str), f"{shown}: {model}.")
        # Optional ones as well, such as `tokenizer_revision`.
        _refuse_others(content[model], dict.fromkeys(content[model], str), f"{shown}: {model}.")
    _refuse_others(
        content["counts"], dict.fromkeys(("rows", "scored", "clusters", "selected"), int), f"{shown}: counts."
    )
    _refuse_others(content["counts"], dict.fromkeys(("rejected", "marked", "selected_by"), dict), f"{shown}: counts.")


def _refuse_others(record: Mapping[str, Any], wanted: Mapping[str, type], shown: str) -> None:
    for name, kind in wanted.items():
        value = record.get(name)
        # bool is a subclass of int, and `true` must not pass as a count.
        if not (is_integer(value) if kind is int else isinstance(value, kind)):
            seen = f"is {value!r:.80}" if name in record else "is missing"
            raise ValueError(
                f"{shown}{name} {seen}; a receipt has {KINDS[kind]} there. Take the file that was written."
            )


def make_receipt(
    source: Mapping[str, Any],
    schema: str,
    settings: Recipe,
    scorer: Scorer,
    pool: Dataset,
    selected: Dataset,
    report: SelectionReport,
) -> Receipt:
    """Make the receipt of a run of [`curate`], without the digests of its files; `write_result` adds them.

    Args:
        source (`Mapping`): what [`describe_source`] returned for the source.
        schema (`str`): the name of the schema that the rows were read by.
        settings ([`Recipe`]), scorer (`Scorer`): as used, with the revisions of both models.
        pool, selected (`Dataset`), report ([`SelectionReport`]): the result.
    """
    return Receipt(
        source=dict(source),
        schema=schema,
        template=str(scorer.template),
        scorer=scorer_record(settings, scorer),
        embedder=embedder_record(settings, scorer),
        recipe=portable_settings(settings),
        counts=counts_of(report) | mark_counts(pool, settings),
        selected_sha256=indices_digest(selected[settings.index_column][:]),
        versions={"car-datasets": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        scored_sha256=pool_digest(pool, settings.names),
    )


def counts_of(report: SelectionReport) -> dict[str, Any]:
    """Return the counts of a receipt, taken from a report."""
    return {
        "rows": report.rows_in,
        "scored": report.rows_scored,
        "rejected": report.rejected,
        "marked": report.marked,
        "clusters": report.clusters,
        "selected": report.selected.rows,
        "selected_by": report.selected_by,
    }


def mark_counts(pool: Dataset, settings: Recipe) -> dict[str, Any]:
    """Return the counts of a receipt that only a pool with marked rows has: `excluded` and `pinned`.

    Args:
        pool (`Dataset`): the scored pool.
        settings ([`Recipe`]): say which marks count.
    """
    marks = excluded_rows(pool, duplicates=settings.marking != "keep", pins=settings.has_pins)
    scored = ~np.isnan(read_numbers(pool, settings.score_column, np.nan))
    counts = {name: int(np.count_nonzero(scored & (marks == name))) for name in (DROPPED, CONTAMINATED, DUPLICATE)}
    excluded = {name: n for name, n in counts.items() if n}
    pinned = int(np.count_nonzero(pinned_values(pool) == KEEP)) if settings.keep is not None else 0
    return ({"excluded": excluded} if excluded else {}) | ({"pinned": pinned} if pinned else {})


def reading_of(settings: Recipe, token: str | None = None) -> Reading:
    """Return how a recipe opens its source."""
    return Reading(
        settings.name, settings.split, settings.revision, token, columns=dict(settings.columns), glob=settings.glob
    )


def describe_source(origin: Origin, opened: Dataset | None, settings: Recipe) -> dict[str, Any]:
    """Describe which rows a source holds, without a path of this machine.

    Args:
        origin ([`Origin`]): where the rows come from.
        opened (`Dataset`, *optional*): what [`open_dataset`] returned; needed only for rows in memory.
        settings ([`Recipe`]): gives `name`, `split` and `revision`.

    Returns:
        `dict`: the field `source` of a [`Receipt`].
    """
    kind, place = origin.kind, origin.name
    # Only what was given: a name or split of None says nothing about the source.
    part = {name: getattr(settings, name) for name in ("name", "split") if getattr(settings, name) is not None}
    if kind == "memory":
        assert opened is not None
        moved = {} if source_numbers(opened) is None else {"numbered": BEFORE_CHOICE}
        return {"kind": kind, "sha256": rows_digest(carried(opened)), **moved, **part}
    if kind == "hub":
        # Name and digest of a Hub dataset are its id and commit, so rows that `datasets` read are not hashed.
        files = [{"name": name.removeprefix(f"{place}/"), "sha256": sha256} for name, sha256 in origin.files]
        told = {"kind": kind, "id": place, "revision": origin.commit or settings.revision, **part}
        return {**told, "files": files} if files else told
    if kind == "file":
        [(name, sha256)] = origin.files
        return {"kind": kind, "name": name if is_address(name) else Path(name).name, "sha256": sha256, **part}
    if kind == "files":
        names = _relative([name for name, _ in origin.files])
        # Contents in the order of the rows, without names, which differ between machines.
        content = hashlib.sha256(json.dumps([sha256 for _, sha256 in origin.files]).encode()).hexdigest()
        files = [{"name": n, "sha256": sha256} for n, (_, sha256) in zip(names, origin.files, strict=True)]
        return {"kind": kind, "sha256": content, "files": files, **part}
    folder = Path(place)
    # `datasets` leaves cache files in folders of save_to_disk, and tools leave hidden files in any folder.
    own = ("cache-", ".")
    every = sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith(own))
    read = origin.files or tuple((str(each), digests.file_digest(each)) for each in every)
    files = [{"name": Path(n).relative_to(folder).as_posix(), "sha256": sha256} for n, sha256 in read]
    whole = digests.files_digest(folder, every)
    return {"kind": kind, "name": folder.resolve().name, "sha256": whole, "files": files, **part}


def _relative(names: Sequence[str]) -> list[str]:
    """Return paths relative to the folder that all are in, and addresses as they are."""
    paths = {name: os.path.abspath(name) for name in names if not is_address(name) and name != STANDARD_INPUT}
    # The folders above would tell about this machine, and are not part of the data.
    base = os.path.commonpath([os.path.dirname(path) for path in paths.values()]) if paths else ""
    return [Path(os.path.relpath(paths[n], base)).as_posix() if n in paths else n for n in names]


def pinned_source(settings: Recipe, origin: Origin) -> Recipe:
    """Return the settings with the commit that a Hub source was read at, so that they give the same rows later."""
    return settings if origin.commit is None else settings.changed(revision=origin.commit)


def pool_digest(pool: Dataset, names: ColumnNames) -> str:
    """Return the sha256 over indices, scores and clusters of a scored pool, in order.

    It is taken over the indices as a JSON list without spaces, then one byte per row for "has a score" (0 or 1), the
    scores as little-endian float64 (NaN without one) and the clusters as little-endian int64 (-1 without one).
    """
    columns = list(dict.fromkeys((names.index, names.score, names.cluster)))  # an index may be one of the others
    table = pool.with_format(None).select_columns(columns).with_format("arrow")[:]
    digest = hashlib.sha256(json.dumps(table[names.index].to_pylist(), separators=(",", ":"), default=str).encode())
    # A null and a NaN both become NaN below; the byte tells them apart.
    digest.update(np.asarray(table[names.score].is_valid().to_numpy(), dtype=np.uint8).tobytes())
    # Type and byte order are fixed, so that every machine gets the same digest.
    digest.update(numbers_of(table[names.score], names.score, np.nan).astype("<f8").tobytes())
    digest.update(numbers_of(table[names.cluster], names.cluster, -1).astype("<i8").tobytes())
    return digest.hexdigest()


def portable(name: str) -> str:
    """Return a model's Hub id, or the name alone of a folder or file."""
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


def portable_settings(settings: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe as plain values, with the name alone of models that are folders here."""
    plain = {**asdict(settings), "columns": dict(settings.columns)}
    # A path would be one of this machine; the revision, a digest, says which model the folder held.
    plain |= {name: portable(plain[name]) for name in MODELS if plain[name] is not None}
    name = read_name(settings.scorer)
    plain["scorer"] = str(name._replace(model=portable(name.model)))
    plain |= {name: with_digest(plain[name]) for name in FILES if plain[name] is not None}
    return plain | {"against": [with_digest(name) for name in settings.against]}


def named_sets(against: Sequence[str], stage: Decontaminator | None) -> tuple[str, ...]:
    """Return the evaluation sets of a recipe as a receipt names them: `NAME@SHA256` of a file, `ID@COMMIT` on the Hub.

    Args:
        against (`Sequence[str]`): as the recipe names them.
        stage ([`Decontaminator`], *optional*): what read them, in this order.
    """
    commits = ["" for _ in against] if stage is None else [each.revision for each in stage.against]
    named = zip(map(with_digest, against), commits, strict=True)
    return tuple(f"{name}@{commit}" if commit and "@" not in name else name for name, commit in named)


def with_digest(name: str) -> str:
    """Return `NAME@SHA256` of a file or folder on this machine, and the name of anything else as it is."""
    path = user_path(name)
    if not path.exists():
        return name
    files = [each for each in sorted(path.rglob("*")) if each.is_file()] if path.is_dir() else []
    digest = digests.files_digest(path, files) if path.is_dir() else digests.file_digest(path)
    return f"{path.resolve().name}@{digest}"


def scorer_record(settings: Recipe, scorer: Scorer) -> dict[str, str]:
    """Return the field `scorer` of a receipt."""
    named = read_name(settings.scorer).record
    return _model(scorer.model_id, str(scorer.revision)) | scorer_pins(scorer) | named


def scorer_pins(scorer: Scorer) -> dict[str, str]:
    """Return the immutable revisions of a scorer and, if it has any, of its tokenizer, int8 encoder and packaged parts."""
    names = ("revision", "tokenizer_revision", "engine_revision", "parts_revision")
    return {name: str(pin) for name in names if (pin := getattr(scorer, name, None)) is not None}


def embedder_record(settings: Recipe, scorer: Scorer) -> dict[str, str]:
    """Return the field `embedder` of a receipt; the embedder may be the scorer's own encoder."""
    from car_datasets.scoring.scorer import QualityScorer  # here, as it imports torch

    if settings.embedder is None and isinstance(scorer, QualityScorer) and scorer.shares_encoder:
        shared = scorer.embedder()
        return _model(shared.model_id, str(shared.revision))
    # No request for a pinned commit that is in the cache, so this also works offline.
    name = settings.embedder or revisions.DEFAULT_ENCODER
    return _model(name, revisions.pin_revision(name, settings.embedder_revision))


def _model(name: str, revision: str) -> dict[str, str]:
    # The digest identifies the weights even after their repository is deleted or renamed.
    weights = digests.weights_digest(revisions.model_folder(name, revision))
    return {"model_id": portable(name), "revision": revision, "weights": weights}
