"""Write pages of the public API from its docstrings; a warning is an error.

Usage: `python .ci/docs.py build/docs`.
"""

import builtins
import dataclasses
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.doc_pyi

import car_datasets

warnings.simplefilter("error")
# `public` names classes after the package, where pdoc looks for the source of fields that have no docstring.
warnings.filterwarnings("ignore", "Cannot determine where")
# Our stubs only list names. For a module that has one, pdoc evaluates the signatures of all inherited methods, and those
# of transformers name types of packages that are not installed.
pdoc.doc_pyi.include_typeinfo_from_stub_files = lambda module: None
# A dataclass may inherit fields from one of another module; pdoc evaluates their types in that of the subclass.
builtins.InitVar = dataclasses.InitVar  # type: ignore[attr-defined]
# Names are loaded on first use, but pdoc documents only those that are in the module already.
for name in car_datasets.__all__:
    setattr(car_datasets, name, getattr(car_datasets, name))
pdoc.render.configure(
    docformat="google", search=True, show_source=True, footer_text=f"car_datasets {car_datasets.__version__}"
)
pdoc.pdoc("car_datasets", "!car_datasets.", output_directory=Path(sys.argv[1]))
