"""Rows that are marked on the way through `curate`, `select` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import Recipe, curate, verify
from car_datasets.cli import app
from car_datasets.curation import made_by
from car_datasets.marking import ready_to_select
from car_datasets.receipt import Receipt

TASKS = ("Name a river in", "Describe the weather of", "Write a short poem about", "List three dishes from")
PLACES = ("Norway", "Peru", "Kenya", "Japan", "Chile", "Ghana", "Nepal", "Spain", "Malta", "Oman")


def records() -> list[dict[str, Any]]:
    """Return 40 different rows of two sources, and two copies of the first."""
    rows = [
        {
            "instruction": f"{task} {place}.",
            "output": f"{place} has much that one could say of it, and number {7 * i + 3 * j} is its {task.split()[-2]} answer.",
            "source": "poems" if "poem" in task else "facts",
            "gold": (i, j) == (2, 5),
        }
        for i, task in enumerate(TASKS)
        for j, place in enumerate(PLACES)
    ]
    return [
        *rows,
        {**rows[0], "source": "copies"},
        {**rows[0], "output": rows[0]["output"].upper(), "source": "copies"},
    ]


def text_of(row: dict[str, Any]) -> dict[str, str]:
    return {name: row[name] for name in ("instruction", "output")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows, rows to drop, an evaluation set and examples."""
    folder, rows = tmp_path_factory.mktemp("marks"), records()
    items = [{"question": rows[12]["output"], "answer": "None."}]
    files = {"rows": rows, "drop": map(text_of, rows[30:32]), "eval": items, "like": map(text_of, rows[20:22])}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def settings_of(folder: Path, tiny_iqs: str, tiny_embedder: str, **more: Any) -> dict[str, Any]:
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder, "k": 4}
    return {
        **models,
        "keep": "gold",
        "drop": str(folder / "drop.jsonl"),
        "against": (str(folder / "eval.jsonl"),),
        **more,
    }


