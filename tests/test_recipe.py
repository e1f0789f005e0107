"""recipe.py: the entire pipeline, its files, and that every mistake is found before the first model call."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets, load_dataset

from car_datasets import QualityScorer, Receipt, Recipe, TextEmbedder, curate, verify
from car_datasets.curation import Curated, made_by
from car_datasets.loading import schemas
from car_datasets.reporting.plots import PLOT_FILES
from car_datasets.results import CURATED_FILES, RESULT_FILES
from car_datasets.selection.procedures import PROCEDURES, Amounts, Procedure
from car_datasets.stages import resolve
from car_datasets.utils import digests, revisions
from car_datasets.utils.settings import is_integer

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if not path.name.startswith(("train_", "rubric_")))
SCORED = ["iqs_score", "iqs_tokens", "iqs_truncated", "iqs_status", "embedding", "cluster", "cluster_distance"]
CHOSEN = ["selected_by", "score_rank", "cluster_rank"]


@pytest.fixture(scope="module")
def tiny(tiny_iqs: str, tiny_embedder: str) -> dict[str, Any]:
    """Return settings for 24 rows on the tiny models."""
    return {"scorer": tiny_iqs, "embedder": tiny_embedder, "n1": 5, "k": 3, "duplicates": "keep"}


def short_rows(count: int = 24) -> Dataset:
    words = ["red", "green", "blue", "sea", "poem", "list", "sum", "name", "good", "bad", "short", "input"]
    rows = [
        {
            "instruction": f"Write a {words[i % 12]} {words[(5 * i + 1) % 12]}.",
            "input": "" if i % 3 else f"the {words[(7 * i) % 12]}",
            "output": " ".join(words[(i * j) % 12] for j in range(i % 7)),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what comes out


@pytest.fixture(scope="module")
def result(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Curated, Path]:
    folder = tmp_path_factory.mktemp("result") / "made" / "anew"
    return curate(short_rows(), folder, **tiny), folder


def test_result_is_whole_files_and_nothing_else(result: tuple[Curated, Path]) -> None:
    _, folder = result
    assert sorted(files_of(folder)) == sorted(CURATED_FILES)


def test_scored_file_has_all_rows_and_the_promised_columns(result: tuple[Curated, Path]) -> None:
    curated, folder = result
    scored = Dataset.from_parquet(str(folder / "scored.parquet"))
    assert scored.column_names == ["instruction", "input", "output", "source_index", *SCORED]
    assert scored.select_columns(["instruction", "input", "output"]).to_list() == short_rows().to_list()
    assert scored["source_index"][:] == list(range(24))
    assert scored.to_list() == curated.scored.to_list()
    assert {name: scored.features[name].dtype for name in ("iqs_score", "cluster")} == {
        "iqs_score": "float32",
        "cluster": "int32",
    }


def test_selected_file_holds_the_best_rows_with_their_reasons(result: tuple[Curated, Path]) -> None:
    (selected, scored, _), folder = result
    read = Dataset.from_parquet(str(folder / "selected.parquet"))
    assert read.to_list() == selected.to_list()
    assert read.column_names == [c for c in scored.column_names if c != "embedding"] + CHOSEN
    best = np.argsort(-np.array(scored["iqs_score"][:]), kind="stable")
    assert set(best[:5].tolist()) <= set(read["source_index"][:])
    assert read["iqs_score"][:] == sorted(read["iqs_score"][:], reverse=True)
    for row in read:
        assert row["instruction"] == short_rows()[row["source_index"]]["instruction"]
        assert (row["selected_by"] == "cluster") == (row["score_rank"] > 5)
        assert row["score_rank"] == best.tolist().index(row["source_index"]) + 1
    assert set(read["cluster"][:]) == set(scored["cluster"][:])


def test_selected_json_is_a_list_of_rows_as_the_original_writes_it(result: tuple[Curated, Path]) -> None:
    (selected, _, _), folder = result
    rows = json.loads((folder / "selected.json").read_text(encoding="utf-8"))
    ours = [
        {{"score": "iqs_score", "label": "cluster"}.get(key, key): value for key, value in row.items()} for row in rows
    ]
    assert [{**row, "cluster": int(row["cluster"])} for row in ours] == selected.to_list()
    assert all(isinstance(row["label"], str) for row in rows)
    assert all(list(row)[:3] == ["instruction", "input", "output"] for row in rows)
    again = Dataset.from_json(str(folder / "selected.json"))
    assert again["output"][:] == selected["output"][:]


def test_report_files_are_the_report(result: tuple[Curated, Path]) -> None:
    (selected, _, report), folder = result
    assert json.loads((folder / "report.json").read_text(encoding="utf-8")) == report.to_dict()
    assert (folder / "report.md").read_text(encoding="utf-8") == report.to_markdown()
    assert (report.rows_in, report.rows_scored, report.selected.rows) == (24, 24, len(selected))
    assert report.marked == {"empty_response": 4}


def test_plots_and_page_are_those_of_the_report(result: tuple[Curated, Path], tmp_path: Path) -> None:
    (selected, scored, report), folder = result
    for path in report.plot(tmp_path, scored, selected):
        assert path.read_bytes() == (folder / "plots" / path.name).read_bytes()
    head = Receipt.read(folder).head()
    assert (folder / "report.html").read_text(encoding="utf-8") == report.to_html(scored, selected, head=head)


def test_without_matplotlib_all_but_the_plots_is_written(
    tiny: dict[str, Any], tmp_path: Path, no_matplotlib: None, caplog: pytest.LogCaptureFixture
) -> None:
    curate(short_rows(), tmp_path, **tiny)
    assert sorted(files_of(tmp_path)) == sorted(set(CURATED_FILES) - {f"plots/{name}" for name in PLOT_FILES})
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("car_datasets")]
    assert said == "No plots were drawn: they need matplotlib, pip install 'car-datasets[plots]'."


def test_equal_input_gives_an_equal_selection(result: tuple[Curated, Path], tiny: dict[str, Any]) -> None:
    again = curate(short_rows(), None, Recipe(**tiny))
    assert again.selected.to_list() == result[0].selected.to_list()
    assert again.report == result[0].report


def test_settings_by_name_win_over_the_recipe(tiny: dict[str, Any]) -> None:
    selected, scored, report = curate(
        short_rows(), None, Recipe(**tiny), n1=0, n2=2, k=4, keep_embeddings=False, allow_worse=True
    )
    assert "embedding" not in scored.column_names
    assert set(selected["selected_by"][:]) == {"cluster"}
    assert report.clusters == 4


@pytest.mark.parametrize("budget", [3, 7, 24])
def test_budget_is_met_exactly(budget: int, tiny: dict[str, Any]) -> None:
    assert (
        len(curate(short_rows(), None, **{**tiny, "n1": None, "budget": budget, "allow_worse": True}).selected)
        == budget
    )


def test_text_outside_ascii_and_odd_columns_survive(tiny: dict[str, Any], tmp_path: Path) -> None:
    extra = {"note": ["Größe – 😀"] * 24, "vector": [[1.5, 2.0]] * 24, "maybe": [None, 1] * 12}
    rows = concatenate_datasets([short_rows(), Dataset.from_dict(extra)], axis=1)
    selected = curate(rows, tmp_path / "out", **tiny).selected
    assert "Größe – 😀" in (tmp_path / "out" / "selected.json").read_text(encoding="utf-8")
    read = json.loads((tmp_path / "out" / "selected.json").read_text(encoding="utf-8"))
    assert [row["maybe"] for row in read] == [rows[i]["maybe"] for i in selected["source_index"]]
    assert read[0]["vector"] == [1.5, 2.0]


def test_one_row_is_curated(tiny: dict[str, Any]) -> None:
    selected, _, report = curate(short_rows(1), None, **{**tiny, "n1": 1, "k": "sqrt"})
    assert (len(selected), report.selected.rows) == (1, 1)


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow"])
@pytest.mark.parametrize("schema", ["alpaca", "messages"])
def test_format_of_the_dataset_makes_no_difference(kind: str, schema: str, tiny: dict[str, Any]) -> None:
    rows = short_rows() if schema == "alpaca" else as_chats(short_rows())
    formatted = curate(rows.with_format(kind), None, **tiny)
    assert formatted.selected.with_format(None).to_list() == curate(rows, None, **tiny).selected.to_list()


# --- chats


def as_chats(rows: Dataset) -> Dataset:
    chats = [
        [
            {"role": "system", "content": "You write short answers."},
            {"role": "user", "content": f"{row['instruction']} {row['input']}"},
            {"role": "assistant", "content": row["output"]},
            {"role": "user", "content": "And the sum?"},
            {"role": "assistant", "content": f"a {row['output']} b"},
        ][: 5 if i % 2 else 3]
        for i, row in enumerate(rows)
    ]
    return Dataset.from_dict({"messages": chats})


def test_chats_end_to_end(tiny: dict[str, Any], tmp_path: Path) -> None:
    chats = as_chats(short_rows())
    lines = tmp_path / "chats.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    selected, scored, _ = curate(lines, tmp_path / "out", **tiny)
    assert json.loads((tmp_path / "out" / "selected.json").read_text())[0]["messages"] == selected["messages"][0]
    system, ask = "You write short answers.", short_rows()["instruction"][1]
    assert short_rows()[1] == {"instruction": ask, "input": "", "output": "red"}
    later = f"{ask} red And the sum?"
    texts = [f"Instruction: {system} {ask} Response: red", f"Instruction: {system} {later} Response: a red b"]
    first, second = QualityScorer(tiny["scorer"]).score_texts(texts).scores
    assert scored["iqs_score"][1] == pytest.approx((first + second) / 2, abs=1e-5)
    least = curate(chats, None, **{**tiny, "turns": "min"}).scored
    assert least["iqs_score"][1] == pytest.approx(min(first, second), abs=1e-5)


# --- the embedded default


@pytest.fixture(scope="module")
def by_default(sample_rows: list[dict[str, Any]]) -> Curated:
    """Curate rows of the sample by the default scorer, behind more unscorable rows than one batch of `.map` takes."""
    names = ("instruction", "input", "output")
    texts = [{name: row[name] for name in names} for row in sample_rows[::12]]
    long = {**texts[0], "output": " ".join(row["output"] for row in texts)}  # above the embedder's 256 tokens
    nothing = dict.fromkeys(names)
    rows = [nothing] * 1001 + [*texts, long]
    return curate(Dataset.from_list(rows), None, on_invalid="mark", n1=8, k=4)


def test_default_reads_on_after_a_thousand_rows_without_text(
    by_default: Curated, sample_rows: list[dict[str, Any]]
) -> None:
    count = len(sample_rows[::12]) + 1
    selected, scored, report = by_default
    assert report.rejected == {"null": 1001}
    assert (report.rows_in, report.rows_scored) == (1001 + count, count)
    assert scored["iqs_score"][:1001] == scored["cluster"][:1001] == scored["embedding"][:1001] == [None] * 1001
    assert min(selected["source_index"][:]) >= 1001
    assert None not in scored["iqs_score"][1001:]


def test_one_pass_equals_the_two_stages_apart(by_default: Curated) -> None:
    rows = by_default.scored.select(range(1001, len(by_default.scored)))
    texts = rows.select_columns(["instruction", "input", "output"])
    scores = texts.map(QualityScorer(), batched=True, with_rank=True)["iqs_score"][:]
    vectors = texts.map(TextEmbedder(), batched=True, with_rank=True)["embedding"][:]
    assert np.abs(np.array(scores) - np.array(rows["iqs_score"][:])).max() < 1e-5
    assert np.abs(np.array(vectors) - np.array(rows["embedding"][:])).max() < 1e-5
    assert max(rows["iqs_tokens"][:]) > 256  # the embedder reads no further, the scorer does


@pytest.mark.parametrize("on_invalid", ["error", "mark"])
def test_one_run_makes_one_scorer_and_finds_the_schema_once(
    on_invalid: str, sample_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[str] = []
    read: list[str] = []
    ordinary, find_schema = QualityScorer.__post_init__, schemas.find_schema

    def counted(self: QualityScorer, token: str | None) -> None:
        made.append(self.model_id)
        ordinary(self, token)

    monkeypatch.setattr(QualityScorer, "__post_init__", counted)
    for module in [each for name, each in sys.modules.items() if name.startswith("car_datasets.")]:
        if getattr(module, "find_schema", None) is find_schema:

            def found(*given: Any, caller: str = module.__name__, **named: Any) -> Any:
                read.append(caller)
                return find_schema(*given, **named)

            monkeypatch.setattr(module, "find_schema", found)
    columns = ("instruction", "input", "output")
    rows = Dataset.from_list([{k: r[k] for k in columns} for r in sample_rows[:12]])
    curate(rows, tmp_path / "out", n1=4, k=2, allow_worse=True, on_invalid=on_invalid)
    assert made == [Recipe.scorer]
    # A stage gets batches and knows nothing of their dataset, so it finds the columns of each by itself.
    assert [caller for caller in read if not caller.startswith("car_datasets.scoring.")] == ["car_datasets.curation"]


def test_one_run_reads_each_weight_file_once_for_its_digest(
    sample_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hashed: list[Path] = []
    ordinary = digests._sha256
    monkeypatch.setattr(digests, "_sha256", lambda path: (hashed.append(path), ordinary(path))[1])
    digests._remembered_sha256.cache_clear()
    revisions.default_encoder_folder.cache_clear()
    rows = Dataset.from_list([{k: r[k] for k in ("instruction", "input", "output")} for r in sample_rows[:12]])
    curate(rows, tmp_path / "out", n1=4, k=2, allow_worse=True)
    weights = sorted(path.resolve() for path in hashed if path.name == "model.safetensors")
    folders = (revisions.default_scorer_folder(), revisions.default_encoder_folder())
    assert weights == sorted((folder / "model.safetensors").resolve() for folder in folders)


def test_a_resolved_recipe_has_its_revisions(tiny: dict[str, Any]) -> None:
    stages = resolve(Recipe(**tiny))
    assert stages.embedder is not None
    assert stages.recipe.scorer_revision == stages.scorer.revision
    assert stages.recipe.embedder_revision == stages.embedder.revision
    shared = resolve(Recipe())
    assert (shared.embedder, shared.scorer.embedding_column) == (None, "embedding")
    assert shared.scorer == QualityScorer(embedding_column="embedding", diagnostics=True)


# --- another procedure


def test_a_procedure_of_ones_own(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Select the best n1 rows by score alone; too many are refused before the models are called."""

    def check(rows: int, clusters: int, amounts: Amounts) -> None:
        if amounts.n1 > rows:
            raise ValueError(f"n1={amounts.n1} is above {rows}.")

    def select(pool: Dataset, amounts: Amounts, names: Any) -> Dataset:
        chosen = pool.sort(names.score, reverse=True).select(range(int(amounts.n1)))
        return (
            chosen.add_column("selected_by", ["score"] * len(chosen))
            .add_column("score_rank", list(range(1, len(chosen) + 1)))
            .add_column("cluster_rank", [0] * len(chosen))
        )

    monkeypatch.setitem(PROCEDURES, "toy", Procedure(check, select))
    selected, scored, report = curate(short_rows(), tmp_path / "out", procedure="toy", **tiny)
    assert sorted(files_of(tmp_path / "out")) == sorted(CURATED_FILES)
    assert selected["iqs_score"][:] == sorted(scored["iqs_score"][:], reverse=True)[:5]
    assert report.selected_by == {"score": 5, "cluster": 0, "both": 0}
    with pytest.raises(ValueError, match="n1=99 is above 24"):
        curate(short_rows(), procedure="toy", **{**tiny, "n1": 99})


