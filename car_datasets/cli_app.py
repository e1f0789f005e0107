"""The typer app, and what its commands have in common: errors in one line, quiet models, tables."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Annotated, Any

import typer

from car_datasets.version import __version__

app = typer.Typer(
    name="car-datasets",
    help="Pick the best and most diverse subset of an instruction-tuning dataset.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


GRACE = 5.0  # seconds for the launcher to end this process, if the main one made the same mistake


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """End a user's mistake with one line and exit code 2; anything else is our bug and keeps its traceback.

    Under `accelerate launch` or `torchrun` only the main process prints, unless another one alone fails.
    """

    @wraps(command)
    def run(**arguments: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        is_main = int(os.environ.get("RANK", "0")) == 0
        try:
            with contextlib.nullcontext() if is_main else _silence():
                command(**arguments)
        except (ValueError, OSError) as error:
            if not is_main:
                time.sleep(GRACE)
            typer.echo(f"car-datasets: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error

    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress output and progress bars; set before the libraries that draw them are imported."""
    os.environ.update(TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def print_table(table: Any) -> None:
    """Print a `rich` table to standard output."""
    from rich.console import Console

    Console().print(table)


def quiet_models() -> None:
    """Turn off the progress bars of weights; each stage has a bar of its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"car-datasets {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Pick the best and most diverse subset of an instruction-tuning dataset."""
