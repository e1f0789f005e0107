"""The steps that come after each command, from what it was called with: commands that can be copied and run.

Does: name the real files of a run, quoted for a shell, with the options that the next command needs to fit this one.
Does not: print, or run anything. A word in capitals, such as OWNER/NAME, is left for the user to fill in.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from car_datasets.cli.printing import Step
from car_datasets.recipe import Recipe
from car_datasets.scoring.named import JUDGE, read_name
from car_datasets.utils.files import data_folder, sample_file, user_path
from car_datasets.utils.settings import CONFIG_NAME, SPLIT

if TYPE_CHECKING:
    from car_datasets.publishing.verification import Verification
    from car_datasets.scoring.engines import Estimate

TRY = "tatsu-lab/alpaca"  # a public dataset, to try the package on
RESCORED = 32  # rows; some seconds on a CPU
LONG = 10  # minutes of scoring, from which it is worth keeping shards
REPOSITORY = "OWNER/NAME"
ANY_SOURCE = "SOURCE"


def command(*words: object) -> str:
    """Return a command as one types it."""
    return shlex.join(["car-datasets", *map(str, words)])


def options_of(changes: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Return settings of a recipe as options.

    Args:
        changes (`dict`): the settings that were given.
        names (`Iterable[str]`, *optional*): those to return; by default all.
    """
    wanted = changes.keys() if names is None else changes.keys() & set(names)
    words: list[str] = []
    for setting in fields(Recipe):
        if setting.name not in wanted:
            continue
        value, flag = changes[setting.name], setting.metadata["flag"] or f"--{setting.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for each in (value or (None,)) if isinstance(value, tuple) else (value,):
            words += [flag, _typed(each)]
    return words


def _typed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{role}={column}" for role, column in value.items())
    return "none" if value is None else str(value)


def fresh(path: Path) -> Path:
    """Return a path that is not there yet: this one, or it with a number."""
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found


def after_curate(folder: Path, source: str) -> list[Step]:
    """Return what one can do with a result."""
    return [
        look(folder),
        *_check(folder, source),
        *_hand_on(folder),
    ]


def after_demo(folder: Path) -> list[Step]:
    """Return what one can do after the demo."""
    return [
        look(folder),
        Step("Ask why the first three rows are in the selection, or are not:", (command("explain", folder, 0, 1, 2),)),
        *_check(folder, str(sample_file())),
        Step(
            "Curate some rows of a dataset on the Hub; a file of yours works as well:",
            (command("curate", TRY, "--split", "train[:2000]", "--output", fresh(folder.parent / "alpaca")),),
        ),
    ]


def after_top_up(folder: Path) -> list[Step]:
    """Return what one can do with a result that new rows were added to."""
    return [
        look(folder),
        Step("Check it against its receipt:", (command("verify", folder),)),
        *_hand_on(folder),
    ]


def _hand_on(folder: Path) -> list[Step]:
    return [
        Step("Write it as a training file for your trainer:", (command("export", folder, "--for", "trl"),)),
        Step("Publish it in a private dataset repository of yours:", (command("push", folder, REPOSITORY),)),
    ]


def look(folder: Path) -> Step:
    """Return the page of a result, as the step after it."""
    from car_datasets.reporting.page import PAGE_FILE

    return Step(f"Open {folder / PAGE_FILE} in a browser: it shows the rows, and why each was taken or not.")


def _check(folder: Path, source: str) -> list[Step]:
    """Return the step that compares a result with its receipt and its source, none if the source is gone."""
    from car_datasets.loading.files import is_address

    if source == "-":
        return []
    # A receipt has the name of a file, but not its path; a dataset on the Hub is found.
    local = user_path(source).exists() or is_address(source)
    given = ["--source", source] if local else []
    return [Step("Check it against its receipt and its source:", (command("verify", folder, *given),))]


def after_score(output: Path, changes: Mapping[str, Any], embedded: bool) -> list[Step]:
    """Return the clustering of scored rows.

    Args:
        output (`Path`): the file of the scored rows.
        changes (`dict`): the settings that `score` was given.
        embedded (`bool`): whether the file has embeddings.
    """
    clustered = fresh(output.with_name("clustered.parquet"))
    reading = ("schema", "columns", "embedder", "template")  # of the texts, which are then embedded
    needed = ("cluster_column", *(("embedding_column",) if embedded else reading))
    words = command("cluster", output, "--output", clustered, *options_of(changes, needed))
    return [Step("Cluster the scored rows:", (words,))]