# --- rows that cannot be scored


def test_marked_rows_are_counted_by_reason_and_never_selected(tiny: dict[str, Any], tmp_path: Path) -> None:
    chats = as_chats(short_rows())["messages"][:]
    bad = {0: None, 4: chats[4][:2], 9: [{"role": "wizard", "content": "x"}], 10: [], 11: None}
    pool = Dataset.from_dict({"messages": [bad.get(i, chat) for i, chat in enumerate(chats)]})
    selected, scored, report = curate(pool, tmp_path / "out", **{**tiny, "on_invalid": "mark", "n1": 19, "n2": 2})
    assert report.rejected == {"null": 2, "no_assistant_turn": 2, "unknown_role: wizard": 1}
    assert (report.rows_in, report.rows_scored, len(selected)) == (24, 19, 19)
    assert set(selected["source_index"][:]).isdisjoint(bad)
    for column in ("iqs_score", "embedding", "cluster", "cluster_distance"):
        assert [i for i, value in enumerate(scored[column]) if value is None] == sorted(bad)
    assert scored["iqs_status"][4] == "no_assistant_turn"
    assert "no_assistant_turn" in (tmp_path / "out" / "report.md").read_text()


def test_thousand_unscorable_rows_first(tiny: dict[str, Any]) -> None:
    good = short_rows(12)
    columns = {name: [None] * 1003 + good[name][:] for name in good.column_names}
    selected, scored, report = curate(Dataset.from_dict(columns), None, **{**tiny, "on_invalid": "mark"})
    assert report.rejected == {"null": 1003}
    assert min(selected["source_index"][:]) >= 1003
    assert scored["iqs_score"][1003:] == curate(good, None, **tiny).scored["iqs_score"][:]


