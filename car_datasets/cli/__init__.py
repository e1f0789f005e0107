"""Parse the command line of `car-datasets` and call the library; `car_datasets/__main__.py` is the entry point."""

# A command is added when its module is imported, so this order is that of `car-datasets --help`: the pipeline first.
from car_datasets.cli import stages  # isort: split

from car_datasets.cli import publishing  # isort: split

from car_datasets.cli import explaining, proving  # isort: split

from car_datasets.cli import judging, scorers
from car_datasets.cli.app import app

__all__ = ["app", "explaining", "judging", "proving", "publishing", "scorers", "stages"]
