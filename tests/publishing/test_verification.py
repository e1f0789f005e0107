"""verification.py: a selection that is what its receipt says, and every way in which one is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset
from typer.testing import CliRunner

from car_datasets import curate, verify
from car_datasets.cli import app
from car_datasets.receipt import DIGESTS, Receipt
from car_datasets.utils.digests import column_digests, file_digest
from tests.hub_server import Hub
from tests.test_recipe import as_chats, short_rows


@pytest.fixture(scope="module")
def run(tiny_iqs: str, tiny_embedder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a file of 24 rows, and the folder that `curate` made of it."""
    folder = tmp_path_factory.mktemp("run")
    short_rows().to_json(folder / "rows.jsonl")
    settings: dict[str, Any] = {"scorer": tiny_iqs, "embedder": tiny_embedder, "duplicates": "keep"}
    curate(folder / "rows.jsonl", folder / "out", n1=5, k=3, n2=2, **settings)
    return folder / "rows.jsonl", folder / "out"


def test_a_true_selection_matches(run: tuple[Path, Path], tiny_iqs: str, tiny_embedder: str) -> None:
    source, folder = run
    found = verify(folder, source=source, rescore=100, scorer=tiny_iqs, embedder=tiny_embedder)
    assert found.matches
    [skipped] = found.skipped
    assert skipped.startswith("whether the clusters and distances follow from the embeddings, the versions, and")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert found.checked[0].startswith(f"the receipt, {len(files) - 1} files and 24 columns have the receipt's sha256")
    assert found.checked[-5] == "24 rows, scored again, have their scores within 1e-05"
    assert found.checked[-4] == "24 rows, embedded again, have their embeddings within 1e-05"
    assert len(found.checked) == 11


def change(folder: Path, name: str, **columns: Callable[[list[Any]], list[Any]]) -> None:
    table = Dataset.from_parquet(str(folder / f"{name}.parquet"), keep_in_memory=True)
    changed = {**table.to_dict(), **{column: mend(table[column][:]) for column, mend in columns.items()}}
    Dataset.from_dict(changed, features=table.features).to_parquet(folder / f"{name}.parquet")


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


def swapped(values: list[Any]) -> list[Any]:
    return [values[1], values[0], *values[2:]]