def test_pool_without_any_scorable_row_is_refused(tiny: dict[str, Any]) -> None:
    pool = Dataset.from_dict({"instruction": [None] * 9, "output": ["a"] * 9})
    with pytest.raises(ValueError, match=r"cannot be scored"):
        curate(pool, None, **{**tiny, "on_invalid": "mark"})


# --- nothing is lost


def test_folder_that_holds_a_result_is_refused_and_left_as_it_is(
    result: tuple[Curated, Path], weightless: dict[str, Any]
) -> None:
    folder = result[1]
    before = files_of(folder)
    with pytest.raises(ValueError, match="already holds a result"):
        curate(short_rows(), folder, **weightless)
    assert files_of(folder) == before


@pytest.mark.parametrize("name", [name for name in RESULT_FILES if name != "README.md"])
def test_any_result_file_makes_a_folder_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"already holds a result .{name}.*Name another folder"):
        curate("no-such-source.json", tmp_path)  # refused before the source is opened
    assert files_of(tmp_path) == {name: b"mine"}


def test_other_files_in_the_folder_are_left_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    curate(short_rows(), tmp_path, **tiny)
    assert sorted(files_of(tmp_path)) == sorted([*CURATED_FILES, "notes.txt"])
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_readme_of_ones_own_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds a README\.md of its own.*Name a new folder"):
        curate("no-such-source.json", tmp_path, overwrite=True)
    assert files_of(tmp_path) == {"README.md": b"mine"}


