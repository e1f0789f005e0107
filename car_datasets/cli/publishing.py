"""The commands on a finished result: push, verify and export, and top-up, which adds rows to it.

Does: parse, call the library, print.
Does not: hold logic, or import a heavy library before a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from car_datasets.cli.app import (
    NEW_PATH,
    Output,
    add_options,
    app,
    one_line_errors,
    option,
    quiet_models,
    recipe_options,
)
from car_datasets.cli.next_steps import after_push, after_top_up, after_verify
from car_datasets.cli.printing import Step, print_result, say, suggest, tell
from car_datasets.cli.running import echo
from car_datasets.cli.stages import PUBLISHING
from car_datasets.recipe import HUB, SCORING
from car_datasets.utils.settings import CONFIG_NAME, SPLIT

_AGAIN = (
    "Name the folder of the {}, if it was a folder when the old rows were curated.  [default: that of the old rows]"
)
_GROWN = "  [default: that of the old rows, grown as the pool is]"


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets push out me/alpaca-car")
@one_line_errors
@add_options(
    "public",
    "check",
    "token",
    split=option(str, "Name the split of the selected rows.", SPLIT),
    config_name=option(str, "Push to this configuration, whose splits all have the same columns.", CONFIG_NAME),
    embeddings=option(bool, "Push the embeddings of the pool as well.", False, "--embeddings"),
)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Push the result in this folder, which `curate` wrote.")],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="Push to this dataset repository, OWNER/NAME, which is created if needed."),
    ],
    also: Annotated[
        str,
        typer.Option(
            help="Push these splits too, separated by commas: scored (the entire pool), random_control and "
            "length_matched_control, or none of them with the word none."
        ),
    ] = "scored",
    **options: Any,
) -> None:
    """Push a result with its card and receipt in one commit, into a private repository by default.

    If the push is interrupted, run the same command again.
    """
    from car_datasets.publishing.push import push_selection

    # A word for the empty list, because an empty argument is easily lost in a shell script.
    names = [name.strip() for name in also.split(",") if name.strip() not in ("", "none")]
    private = not options.pop("public")
    pushed = push_selection(folder, repo, also=names, private=private, **options)
    tell(f"Pushed to {pushed[0]}, commit {pushed[1]}.")
    if options["check"]:
        tell("Read back from there, every row equals the one that was pushed.")
    suggest(after_push(repo, pushed[1], options["split"], options["config_name"]))


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets verify out --source alpaca_data.json")
@one_line_errors
@add_options(
    "token",
    source=option(
        str | None, "Compare with this file or folder, which was curated. A Hub dataset is found without it."
    ),
    rescore=option(int, "Also score this many rows again, drawn at random.", 0, panel=SCORING),
    seed=option(int, "Seed the draw of --rescore with this number.", 0, panel=SCORING),
    scorer=option(str | None, "Rescore with the scorer in this folder, if it was a folder.", panel=SCORING),
    tokenizer=option(str | None, "Rescore with the tokenizer in this folder, if it was a folder.", panel=SCORING),
    engine=option(str | None, "Rescore with the int8 encoder in this folder, if one was used.", panel=SCORING),
    embedder=option(str | None, "Embed again with the embedder in this folder, if it was a folder.", panel=SCORING),
    revision=option(str | None, "Check this branch, tag or commit of the repository.", panel=HUB),
    config_name=option(str, "Check this configuration of the repository.", CONFIG_NAME, panel=HUB),
    split=option(str, "Check the selected rows in this split of the repository.", SPLIT, panel=HUB),
)
def verify(
    where: Annotated[
        str,
        typer.Argument(
            metavar="REPO_OR_DIR", help="Check this repository, which `push` wrote, or this folder of a result."
        ),
    ],
    **options: Any,
) -> None:
    """Check a selection against its receipt: its files, its source, its choice and, with --rescore, its scores.

    All differences are printed, and the exit code is then 1; what was not checked is printed as well.
    """
    from car_datasets.publishing.comparing import OLD
    from car_datasets.publishing.verification import verify

    found = verify(where, **options)
    for words in found.checked:
        say(f"ok: {words}")
    for words in found.skipped:
        say(f"not checked: {words}")
    for words in found.differences:
        tell(f"mismatch: {words}")
    if found.matches:
        # Anyone can write an old receipt for a changed result, so the verdict itself says what it is worth.
        tell("match of the rows alone: the receipt has no digests of the files" if OLD in found.skipped else "match")
    suggest(after_verify(where, found, options))
    # 1 for a mismatch, so that scripts can tell it from a wrong call, which exits with 2.
    if not found.matches:
        raise typer.Exit(1)


@app.command(rich_help_panel=PUBLISHING, epilog="Example: car-datasets export out --for trl")
@one_line_errors
@add_options(
    "overwrite",
    output=option(
        Path | None,
        "Write this new file, which ends in .jsonl (.json for alpaca), or into this folder.  [default: DIR-TRAINER]",
        None,
        *("--output", "-o"),
        **NEW_PATH,
    ),
)
def export(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Export the selection in this folder, which `curate` wrote.")
    ],
    trainer: Annotated[
        str, typer.Option("--for", help="Write what this trainer reads: trl, llama-factory, axolotl, openai or alpaca.")
    ],
    **options: Any,
) -> None:
    """Write the selected rows as a training file with the source's columns, and print the trainer's configuration."""
    from car_datasets.publishing.exporting import export_selection

    done = export_selection(folder, trainer, **options)
    tell(f"{done.rows:,} rows are in {done.file}, with the columns {', '.join(done.columns)}.")
    if done.left_out:
        say(f"Left out, because {trainer} would refuse or misread them: {', '.join(done.left_out)}.")
    say(f"{f'The lines for {trainer}' if done.info is None else f'The entry in {done.info}'}:")
    for line in ("", *done.stanza.splitlines()):
        echo(line)
    suggest([Step(done.next_step)])


@app.command("top-up", rich_help_panel=PUBLISHING, epilog="Example: car-datasets top-up out new.json --output out-2")
@one_line_errors
@recipe_options(
    *("name", "split", "revision", "glob", "allow_worse"),
    n1=f"Take this many rows by score, or this share of them, such as 0.05.{_GROWN}",
    budget=f"Take this many rows in total, in place of --n1.{_GROWN}",
    budget_tokens=f"Select rows of so many tokens at most, such as 500k or 2M, in place of --n1 and --budget.{_GROWN}",
    against="Compare the new rows with these evaluation sets, which must be those of the old rows.",
    **{name: _AGAIN.format(name) for name in ("scorer", "embedder", "tokenizer", "engine", "budget_tokenizer")},
)
@add_options("shards", "overwrite", "token")
def top_up(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Add rows to the selection in this folder, from curate.")
    ],
    source: Annotated[str, typer.Argument(metavar="NEW_SOURCE", help="Read the new rows from here, as curate would.")],
    output: Output,
    changes: dict[str, Any],
    reselect: Annotated[
        bool,
        typer.Option("--reselect", help="Select anew from all rows, instead of keeping what was selected before."),
    ] = False,
    **options: Any,
) -> None:
    """Add new rows to a finished selection: only these are scored, and what was selected before stays."""
    quiet_models()
    from car_datasets.topping_up import top_up

    curated, drift = top_up(
        folder,
        source,
        output,
        reselect=reselect,
        token=options["token"],
        shard_dir=options["shards"],
        overwrite=options["overwrite"],
        **changes,
    )
    print_result(curated.report, output)
    tell(drift.sentence())
    suggest(after_top_up(output))