def in_receipt(seal: bool = True, **changes: Any) -> Callable[[Path], None]:
    """Change fields of the receipt, with a `sha256` of its own that fits them, unless it is not to be sealed."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "receipt.json").read_text())
        for path, value in changes.items():
            at, *keys = path.split("__")
            content[at] = {**content[at], keys[0]: value} if keys else value
        body = {name: value for name, value in content.items() if name != "sha256"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        content |= {"sha256": hashlib.sha256(text.encode()).hexdigest()} if seal else {}
        (folder / "receipt.json").write_text(json.dumps(content))

    return apply


def rows_of(name: str, **columns: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    return lambda folder: change(folder, name, **columns)


@pytest.mark.parametrize(
    ("spoil", "difference"),
    [
        (rows_of("selected", output=first("better")), "selected is not what the source holds: row 0, column 'output': 'better'"),
        (rows_of("scored", output=first("better")), "scored is not what the source holds: row 0, column 'output': 'better'"),
        (rows_of("scored", iqs_score=lambda v: [min(v), *v[1:]]), "source row"),
        (rows_of("scored", iqs_score=lambda v: [9.0 if x == min(v) else x for x in v]), "selected, row 0, is source row"),
        (rows_of("scored", cluster=lambda v: [0] * len(v)), "selected"),
        (rows_of("selected", source_index=swapped), "do not have the receipt's sha256"),
        (rows_of("selected", selected_by=first("cluster")), "column 'selected_by': 'cluster', expected"),
        (rows_of("selected", score_rank=first(17)), "column 'score_rank': 17, expected 1"),
        (in_receipt(selected_sha256="0" * 64), "do not have the receipt's sha256"),
        (in_receipt(recipe__n2=1), "selected"),
        (in_receipt(recipe__n1=6), "selected"),
        (in_receipt(counts__selected=3), "rows are selected; the receipt says 3"),
        (in_receipt(counts__rows=25), "scored has 24 rows; the receipt says 25"),
        (in_receipt(source__sha256="0" * 64), "the source has the sha256"),
        (rows_of("scored", iqs_score=lambda v: [None if x == min(v) else x for x in v]), "has no score; scored again, the score"),
        (in_receipt(scored_sha256="0" * 64), "do not have the receipt's sha256"),
        (in_receipt(template="paper"), "the scorer's template is 'clean-1'; the receipt says 'paper'"),
        (in_receipt(scorer__weights="0" * 64), "the scorer's weights is"),
    ],
)  # fmt: skip
def test_every_change_is_found(
    run: tuple[Path, Path], tiny_iqs: str, tmp_path: Path, spoil: Callable[[Path], None], difference: str
) -> None:
    source, out = run
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    spoil(folder)
    done = CliRunner().invoke(
        app, ["verify", str(folder), "--source", str(source), "--rescore", "24", "--scorer", tiny_iqs]
    )
    assert done.exit_code == 1, done.output
    last = done.output.splitlines()[-1]
    assert last.startswith("mismatch: ") and difference in last, last


def lowest(value: Any) -> Callable[[list[Any]], list[Any]]:
    """Replace the worst score, of a row that was not selected, by another one."""
    return lambda values: [value if x == min(values) else x for x in values]


def taken(order: Callable[[list[int]], list[int]]) -> Callable[[Path], None]:
    """Reorder the rows of the pool, or take some of them twice."""

    def apply(folder: Path) -> None:
        table = Dataset.from_parquet(str(folder / "scored.parquet"), keep_in_memory=True)
        table.select(order(list(range(len(table))))).to_parquet(folder / "scored.parquet")

    return apply


def labels_swapped(folder: Path) -> None:
    """Swap the labels of two rows that were not selected, so that no count tells."""
    table = Dataset.from_parquet(str(folder / "scored.parquet"), keep_in_memory=True)
    chosen = Dataset.from_parquet(str(folder / "selected.parquet"), keep_in_memory=True)["source_index"][:]
    labels = table["cluster"][:]
    scores = table["iqs_score"][:]
    rest = sorted(set(range(len(labels))) - set(chosen), key=scores.__getitem__)
    one = rest[0]
    other = next(row for row in rest if labels[row] != labels[one])
    labels[one], labels[other] = labels[other], labels[one]
    change(folder, "scored", cluster=lambda _: labels)


@pytest.mark.parametrize(
    ("spoil", "difference"),
    [
        (rows_of("scored", iqs_score=lowest(-9.0)), "indices, scores and clusters of scored do not have"),
        (rows_of("scored", iqs_score=lowest(None)), "counts.scored is 23; the receipt says 24"),
        (rows_of("scored", iqs_score=lowest(float("nan"))), "counts.scored is 23; the receipt says 24"),
        (taken(lambda rows: [rows[1], rows[0], *rows[2:]]), "indices, scores and clusters of scored do not have"),
        (taken(lambda rows: [rows[1], *rows[1:]]), "scored holds the source's row at position 1 twice"),
        (labels_swapped, "indices, scores and clusters of scored do not have"),
        (in_receipt(recipe__seed=7), "report.json has the seed 42; the recipe says 7"),
        (in_receipt(recipe__k=2), "the pool has 3 clusters; the recipe says k=2"),
        (in_receipt(counts__scored=23), "counts.scored is 24; the receipt says 23"),
        (in_receipt(counts__clusters=4), "counts.clusters is 3; the receipt says 4"),
        (in_receipt(counts__selected_by={"score": 1}), "counts.selected_by is {'score':"),
        (in_receipt(schema="messages"), "the rows have the schema 'alpaca'; the receipt says 'messages'"),
        (in_receipt(scorer__revision="sha256:0"), "the receipt's scorer.revision is 'sha256:0'; its recipe says"),
        (in_receipt(embedder__revision="sha256:0"), "the receipt's embedder.revision is 'sha256:0'; its recipe says"),
    ],
)  # fmt: skip
def test_changes_are_found_without_scoring_again(
    run: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], None], difference: str
) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    spoil(tmp_path / "out")
    seen = verify(tmp_path / "out", source=source).difference
    assert seen is not None and difference in seen


def test_more_clusters_asked_for_than_seen_is_said(run: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    in_receipt(recipe__k=5)(tmp_path / "out")
    found = verify(tmp_path / "out", source=source)
    assert found.matches and any("3 clusters of k=5" in words for words in found.skipped)


# --- edits that no count and no score tells


def both(**columns: Callable[[list[Any]], list[Any]]) -> Callable[[Path], None]:
    """Change the first row of the selection, in the pool as well."""

    def apply(folder: Path) -> None:
        change(folder, "selected", **columns)
        selected = Dataset.from_parquet(str(folder / "selected.parquet"), keep_in_memory=True)
        for name in columns:
            at = selected["source_index"][0]
            change(folder, "scored", **{name: lambda old, at=at, n=name: [*old[:at], selected[n][0], *old[at + 1 :]]})

    return apply


def in_json(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


def replaced(name: str, content: bytes = b"[]") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def forged(*edits: Callable[[Path], None]) -> Callable[[Path], None]:
    """Edit a result, and write digests into its receipt that fit."""

    def apply(folder: Path) -> None:
        for edit in edits:
            edit(folder)
        receipt = Receipt.read(folder)
        tables = {name: pq.ParquetFile(folder / f"{name}.parquet").iter_batches() for name in receipt.columns}
        sealed = receipt.sealed(
            {name: file_digest(folder / name) for name in receipt.files},
            {name: column_digests(table) for name, table in tables.items()},
        )
        (folder / "receipt.json").write_text(sealed.to_json())

    return apply


def far(vectors: list[Any]) -> list[Any]:
    return [np.roll(vectors[0], 1).tolist(), *vectors[1:]]


BY_HAND = [
    {"scorer__weights": "sha256:0"},
    {"scorer__model_id": "me/better"},
    {"scorer__engine_revision": "sha256:0"},
    {"template": "paper"},
    {"embedder__model_id": "me/better"},
    {"embedder__revision": "sha256:0"},
    {"embedder__weights": "sha256:0"},
    {"versions__torch": "1.0"},
    {"recipe__dtype": "bfloat16"},
    {"recipe__n_init": 99},
    {"recipe__embedding_dtype": "float16"},
    {"source__name": "other.jsonl"},
    {"files__report.html": "0" * 64},
    {"files": {}},
    {"columns": {}},
    {"sha256": "0" * 64},
]
EDITS = [
    *((in_receipt(seal=False, **fields), "receipt.json does not have its own sha256") for fields in BY_HAND),
    (in_json("report.json", rows_scored=99), "report.json does not have the receipt's sha256"),
    (in_json("report.json", clusters_by_score=99), "report.json has clusters_by_score 99; the rows give"),
    *(
        (replaced(name), f"{name} does not have the receipt's sha256")
        for name in ("selected.json", "report.html", "report.md", "plots/plot_map.png", "README.md")
    ),
    (replaced("plots/plot_none.png"), "plots/plot_none.png: not in the receipt"),
    (replaced("clustering.json"), "clustering.json: not in the receipt"),
    (lambda folder: (folder / "more").mkdir(), "more: not in the receipt"),
    (lambda folder: ((folder / "report.md").unlink(), (folder / "report.md").mkdir()), "report.md does not have"),
    (in_receipt(files={"../rows.jsonl": "0" * 64}), "files has '../rows.jsonl', which is no name of a file"),
    (lambda folder: (folder / "report.html").unlink(), "report.html: no longer in the folder"),
    *(
        (edit, f"the column {column!r} of {table} does not have the receipt's sha256")
        for table in ("selected", "scored")
        for column, edit in (
            ("iqs_tokens", rows_of(table, iqs_tokens=first(7))),
            ("iqs_truncated", rows_of(table, iqs_truncated=first(True))),
            ("iqs_status", rows_of(table, iqs_status=first("tool_call"))),
            ("cluster_distance", rows_of(table, cluster_distance=first(0.25))),
        )
    ),
    (rows_of("scored", embedding=far), "the column 'embedding' of scored does not have"),
    (rows_of("scored", iqs_status=first("fine")), "scored.parquet does not have the receipt's sha256"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "words"), EDITS)
def test_an_edit_is_reported_by_name(
    run: tuple[Path, Path], tmp_path: Path, edit: Callable[[Path], None], words: str
) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    edit(tmp_path / "out")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--source", str(source)])
    is_missing = "not in the receipt" in words or "no longer" in words  # nothing that is read differs
    if "no name" in words:
        assert done.exit_code == 2 and words in done.output
        return
    assert done.exit_code == (0 if is_missing else 1), done.output
    start = "not checked: " if is_missing else "mismatch: "
    assert [line for line in done.output.splitlines() if line.startswith(start) and words in line], done.output


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (in_receipt(scorer__model_id="me/better"), "the receipt's scorer.model_id is 'me/better'; its recipe says"),
        (in_receipt(embedder__model_id="me/better"), "the receipt's embedder.model_id is 'me/better'; its recipe says"),
        (in_json("report.json", clusters_by_score=99), "report.json has clusters_by_score 99; the rows give"),
        (both(iqs_tokens=first(7)), "has iqs_tokens 7; scored again"),
        (both(iqs_truncated=first(True)), "has iqs_truncated True; scored again, False"),
        (rows_of("scored", embedding=far), "source row 0 has another embedding than the text gives again"),
        (in_receipt(embedder__weights="sha256:0"), "the embedder's weights is"),
        (in_receipt(scorer__weights="sha256:0"), "the scorer's weights is"),
        (in_receipt(scorer__more="x"), "the scorer's more is None; the receipt says 'x'"),
    ],
)  # fmt: skip
def test_a_forged_receipt_does_not_hide_what_models_and_rows_give(
    run: tuple[Path, Path],
    tiny_iqs: str,
    tiny_embedder: str,
    tmp_path: Path,
    edit: Callable[[Path], None],
    words: str,
) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    forged(edit)(tmp_path / "out")
    found = verify(tmp_path / "out", source=source, rescore=24, scorer=tiny_iqs, embedder=tiny_embedder)
    [difference] = found.differences
    assert words in difference


def test_labels_of_other_names_are_other_labels(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    kinds = [i % 2 for i in range(24)]
    rows = short_rows().add_column("kind", kinds, feature=ClassLabel(names=["good", "bad"]))
    rows.to_parquet(tmp_path / "rows.parquet")
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder}
    curate(tmp_path / "rows.parquet", tmp_path / "out", **models, n1=5, k=3)
    assert verify(tmp_path / "out", source=tmp_path / "rows.parquet").matches

    def swap_labels(folder: Path) -> None:
        for name in ("selected", "scored"):
            table = Dataset.from_parquet(str(folder / f"{name}.parquet"), keep_in_memory=True)
            table.cast_column("kind", ClassLabel(names=["bad", "good"])).to_parquet(folder / f"{name}.parquet")

    forged(swap_labels)(tmp_path / "out")
    found = verify(tmp_path / "out", source=tmp_path / "rows.parquet")
    assert found.difference is not None and "names the labels of 'kind' otherwise than the source" in found.difference
    assert found.skipped == ("what comes after the last difference: the rows, the choice, the counts or the models",)


def test_without_models_it_says_what_only_they_can_tell(run: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    shutil.copy(source, tmp_path / "renamed.jsonl")
    forged(in_receipt(embedder__weights="sha256:0", template="paper", versions__torch="1.0"))(tmp_path / "out")
    replaced("notes.txt")(tmp_path / "out")
    found = verify(tmp_path / "out", source=tmp_path / "renamed.jsonl")
    assert found.matches
    skipped = "\n".join(found.skipped)
    for words in (
        "the scorer 'iqs",
        "template",
        "the embedder 'embedder",
        "`verify --rescore N` checks them",
        "versions",
    ):
        assert words in skipped
    assert "notes.txt: not in the receipt" in skipped
    assert "the receipt says 'rows.jsonl', and the rows are in" in skipped


def test_an_old_receipt_says_what_it_cannot_show(run: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = run
    shutil.copytree(out, tmp_path / "out")
    content = json.loads((out / "receipt.json").read_text())
    old = {name: value for name, value in content.items() if name not in DIGESTS} | {"format": 1}
    (tmp_path / "out" / "receipt.json").write_text(json.dumps(old))
    found = verify(tmp_path / "out", source=source)
    assert found.matches and found.skipped[0].startswith("digests: this receipt.json is of format 1, which has none")
    assert json.loads(Receipt.read(tmp_path / "out").to_json()) == old  # a push keeps it as it is


# --- files of equal path and time


def at_the_same_time(path: Path, write: Callable[[], object]) -> None:
    """Write a file so that its path and its times of access and modification are those that it had."""
    before = path.stat()
    write()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["selected.parquet", "scored.parquet", "selected.json", "report.html", "source"])
def test_a_file_is_read_anew_although_path_and_time_are_equal(
    run: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    shutil.copytree(run[1], out)
    shutil.copy(run[0], source)
    path = source if name == "source" else out / name
    for each in (path, source):
        os.utime(each, (1e9, 1e9))  # long ago, as files in images have it
    assert verify(out, source=source).matches

    def forge() -> None:
        if path.suffix == ".parquet":
            change(out, path.stem, output=first("better"))
        else:
            path.write_bytes(path.read_bytes().replace(b"sea", b"see").replace(b"Pool", b"pool"))

    at_the_same_time(path, forge)
    assert path.stat().st_mtime == 1e9
    found = verify(out, source=source)
    wanted = "the source has the sha256" if name == "source" else f"{name} does not have the receipt's sha256"
    assert [words for words in found.differences if wanted in words], found.differences
    if path.suffix == ".parquet":
        assert "row 0, column 'output': 'better'" in str(found.difference)


def broken(name: str, text: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / name).write_text(text)

    return apply


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (in_receipt(counts={}), "receipt.json", "counts.rows is missing; a receipt has an integer there"),
        (in_receipt(counts__rows="many"), "receipt.json", "counts.rows is 'many'"),
        (in_receipt(recipe=None), "receipt.json", "recipe is None; a receipt has a record there"),
        (in_receipt(recipe__n1="many"), "receipt.json", "its recipe cannot be read: n1='many'"),
        (in_receipt(recipe__columns=3), "receipt.json", "its recipe cannot be read"),
        (in_receipt(source=None), "receipt.json", "source is None; a receipt has a record there"),
        (in_receipt(source={"kind": "file"}), "receipt.json", "source.name is missing"),
        (in_receipt(source={"kind": "air"}), "receipt.json", "source.kind is 'air'"),
        (in_receipt(scorer={}), "receipt.json", "scorer.model_id is missing"),
        (broken("receipt.json", "3"), "receipt.json", "holds a int, not a record"),
        (broken("receipt.json", "{"), "receipt.json", "is not JSON"),
        (broken("report.json", "{}"), "report.json", "is not a report"),
        (broken("report.json", "3"), "report.json", "is not a report"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_are_named(
    run: tuple[Path, Path], tmp_path: Path, spoil: Callable[[Path], None], name: str, message: str
) -> None:
    source, out = run
    folder = tmp_path / "out"
    shutil.copytree(out, folder)
    spoil(folder)
    done = CliRunner().invoke(app, ["verify", str(folder), "--source", str(source)])
    assert done.exit_code == 2, done.output  # 1 is a mismatch
    assert str(folder) in done.output and name in done.output and message in done.output


def test_a_changed_source_and_a_missing_one(run: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = run
    other = tmp_path / "rows.jsonl"
    other.write_text(source.read_text().replace("sea", "see"))
    assert "the source has the sha256" in str(verify(folder, source=other).difference)
    with pytest.raises(ValueError, match=r"source was a file 'rows.jsonl'; say where it is: .*--source FILE"):
        verify(folder)
    with pytest.raises(FileNotFoundError, match="no such file"):
        verify(folder, source=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"these were folders.*scorer=\.\.\. \(--scorer\)"):
        verify(folder, source=source, rescore=1)
    with pytest.raises(ValueError, match=r"rescore=-1"):
        verify(folder, source=source, rescore=-1)
    with pytest.raises(ValueError, match=r"seed=-1: pass a number that is not negative"):
        verify(folder, source=source, rescore=1, seed=-1, scorer=str(source))
    with pytest.raises(ValueError, match=r"has no selected\.parquet"):
        verify(tmp_path)


def test_another_scorer_is_not_taken_for_the_receipts(run: tuple[Path, Path], make_tiny_iqs: Any) -> None:
    source, folder = run
    with pytest.raises(ValueError, match="has the digest"):
        verify(folder, source=source, rescore=1, scorer=make_tiny_iqs(seed=5))


@pytest.mark.parametrize("kind", ["memory", "folder", "chats", "marked", "own index", "paper"])
def test_other_sources_and_recipes_match(kind: str, tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 5, "k": 3}
    rows = as_chats(short_rows()) if kind == "chats" else short_rows()
    given: Any = tmp_path / "rows.jsonl"
    if kind == "marked":
        rows = Dataset.from_list([*rows.to_list(), {"instruction": None, "input": "", "output": "x"}])
        settings["on_invalid"] = "mark"
    if kind == "own index":
        rows = rows.add_column("key", [f"k{i}" for i in range(24)])
        settings |= {"index_column": "key", "n2": 3, "seed": 7}
    if kind == "paper":
        settings["procedure"] = "paper"
    rows.to_json(given)
    if kind == "folder":
        given = tmp_path / "rows"
        rows.save_to_disk(given)
    curate(rows if kind == "memory" else given, tmp_path / "out", **settings)
    found = verify(tmp_path / "out", source=given, rescore=5, scorer=tiny_iqs)
    assert found.matches, found.difference
    assert len(found.checked) == 10
    assert any(words.startswith("the embedder 'embedder") for words in found.skipped)


def test_sources_in_other_places_match(tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    """Verify several files, slices, rows that a user selected before, and names that look like patterns."""
    rows, folder = short_rows(), tmp_path / "rows[1]"
    parts = [folder / "b.jsonl", folder / "a.jsonl"]
    folder.mkdir()
    for part, wanted in zip(parts, (range(10), range(10, 24)), strict=True):
        rows.select(wanted).to_json(part)
    chosen = rows.shuffle(seed=1).filter(lambda row: len(row["output"]) % 5)
    chosen.to_json(tmp_path / "chosen.jsonl")
    settings: dict[str, Any] = {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 3, "k": 2}
    pattern = f"{tmp_path}/rows*/*.jsonl"
    for name, source, again, more in (
        ("list", parts, parts, {}),
        ("pattern", pattern, pattern, {"glob": True}),
        ("slice", folder, folder, {"split": "train[4:]"}),
        ("chosen", chosen, tmp_path / "chosen.jsonl", {}),
    ):
        out = tmp_path / f"out[{len(name)}]"
        curate(source, out, **settings, **more)
        found = verify(out, source=again)
        assert found.matches, (name, found.difference)
        selected = Dataset.from_parquet(str(tmp_path / f"out[[]{len(name)}]" / "selected.parquet"))
        numbered = rows if name != "slice" and name != "pattern" else rows.select([*range(10, 24), *range(10)])
        assert [numbered[i]["output"] for i in selected["source_index"][:]] == selected["output"][:], name
        shutil.rmtree(out)
    with pytest.raises(ValueError, match="The source was several files; say where"):
        curate(parts, tmp_path / "out", **settings)
        verify(tmp_path / "out")
    found = verify(tmp_path / "out", source=parts[::-1])
    assert found.difference is not None and found.difference.startswith("the source has the sha256")


def test_rows_that_were_chosen_before_are_compared_by_content(
    tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    chosen = short_rows().select([5, 3, 20, 8, 13, 1, 2, 11])
    chosen.to_json(tmp_path / "chosen.jsonl")
    curate(chosen, tmp_path / "out", scorer=tiny_iqs, embedder=tiny_embedder, n1=3, k=2)
    change(tmp_path / "out", "scored", output=first("better"))
    found = verify(tmp_path / "out", source=tmp_path / "chosen.jsonl")
    assert found.difference == "scored does not fit the source: row 0 is not in the source, or is there less often"


def test_a_result_is_read_from_its_own_folder(run: tuple[Path, Path], tmp_path: Path) -> None:
    """Read `out[1]`, for which `datasets` would read `out1`."""
    source, out = run
    for name in ("out[1]", "out1"):
        shutil.copytree(out, tmp_path / name)
    change(tmp_path / "out1", "selected", output=first("OTHER"))
    assert verify(tmp_path / "out[1]", source=source).matches
    assert not verify(tmp_path / "out1", source=source).matches


@pytest.mark.slow
def test_a_pushed_selection_is_verified_from_the_hub(
    hub: Hub, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.parquet"
    short_rows().to_parquet(rows)
    header = b"---\nlicense: cc-by-4.0\nlicense_link: somewhere\nlanguage:\n- de\n---\n# Rows\n"
    source = hub.commit("you/rows", {"data/train-00000-of-00001.parquet": rows.read_bytes(), "README.md": header})
    command = "from car_datasets.cli import app\napp()"
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--n1", "5", "--k", "3", "--duplicates", "keep"]
    hub.run(command, "curate", "you/rows", "--output", tmp_path / "out", *models, "--push", "me/car", check=True)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    assert receipt["source"] == {"kind": "hub", "id": "you/rows", "revision": source}
    card = hub.repo("me/car").files()["README.md"].decode()
    link = f"license_link: https://huggingface.co/datasets/you/rows/blob/{source}/somewhere"
    for line in ("license: cc-by-4.0", link, "- de", "source_datasets:\n- you/rows", "n<1K"):
        assert line in card
    hub.commit("you/rows", {"data/train-00000-of-00001.parquet": b"no longer what it was"})
    done = hub.run(command, "verify", "me/car", "--rescore", "9", "--scorer", tiny_iqs, check=True)
    assert done.stdout.splitlines()[-1] == "match" and len(done.stdout.splitlines()) == 16
    hub.run(command, "push", tmp_path / "out", "me/small", "--also", "none", check=True)
    done = hub.run(command, "verify", "me/small", check=True)
    assert "not checked: the choice, the counts and the pool: there is no split 'scored'" in done.stdout
    change(tmp_path / "out", "scored", iqs_score=lambda v: [9.0 if x == min(v) else x for x in v])
    done = hub.run(command, "push", tmp_path / "out", "me/car")
    assert done.returncode == 2 and "scored.parquet does not have the receipt's sha256" in done.stderr
    scored = hashlib.sha256((tmp_path / "out" / "scored.parquet").read_bytes()).hexdigest()
    in_receipt(**{"files__scored.parquet": scored})(tmp_path / "out")  # a forger's receipt
    hub.run(command, "push", tmp_path / "out", "me/car", check=True)
    done = hub.run(command, "verify", "me/car")
    assert done.returncode == 1 and "mismatch: selected, row 0, is source row" in done.stdout
    assert hub.run(command, "verify", "you/rows").returncode == 2
    assert hub.run(command, "verify", "you/nothing").returncode == 2


@pytest.mark.slow
def test_a_hub_that_fails_is_no_mismatch(hub: Hub, run: tuple[Path, Path]) -> None:
    source, folder = run
    command = "import time\ntime.sleep = lambda _: None\nfrom car_datasets.cli import app\napp()"
    hub.run(command, "push", folder, "me/car", check=True)
    arguments = ("verify", "me/car", "--source", source)

    def failing(place: str, **options: Any) -> str:
        hub.fault("GET|HEAD", place, times=1000, **options)
        done = hub.run(command, *arguments, env={"HF_HOME": str(hub.folder / f"home-{hub.count('GET', '')}")})
        hub.mend()
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        return done.stderr.strip().splitlines()[-1]

    for place in ("/large/", "/resolve/", "/api/datasets/me/car"):
        for fault in ({"kind": "drop"}, {"status": 503}):
            assert "the Hub could not be asked" in failing(place, **fault), (place, fault)
    assert "'me/car', split 'selected': the Hub refuses (403" in failing("/large/", status=403)
    hub.fault("GET|HEAD", "/large/", kind="drop")  # once
    done = hub.run(command, *arguments, check=True)
    assert done.stdout.splitlines()[-1] == "match"
    for wrong, message in (
        ({"token": "hf_wrong"}, "the Hub does not know your token (401)"),
        ({"token": hub.other_token}, "Check the spelling"),
    ):
        done = hub.run(command, *arguments, **wrong)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr[-2000:]
    done = hub.run(command, *arguments, "--revision", "nope")
    assert done.returncode == 2 and "'me/car' has no revision 'nope'" in done.stderr.splitlines()[-1]