def test_overwrite_replaces_a_complete_result_and_nothing_else(
    tiny: dict[str, Any], weightless: dict[str, Any], tmp_path: Path
) -> None:
    rows, folder = short_rows(), tmp_path / "out"
    curate(rows, folder, **{**tiny, "procedure": "paper"})  # with three more files
    (folder / "notes.txt").write_text("mine")
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"already holds a result.*overwrite=True \(--overwrite\)"):
        curate(rows, folder, **tiny)
    with pytest.raises(Exception, match=r"model\.safetensors"):  # fails while it scores
        curate(rows, folder, overwrite=True, **weightless)
    with pytest.raises(ValueError, match="lies in output_dir"):
        curate(folder / "selected.json", folder, overwrite=True, **tiny)
    assert files_of(folder) == before
    curate(rows, folder, overwrite=True, **tiny)
    curate(rows, tmp_path / "plain", **tiny)
    assert files_of(folder) == {**files_of(tmp_path / "plain"), "notes.txt": b"mine"}
    (folder / "receipt.json").unlink()  # no complete result any more
    with pytest.raises(ValueError, match="already holds a result"):
        curate(rows, folder, overwrite=True, **tiny)


def test_a_write_that_fails_leaves_the_old_result(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curate(short_rows(), tmp_path, **tiny)
    before = files_of(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("car_datasets.results.write_original", full)
    with pytest.raises(OSError, match="No space left"):
        curate(short_rows(), tmp_path, overwrite=True, **{**tiny, "k": 4})
    assert files_of(tmp_path) == before


def test_load_dataset_reads_the_selection_in_the_folder(result: tuple[Curated, Path], tmp_path: Path) -> None:
    (selected, scored, _), folder = result
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path))
    assert list(loaded) == ["selected"]
    assert loaded["selected"].to_list() == selected.to_list()
    pool = load_dataset(str(folder), "scored", split="scored", cache_dir=str(tmp_path))
    assert pool.to_list() == scored.to_list()


