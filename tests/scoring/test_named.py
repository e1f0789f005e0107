"""named.py: a scorer of each kind by its name, compared with others, and in `curate` and `verify`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import (
    IFDScorer,
    PerplexityScorer,
    QualityScorer,
    Receipt,
    Recipe,
    RewardScorer,
    TextEmbedder,
    curate,
    select_car,
    verify,
)
from car_datasets.cli import app
from car_datasets.curation import made_by
from car_datasets.publishing.card import Target, render_section
from car_datasets.publishing.rescoring import Difference, Rescoring
from car_datasets.scoring.named import SCORERS, find_scorer, moved, read_name, settings_of
from tests.conftest import WORDS
from tests.scoring.tiny_models import rated_rows, save_classifier
from tests.test_recipe import short_rows
from tests.workers import at_home, run_ranks, start


def test_a_name_gives_a_scorer_of_its_kind(
    tiny_iqs: str, classifiers: dict[str, str], language_models: dict[str, str]
) -> None:
    gpt2 = language_models["gpt2"]
    found = {
        tiny_iqs: QualityScorer,
        f"iqs:{tiny_iqs}": QualityScorer,
        f"reward:{classifiers['bert']}": RewardScorer,
        f"ifd:{gpt2}": IFDScorer,
        f"perplexity:{gpt2}": PerplexityScorer,
    }
    for name, kind in found.items():
        assert type(find_scorer(name, on_invalid="mark")) is kind
    with pytest.raises(ValueError, match="write ifd:MODEL"):
        find_scorer("ifd:")
    with pytest.raises(ValueError, match="has an option twice"):
        read_name("reward:o/m,labels=good,labels=bad")


def test_a_moved_model_keeps_its_kind_and_options() -> None:
    name = "reward:o/m,labels=good"
    for place in ("here", "reward:here", "reward:here,labels=good"):
        assert moved(name, place) == "reward:here,labels=good"
    for place in ("ifd:here", "reward:here,labels=bad"):
        with pytest.raises(ValueError, match="Pass the model alone"):
            moved(name, place)


def test_several_are_compared_in_the_same_tables(
    tiny_iqs: str, classifiers: dict[str, str], language_models: dict[str, str], tmp_path: Path
) -> None:
    ratings = tmp_path / "ratings.jsonl"
    ratings.write_text("\n".join(map(json.dumps, rated_rows(24))))
    names = [tiny_iqs, f"reward:{classifiers['bert']}", f"ifd:{language_models['gpt2']}"]
    options = ["--ratings", str(ratings), "--samples", "5", "--json", str(tmp_path / "figures.json")]
    done = CliRunner().invoke(app, ["evaluate", *names, *options])
    assert done.exit_code == 0, done.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["scorers"]) == names and list(figures["agreement"]) == [*names, "length", "random"]
    assert figures["rows"] == 24 and len(figures["between"]) == 10 and figures["corruptions"] == {}
    for arguments, message in (
        ([names[0], names[0], *options[:2]], "named twice"),
        ([*names, *options[:2], "--former", tiny_iqs], "--former is for one IQS model alone"),
        ([*names], "name at least one"),
        ([names[0], *options[:2], "--no-corruptions"], "--corruptions is for several"),
    ):
        failed = CliRunner().invoke(app, ["evaluate", *arguments])
        assert failed.exit_code == 2 and message in failed.stderr, failed.stderr


# --- a recipe with a scorer of another kind


@pytest.fixture(scope="module")
def names(
    classifiers: dict[str, str], language_models: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Return a name of each kind of scorer, by the column that it adds."""
    two = save_classifier(str(tmp_path_factory.mktemp("two")), "bert", ("bad", "good, or so"))
    return {
        "reward_score": f"reward:{classifiers['roberta']}",
        "of_labels": f"reward:{two},labels=softmax('good, or so'),max_tokens=40",
        "ifd_score": f"ifd:{language_models['gpt2']}",
        "perplexity_score": f"perplexity:{language_models['llama']},given=nothing",
    }