def after_filled_shards(source: str, shards: str, changes: Mapping[str, Any]) -> list[Step]:
    """Return the command that makes a result of shards, with the settings that they were scored with."""
    again = command("curate", source, "--output", fresh(Path("curated")), "--shards", shards, *options_of(changes))
    return [Step("Curate from these shards, which scores what is missing:", (again,))]


def after_estimate(source: str, changes: Mapping[str, Any], estimate: Estimate, devices: int) -> list[Step]:
    """Return the command that curates the rows that were timed.

    Args:
        source (`str`): the dataset.
        changes (`dict`): the settings that `estimate` was given.
        estimate ([`Estimate`]): what it found.
        devices (`int`): GPUs of this machine.
    """
    shards = ["--shards", fresh(Path("shards"))] if estimate.minutes / max(1, devices) > LONG else []
    resumed = "; after a kill, the same command resumes" if shards else ""
    words = ["curate", source, "--output", fresh(Path("curated")), *shards, *options_of(changes)]
    if devices > 1:
        launcher = ["accelerate", "launch", "--multi_gpu", "--num_processes", devices, "-m", "car_datasets"]
        line = shlex.join(map(str, [*launcher, *words]))
        return [Step(f"Curate with {devices} processes, one for each GPU{resumed}:", (line,))]
    cores = "on the GPU" if estimate.device.startswith("cuda") else "which uses all cores"
    return [Step(f"Curate in one process, {cores}{resumed}:", (command(*words),))]


def after_cluster(output: Path, columns: Sequence[str], changes: Mapping[str, Any]) -> list[Step]:
    """Return the selection from clustered rows.

    Args:
        output (`Path`): the file of the clustered rows.
        columns (`Sequence[str]`): of the file.
        changes (`dict`): the settings that `cluster` was given.
    """
    score = Recipe.score_column
    others = [name for name in columns if name.endswith("score")]
    # Rows of another scorer have another column; without exactly one, `select` names those that are there.
    given = ["--score-column", others[0]] if score not in columns and len(others) == 1 else []
    options = [*given, *options_of(changes, ("schema", "columns", "cluster_column", "embedding_column", "rule"))]
    words = command("select", output, "--output", fresh(output.with_name("selected.parquet")), *options)
    known = score in columns or given
    return [Step("Select from them:", (words,))] if known else [Step("Score them: `car-datasets select` needs scores.")]


def after_select(output: Path) -> list[Step]:
    """Return the lines that load selected rows."""
    kind = "json" if output.suffix == ".json" else "parquet"
    load = f"rows = load_dataset({kind!r}, data_files={str(output)!r}, split='train')"
    return [Step("Load the rows in Python:", ("from datasets import load_dataset", load))]


def after_judge(output: Path, score: str, columns: Sequence[str], changes: Mapping[str, Any]) -> list[Step]:
    """Return the selection by the ratings of a judge.

    Args:
        output (`Path`): the file of the judged rows.
        score (`str`): the column of ratings.
        columns (`Sequence[str]`): of the file.
        changes (`dict`): the settings that `judge` was given.
    """
    reading = options_of(changes, ("schema", "columns"))
    selected = fresh(output.with_name("selected.parquet"))
    select = ["--output", selected, "--score-column", score, *reading, *options_of(changes, ("index_column",))]
    if Recipe.cluster_column in columns:
        return [Step("Select by these ratings:", (command("select", output, *select),))]
    clustered = fresh(output.with_name("clustered.parquet"))
    return [
        Step(
            "Cluster the rows, and select by these ratings:",
            (command("cluster", output, "--output", clustered, *reading), command("select", clustered, *select)),
        )
    ]


def after_push(repo: str, commit: str, split: str = SPLIT, config_name: str = CONFIG_NAME) -> list[Step]:
    """Return the lines that load what was pushed.

    Args:
        repo (`str`): the dataset repository, `"owner/name"`, because `load_dataset` takes no address of a page.
        commit (`str`): the commit of the push.
        split, config_name (`str`): where the selected rows are.
    """
    named = [repr(repo), *([repr(config_name)] if config_name != CONFIG_NAME else []), f"split={split!r}"]
    load = f"rows = load_dataset({', '.join(named)}, revision={commit!r})"
    return [Step("Load the selection in Python, from this commit:", ("from datasets import load_dataset", load))]


