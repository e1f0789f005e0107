"""The command that has a language model judge the rows of a dataset.

Does: parse, call the library, print what was judged and what it has cost.
Does not: hold logic, take a key as an option, or import a heavy library before the command runs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from car_datasets.cli.app import NEW_PATH, Source, add_options, app, echo, one_line_errors, option, recipe_options
from car_datasets.cli.next_steps import after_judge
from car_datasets.cli.printing import suggest, tell
from car_datasets.cli.stages import READING
from car_datasets.recipe import OUTPUT, PERFORMANCE, Recipe
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.files import claimed, fresh_file

if TYPE_CHECKING:
    from datasets import Dataset

    from car_datasets.scoring.judges.judge import JudgeScorer

OTHERS = "Other scorers"  # the group of this command in the help
DESCRIPTION = "Judging"  # of the progress bar


@app.command(
    rich_help_panel=OTHERS,
    epilog="Example: car-datasets judge rows.json --output rated.parquet --base-url http://localhost/v1 --model NAME",
)
@one_line_errors
@recipe_options(*READING, "index_column")
@add_options(
    "shards",
    "overwrite",
    "token",
    rubric=option(str, "Judge by this rubric: a YAML file, or the name of one in configs/.", "soundness_worth"),
    key_variable=option(
        str | None,
        "Read the API key from this environment variable.  [default: OPENAI_API_KEY for api.openai.com, else JUDGE_API_KEY]",
    ),
    output_column=option(str, "Name the column of scores; the other columns are named after it.", "judge_score"),
    on_failure=option(
        str,
        "Let a row that is not answered, or for which the cap has no room, end the run (error) or be null (mark).",
        "error",
    ),
    max_tokens=option(int | None, "Never use more tokens than this, of prompts and answers.", panel=PERFORMANCE),
    max_cost=option(float | None, "Never spend more than this, by --prices.", panel=PERFORMANCE),
    prices=option(
        str | None,
        "Count with these prices of a million tokens of prompts and of answers, as in 0.15,0.6.",
        panel=PERFORMANCE,
    ),
    answer_tokens=option(
        int, "Let an answer have at most this many tokens, thoughts included.", 512, panel=PERFORMANCE
    ),
    concurrency=option(int, "Make this many calls at the same time.", 8, panel=PERFORMANCE),
    timeout=option(float, "Wait this many seconds for an answer.", 120.0, panel=PERFORMANCE),
    retries=option(int, "Repeat a call that failed this many times.", 8, panel=PERFORMANCE),
    cache=option(
        str | None,
        "Keep answers and costs in this file.  [default: one per address and model in the cache of datasets]",
        panel=PERFORMANCE,
    ),
)
def judge(
    source: Source,
    base_url: Annotated[
        str, typer.Option(metavar="URL", help="Ask the server at this address, such as http://localhost:8000/v1.")
    ],
    model: Annotated[str, typer.Option(help="Ask the model of this name there.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write this new .parquet file.", rich_help_panel=OUTPUT, **NEW_PATH)
    ],
    changes: dict[str, Any],
    **options: Any,
) -> None:
    """Have a language model rate each row: add judge_score, judge_reason and the other fields of a rubric.

    Any OpenAI-compatible server will do. Needs an extra: pip install 'car-datasets[judge]'.
    """
    fresh_file(output, source, options["overwrite"])
    if output.suffix != ".parquet":
        raise ValueError(f"--output {output}: name a .parquet file, which keeps all columns of a judge.")
    from car_datasets.results import write_table
    from car_datasets.scoring.judges.judge import JudgeScorer
    from car_datasets.utils.processes import from_main

    shards, token, prices = (options.pop(name) for name in ("shards", "token", "prices"))
    del options["overwrite"]
    if shards is not None:
        from car_datasets.scoring.shards.storage import check_shards

        check_shards(shards, output, source)
    recipe = Recipe().changed(**changes)
    reading = {name: getattr(recipe, name) for name in ("schema", "columns", "on_invalid", "score_thoughts")}
    scorer = JudgeScorer(base_url, model, prices=_parse_prices(prices), **reading, **options)
    with claimed(output, ("judge", source, recipe, scorer)) as claim:
        judged = _judge(source, recipe, scorer, shards, token)

        def write() -> None:
            claim.check()
            write_table(judged, output, recipe.names)

        from_main(write)
    status = ColumnNames(score=scorer.output_column).status
    counts = Counter(str(found).partition(": ")[0] for found in judged[status])
    tell(f"{len(judged):,} rows are in {output}: {', '.join(f'{n:,} {found}' for found, n in counts.most_common())}.")
    say_spent(scorer)
    suggest(after_judge(output, scorer.output_column, judged.column_names, changes))


def say_spent(scorer: JudgeScorer) -> None:
    """Print what the calls of a judge have cost, those of earlier runs included."""
    spent = scorer.spent()
    cost = "" if scorer.prices is None else f", which cost {spent.cost:,.4g}"
    echo(f"{scorer.cache_file} has recorded {spent.calls:,} calls of {spent.tokens:,} tokens{cost}.")


def _judge(source: str, recipe: Recipe, scorer: JudgeScorer, shards: str | None, token: str | None) -> Dataset:
    """Open the source and return its rows with the columns of the judge."""
    from car_datasets.curation import open_source
    from car_datasets.scoring.shards.run import score_in_shards
    from car_datasets.scoring.stage import add_columns, refuse_taken
    from car_datasets.utils.processes import process_rank

    dataset = open_source(source, recipe, token).dataset
    refuse_taken(dataset.column_names, scorer)
    # Several processes share the work in shards even without a folder.
    if shards is None and process_rank()[1] == 1:
        return add_columns(dataset, scorer, DESCRIPTION)
    return score_in_shards(dataset, scorer, shards, description=DESCRIPTION, token=token)


def _parse_prices(text: str | None) -> tuple[float, float] | None:
    """Return the two numbers of `--prices`.

    Raises:
        ValueError: the text is not two numbers with a comma between them.
    """
    if text is None:
        return None
    try:
        prompts, answers = map(float, text.split(","))
    except ValueError as error:
        raise ValueError(
            f"--prices {text}: pass the prices of a million tokens of prompts and of answers, as in 0.15,0.6."
        ) from error
    return prompts, answers