@pytest.mark.parametrize(
    ("column", "others"),
    [
        ("ifd_score", ["ifd"]),
        pytest.param("of_labels", [], marks=pytest.mark.slow),
        pytest.param("reward_score", [], marks=pytest.mark.slow),
        pytest.param("perplexity_score", ["perplexity"], marks=pytest.mark.slow),
    ],
)
def test_curate_and_verify_by_another_scorer(
    names: dict[str, str], column: str, others: list[str], tiny_embedder: str, tmp_path: Path
) -> None:
    changes = {"score_column": column} if column == "of_labels" else {}
    rows, source = Dataset.from_list(short_rows().to_list()), tmp_path / "rows.json"
    source.write_text(json.dumps(rows.to_list()))
    name, folder = names[column], read_name(names[column]).model
    selected, scored, _ = curate(
        str(source), tmp_path / "out", scorer=name, embedder=tiny_embedder, n1=5, k=3, **changes
    )
    stem = column.removesuffix("_score")
    added = [column, *others, f"{stem}_tokens", f"{stem}_truncated", f"{stem}_status", "embedding"]
    assert scored.column_names[4:-4] == added
    expected = np.array(find_scorer(name, output_column=column)(rows[:])[column], dtype=float)
    assert np.allclose(np.array(scored[column][:], dtype=float), expected, rtol=1e-4, equal_nan=True)
    best = np.argsort(-expected)[:3].tolist()  # rows without a score come last
    assert set(selected["source_index"][:]) >= {i for i in best if scored["duplicate_of"][i] is None}
    receipt = Receipt.read(tmp_path / "out")
    assert receipt.scorer["kind"] == name.partition(":")[0] and receipt.scorer["model_id"] == Path(folder).name
    assert receipt.scorer.get("options", "") == name.partition(",")[2]
    assert receipt.recipe["scorer"] == name.replace(folder, Path(folder).name)
    card = render_section(Target("me/rows", "default", "selected"), {}, [], None, receipt, {}, [])
    assert f"Scored by `{receipt.recipe['scorer']}` (revision" in card and "how an answer reads" not in card
    assert SCORERS[receipt.scorer["kind"]].meaning in card
    found = verify(tmp_path / "out", source=source, rescore=9, scorer=folder, embedder=tiny_embedder)
    assert found.matches, found.differences
    assert any("scored again" in words for words in found.checked)
    assert made_by(receipt, str(source), Recipe(scorer=name, embedder=tiny_embedder, n1=5, k=3, **changes))
    moved = scored.map(lambda row: {column: None if row[column] is None else 1.01 * row[column] + 0.01})
    recipe = Recipe().changed(**receipt.recipe)
    with pytest.raises(Difference, match="scored again"):
        Rescoring(receipt, recipe, 24, models={"scorer": folder}).scores(moved)
    with pytest.raises(ValueError, match=r"has the digest .*, not revision="):
        verify(tmp_path / "out", source=source, rescore=2, scorer=tiny_embedder)


def test_a_stage_may_be_given_with_its_options(names: dict[str, str], tiny_embedder: str) -> None:
    folder = read_name(names["of_labels"]).model
    stage = RewardScorer(folder, labels="LABEL_1", max_tokens=30, output_column="mine", on_invalid="mark")
    found = curate(short_rows(), scorer=stage, embedder=tiny_embedder, n1=5, k=3, duplicates="keep")
    assert found.scored["mine"][:] == pytest.approx(stage(short_rows()[:])["mine"], rel=1e-4)
    settings = settings_of(stage, ["scorer", "on_invalid", "dtype"])
    assert settings["scorer"] == f"reward:{folder},text=pair,labels=LABEL_1,max_tokens=30"
    assert settings["on_invalid"] == "mark" and "dtype" not in settings and settings["score_column"] == "mine"
    with pytest.raises(ValueError, match=r"scorer is a TextEmbedder; .* select_car\(rows, score_column=\.\.\.\)"):
        curate(short_rows(), scorer=TextEmbedder())


def test_the_likeliest_answers_are_the_best_by_perplexity(names: dict[str, str], tiny_embedder: str) -> None:
    name = names["perplexity_score"]
    found = curate(short_rows(), scorer=name, embedder=tiny_embedder, n1=5, n2=0, duplicates="keep")
    lowest = sorted(each for each in found.scored["perplexity"][:] if each is not None)[:5]
    assert sorted(found.selected["perplexity"][:]) == lowest
    for column in ("perplexity", "ifd"):
        pool = Dataset.from_dict({column: [3.0, 1.0], f"{column}_score": [1.0, 3.0], "cluster": [0, 0]})
        with pytest.raises(ValueError, match=f"Its column '{column}_score' has the best rows first"):
            select_car(pool, n1=1, score_column=column)
        assert len(select_car(pool.remove_columns(f"{column}_score"), n1=1, score_column=column)) == 1


