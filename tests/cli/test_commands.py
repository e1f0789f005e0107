"""cli.py: every command does its work on real files, and a user's mistake is one line and exit code 2."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from datasets import Dataset
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from car_datasets import (
    ClusterModel,
    QualityScorer,
    Recipe,
    TextEmbedder,
    __version__,
    load_instructions,
    score_in_shards,
)
from car_datasets.cli import app
from car_datasets.exploring import atlas_table
from car_datasets.publishing.verification import OLD, Verification
from car_datasets.recipe import PANELS
from car_datasets.results import CURATED_FILES
from car_datasets.training.evaluation import Clue
from car_datasets.training.preparation import Audit, audit_table
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import printable

COMMANDS = [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]
PARSER: Any = get_command(app)
TOKEN = "hf_ThisIsNotARealTokenButNobodyMaySeeIt"
GOOD = '{"instruction": "a", "output": "b"}'


def run(*arguments: Any, env: dict[str, str] | None = None) -> Result:
    """Run the command line in this process, where the models stay loaded."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)


def run_process(*arguments: Any, cwd: Path, bars: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    command = [sys.executable, "-m", "car_datasets", *map(str, arguments)]
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": str(int(not bars))}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def assert_mistake(code: int, errors: str, message: str) -> None:
    assert code == 2, errors
    assert re.fullmatch(rf"car-datasets: [^\n]*(?:{message})[^\n]*\n", errors), errors


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Write 24 rows as the original's JSON list."""
    words = ["red", "green", "blue", "sea", "poem", "list", "sum"]
    content = [
        {"instruction": f"Write {words[i % 7]}.", "input": "", "output": " ".join(words[: 1 + i % 5]), "page": i // 2}
        for i in range(24)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "rows.json"


# --- help and version


def test_the_commands_are_the_promised_ones_in_the_order_of_the_pipeline() -> None:
    assert COMMANDS == [
        "curate",
        "demo",
        "score",
        "estimate",
        "cluster",
        "select",
        "explore",
        "push",
        "verify",
        "export",
        "top-up",
        "explain",
        "prove",
        "judge",
        "prepare",
        "train",
        "evaluate",
        "quantise",
        "convert",
    ]
    listed = re.findall(r"^│ ([a-z][a-z-]*) ", run("--help").stdout, flags=re.MULTILINE)
    assert listed == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_whose_options_exist(command: str) -> None:
    result = run(command, "--help", env={"HF_TOKEN": TOKEN})
    assert result.exit_code == 0
    [example] = re.findall(r"Example: (.*(?:\n +.*)*)", result.stdout)
    words = shlex.split(example)
    assert words[:2] == ["car-datasets", command]
    assert {word for word in words if word.startswith("--")} <= set(
        re.findall(r"--[\w-]+", result.stdout.split("Example")[0])
    )
    assert TOKEN not in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_texts_are_full_sentences_in_panels_and_never_cut(command: str) -> None:
    parameters = PARSER.commands[command].params
    for parameter in parameters:
        text = parameter.help.partition("  [dim]")[0]
        assert re.fullmatch(r"[A-Z]\w+ \S+ .*\.", text, flags=re.DOTALL), (parameter.name, text)
    flags = {flag for parameter in parameters for flag in parameter.opts if flag.startswith("--")}
    for width in ("80", "120"):
        shown = run(command, "--help", env={"COLUMNS": width}).stdout
        assert "…" not in shown
        assert max(map(len, shown.splitlines())) <= int(width)
        assert flags <= set(re.findall(r"--[\w-]+", shown))
    titles = re.findall(r"^╭─ ([\w ]+) ─", shown, flags=re.MULTILINE)
    panels = [title for title in titles if title not in ("Arguments", "Options")]
    assert panels == [panel for panel in PANELS if panel in panels]


@pytest.mark.parametrize(
    ("command", "option", "table"),
    [
        ("curate", "schema", "car_datasets.loading.schemas:SCHEMAS"),
        ("curate", "columns", "car_datasets.loading.schemas:ROLE_NAMES"),
        ("curate", "on_invalid", "car_datasets.loading.schemas:ON_INVALID"),
        ("curate", "template", "car_datasets.loading.templates:TEMPLATES"),
        ("curate", "turns", "car_datasets.scoring.scorer:TURNS"),
        ("curate", "dtype", "car_datasets.scoring.stage:DTYPES"),
        ("curate", "embedding_dtype", "car_datasets.scoring.stage:EMBEDDING_DTYPES"),
        ("curate", "kmeans", "car_datasets.clustering.model:ENGINES"),
        ("curate", "procedure", "car_datasets.selection.procedures:PROCEDURES"),
        ("curate", "projection", "car_datasets.reporting.maps:PROJECTIONS"),
        ("curate", "languages", "car_datasets.loading.languages:CHOICES"),
        ("cluster", "template", "car_datasets.loading.templates:TEMPLATES"),
        ("push", "also", "car_datasets.reporting.overview:CONTROLS"),
    ],
)
def test_the_names_in_a_help_text_are_those_of_the_table(command: str, option: str, table: str) -> None:
    """Hold that recipe.py, which must not import the modules of most tables, repeats their names, in its docstring too."""
    module, _, name = table.partition(":")
    [text] = [parameter.help for parameter in PARSER.commands[command].params if parameter.name == option]
    names = list(getattr(importlib.import_module(module), name))
    told = re.search(
        rf"\n    [\w, ]*\b{option}\b[\w, ]* \(.*?(?=\n    \w|\Z)", inspect.getdoc(Recipe) or "", flags=re.DOTALL
    )
    for words in [text, *([told[0]] if told and '`"' in told[0] and '"`, ...' not in told[0] else [])]:
        assert [key for key in names if key not in re.findall(r"[\w/-]+", words)] == []


def test_no_arguments_list_the_commands() -> None:
    assert all(command in run().output for command in COMMANDS)


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"car-datasets {__version__}")


def test_only_the_recipe_has_defaults_for_its_options() -> None:
    """Check it, because a default in the command line would silently win over a recipe file."""
    curate = next(
        c.callback for c in app.registered_commands if c.callback is not None and c.callback.__name__ == "curate"
    )
    own = {
        name: p.default for name, p in inspect.signature(curate).parameters.items() if p.default not in (None, False)
    }
    assert own == {"source": inspect.Parameter.empty, "output": inspect.Parameter.empty}
    assert {f.name for f in fields(Recipe)} <= set(inspect.signature(curate).parameters)


def test_help_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "datasets", "sklearn", "pyarrow")
    code = f"import sys, car_datasets.cli.stages; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_shows_the_defaults_of_the_recipe() -> None:
    text = " ".join(run("curate", "--help", env={"COLUMNS": "300"}).stdout.split())
    for flag, default in (("--seed", "42"), ("--n1", "1000"), ("--explained-variance", "0.95"), ("--kmeans", "by")):
        assert re.search(rf"{flag} <.{{0,90}}\[default: {default}", text), flag
    assert all(flag in text for flag in ("--no-compile", "--no-allow-worse", "--no-uncertainty", "--no-embeddings"))


def test_an_option_wins_over_a_recipe_file_even_with_the_default_value(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []

    def watched(source: str, output: Path, recipe: Recipe, **_: Any) -> None:
        seen.append(recipe)
        raise ValueError("seen enough")

    monkeypatch.setattr("car_datasets.curation.curate", watched)
    (tmp_path / "recipe.yaml").write_text(
        "schema: messages\non_invalid: mark\ncompile: true\nuncertainty: true\nallow_worse: true\n"
        "keep_embeddings: false\nn1: 7\nexplained_variance: 0.5\n"
    )
    options = ("--schema", "auto", "--on-invalid", "error", "--no-compile", "--no-uncertainty", "--no-allow-worse")
    options += ("--embeddings", "--n1", "1000", "--explained-variance", "0.95")
    run("curate", rows, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml", *options)
    run("curate", rows, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert seen[0] == Recipe(n1=1000)
    assert (seen[1].schema, seen[1].compile, seen[1].keep_embeddings) == ("messages", True, False)


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("budget: 30", ("--n1", "5"), {"n1": 5}),
        ("n1: 5", ("--budget", "30"), {"budget": 30}),
        ("budget: 30", ("--budget", "none"), {}),
        ("n1: 5", ("--n1", "none"), {}),
        ("batch_tokens: 9", ("--batch-tokens", "none"), {}),
        ("name: a\nsplit: b\nrevision: c", ("--name", "none", "--split", "none", "--revision", "none"), {}),
        ("scorer: a\nscorer_revision: b", ("--scorer-revision", "none"), {"scorer": "a"}),
        ("template: paper\nkmeans: sklearn", ("--template", "none", "--kmeans", "none"), {}),
        ("tokenizer: a\nengine: b", ("--tokenizer", "none", "--engine", "none"), {}),
        ("embedder: a\nembedder_revision: b", ("--embedder", "none"), {}),
        ("language_column: a", ("--language-column", "none"), {}),
        ("score_column: a", ("--score-column", "none"), {"score_column": "none"}),
    ],
)
def test_an_option_replaces_or_undoes_what_a_file_says(
    content: str, options: tuple[str, ...], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("car_datasets.curation.curate", lambda source, output, recipe, **_: seen.append(recipe))
    (tmp_path / "recipe.yaml").write_text(content)
    run("curate", "rows.json", "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml", *options)
    assert seen == [Recipe(**expected)]


def test_a_number_that_is_none_is_one_line(tmp_path: Path) -> None:
    found = run("curate", "rows.json", "-o", tmp_path / "out", "--budget", "many")
    assert_mistake(found.exit_code, found.stderr, "--budget many: pass an integer, or none")


# --- the work


def test_curate_on_tiny_models(rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path) -> None:
    models = ("--scorer", tiny_iqs, "--embedder", tiny_embedder, "--token", TOKEN)
    result = run("curate", rows, "-o", tmp_path / "out", *models, "--budget", 6, "--k", 3, "--seed", 1, "--allow-worse")
    assert result.exit_code == 0, result.output
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in written) == sorted(CURATED_FILES)
    assert len(json.loads((tmp_path / "out" / "selected.json").read_text())) == 6
    assert "Selection report" in result.stdout
    assert str(tmp_path / "out" / "selected.parquet") in result.stdout
    assert TOKEN not in result.output
    assert all(TOKEN.encode() not in path.read_bytes() for path in written)


def test_curate_reads_a_recipe_and_options_win_over_it(
    rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"scorer: {tiny_iqs}\nembedder: {tiny_embedder}\nn1: 3\nk: 2\nseed: 5\nindex_column: row\n")
    kept = ("--duplicates", "keep")
    result = run("curate", rows, "-o", tmp_path / "out", "--config", recipe, "--n1", 0.5, "--no-embeddings", *kept)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["selected_by"]["score"] + report["selected_by"]["both"] == 12  # --n1 0.5 of 24, not the recipe's 3
    assert (report["clusters"], report["seed"]) == (2, 5)
    columns = Dataset.from_parquet(str(tmp_path / "out" / "scored.parquet")).column_names
    assert "row" in columns
    assert "embedding" not in columns


@pytest.mark.slow
def test_stages_one_by_one_give_what_curate_gives(rows: Path, tmp_path: Path) -> None:
    """Run the stages on the embedded default, whose one pass gives the score and the embedding."""
    scored, clustered, selected = (tmp_path / f"{name}.parquet" for name in ("scored", "clustered", "selected"))
    for arguments in (
        ("score", rows, "-o", scored),
        ("cluster", scored, "-o", clustered, "--k", 3, "--save-model", tmp_path / "model"),
        ("select", clustered, "-o", selected, "--n1", 4),
        ("curate", rows, "-o", tmp_path / "out", "--k", 3, "--n1", 4, "--duplicates", "keep"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    assert Dataset.from_parquet(str(selected)).remove_columns("embedding").to_list() == (
        Dataset.from_parquet(str(tmp_path / "out" / "selected.parquet")).to_list()
    )
    whole = Dataset.from_parquet(str(tmp_path / "out" / "scored.parquet"))
    assert Dataset.from_parquet(str(clustered)).to_list() == whole.to_list()
    assert ClusterModel.from_pretrained(tmp_path / "model").k == 3


def test_score_without_an_output_fills_shards_that_curate_takes(
    rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    models = ("--scorer", tiny_iqs, "--embedder", tiny_embedder, "--turns", "min", "--on-invalid", "mark")
    result = run("score", rows, "--shards", shards, *models)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"{shards}/scores holds 24 of 24 rows, {shards}/embeddings holds 24 of 24 rows; none is left.\n"
    )
    assert shlex.join(["--shards", str(shards), "--on-invalid", "mark"]) in result.stderr  # of the next step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "shards"]
    for stage in (QualityScorer, TextEmbedder):
        monkeypatch.setattr(stage, "__call__", lambda *_: pytest.fail("was scored already"))
    result = run("curate", rows, "-o", tmp_path / "out", "--shards", shards, *models, "--n1", 4, "--k", 2)
    assert result.exit_code == 0, result.output


def test_score_alone_needs_no_room_for_later_columns(rows: Path, tiny_iqs: str, tmp_path: Path) -> None:
    """Score rows that have embeddings and clusters of their own."""
    own = Dataset.from_json(str(rows)).add_column("embedding", [[1.0]] * 24).add_column("cluster", [0] * 24)
    own.to_parquet(tmp_path / "own.parquet")
    arguments = ("--scorer", tiny_iqs, "--no-embeddings", "--score-column", "quality")
    result = run("score", tmp_path / "own.parquet", "-o", tmp_path / "scored.parquet", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "quality" in Dataset.from_parquet(str(tmp_path / "scored.parquet")).column_names


@pytest.mark.parametrize(
    ("column", "option"),
    [("cluster", "--cluster-column"), ("embedding", "--embedding-column"), ("source_index", "--index-column")],
)
def test_score_names_the_columns_of_later_stages(
    column: str, option: str, rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    Dataset.from_json(str(rows)).add_column(column, [None, *range(23)]).to_parquet(tmp_path / "own.parquet")
    command = ("score", tmp_path / "own.parquet", "-o", tmp_path / "scored.parquet")
    result = run(*command, "--scorer", "someone/no-such-model")  # never asked for
    assert_mistake(result.exit_code, result.stderr, f"{column}.*{option[2:].replace('-', '.')}")  # by keyword or option
    result = run(*command, "--scorer", tiny_iqs, "--embedder", tiny_embedder, option, "mine")
    assert result.exit_code == 0, result.stderr
    found = Dataset.from_parquet(str(tmp_path / "scored.parquet"))
    assert found[column][:] == [None, *range(23)]
    assert {"embedding", "source_index"} - {column} <= set(found.column_names)
    assert ("mine" in found.column_names) == (column != "cluster")  # `cluster` adds that one


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k", 0), "k=0 must be"),
        (("--n-init", 0), "--n-init=0 must be"),
        (("--kmeans", "fast"), "kmeans='fast' is not known"),
        (("--explained-variance", 2), r"--explained-variance=2\.0 must lie"),
    ],
    ids=str,
)
def test_cluster_checks_its_settings_before_it_embeds(
    options: tuple[Any, ...], message: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("car_datasets.stages.embed_where_missing", lambda *_: pytest.fail("embedded first"))
    result = run("cluster", rows, "-o", tmp_path / "out.parquet", *options)
    assert_mistake(result.exit_code, result.stderr, message)


def test_estimate_shows_the_number_of_rows_that_it_times() -> None:
    text = " ".join(run("estimate", "--help", env={"COLUMNS": "300"}).stdout.split())
    assert re.search(r"Time this many rows\. +\[default: 256\]", text)


def test_columns_named_on_the_command_line(tiny_iqs: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("task,answer\nName a sea.,red\nSum it.,\n")
    arguments = ("--columns", "instruction=task, response=answer", "--scorer", tiny_iqs, "--no-embeddings")
    result = run("score", tmp_path / "rows.csv", "-o", tmp_path / "scored.parquet", *arguments)
    assert result.exit_code == 0, result.stderr
    assert Dataset.from_parquet(str(tmp_path / "scored.parquet"))["iqs_status"][:] == ["ok", "empty_response"]


@pytest.mark.slow
def test_demo_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_process("demo", "--output", "demo", "--budget", 30, cwd=tmp_path, bars=True)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "demo" / name).is_file() for name in CURATED_FILES)
    assert len(json.loads((tmp_path / "demo" / "selected.json").read_text(encoding="utf-8"))) == 30
    assert "demo/selected.json" in done.stdout
    assert "Scoring and embedding: 100%" in done.stderr
    assert "Clustering: 100%" in done.stderr
    assert "Warning" not in done.stderr


def test_columns_keep_their_given_names_through_every_stage(
    rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    given = {"score": "quality", "embedding": "vector", "cluster": "group", "index": "row"}
    options = [part for name, column in given.items() for part in (f"--{name}-column", column)]
    models = ("--scorer", tiny_iqs, "--embedder", tiny_embedder)
    kept = ("--allow-worse", "--duplicates", "keep")
    scored, clustered, selected = (tmp_path / f"{name}.parquet" for name in ("scored", "clustered", "selected"))
    for arguments in (
        ("score", rows, "-o", scored, *models, *options),
        ("cluster", scored, "-o", clustered, "--k", 3, "--embedding-column", "vector", "--cluster-column", "group"),
        ("select", clustered, "-o", selected, "--n1", 4, *options[:2], *options[4:], "--allow-worse"),
        ("curate", rows, "-o", tmp_path / "out", "--k", 3, "--n1", 4, *models, *options, *kept),
        ("curate", rows, "-o", tmp_path / "plain", "--k", 3, "--n1", 4, *models, *kept),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    names, plain = ColumnNames(**given), ColumnNames()
    renamed = {getattr(plain, each): getattr(names, each) for each in (*given, "tokens", "truncated", "status")}
    renamed["cluster_distance"] = "group_distance"
    for file in ("scored.parquet", "selected.parquet"):
        expected = [
            renamed.get(name, name) for name in Dataset.from_parquet(str(tmp_path / "plain" / file)).column_names
        ]
        assert Dataset.from_parquet(str(tmp_path / "out" / file)).column_names == expected
    assert set(Dataset.from_parquet(str(selected)).column_names) == {*expected, "vector"}
    # Reports read the same columns: their figures do not depend on the names.
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("out", "plain")]
    assert reports[0] == reports[1]
    table, _ = atlas_table(tmp_path / "out", names=names)
    assert {"quality", "group", "row"} <= set(table.column_names)
    assert not {"iqs_score", "cluster", "source_index"} & {*table.column_names}


# --- mistakes

MISTAKES: list[Any] = [
    # content of source.json or its replacement, arguments after `curate source.json -o out`, message
    pytest.param(None, (), "no such file or folder", id="missing file"),
    pytest.param("", (), "is an empty file", id="empty file"),
    pytest.param("[]", (), "is an empty list", id="empty list"),
    pytest.param('["a"]', (), "is neither a list of objects nor JSON Lines", id="strings"),
    pytest.param('{"data": [1]}', (), r"No known schema fits the columns \['data'\].*--columns", id="an object"),
    pytest.param(
        '[{"text": "a"}]', (), r"No known schema fits the columns \['text'\].*--columns", id="unknown columns"
    ),
    pytest.param(f"{GOOD}\n{GOOD[:20]}", (), "cannot be read as json", id="truncated lines"),
    pytest.param(
        f'{GOOD}\n{{"instruction": "a", "output": null}}', (), r"1 null \(rows 1\).*--on-invalid mark", id="null"
    ),
    pytest.param('[{"instruction": "a", "output": 1}]', (), r"1 not_a_string \(rows 0\)", id="a number"),
    pytest.param('[{"messages": [{"role": "user", "content": "a"}]}]', (), "1 no_assistant_turn", id="chat"),
    pytest.param(
        '[{"instruction": "a", "output": "b", "iqs_score": 1}]', ("--n1", "1"), "--score-column", id="taken column"
    ),
    pytest.param('[{"instruction": "a", "output": "b", "source_index": null}]', (), "--index-column", id="null ids"),
    pytest.param(f"{GOOD}\n{GOOD}", ("--n1", "3"), "n1=3 must be between 0 and the 2 rows", id="n1 above the rows"),
    pytest.param(GOOD, ("--n1", "1", "--budget", "1"), "--n1=1 and --budget=1: .*Leave one of the two out", id="both"),
    pytest.param(GOOD, ("--n1", "-1"), "n1=-1 must be between", id="negative n1"),
    pytest.param(GOOD, ("--n1", "1.5"), r"n1=1\.5: a fraction must lie between 0 and 1", id="fraction above 1"),
    pytest.param(GOOD, ("--n1", "nan"), "n1=nan", id="n1 is no number"),
    pytest.param(GOOD, ("--n1", "inf"), "n1=inf", id="n1 is infinite"),
    pytest.param(GOOD, ("--n1", "1", "--n2", "-1"), "n2=-1 must be between", id="negative n2"),
    pytest.param(GOOD, ("--budget", "7"), "budget=7 must be between", id="budget above the rows"),
    pytest.param(GOOD, ("--n1", "1", "--k", "2"), "k=2 must be 'sqrt' or a number between 1 and the 1 rows", id="k"),
    pytest.param(GOOD, ("--n1", "1", "--k", "-2"), "k=-2 must be", id="negative k"),
    pytest.param(GOOD, ("--k", "many"), "--k many: pass a number, or sqrt", id="k is a word"),
    pytest.param(GOOD, ("--k", "²"), "--k ²: pass a number, or sqrt", id="k is a superscript"),
    pytest.param(GOOD, ("--schema", "vicuna"), "schema='vicuna' is not known", id="unknown schema"),
    pytest.param(GOOD, ("--schema", "messages"), r"Columns \['messages'\] are not in the dataset", id="other schema"),
    pytest.param(GOOD, ("--columns", "instruction"), "--columns instruction: write role=column pairs", id="columns"),
    pytest.param(GOOD, ("--columns", "quest=a"), r"columns has the keys \['quest'\]", id="unknown role"),
    pytest.param(GOOD, ("--split", "test"), "split='test' is not in the source", id="unknown split"),
    pytest.param(GOOD, ("--n1", "1", "--turns", "max"), "turns='max' is not known", id="unknown turns"),
    pytest.param(
        GOOD, ("--n1", "1", "--on-invalid", "drop"), "--on-invalid='drop' is not known", id="unknown on_invalid"
    ),
    pytest.param(GOOD, ("--n1", "1", "--scorer", "/no/model"), "no such folder", id="missing scorer"),
    pytest.param(GOOD, ("--n1", "1", "--scorer", "me/none"), "model_id='me/none'", id="scorer not on the Hub"),
    pytest.param(GOOD, ("--n1", "1", "--scorer", "."), "no config.json", id="folder without a model"),
    pytest.param(GOOD, ("--n1", "1", "--embedder", "/no/model"), "no such folder", id="missing embedder"),
    pytest.param(GOOD, ("--n1", "1", "--seed", "-1"), "seed=-1", id="negative seed"),
    pytest.param(GOOD, ("--config", "nope.yaml"), "nope.yaml", id="missing recipe"),
    pytest.param(GOOD, ("--config", "."), "[Dd]irectory|folder", id="recipe is a folder"),
]


@pytest.mark.parametrize(("content", "options", "message"), MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(
    content: str | None, options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("source.json").write_text(content, encoding="utf-8")
    result = run("curate", "source.json", "-o", "out", *options, env={"HF_TOKEN": TOKEN})
    assert_mistake(result.exit_code, result.stderr, message)
    assert TOKEN not in result.output
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scorrer: x", "A recipe has no 'scorrer'; did you mean 'scorer'"),
        ("[1]", "holds a list, not `key: value` lines"),
        ("n1: [1", "recipe.yaml"),
        ("n1: many", "n1='many'"),
        ("columns: [a]", "columns"),
        ("k: 1.5", r"k=1\.5 must be"),
    ],
)
def test_mistake_in_a_recipe_is_one_line(text: str, message: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    result = run("curate", rows, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert_mistake(result.exit_code, result.stderr, message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", b"text", r"the file extension '\.txt' is not known"),
        ("rows.parquet", b"PAR1", r"rows\.parquet.*cannot be read as parquet"),
        ("rows.parquet", b"PAR1" + b"\xff" * 99 + b"\x10\0\0\0PAR1", r"rows\.parquet.*cannot be read as parquet"),
        ("rows.csv", b"instruction,output\ncaf\xe9,b\n", r"rows\.csv.*cannot be read as csv"),
        ("rows.csv", b"instruction,output\n", r"rows\.csv.*has no rows"),
        ("rows/part.jsonl", f"{GOOD}\n{GOOD[:20]}".encode(), "cannot be read"),
        ("rows/.empty", b"", "folder without data"),
    ],
)
def test_source_that_cannot_be_read_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    source = tmp_path / name.split("/")[0]
    result = run("curate", source, "-o", tmp_path / "out")
    assert_mistake(result.exit_code, result.stderr, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "rows.json", "-o", "scored.csv"), "scored.csv: name a .parquet file"),
        (("score", "rows.json"), "--output FILE, or --shards DIR"),
        (("score", "rows.json", "--shards", ""), "--shards='' is empty"),
        (("score", "nope.json", "-o", "scored.parquet"), "no such file or folder"),
        (("score", "someone/no-such-dataset", "-o", "scored.parquet"), "someone/no-such-dataset"),
        (("score", "rows.json", "-o", "rows.json/scored.parquet"), "rows.json.* is a file"),
        (("cluster", "rows.json", "-o", "out.parquet", "--embedder", "./none"), "no such folder"),
        (("convert", "rows.json", "out"), "not in the original's layout"),
        (("convert", "./none", "out"), "no such folder"),
        (("cluster", "nope.parquet", "-o", "out.parquet"), "no such file or folder"),
        (("cluster", "rows.json", "-o", "out.parquet", "--cluster-column", "page"), "--cluster-column"),
        (("cluster", "rows.json", "-o", "out.parquet", "--embedding-column", "output"), "not lists of numbers"),
        (("select", "rows.json", "-o", "out.parquet"), r"has no column \['iqs_score', 'cluster'\]"),
        (
            ("select", "rows.json", "-o", "out.parquet", "--score-column", "output", "--cluster-column", "page"),
            "'output' holds .*, not numbers",
        ),
        (
            ("select", "rows.json", "-o", "o.json", "--n1", "99", "--score-column", "page", "--cluster-column", "page"),
            "n1=99 must be between 0 and the 24 rows",
        ),
        (("demo", "--output", "rows.json"), "is a file; name a folder"),
        (("demo", "--output", "demo", "--budget", "100000"), "budget=100000 must be between"),
    ],
)
def test_mistake_in_another_command_is_one_line(
    arguments: tuple[str, ...], message: str, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    result = run(*arguments)
    assert_mistake(result.exit_code, result.stderr, message)
    assert [path.name for path in rows.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("curate", "rows.json", "-o", "out", "--n1", "25"), "--n1=25 must be between 0 and the 24 rows"),
        (
            ("curate", "rows.json", "-o", "out", "--n1", "3", "--embedder-revision", "x"),
            "--embedder-revision='x' needs",
        ),
        (("estimate", "rows.json", "--rows", "0"), "--rows=0 must be at least 1"),
        (("demo", "-o", "rows.json"), "--output='rows.json': "),
        (("score", "mixed.json", "-o", "o.parquet"), "or pass --on-invalid mark to keep them"),
        (("push", "nope", "me/x", "--also", "what"), r"--also=\('what',\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_a_message_names_an_option_as_it_is_typed(
    arguments: tuple[str, ...], message: str, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    Path("mixed.json").write_text(f'[{GOOD}, {{"instruction": "a", "output": null}}]')
    result = run(*arguments)
    assert_mistake(result.exit_code, result.stderr, message)


def test_a_value_of_a_recipe_file_is_not_called_an_option(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("n1: 25\n")
    result = run("curate", rows, "-o", tmp_path / "out", "--config", tmp_path / "recipe.yaml")
    assert_mistake(result.exit_code, result.stderr, "(?<!--)n1=25 must be between")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("curate", "rows.json"), "Missing option '--output'"),
        (("curate", "rows.json", "-o", "out", "--n3", "1"), "No such option: --n3"),
        (("curat",), "No such command 'curat'"),
    ],
)
def test_words_that_are_no_command_line_show_the_usage(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")
    assert message in result.stderr


@pytest.mark.slow
def test_mistake_in_a_process_of_its_own_prints_nothing_else(tmp_path: Path) -> None:
    """Run a process, because libraries log to the real stderr, where their lines would be mixed with ours."""
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{GOOD[:20]}")
    done = run_process("curate", "rows.jsonl", "--output", "out", cwd=tmp_path)
    assert_mistake(done.returncode, done.stderr, "cannot be read as json")
    assert done.stdout == ""


# --- nothing is overwritten


@pytest.mark.parametrize("command", ["score", "cluster", "select"])
def test_file_that_is_there_is_not_overwritten(command: str, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "out.parquet").write_text("mine")
    result = run(command, rows, "-o", tmp_path / "out.parquet")
    assert_mistake(result.exit_code, result.stderr, "is there already; name another file")
    assert (tmp_path / "out.parquet").read_text() == "mine"


def test_overwrite_replaces_the_file_but_never_the_one_that_is_read(rows: Path, tmp_path: Path) -> None:
    content = [{**row, "iqs_score": i / 7, "cluster": i % 2} for i, row in enumerate(json.loads(rows.read_text()))]
    Dataset.from_list(content).to_parquet(tmp_path / "pool.parquet")
    (tmp_path / "out.parquet").write_text("an earlier result")
    assert run("select", tmp_path / "pool.parquet", "-o", tmp_path / "out.parquet", "--overwrite").exit_code == 0
    assert len(Dataset.from_parquet(str(tmp_path / "out.parquet"))) == 12
    result = run("select", tmp_path / "pool.parquet", "-o", tmp_path / "pool.parquet", "--overwrite")
    assert_mistake(result.exit_code, result.stderr, "is the file that is read; name another file")


@pytest.mark.parametrize("command", [["curate", "nope.json"], ["demo"]], ids=["curate", "demo"])
def test_folder_that_holds_a_result_is_not_overwritten(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("mine")
    result = run(*command, "-o", tmp_path)
    assert_mistake(result.exit_code, result.stderr, "already holds a result")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "mine"


def test_saved_cluster_model_is_not_overwritten(tmp_path: Path) -> None:
    Dataset.from_dict({"embedding": [[float(i), i % 3] for i in range(9)]}).to_parquet(tmp_path / "in.parquet")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "cluster_model.json").write_text("mine")
    result = run("cluster", tmp_path / "in.parquet", "-o", tmp_path / "out.parquet", "--save-model", tmp_path / "model")
    assert_mistake(result.exit_code, result.stderr, "model")
    assert (tmp_path / "model" / "cluster_model.json").read_text() == "mine"
    assert not (tmp_path / "out.parquet").exists()


# --- stopped


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("curate", "rows.json", "-o", "out"), "Scores of an unfinished pass are not kept; with --shards DIR .*"),
        (("curate", "rows.json", "-o", "out", "--shards", "s"), "s/scores holds 16 of 24 rows."),
        (("score", "rows.json", "-o", "out.parquet", "--shards", "s"), "s/scores holds 16 of 24 rows."),
        (("cluster", "rows.json", "-o", "out.parquet"), "Nothing was written to out.parquet."),
        (("select", "rows.json", "-o", "out.parquet"), "Nothing was written to out.parquet."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_stopped_command_says_what_is_kept_and_how_to_resume(
    arguments: tuple[str, ...], kept: str, rows: Path, tiny_iqs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(rows.parent)
    score_in_shards(load_instructions(str(rows)), QualityScorer(tiny_iqs), "s/scores", shard_rows=8)
    Path("s/scores/part-00001.arrow").unlink()

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr("car_datasets.loading.sources.open_dataset", stop)
    monkeypatch.setattr("car_datasets.curation.open_source", stop)
    monkeypatch.setattr(sys, "argv", ["car-datasets", *arguments, "--token", TOKEN, f"--token={TOKEN}"])
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 130
    again = re.escape(shlex.join(["car-datasets", *arguments, "--token", "TOKEN", "--token=TOKEN"]))
    assert re.fullmatch(rf"\ncar-datasets: stopped\. {kept} To (resume|start again): {again}\n", result.stderr)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_in_one_line_and_the_same_command_resumes(
    sent: signal.Signals, code: int, rows: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    content = json.loads(rows.read_text())
    rows.write_text(
        json.dumps([{**row, "instruction": f"{row['instruction']} {i}"} for i in range(250) for row in content])
    )
    models = ["--scorer", tiny_iqs, "--embedder", tiny_embedder, "--shards", "shards", "--n1", "9", "--k", "3"]
    command = [sys.executable, "-m", "car_datasets", "curate", "rows.json", "--output", "out", *models]
    # A parent in the background may have told its children to ignore Ctrl-C.
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("shards/scores/part-*.arrow"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(sent)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert re.search(
        r"car-datasets: stopped\. shards/scores holds [\d,]+ of 6,000 rows.* To resume: car-datasets", errors
    )
    assert not (tmp_path / "out").exists()
    done = run_process(*command[3:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- text of others

NASTY = "[/foo] [bold]b\x1b[31m\u202e\x07"
SHOWN = r"[/foo] [bold]b\x1b[31m\u202e\x07"


def assert_plain(result: Result, code: int) -> None:
    """No character that a terminal obeys is printed, and markup is printed as it is."""
    printed = result.stdout + result.stderr
    assert (result.exit_code, result.exception is None or isinstance(result.exception, SystemExit)) == (code, True)
    assert not set("\x1b\u202e\x07") & set(printed)
    assert SHOWN in " ".join(printed.split()), printed


def test_statuses_columns_and_paths_of_others_are_printed_as_text(tmp_path: Path) -> None:
    content = {
        "instruction": ["a", "b", "c"],
        NASTY: [1, 2, 3],
        "iqs_score": [0.1, 0.2, None],
        "iqs_status": ["ok", "ok", NASTY],
        "cluster": [0, 0, 0],
    }
    Dataset.from_dict(content).to_parquet(tmp_path / "scored.parquet")
    rules = ("--n1", 1, "--n2", 1)
    assert_plain(run("select", tmp_path / "scored.parquet", "-o", tmp_path / f"{NASTY}.parquet", *rules), 0)
    assert (tmp_path / f"{NASTY}.parquet").is_file()
    column = ("--score-column", "cluster", "--cluster-column", NASTY.replace("foo", "none"))
    missing = run("select", tmp_path / "scored.parquet", "-o", tmp_path / "o.parquet", *rules, *column)
    assert missing.exit_code == 2 and "\x1b" not in missing.stderr and "Traceback" not in missing.stderr
    assert_plain(run("cluster", tmp_path / f"{NASTY}.csv", "-o", tmp_path / "o.parquet"), 2)


@pytest.mark.parametrize("words", ["checked", "skipped", "differences"])
def test_what_verify_found_in_files_of_others_is_one_line_each(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty = f"row {NASTY}\nmatch"
    found = SimpleNamespace(
        **{"checked": (), "skipped": (), "differences": ("other",), "matches": False, words: (nasty,)}
    )
    monkeypatch.setattr("car_datasets.publishing.verification.verify", lambda *_, **__: found)
    result = run("verify", "out")
    assert_plain(result, 1)
    assert "match" not in result.stdout.splitlines()


def test_a_match_by_a_receipt_without_digests_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.publishing.verification.verify", lambda *_, **__: Verification((), (OLD,), ()))
    result = run("verify", "out")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "match of the rows alone: the receipt has no digests of the files"


def test_tables_and_answers_print_text_of_others_as_text() -> None:
    out = io.StringIO()
    clues = (Clue(token=NASTY, worse=0.1, better=0.2, weight=-1.0),)
    Console(file=out, width=200).print(audit_table("a", Audit(pairs=0.5, auc=0.5, clues=clues)))
    assert "[/foo]" in out.getvalue() and "\x1b" not in out.getvalue()
    assert printable(NASTY + "\n\tä\u200d🙂") == SHOWN + "\n\tä\u200d🙂"
    assert printable("\udc80") == r"\udc80"
