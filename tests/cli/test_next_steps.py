"""What a command suggests at its end: the parser understands it, it names real files, and it can be run as it is."""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from datasets import Dataset
from typer.main import get_command
from typer.testing import CliRunner

from car_datasets import Recipe
from car_datasets.cli import app
from car_datasets.cli.next_steps import (
    ANY_SOURCE,
    REPOSITORY,
    after_cluster,
    after_curate,
    after_demo,
    after_estimate,
    after_filled_shards,
    after_judge,
    after_prepare,
    after_prove,
    after_push,
    after_quantise,
    after_score,
    after_scorer,
    after_select,
    after_top_up,
    after_train,
    after_verify,
    fresh,
    options_of,
)
from car_datasets.cli.printing import Step
from car_datasets.publishing.verification import Verification
from car_datasets.scoring.engines import Estimate

PARSER: Any = get_command(app)
ODD = Path("my folder/it's.parquet")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def suggested(result: Result) -> list[str]:
    """Return the lines that a command prints to be copied."""
    assert result.exit_code == 0, result.output
    assert "Next:" not in result.stdout and "car-datasets " not in result.stdout
    return [line[4:] for line in result.stderr.partition("\nNext:\n")[2].splitlines() if line.startswith("    ")]


def parsed(line: str) -> tuple[str, dict[str, Any]]:
    """Return the command and the values of its options; fail if the parser does not understand the line."""
    words = shlex.split(line)
    assert words[0] in ("car-datasets", "accelerate"), line
    start = words.index("car_datasets") if words[0] == "accelerate" else 0
    name, *options = words[start + 1 :]
    return name, PARSER.commands[name].make_context(name, options).params


def commands(steps: Iterable[Step]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for step in steps:
        for line in step.lines:
            if "load_dataset" in line:
                compile(line, "next step", "exec")
            else:
                found.append(parsed(line))
    return found


def estimated(minutes: float) -> Estimate:
    return Estimate(rows=int(minutes * 60), sample=1, seconds=1.0, tokens=None, waste=None, device="cpu")


MATCH = Verification((), (), ())
GIVEN = {"rescore": 0, "source": None, "revision": "v1", "config_name": "default", "split": "selected"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (after_curate(ODD, "me/rows"), ["verify", "export", "push"]),
        (after_curate(ODD, "-"), ["export", "push"]),  # standard input cannot be read again
        (after_demo(ODD), ["explain", "verify", "curate"]),
        (after_top_up(ODD), ["verify", "export", "push"]),
        (after_score(ODD, {"embedder": "me/embedder", "cluster_column": "group"}, True), ["cluster"]),
        (after_filled_shards("rows.json", "s", {"columns": {"instruction": "task"}}), ["curate"]),
        (after_estimate("rows.json", {"split": "train[:9]"}, estimated(5), 0), ["curate"]),
        (after_estimate("rows.json", {}, estimated(60), 8), ["curate"]),
        (after_cluster(ODD, ["iqs_score"], {"rule": "gain"}), ["select"]),
        (after_cluster(ODD, ["text"], {}), []),
        (after_select(ODD), []),
        (after_judge(ODD, "judge_score", [], {"columns": {"response": "answer"}}), ["cluster", "select"]),
        (after_judge(ODD, "judge_score", ["cluster"], {}), ["select"]),
        (after_push("me/rows", "abc", "chosen", "small"), []),
        (after_verify("me/rows", MATCH, GIVEN), ["verify"]),
        (after_verify("me/rows", MATCH, {**GIVEN, "rescore": 9}), []),
        (after_verify(".", MATCH, {**GIVEN, "rescore": 9}), ["push"]),
        (after_verify(".", MATCH._replace(differences=("a row",)), GIVEN), []),
        (after_prove(ODD), ["push"]),
        (after_prepare({"score_train": ODD, "score_valid": ODD}, ODD), ["train"]),
        (after_train("my-scorer", "valid.csv", "rated.csv"), ["evaluate", "curate"]),
        ([after_scorer("me/model", "ifd:me/model", tokenizer="me/tokenizer")], ["curate", "curate"]),
        (after_quantise("rows.json", ODD, {"scorer": "me/model", "seed": 3}), ["estimate", "curate"]),
    ],
)
def test_every_suggestion_is_understood_by_the_parser(steps: list[Step], expected: list[str]) -> None:
    assert steps or not expected
    assert [name for name, _ in commands(steps)] == expected


def test_options_of_settings_are_read_back_as_these_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []
    monkeypatch.setattr("car_datasets.curation.curate", lambda source, output, recipe, **_: seen.append(recipe))
    changes = {
        "columns": {"instruction": "a task", "response": "answer"},
        "against": ("a.json", "me/b"),
        "keep_embeddings": False,
        "compile": True,
        "n1": 0.25,
        "template": None,
        "k": "sqrt",
        "budget_tokens": "500k",
        "explained_variance": 0.5,
    }
    del changes["n1"]  # the budget is in tokens
    run("curate", "rows.json", "-o", tmp_path / "out", *options_of(changes))
    assert seen == [Recipe().changed(**changes)]
    assert options_of({"seed": 3, "k": 4}, ("k",)) == ["--k", "4"]


