"""The public API as pages, from its docstrings, into the folder given: `python .ci/docs.py build/docs`. A warning is an error."""

import sys
import warnings
from pathlib import Path

import pdoc

import car_datasets

warnings.simplefilter("error")
# Classes are named after the package, from which users import them; pdoc looks there for the fields that have no docstring.
warnings.filterwarnings("ignore", "Cannot determine where")
for name in car_datasets.__all__:  # names are loaded on first use, and pdoc looks for those that are there
    setattr(car_datasets, name, getattr(car_datasets, name))
pdoc.render.configure(
    docformat="google", search=True, show_source=True, footer_text=f"car_datasets {car_datasets.__version__}"
)
pdoc.pdoc("car_datasets", "!car_datasets.", output_directory=Path(sys.argv[1]))