def after_verify(where: str, found: Verification, given: Mapping[str, Any]) -> list[Step]:
    """Return what was not checked, or the publication of a folder that was; nothing if there are differences.

    Args:
        where (`str`): the folder or repository.
        found ([`Verification`]): what was found.
        given (`dict`): the options of `verify`.
    """
    if not found.matches:
        return []
    if not given["rescore"]:
        names = ("source", "revision", "config_name", "split")
        defaults = {"config_name": CONFIG_NAME, "split": SPLIT}
        typed = [name for name in names if given[name] not in (None, defaults.get(name))]
        same = [word for name in typed for word in (f"--{name.replace('_', '-')}", given[name])]
        again = command("verify", where, *same, "--rescore", RESCORED)
        return [Step(f"Score {RESCORED} rows again, and compare:", (again,))]
    if Path(where).is_dir():
        return [Step("Publish it in a private dataset repository of yours:", (command("push", where, REPOSITORY),))]
    return []


def after_prove(folder: Path) -> list[Step]:
    """Return what one can do with a proof."""
    return [
        Step(f"Read {folder / 'proof.md'}: it has the intervals by domain, and says what the proof does not show."),
        Step("Publish the selection with its proof:", (command("push", folder, REPOSITORY),)),
    ]


def after_prepare(files: Mapping[str, Path], folder: Path) -> list[Step]:
    """Return the training on prepared files.

    Args:
        files (`dict`): the files by name.
        folder (`Path`): where they are.
    """
    ours = Path("configs") / "train_iqs_minilm.yaml"  # in a checkout
    config = ours if ours.exists() else data_folder("configs") / ours.name
    given = ["--train", files["score_train"], "--valid", files["score_valid"]]
    model = fresh(folder.parent / "my-scorer")
    return [Step("Train a scorer on them:", (command("train", config, *given, "--output", model),))]


def after_train(output: str, valid: str, valid_ratings: str | None) -> list[Step]:
    """Return the evaluation of a trained scorer.

    Args:
        output (`str`): the folder of the model.
        valid (`str`): the validation file of pairs.
        valid_ratings (`str`, *optional*): the validation file of rated rows.
    """
    path = Path(valid)
    # The epoch was chosen by the validation file, so figures on it flatter; `prepare` writes a test file next to it.
    test = path.with_name(path.name.replace("valid", "test"))
    pairs = test if test.exists() else path
    ratings = [] if valid_ratings is None else ["--ratings", valid_ratings]
    return [Step("Measure it:", (command("evaluate", output, "--pairs", pairs, *ratings),)), after_scorer(output)]


def after_scorer(*models: str | Path, tokenizer: str | None = None) -> Step:
    """Return the commands that curate a dataset by a scorer, or by one of several; a judge has a command of its own."""
    given = [] if tokenizer is None else ["--tokenizer", tokenizer]
    lines, verbs = [], list[str]()
    words: list[Any]
    for model in models:
        name = read_name(str(model))
        if name.kind == JUDGE:
            options = [word for option, value in name.options for word in (f"--{option.replace('_', '-')}", value)]
            words = ["judge", ANY_SOURCE, "--output", fresh(Path("judged.parquet")), "--model", name.model, *options]
        else:
            words = ["curate", ANY_SOURCE, "--output", fresh(Path("curated")), "--scorer", model, *given]
        lines.append(command(*words))
        verbs.append("judge" if name.kind == JUDGE else "curate")
    which = " or ".join(dict.fromkeys(verbs)).capitalize() + (" by it" if len(models) == 1 else " by one of them")
    return Step(f"{which}, with your dataset as SOURCE:", tuple(lines))


def after_quantise(source: str, output: Path, changes: Mapping[str, Any]) -> list[Step]:
    """Return the commands that score with an int8 encoder."""
    options = options_of({**changes, "engine": output}, set(changes) - {"seed"} | {"engine"})
    curated = fresh(Path("curated"))
    return [
        Step("Measure its speed:", (command("estimate", source, *options),)),
        Step("Curate with it:", (command("curate", source, "--output", curated, *options),)),
    ]
