"""Parse the command line of `car-datasets` and call the library; `car_datasets/__main__.py` is the entry point."""

# A command is added when its module is imported, so this order is that of `car-datasets --help`: the pipeline first.
from car_datasets.cli import stages  # isort: split

from car_datasets.cli import proving, topping_up  # isort: split

from car_datasets.cli import scorers
from car_datasets.cli.app import app

__all__ = ["app", "proving", "scorers", "stages", "topping_up"]