# --- how many rows


def test_an_n1_that_nobody_gave_is_half_of_a_small_pool_and_in_the_receipt(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    settings = {name: value for name, value in tiny.items() if name != "n1"}
    short_rows().to_json(tmp_path / "rows.jsonl")
    curated = curate(tmp_path / "rows.jsonl", tmp_path / "out", **settings)
    assert sum(curated.report.selected_by[name] for name in ("score", "both")) == 12
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.recipe["n1"] == 12
    assert "with n1 = 12: " in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert verify(tmp_path / "out", source=tmp_path / "rows.jsonl").matches
    assert made_by(receipt, str(tmp_path / "rows.jsonl"), Recipe(**settings))
    assert not made_by(receipt, str(tmp_path / "rows.jsonl"), Recipe(**settings, n1=13))


def test_a_budget_is_compared_with_the_clusters_that_can_have_rows(tiny: dict[str, Any]) -> None:
    pair = short_rows(2)
    rows = concatenate_datasets([pair] * 5)
    settings = {**tiny, "n1": None, "k": 5, "allow_worse": True}
    assert len(curate(rows, None, budget=3, **settings).selected) == 3
    with pytest.raises(ValueError, match="budget=1 must be between the 2 rows that the clusters take"):
        curate(rows, None, budget=1, **settings)


def test_the_later_of_n1_and_budget_replaces_the_other(tmp_path: Path) -> None:
    """Change a recipe, as an option of the command line changes that of a file."""
    (tmp_path / "recipe.yaml").write_text("n1: 7\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml", budget=9) == Recipe(budget=9)
    assert Recipe(budget=9).changed(n1=7) == Recipe(n1=7)
    with pytest.raises(ValueError, match="Leave one of the two out"):
        Recipe(n1=7).changed(n1=7, budget=9)


# --- everything is checked before the first model call


@pytest.fixture(scope="module")
def weightless(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return settings with a scorer that can be looked up but not loaded: whoever starts scoring fails in another way."""
    folder = tmp_path_factory.mktemp("weightless") / "iqs"
    shutil.copytree(tiny["scorer"], folder)
    (folder / "model.safetensors").unlink()
    return {**tiny, "scorer": str(folder)}


@pytest.mark.parametrize("recipe", [{"n1": 5}, "recipe.yaml"])
def test_a_recipe_that_is_none_is_refused(recipe: Any) -> None:
    with pytest.raises(ValueError, match=rf"recipe is a {type(recipe).__name__}; pass a Recipe"):
        curate(short_rows(), None, recipe)


def test_scorer_without_weights_fails_only_when_it_is_called(weightless: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"model\.safetensors"):
        curate(short_rows(), None, **weightless)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n1": -1}, "n1=-1 must be between 0 and the 24 rows"),
        ({"n1": 25}, "n1=25 must be between 0 and the 24 rows"),
        ({"n1": 2.5}, r"n1=2\.5: a fraction must lie between 0 and 1"),
        ({"n1": float("nan")}, "n1=nan"),
        ({"n1": "many"}, "n1='many'"),
        ({"n1": 0, "n2": 0}, "select no rows"),
        ({"n2": -1}, "n2=-1 must be between 0 and the 24 rows"),
        ({"n2": 25}, "n2=25 must be between 0 and the 24 rows"),
        ({"n2": 1.5}, r"n2=1\.5"),
        ({"budget": 0, "n1": None}, "budget=0 must be between"),
        ({"budget": 2, "n1": None}, "budget=2 must be between the 3 rows that the clusters take"),
        ({"budget": 25, "n1": None}, "budget=25 must be between .* the 24 rows"),
        ({"budget": 7.5}, r"budget=7\.5"),
        ({"budget": 7, "n1": 5}, "n1=5 and budget=7: with a budget, n1 follows from it"),
        ({"k": 0}, "k=0 must be 'sqrt' or a number between 1 and the 24 rows"),
        ({"k": 25}, "k=25 must be 'sqrt' or a number between 1 and the 24 rows"),
        ({"k": "many"}, "k='many' must be 'sqrt' or a number"),
        ({"explained_variance": 1.5}, r"explained_variance=1\.5 must lie in"),
        ({"n_init": 0}, "n_init=0 must be at least 1"),
        ({"projection": "lda"}, "projection='lda' is not known; choose one of"),
        ({"turns": "max"}, "turns='max' is not known; choose one of"),
        ({"template": "old"}, "template='old' is not known; choose one of"),
        ({"dtype": "int8"}, "dtype='int8' is not known; choose one of"),
        ({"on_invalid": "drop"}, "on_invalid='drop' is not known; choose one of"),
        ({"schema": "vicuna"}, "schema='vicuna' is not known"),
        ({"columns": {"instruction": "task", "response": "output"}}, r"Columns \['task'\] are not in the dataset"),
        ({"embedder": "/no/such/model"}, "model_id='/no/such/model': no such folder"),
        ({"embedder": "someone/no-such-model"}, "model_id='someone/no-such-model'"),
        ({"scorer": "someone/no-such-model"}, "model_id='someone/no-such-model'"),
        ({"scorer": "/no/such/model"}, "model_id='/no/such/model': no such folder"),
        ({"scorer_revision": "main"}, "not revision='main'"),
        ({"score_column": "cluster"}, "'cluster'"),
        ({"score_column": "embedding"}, "'embedding'"),
        ({"embedding_column": "iqs_tokens"}, "'iqs_tokens'"),
        ({"embedding_column": "cluster_distance"}, "'cluster_distance'"),
        ({"cluster_column": "iqs_score"}, "'iqs_score'"),
        ({"score_column": "selected_by"}, "'selected_by'"),
        ({"index_column": "iqs_score"}, "'iqs_score'"),
        ({"n3": 1}, "A recipe has no 'n3'"),
        ({"clusters_column": "c"}, "no 'clusters_column'; did you mean 'cluster_column'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_setting_that_cannot_work_is_refused_before_the_first_model_call(
    changes: dict[str, Any], message: str, weightless: dict[str, Any], tmp_path: Path
) -> None:
    # The Hub may not be asked here, which is no mistake in the setting; no less early, though.
    kind = ConnectionError if "someone/" in message else ValueError
    with pytest.raises(kind, match=message) as caught:
        curate(short_rows(), tmp_path / "out", **{**weightless, **changes})
    assert "model.safetensors" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_column": "cluster"}, r"\['cluster'\] are given to two new columns"),
        ({"score_column": "embedding"}, r"\['embedding'\] are given to two new columns"),
        ({"embedding_column": "iqs_tokens"}, r"\['iqs_tokens'\] are given to two new columns"),
        ({"embedding_column": "iqs_status"}, r"\['iqs_status'\] are given to two new columns"),
        ({"embedding_column": "cluster_distance"}, r"\['cluster_distance'\] are given to two new columns"),
        ({"score_column": "selected_by"}, r"\['selected_by'\] are given to two new columns"),
        ({"uncertainty": True, "cluster_column": "iqs_score_std"}, r"\['iqs_score_std'\] are given to two"),
        ({"embedding_column": "output"}, r"already has the column\(s\) \['output'\], which would be overwritten"),
        ({"uncertainty": True, "index_column": "iqs_score_std"}, r"already has the column\(s\) \['iqs_score_std'\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("models", [{}, {"scorer": "someone/no-such-model"}], ids=["default", "not on the Hub"])
def test_names_of_columns_are_checked_before_a_model_is_looked_up(
    changes: dict[str, Any], message: str, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check them with the default models, whose scorer adds the embedding itself, and with others."""
    monkeypatch.setattr("car_datasets.scoring.scorer.pin_model", lambda *_: pytest.fail("a model was looked up"))
    with pytest.raises(ValueError, match=message):
        curate(short_rows(), tmp_path / "out", n1=3, k=3, **models, **changes)
    assert not (tmp_path / "out").exists()


def test_scorer_of_another_kind_is_refused(tiny: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is a 'bert' model, not an IQS model"):
        curate(short_rows(), None, **{**tiny, "scorer": tiny["embedder"]})


@pytest.mark.parametrize("below", ["", "/out"], ids=["the folder is a file", "its parent is a file"])
def test_output_that_cannot_be_a_folder_is_refused_before_the_first_model_call(
    below: str, weightless: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ValueError, match=r"taken.* is a file"):
        curate(short_rows(), f"{tmp_path}/taken{below}", **weightless)


def test_bad_rows_are_refused_before_the_first_model_call(weightless: dict[str, Any]) -> None:
    rows = Dataset.from_dict({"instruction": ["a"] * 3000, "output": ["b"] * 2999 + [None]})
    with pytest.raises(ValueError, match=r"1 of 3000 rows cannot be scored: 1 null \(rows 2999\)"):
        curate(rows, None, **weightless)


@pytest.mark.parametrize("name", [*SCORED, *CHOSEN])
def test_column_that_a_stage_would_overwrite_is_refused_before_the_first_model_call(
    name: str, weightless: dict[str, Any]
) -> None:
    rows = short_rows().add_column(name, [0] * 24)
    with pytest.raises(ValueError, match=rf"already has the column\(s\) \['{name}'\].*which would be overwritten"):
        curate(rows, None, **weightless)


def test_options_that_the_refusal_names_make_room(tiny: dict[str, Any], tmp_path: Path) -> None:
    taken = {name: [name] * 24 for name in SCORED}
    rows = concatenate_datasets([short_rows(), Dataset.from_dict(taken)], axis=1)
    options = {"score_column": "new_score", "embedding_column": "new_vector", "cluster_column": "new_cluster"}
    with pytest.raises(ValueError, match="score_column=, embedding_column= or cluster_column="):
        curate(rows, None, **tiny)
    selected, scored, report = curate(rows, tmp_path / "out", **{**tiny, **options})
    assert set(selected["iqs_score"][:]) == {"iqs_score"}
    assert set(scored["embedding"][:]) == {"embedding"}
    plain = curate(short_rows(), None, **tiny)
    assert scored["new_score"][:] == plain.scored["iqs_score"][:]
    assert selected["source_index"][:] == plain.selected["source_index"][:]
    assert report == plain.report


# --- recipes


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(columns={"response": "answer", "instruction": "task"}, k=50, n1=0.05, seed=7, split="train"),
        Recipe(budget=70),
        Recipe(columns=(("instruction", "task"), ("response", "answer")), on_invalid="mark", keep_embeddings=False),
    ],
)
def test_recipe_survives_yaml(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe


def test_empty_recipe_is_the_default_and_changes_win(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# nothing yet\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == Recipe()
    (tmp_path / "recipe.yaml").write_text("n1: 7\nk: 3\n")
    assert Recipe.from_yaml(tmp_path / "recipe.yaml", k=4) == Recipe(n1=7, k=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_1: 5", "A recipe has no 'n_1'; did you mean 'n1'"),
        ("scorer_model: x", "no 'scorer_model'; did you mean 'scorer'"),
        ("zzz: 1", r"A recipe has no 'zzz'.*Known: .*'scorer'"),
        ("1: 2", "A recipe has no '?1"),
        ("- n1\n- n2", "holds a list, not `key: value` lines"),
        ("n1", "holds a str, not"),
        ("n1: [1", "recipe.yaml"),
    ],
)
def test_recipe_file_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_there_are_recipes() -> None:
    assert "default.yaml" in {path.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipe_parses_and_opens_with_its_purpose_and_command(path: Path) -> None:
    recipe = Recipe.from_yaml(path)
    assert {f.name for f in fields(recipe)} == {f.name for f in fields(Recipe)}
    comment = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert comment.startswith("# ")
    assert f"car-datasets curate alpaca_data.json --output out --config configs/{path.name}" in comment


def test_default_recipe_is_the_default() -> None:
    assert Recipe.from_yaml(ROOT / "configs" / "default.yaml") == Recipe()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"turns": [1]}, r"turns=\[1\] must be of the type str"),
        ({"scorer": None}, "scorer=None must be of the type str"),
        ({"score_column": 3}, "score_column=3"),
        ({"keep_embeddings": "no"}, "keep_embeddings='no' must be of the type bool"),
        ({"n1": True}, "n1=True"),
        ({"n1": 1.0}, "n1=1.0: a fraction must lie between 0 and 1"),
        ({"embedder_revision": "abc"}, "needs an embedder"),
        ({"columns": "foo"}, "columns='foo' must map roles to columns"),
    ],
)
def test_values_of_another_type_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curate(short_rows(), **settings)


