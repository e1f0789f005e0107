"""`car-datasets`: commands that parse a command line and call the library; `car_datasets.cli:app` is their entry point."""

from car_datasets.cli import publishing, scorers, stages
from car_datasets.cli.app import app

__all__ = ["app", "publishing", "scorers", "stages"]
