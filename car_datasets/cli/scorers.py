"""The commands that make, measure and convert scorers: prepare, train, evaluate, quantise, convert."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from car_datasets.cli.app import (
    NEW_PATH,
    Output,
    Source,
    add_options,
    app,
    echo,
    one_line_errors,
    option,
    parse_new_path,
    quiet_models,
    recipe_options,
)
from car_datasets.cli.next_steps import after_prepare, after_quantise, after_scorer, after_train
from car_datasets.cli.printing import print_table, suggest, tell
from car_datasets.recipe import SCORING, Recipe
from car_datasets.scoring.named import IQS, JUDGE, ScorerName, read_name
from car_datasets.utils.files import claimed, fresh_folder, output_path, take_claim, without_nan, write_content
from car_datasets.utils.processes import launched_rank
from car_datasets.utils.settings import BOOTSTRAP_SAMPLES, read_kind

SCORERS = "Make and measure a scorer"  # the group of these commands in the help
FROM_CONFIG = "  [default: from CONFIG]"


@app.command(rich_help_panel=SCORERS, epilog="Example: car-datasets prepare revisions.json --output expert-pairs")
@one_line_errors
@add_options(
    drop=option(
        float | None,
        "Leave out the smallest edits: this share of them if below 1, else this many.  [default: 0.323, as in CaR]",
    )
)
def prepare(
    revisions: Annotated[
        Path,
        typer.Argument(metavar="REVISIONS", help="Read this JSON list of objects with the keys original and revised."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Write the files into this new folder.", **NEW_PATH)],
    seed: Annotated[int, typer.Option(help="Seed the split with this number.")] = Recipe.seed,
    similarity: Annotated[
        float,
        typer.Option(help="Keep pairs in one file whose cosine similarity is at least this; 0 skips the search."),
    ] = 0.8,
    clean: Annotated[
        bool, typer.Option(help="Decode typed-out escapes, straighten quotes and fold white space.")
    ] = True,
    **options: Any,
) -> None:
    """Split expert revisions into training, validation and test files, in the original's two formats.

    It also prints whether single words give the labels away.
    """
    from car_datasets.training.preparation import PUBLISHED_SHARE, audit_table
    from car_datasets.training.preparation import prepare as prepare_files

    drop = PUBLISHED_SHARE if options["drop"] is None else options["drop"]
    with claimed(output, ("prepare", revisions, drop, seed, clean, similarity)):
        found = prepare_files(revisions, output, drop=drop, seed=seed, clean_text=clean, similarity=similarity or None)
    kept = ", ".join(f"{found.counts[side]:,} {side}" for side in ("train", "valid", "test"))
    tell(
        f"{found.counts['revisions']:,} revisions, {found.counts['dropped']:,} smallest edits dropped; pairs: {kept} "
        f"({found.moved:,} near-duplicates moved to train). The files are in {output}."
    )
    for name, audit in found.audits.items():
        print_table(audit_table(name, audit))
    suggest(after_prepare(found.files, output))


@app.command(
    rich_help_panel=SCORERS, epilog="Example: car-datasets train configs/train_iqs_minilm.yaml --output my-scorer"
)
@one_line_errors
@add_options(
    "token",
    train=option(str | None, f"Train on this file of pairs or scored rows.{FROM_CONFIG}"),
    valid=option(str | None, f"Choose the epoch by this file of pairs.{FROM_CONFIG}"),
    output=option(str | None, f"Write the model into this new folder.{FROM_CONFIG}", None, "--output", "-o"),
    seed=option(int | None, f"Seed weights, order and dropout with this number.{FROM_CONFIG}"),
    ratings=option(str | None, f"Train on these ratings of single rows as well.{FROM_CONFIG}"),
    valid_ratings=option(str | None, f"Measure on these ratings of single rows.{FROM_CONFIG}"),
    set_=option(
        list[str] | None,
        "Change any key of CONFIG, as in --set epochs=2. The option may be repeated.",
        None,
        "--set",
        metavar="KEY=VALUE",
    ),
)
def train(
    config: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG", help="Read the settings from this YAML file, such as configs/train_iqs_minilm.yaml."
        ),
    ],
    **options: Any,
) -> None:
    """Train a scorer: the head of the embedded one, one that judges by parts, or a complete model as the original does."""
    quiet_models()
    # Only what was typed, so that the file decides on everything else.
    changes = {name: value for name, value in options.items() if name not in ("token", "set_") and value is not None}
    from car_datasets.training.head import HeadTraining, train_head
    from car_datasets.training.parts import PartsTraining, train_parts
    from car_datasets.training.train import OBJECTIVE_OF_KIND, ScorerTraining, train_scorer

    # The kind says which class knows the other keys, so it is read before any of them is checked.
    kind = read_kind(config, ("head", "parts", *OBJECTIVE_OF_KIND))
    entire = ScorerTraining, lambda settings: train_scorer(settings, options["token"])
    of_kind: dict[str, Any] = {"head": (HeadTraining, train_head), "parts": (PartsTraining, train_parts)}
    known, fit = of_kind.get(kind, entire)
    settings: Any = known.from_yaml(config, given=options["set_"] or (), **changes)
    with contextlib.ExitStack() as held:
        # By the main process alone, as `Trainer` lets the processes meet later, in its own way.
        if launched_rank()[0] == 0:
            held.callback(take_claim(output_path(settings.output, "output"), ("train", settings)).release)
        figures = fit(settings)
    if figures:  # the other processes of a distributed run have none
        pairs = figures["accuracy"]["cleaned"]["pairs"]
        tell(f"The model is in {settings.output}.")
        _say_accuracy("It", pairs, "validation pairs")
        suggest(after_train(settings.output, settings.valid, getattr(settings, "valid_ratings", None)))


@app.command(
    rich_help_panel=SCORERS,
    epilog="Example: car-datasets evaluate car-datasets/iqs-minilm --pairs expert_score_valid.csv",
)
@one_line_errors
@recipe_options("tokenizer")
@add_options(
    "token",
    pairs=option(
        Path | None, "Measure on these pairs: CSV (src, score or src, pos, neg) or JSON Lines (chosen, rejected)."
    ),
    ratings=option(
        Path | None,
        "Measure on these rated rows: CSV, JSON Lines or Parquet with soundness, fault and worth, and with file and row "
        "where the texts are in files of the same folder.",
    ),
    other=option(Path | None, "Choose the threshold and train the bag of words on these other pairs."),
    other_ratings=option(Path | None, "Train a bag of words on these other ratings, for comparison with --ratings."),
    former=option(str | None, "Measure this model, too, on --ratings."),
    revision=option(str | None, "Take this branch, tag or commit of a Hub model.", panel=SCORING),
    engine=option(
        str | None, "Also measure the int8 encoder in this folder, and compare it with float32.", panel=SCORING
    ),
    corruptions=option(
        bool | None,
        "Of several scorers, also score corrupted copies of the rows, which takes twelve times as long, and twelve times "
        "the calls of a judge.  [default: with --pairs, unless there is a judge]",
        None,
        "--corruptions/--no-corruptions",
    ),
    samples=option(int | None, f"Draw this many bootstrap samples per interval.  [default: {BOOTSTRAP_SAMPLES}]"),
    seed=option(int, "Seed bootstrap and corruptions with this number.", 0),
    json_=option(Path | None, "Also write all figures into this new JSON file.", None, "--json", **NEW_PATH),
)
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Evaluate this IQS model, a Hub id or folder; car-datasets/iqs-minilm is included. Several, or others as "
            "reward:MODEL, ifd:MODEL or perplexity:MODEL, are compared in the same tables. Options of such a scorer follow "
            "the model, as in reward:MODEL,labels=softmax(good). A judge is judge:MODEL,base_url=URL, with options of "
            "car-datasets judge such as rubric=FILE or max_tokens=500000.",
        ),
    ],
    changes: dict[str, Any],
    **options: Any,
) -> None:
    """Evaluate scorers on pairs of answers or rated rows: what they get right, what fools them, and what they like."""
    quiet_models()
    json_, other = options["json_"], options["other"]
    if len(models) > 1 or read_name(models[0]).kind != IQS:
        _compare(models, changes, json_, other, options)
        return
    model = read_name(models[0]).model
    pairs, ratings = options["pairs"], options["ratings"]
    if options["corruptions"] is not None:
        raise ValueError("--corruptions is for several scorers, or one that is no IQS model; leave it out.")
    _refuse_missing(options, other)
    from car_datasets.training.agreement import evaluate_ratings, refuse_one_class
    from car_datasets.training.pairs import read_pairs
    from car_datasets.training.ratings import read_ratings

    _refuse_json(json_, models)
    # Files first: a wrong path must not cost a download.
    measured, rest = ([] if path is None else read_pairs(path) for path in (pairs, other))
    rated, others = (None if path is None else read_ratings(path) for path in (ratings, options["other_ratings"]))
    if rated is not None:
        refuse_one_class(rated)
    from car_datasets.scoring.scorer import QualityScorer
    from car_datasets.training.evaluation import evaluate_scorer

    engine, token = options["engine"], options["token"]
    scorer = QualityScorer(model, options["revision"], token, changes.get("tokenizer"))
    former = None if options["former"] is None else QualityScorer(options["former"], None, token)
    # Options that were not given are left to the defaults of the library.
    drawing = {name: options[name] for name in ("samples", "seed") if options[name] is not None}
    quick = None if engine is None else replace(scorer, engine=engine)  # refused here, before anything is measured
    tables: list[Any] = []
    figures: dict[str, Any] = {}
    if measured:
        found = evaluate_scorer(scorer, measured, other=rest, **drawing)
        # Through JSON, where figures of no rows are null instead of NaN.
        tables, figures = found.to_tables(), json.loads(found.to_json())
        _say_accuracy(str(model), figures["accuracy"]["cleaned"]["pairs"])
    if rated is not None:
        by_reader = evaluate_ratings(scorer, rated, pairs=measured, other=others, former=former, **drawing)
        tables += by_reader.to_tables()
        figures["ratings"] = json.loads(by_reader.to_json())
    if quick is not None:
        from car_datasets.loading.templates import render
        from car_datasets.scoring.iqs.quantisation import compare_engines

        # The same pairs and seed, so that the two tables differ by the encoder alone.
        by_engine = evaluate_scorer(quick, measured, other=rest, **drawing)
        texts = [render(row, str(scorer.template)) for pair in measured for row in pair]
        agreement = compare_engines(scorer, quick, texts)
        tables += [*by_engine.to_tables(), agreement.to_table()]
        figures["int8"] = {**json.loads(by_engine.to_json()), "beside_float32": without_nan(asdict(agreement))}
    for table in tables:
        print_table(table)
    if json_ is not None:
        json_.parent.mkdir(parents=True, exist_ok=True)
        write_content(json_, json.dumps(figures, indent=2) + "\n")
    suggest([after_scorer(model, tokenizer=changes.get("tokenizer"))])


def _say_accuracy(who: str, pairs: Mapping[str, Any], what: str = "pairs") -> None:
    tell(
        f"{who} ranks {100 * pairs['value']:.1f} % of the {what} right (95 % interval {100 * pairs['low']:.1f} to "
        f"{100 * pairs['high']:.1f})."
    )


def _refuse_json(path: Path | None, models: Sequence[str]) -> None:
    """Raise ValueError if the file of figures is there already, or cannot be written."""
    if path is not None and path.exists():
        raise ValueError(f"--json {path} is there already; name another file or move it away.")
    if path is not None:
        with claimed(path, ("evaluate", models), argument="--json"):
            pass  # now, as nothing is measured for a file that cannot be written


def _compare(
    models: Sequence[str],
    changes: Mapping[str, Any],
    json_: Path | None,
    other: Path | None,
    options: Mapping[str, Any],
) -> None:
    """Print several scorers, or one that is no IQS model, in the same tables."""
    from car_datasets.cli.judging import say_spent
    from car_datasets.scoring.named import find_scorer
    from car_datasets.training.comparison import Judge, compare_scorers
    from car_datasets.training.pairs import read_pairs
    from car_datasets.training.ratings import read_ratings

    alone = {"--other": other, **{f"--{name.replace('_', '-')}": options[name] for name in ALONE}}
    alone["--tokenizer"] = changes.get("tokenizer")
    if given := [name for name, value in alone.items() if value is not None]:
        raise ValueError(f"{given[0]} is for one IQS model alone; leave it out to compare scorers.")
    if len(set(models)) < len(models):
        raise ValueError(f"{' '.join(models)}: a scorer is named twice; name each once.")
    _refuse_missing(options, None)
    _refuse_json(json_, models)
    pairs = [] if options["pairs"] is None else read_pairs(options["pairs"])
    names = [read_name(model) for model in models]
    judges = [model for model, name in zip(models, names, strict=True) if name.kind == JUDGE]
    # Each copy is a call of a judge, so copies must be asked for.
    corruptions = bool(pairs) and not judges if options["corruptions"] is None else options["corruptions"]
    ratings = None if options["ratings"] is None else read_ratings(options["ratings"])
    # A row that cannot be scored is counted, and left out for all.
    marks = {model: {"on_failure": "mark"} if model in judges else {} for model in models}
    found = {model: find_scorer(model, options["token"], on_invalid="mark", **marks[model]) for model in models}
    shown = _shown(models, names)
    drawing = {name: options[name] for name in ("samples", "seed") if options[name] is not None}
    compared = compare_scorers(
        {shown[model]: Judge(scorer, scorer.output_column) for model, scorer in found.items()},
        ratings=ratings,
        pairs=pairs,
        corruptions=corruptions,
        **drawing,
    )
    for table in compared.to_tables():
        print_table(table)
    if json_ is not None:
        write_content(json_, compared.to_json() + "\n")
    for model in judges:
        say_spent(found[model])
    suggest([after_scorer(*models)])


def _shown(models: Sequence[str], names: Sequence[ScorerName]) -> dict[str, str]:
    """Return what tables call each scorer: of a judge, only the options that tell it from the others, if that is enough."""
    short = [
        str(name._replace(options=tuple(option for option in name.options if option[0] == "rubric")))
        if name.kind == JUDGE
        else model
        for model, name in zip(models, names, strict=True)
    ]
    return {model: each if short.count(each) == 1 else model for model, each in zip(models, short, strict=True)}


ALONE = ("other_ratings", "former", "revision", "engine")  # options of `evaluate` for one IQS model


def _refuse_missing(options: Mapping[str, Any], other: Path | None) -> None:
    """Raise ValueError if there is nothing to measure on, or an option lacks what it belongs to."""
    if options["pairs"] is None and options["ratings"] is None:
        raise ValueError("evaluate measures on --pairs FILE, on --ratings FILE, or on both; name at least one.")
    needs = {
        "--pairs": {"--other": other, "--engine": options["engine"]},
        "--ratings": {"--other-ratings": options["other_ratings"], "--former": options["former"]},
    }
    for needed, given in needs.items():
        for name, value in given.items():
            if value is not None and options[needed.strip("-")] is None:
                raise ValueError(
                    f"{name} {value} is of use with {needed} FILE only; name that file, or leave {name} out."
                )


@app.command(rich_help_panel=SCORERS, epilog="Example: car-datasets quantise alpaca_data.json --output int8")
@one_line_errors
@recipe_options(
    *("scorer", "scorer_revision", "tokenizer", "name", "split", "revision", "schema", "columns"),
    seed="Seed the choice of rows with this number.",
)
@add_options("token")
def quantise(
    source: Source,
    output: Output,
    changes: dict[str, Any],
    rows: Annotated[
        int, typer.Option(help="Calibrate on this many rows of the source, and compare on as many others.")
    ] = 300,
    **options: Any,
) -> None:
    """Quantise a scorer's encoder to int8, for --engine on the CPU.

    This needs an extra: pip install 'car-datasets[openvino]'.
    """
    quiet_models()
    from car_datasets.scoring.iqs.openvino_encoder import RECORD_FILE, import_openvino

    # Both checks come before a source or a model is downloaded.
    fresh_folder(output, (RECORD_FILE,), "--output")
    import_openvino("nncf")
    from car_datasets.curation import open_source
    from car_datasets.scoring.iqs.quantisation import FEWEST_TEXTS, compare_engines, quantise_encoder, sample_texts
    from car_datasets.scoring.scorer import QualityScorer
    from car_datasets.stages import scorer_of

    if rows < FEWEST_TEXTS:
        raise ValueError(f"--rows {rows}: calibration needs at least {FEWEST_TEXTS}.")
    # Rows that cannot be scored are skipped below; they must not stop a calibration.
    recipe, token = Recipe(on_invalid="mark").changed(**changes), options["token"]
    if read_name(recipe.scorer).kind != IQS:
        raise ValueError(f"--scorer {recipe.scorer} is no IQS model, and only the encoder of one is quantised.")
    with claimed(output, ("quantise", source, rows, recipe)):
        dataset = open_source(source, recipe, token).dataset
        scorer = scorer_of(recipe, token, embed=False)
        assert isinstance(scorer, QualityScorer)
        texts, others = sample_texts(dataset, scorer, rows, seed=recipe.seed)
        quantise_encoder(scorer, texts, output)
        tell(f"The int8 encoder, calibrated on {len(texts):,} texts, is in {output}.")
        # On rows that were not calibrated on, where the agreement would be too good.
        if len(others) >= FEWEST_TEXTS:
            print_table(compare_engines(scorer, replace(scorer, engine=str(output)), others).to_table())
        else:
            echo(f"Not compared with float32: {len(others)} texts are left, and it takes {FEWEST_TEXTS}.")
    suggest(after_quantise(source, output, changes))


@app.command(
    rich_help_panel=SCORERS,
    epilog="Example: car-datasets convert instruction_score iqs --tokenizer FacebookAI/xlm-roberta-large",
)
@one_line_errors
@recipe_options("tokenizer")
def convert(
    checkpoint: Annotated[
        str, typer.Argument(help="Convert this .ckpt file, or folder or Hub id in the original's layout.")
    ],
    output: Annotated[
        Path, typer.Argument(parser=parse_new_path, metavar="DIR", help="Write the model into this new folder.")
    ],
    changes: dict[str, Any],
) -> None:
    """Convert a checkpoint of the original CaR project to an ordinary model folder."""
    quiet_models()
    from car_datasets.scoring.iqs.modeling_iqs import convert_checkpoint

    with claimed(output, ("convert", checkpoint, changes), argument="output"):
        convert_checkpoint(checkpoint, output, changes.get("tokenizer"))
    tell(f"The model is in {output}.")
    suggest([after_scorer(output)])