def test_the_column_follows_the_kind_unless_it_is_named() -> None:
    recipe = Recipe(scorer="ifd:me/model")
    assert recipe.score_column == "ifd_score" and recipe.further_columns == ("ifd",)
    assert recipe.changed(scorer="reward:me/model").score_column == "reward_score"
    assert recipe.changed(scorer="me/iqs").score_column == Recipe().score_column == "iqs_score"
    assert recipe.changed(n1=3).score_column == "ifd_score"
    named = Recipe(scorer="perplexity:me/model", score_column="mine")
    assert named.changed(scorer="ifd:me/model").score_column == "mine" and named.further_columns == ("mine_perplexity",)
    assert Recipe(scorer="iqs:me/model").scorer == "me/model"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": True}, "parts=True is for an IQS model, and scorer='ifd:m' is of another kind"),
        ({"uncertainty": True}, "uncertainty=True is for an IQS model"),
        ({"engine": "openvino"}, "engine='openvino' is for an IQS model"),
        ({"template": "clean-1"}, "Leave template out"),
        ({"dtype": "float8"}, "Choose float32, bfloat16 or float16"),
        ({"scorer": "ifd:"}, "names no model; write ifd:MODEL"),
        ({"scorer": "rwd:m"}, r"has the kind 'rwd'; write one of \['iqs', 'reward', 'ifd', 'perplexity', 'judge'\]"),
        ({"scorer": "ifd:m,labels=a"}, r"has the option 'labels'; .* takes \['max_tokens'\]"),
    ],
)
def test_options_that_another_kind_lacks_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        curate("nowhere.json", **{"scorer": "ifd:m", **settings})


def test_a_model_of_another_class_is_refused_with_the_kinds_that_fit(language_models: dict[str, str]) -> None:
    with pytest.raises(
        ValueError, match=r"class AutoModelForSequenceClassification.* ifd:MODEL or perplexity:MODEL for a causal"
    ):
        list(short_rows().map(find_scorer(f"reward:{language_models['gpt2']},labels=LABEL_1"), batched=True))
    with pytest.raises(ValueError, match=r"'ifd:elsewhere' is of another kind.* Pass the model alone, 'elsewhere'"):
        moved("perplexity:lm", "ifd:elsewhere")


def test_a_taken_column_of_the_kind_is_refused_before_a_model_is_loaded() -> None:
    rows = short_rows().add_column("ifd", [0.5] * 24)
    with pytest.raises(ValueError, match=r"already has the column\(s\) \['ifd'\]"):
        curate(rows, scorer="ifd:no/such-model")
    judged = short_rows().add_column("judge_score", [0.5] * 24)
    with pytest.raises(ValueError, match=r"`car-datasets cluster` .* `car-datasets select --score-column judge_score`"):
        curate(judged, score_column="judge_score")


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_a_killed_run_is_finished_by_several_processes(
    names: dict[str, str], tiny_embedder: str, tmp_path: Path
) -> None:
    words = [word for word in WORDS if word.isalpha()]
    content = [
        {
            "instruction": f"Write {words[i % 20]} of {words[i // 20 % 20]}",
            "output": " ".join(words[i // 400 : 3 + i % 9]),
        }
        for i in range(600)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(content))
    source, scorer = str(tmp_path / "rows.json"), names["reward_score"]
    models = ["--scorer", scorer, "--embedder", tiny_embedder, "--n1", "50", "--k", "5"]
    command = ["-m", "car_datasets", "curate", source, *models]
    curate(source, tmp_path / "one", scorer=scorer, embedder=tiny_embedder, n1=50, k=5)
    command += ["--output", str(tmp_path / "many"), "--shards", str(tmp_path / "shards")]
    killed = start(command, {**at_home(), "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (parts := list((tmp_path / "shards").glob("scores/part-*.arrow"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    killed.wait(30)
    written = {part: part.stat().st_mtime_ns for part in parts}
    assert written and not (tmp_path / "many" / "receipt.json").exists()
    for rank in run_ranks(2, command):
        assert rank.returncode == 0, rank.stderr
    assert written == {part: part.stat().st_mtime_ns for part in parts}
    found = [
        Dataset.from_parquet(str(tmp_path / name / "scored.parquet"), cache_dir=str(tmp_path))
        for name in ("one", "many")
    ]
    assert np.allclose(found[0]["reward_score"][:], found[1]["reward_score"][:], atol=1e-5)
    receipts = [Receipt.read(tmp_path / name) for name in ("one", "many")]
    assert receipts[0].selected_sha256 == receipts[1].selected_sha256
    assert receipts[0].scorer == receipts[1].scorer