def test_marks_are_made_kept_in_the_receipt_and_verified(
    folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    settings = settings_of(folder, tiny_iqs, tiny_embedder, budget=10, quota="source=poems:0.4")
    made = curate(folder / "rows.jsonl", tmp_path / "out", **settings)
    assert made.selected["source"][:].count("poems") == 4
    chosen = set(made.selected["source_index"][:])
    assert 25 in chosen and not chosen & {12, 30, 31} and len(chosen & {0, 40, 41}) <= 1
    assert dict(zip(made.selected["source_index"], made.selected["selected_by"], strict=True))[25] == "pin"
    receipt = Receipt.read(tmp_path / "out")
    # The best of three equal rows stays.
    assert (
        receipt.counts["excluded"] == {"drop": 2, "contaminated": 1, "duplicate": 2} and receipt.counts["pinned"] == 1
    )
    text = receipt.to_json()
    assert str(folder) not in text and "drop.jsonl@" in text and "eval.jsonl@" in text
    assert made_by(receipt, str(folder / "rows.jsonl"), Recipe(**settings))
    found = verify(tmp_path / "out", source=folder / "rows.jsonl")
    assert found.matches, found.differences
    begins = {words.split(":")[0] for words in found.skipped}
    assert begins >= {"duplicates", "contamination", "drop"} and "keep" not in begins
    # A file that has changed since is another one.
    changed = tmp_path / "drop.jsonl"
    changed.write_text((folder / "drop.jsonl").read_text().replace("number", "figure"))
    assert not made_by(receipt, str(folder / "rows.jsonl"), Recipe(**settings).changed(drop=str(changed)))


def test_a_receipt_of_before_says_nothing_of_duplicates(
    folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder, "k": 4}
    curate(folder / "rows.jsonl", tmp_path / "out", n1=41, duplicates="keep", **models)
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text())
    new = [name for name in receipt["recipe"] if name not in ("n1", "budget") and getattr(Recipe(), name) in (None, ())]
    receipt["recipe"] = {name: value for name, value in receipt["recipe"].items() if name not in new or value}
    del receipt["recipe"]["duplicates"], receipt["recipe"]["rule"]
    known = Receipt(**receipt)
    (tmp_path / "out" / "receipt.json").write_text(known.sealed(known.files, known.columns).to_json())
    assert verify(tmp_path / "out", source=folder / "rows.jsonl").matches
    assert not made_by(Receipt.read(tmp_path / "out"), str(folder / "rows.jsonl"), Recipe(n1=41, **models))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"budget_tokens": 300, "within": "kind"}, {"score", "cluster", "both", "pin"}),
        ({"rule": "gain", "budget": 8}, {"gain", "pin"}),
        ({"like": "like.jsonl", "budget": 6, "allow_worse": True}, {"like", "pin"}),
    ],
    ids=["tokens", "gain", "like"],
)
def test_other_rules_and_budgets(
    more: dict[str, Any], expected: set[str], folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    if "like" in more:
        more = {**more, "like": str(folder / more["like"])}
    made = curate(folder / "rows.jsonl", tmp_path / "out", **settings_of(folder, tiny_iqs, tiny_embedder, **more))
    assert set(made.selected["selected_by"][:]) <= expected and "pin" in made.selected["selected_by"][:]
    if "budget_tokens" in more:
        assert sum(made.selected["iqs_tokens"][:]) <= 300 and "kind" in made.scored.column_names
    if "like" in more:
        assert {20, 21} <= set(made.selected["source_index"][:])
    found = verify(tmp_path / "out", source=folder / "rows.jsonl")
    assert found.matches, found.differences


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"within": "sourse"}, "no column 'sourse'"),
        ({"quota": "source=plays:0.5"}, "no row has 'plays' in the column 'source'"),
        ({"quota": "kind=plays:0.5"}, "no row has 'plays' in the column 'kind'"),
        ({"keep": "no-such.jsonl"}, "neither a column of the data"),
        ({"keep": "gold", "budget": 0}, "budget=0"),
        ({"keep": "gold", "budget_tokens": 9}, r"budget_tokens=9 is below the \d+ tokens of 1 row to keep"),
        ({"balance": "output"}, "names rows, and not groups"),
        ({"like": "no-such.jsonl"}, "no-such.jsonl"),
        ({"against": ("no-such.jsonl",)}, "no-such.jsonl"),
        ({"budget_tokens": "1k", "budget_tokenizer": "/no/such"}, "has no tokenizer.json"),
        ({"drop": "all"}, "drop='all' names every row"),
        ({"drop": "empty.json"}, r"drop='empty.json': .* is an empty list"),
        ({"like": "empty.json"}, r"like='empty.json': .* is an empty list"),
        ({"keep": "gold", "index_column": "id"}, r"has the column\(s\) \['pinned'\] already"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_scored(
    settings: dict[str, Any], words: str, tmp_path: Path, tiny_iqs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from car_datasets.stages import Pipeline

    monkeypatch.chdir(tmp_path)
    Path("empty.json").write_text("[]")
    monkeypatch.setattr(Pipeline, "score", lambda *_, **__: pytest.fail("rows were scored"))
    taken = {"pinned": 1} if "index_column" in settings else {}
    rows = [{**row, **taken, "all": True, "id": i} for i, row in enumerate(records())]
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        curate(rows, None, scorer=tiny_iqs, **settings)


def test_marks_do_not_make_rows_be_scored_again(
    folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from car_datasets import QualityScorer, TextEmbedder

    models = {"scorer": tiny_iqs, "embedder": tiny_embedder, "k": 4, "n1": 5}
    rows = tmp_path / "rows.jsonl"  # a file of its own, whose rows no other test has scored
    rows.write_text((folder / "rows.jsonl").read_text().replace("much", "much more"))
    scored = curate(rows, None, **models).scored
    for stage, reads in ((QualityScorer, "score_texts"), (TextEmbedder, "embed_texts")):
        monkeypatch.setattr(stage, reads, lambda *_, **__: pytest.fail("rows were read by a model again"))
    more = settings_of(folder, tiny_iqs, tiny_embedder, within="kind", n1=5)
    del more["drop"]  # its rows are found by their content, which differs here
    marked = curate(rows, None, **more)
    assert marked.scored["iqs_score"][:] == scored["iqs_score"][:]
    assert "pin" in marked.selected["selected_by"][:]


def test_examples_are_embedded_by_the_model_of_the_pool(
    folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    scored = curate(
        folder / "rows.jsonl", None, n1=5, scorer=tiny_iqs, embedder=tiny_embedder, k=4, keep_embeddings=True
    ).scored
    ready = Recipe(n1=5, like=str(folder / "like.jsonl"), embedder=tiny_embedder)
    ranks = ready_to_select(ready, scored)["like_rank"][:]
    assert ranks[20] <= 2
    named = {"instruction": "asked", "output": "said"}
    examples = [json.loads(line) for line in (folder / "like.jsonl").read_text().splitlines()]
    renamed = [{named.get(key, key): value for key, value in row.items()} for row in examples]
    (tmp_path / "like.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    columns = {"instruction": "asked", "response": "said"}
    changed = ready.changed(columns=columns, like=str(tmp_path / "like.jsonl"))
    assert ready_to_select(changed, scored.rename_columns(named))["like_rank"][:] == ranks
    vectors = np.random.default_rng(0).normal(size=(len(scored), 32)).astype(np.float32)
    other = scored.remove_columns("embedding").add_column("embedding", [None] * 4 + vectors.tolist()[4:])
    with pytest.raises(ValueError, match=f"not those that {tiny_embedder} gives"):
        ready_to_select(ready, other)


def test_select_marks_what_it_is_told_to(folder: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    models = {"scorer": tiny_iqs, "embedder": tiny_embedder, "k": 4}
    scored = curate(folder / "rows.jsonl", None, n1=5, duplicates="keep", **models).scored
    scored.to_parquet(tmp_path / "scored.parquet")
    # The tokenizer of the scorer, named by its folder.
    options = ["--keep", "gold", "--drop", str(folder / "drop.jsonl"), "--against", str(folder / "eval.jsonl")]
    options += ["--duplicates", "only-exact", "--balance", "source", "--budget-tokens", "0.4k"]
    options += ["--budget-tokenizer", tiny_iqs, "--allow-worse"]
    done = CliRunner().invoke(
        app, ["select", str(tmp_path / "scored.parquet"), "--output", str(tmp_path / "chosen.parquet"), *options]
    )
    assert done.exit_code == 0, done.output
    chosen = Dataset.from_parquet(str(tmp_path / "chosen.parquet"))
    rows = set(chosen["source_index"][:])
    assert 25 in rows and not {12, 30, 31} & rows and len({0, 40, 41} & rows) <= 1
    assert sum(chosen["budget_tokens"][:]) <= 400