def test_numbers_are_checked_against_the_rows_that_can_be_scored(tiny: dict[str, Any]) -> None:
    rows = short_rows().to_list()
    half = Dataset.from_list([{**row, "output": None if i % 2 else row["output"]} for i, row in enumerate(rows)])
    with pytest.raises(ValueError, match="n1=13 must be between 0 and the 12 rows"):
        curate(half, **{**tiny, "n1": 13, "on_invalid": "mark"})


def test_another_scorer_does_not_keep_the_tokenizer_of_the_one_before() -> None:
    paper = Recipe.from_yaml(ROOT / "configs" / "car_paper.yaml")
    assert paper.tokenizer is not None
    assert paper.changed(scorer="./mine").tokenizer is None
    assert paper.changed(scorer="./mine", tokenizer="./its").tokenizer == "./its"
    assert paper.changed(n1=5).tokenizer == paper.tokenizer
    assert Recipe(engine="int8").changed(scorer="./mine").engine is None
    assert Recipe(engine="int8").changed(n1=5).engine == "int8"


def test_another_embedder_does_not_keep_the_revision_of_the_one_before() -> None:
    recipe = Recipe(embedder="me/one", embedder_revision="abc")
    assert recipe.changed(embedder="me/two").embedder_revision is None
    assert recipe.changed(embedder=None).embedder_revision is None
    assert recipe.changed(n1=5).embedder_revision == "abc"


@pytest.mark.parametrize(
    ("value", "whole"), [(3, True), (np.int64(3), True), (True, False), (3.0, False), ("3", False)]
)
def test_a_bool_is_no_whole_number(value: Any, whole: bool) -> None:
    assert is_integer(value) is whole