def test_a_suggestion_fits_what_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("[]")
    Path("curated").mkdir()
    Path("score_test.csv").write_text("")
    [(_, verify), *_] = commands(after_curate(Path("out"), "rows.json"))
    assert (verify["where"], verify["source"]) == ("out", "rows.json")
    [(_, long)] = commands(after_estimate("rows.json", {"split": "all"}, estimated(100), 4))
    assert (long["output"], long["shards"], long["split"]) == (Path("curated-2"), "shards", "all")
    assert "--num_processes 4" in after_estimate("rows.json", {}, estimated(1), 4)[0].lines[0]
    [(_, cluster)] = commands(after_score(Path("a/b.json"), {"embedder": "e", "embedding_column": "v"}, False))
    assert (cluster["output"], cluster["embedder"], cluster["embedding_column"]) == (
        Path("a/clustered.parquet"),
        "e",
        None,
    )
    [(_, select)] = commands(after_cluster(Path("c.parquet"), ["judge_score"], {"cluster_column": "group"}))
    assert (select["score_column"], select["cluster_column"]) == ("judge_score", "group")
    [(_, evaluate), (_, curate)] = commands(after_train("m", "score_valid.csv", None))
    assert evaluate["pairs"] == Path("score_test.csv")  # the epoch was chosen by the other file
    assert (curate["source"], curate["scorer"]) == (ANY_SOURCE, "m")
    [(_, push)] = commands(after_prove(Path("out")))
    assert push["repo"] == REPOSITORY
    assert fresh(Path("new")) == Path("new")


def test_the_next_steps_lead_from_scores_to_rows_in_python(
    tiny_iqs: str, tiny_embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run what each command suggests, as it is printed, in a folder whose name must be quoted."""
    folder = tmp_path / "it's mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    rows = [{"task": f"Write {i}.", "output": "word " * (1 + i % 5)} for i in range(24)]
    Path("my rows.json").write_text(json.dumps(rows))
    names = ("--columns", "instruction=task,response=output", "--cluster-column", "group", "--no-embeddings")
    done = run(
        "score", "my rows.json", "-o", "my scores.parquet", "--scorer", tiny_iqs, "--embedder", tiny_embedder, *names
    )
    for name in ("cluster", "select"):
        [line] = suggested(done)
        assert parsed(line)[0] == name
        done = run(*shlex.split(line)[1:], *(("--k", 3) if name == "cluster" else ()))
    found: dict[str, Any] = {}
    exec("\n".join(suggested(done)), found)
    assert 0 < len(found["rows"]) < 24


def test_commands_on_a_result_suggest_what_comes_next(
    tiny_iqs: str, tiny_embedder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"instruction": f"Write {i}.", "output": "word " * (1 + i % 5)} for i in range(24)]
    Path("rows.json").write_text(json.dumps(rows))
    models = ("--scorer", tiny_iqs, "--embedder", tiny_embedder)
    verify, export, push = suggested(run("curate", "rows.json", "-o", "out", *models, "--allow-worse", "--budget", 6))
    assert parsed(push)[0] == "push" and run(*shlex.split(export)[1:]).exit_code == 0
    [rescore] = suggested(run(*shlex.split(verify)[1:]))
    assert parsed(rescore)[1]["source"] == "rows.json"
    assert "out/report.html" in run("explain", "out", 0).stderr
    assert suggested(run("explain", "out", "--explain-all")) == []
    monkeypatch.setattr(
        "car_datasets.publishing.push.push_selection", lambda *_, **__: ("https://hub/datasets/me/x", "abc")
    )
    assert (
        "load_dataset('me/x', 'small', split='selected', revision='abc')"
        in suggested(run("push", "out", "me/x", "--config-name", "small"))[1]
    )
    monkeypatch.setattr(
        "car_datasets.scoring.engines.estimate_scoring",
        lambda *_: SimpleNamespace(minutes=1, device="cpu", __str__=lambda: "1 row/s"),
    )
    assert [parsed(line)[1]["scorer"] for line in suggested(run("estimate", "rows.json", *models[:2]))] == [tiny_iqs]


def test_other_processes_of_a_launcher_suggest_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.cli.printing.launched_rank", lambda: (1, 2))
    pool = {"instruction": ["a", "b"], "output": ["c", "d"], "iqs_score": [0.1, 0.2], "cluster": [0, 0]}
    Dataset.from_dict(pool).to_parquet(tmp_path / "pool.parquet")
    done = run("select", tmp_path / "pool.parquet", "-o", tmp_path / "out.parquet", "--n1", 1)
    assert done.exit_code == 0 and "Next:" not in done.stderr
