"""Check what the package promises: names, lazy import, documentation, limits on size; and that tests mirror it."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import car_datasets

PACKAGE = Path(car_datasets.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
FACES = sorted(path.parent for path in PACKAGE.rglob("__init__.pyi"))
TESTS = Path(__file__).parent
ACROSS_MODULES = {  # test files below tests/<folder>/ whose subject is more than one module
    "cli/test_commands.py",
    "loading/test_real_input.py",
    "loading/test_shapes.py",
    "loading/test_sources_on_the_hub.py",
    "publishing/test_real_hub.py",
    "scoring/iqs/test_models_on_the_hub.py",
    "scoring/shards/test_killed.py",
    "scoring/shards/test_shards_on_the_hub.py",
    "scoring/test_fingerprints.py",
    "scoring/test_parity.py",
    "scoring/test_ray.py",
    "scoring/test_streaming_scores.py",
    "selection/test_published_on_a_hub.py",
    "utils/test_places.py",  # of utils/files.py; pytest takes no second test_files.py
}
WIDE = {  # functions of eight parameters or more: what a model or a public call needs
    "IQSConfig.__init__",
    "_assign",  # kernels of Triton take each buffer by itself
    "_distances",
    "_round",
    "IQSModel.forward",
    "ClusterModel.fit",
    "cluster_filter",
    "load_instructions",
    "open_dataset",
    "prove",
    "push_selection",
    "select_car",
    "select_car_streaming",
    "verify",
}


def load(path: Path) -> ModuleType:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return importlib.import_module(".".join(part for part in parts if part != "__init__"))


def test_all_is_sorted_and_complete() -> None:
    assert car_datasets.__all__ == sorted(car_datasets.__all__)
    assert dir(car_datasets) == car_datasets.__all__
    for name in car_datasets.__all__:
        value = getattr(car_datasets, name)
        if inspect.isclass(value):  # a move must not cost a user's cache: fingerprints hold the module
            assert value.__module__ == "car_datasets", name
    with pytest.raises(AttributeError, match="no_such_name"):
        car_datasets.no_such_name  # noqa: B018


@pytest.mark.parametrize("folder", FACES, ids=lambda folder: folder.name)
def test_every_name_of_a_face_is_there(folder: Path) -> None:
    face = load(folder)
    assert face.__doc__
    assert folder == PACKAGE or "\n" not in face.__doc__.strip()
    for name in face.__all__:
        assert getattr(face, name) is not None


def test_import_alone_is_light() -> None:
    heavy = ("torch", "transformers", "datasets", "sklearn")
    code = f"import sys, car_datasets; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def public_functions() -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every public function, class and method of every module."""
    for path in MODULES:
        if path.name == "__main__.py":
            continue
        module = load(path)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) not in (module.__name__, "car_datasets"):
                continue
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                yield f"{module.__name__}.{name}", value
                for method, function in vars(value).items():
                    if inspect.isfunction(function) and not method.startswith("_"):
                        yield f"{module.__name__}.{name}.{method}", function


def test_every_public_name_is_documented_and_typed() -> None:
    functions = list(public_functions())
    assert len(functions) > 400
    for name, value in functions:
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isfunction(value):
            parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
            bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
            assert not bare, f"{name} leaves {bare} without a type"


def test_a_reader_can_take_it_in() -> None:
    """Hold the limits that CONTRIBUTING states: few modules, small folders, short files."""
    # 70 for the pipeline; proofs, parts of a score, GPU kernels, marks of rows and other scorers have modules of their own.
    assert len(MODULES) <= 138
    for folder in {path.parent for path in MODULES}:
        assert len([path for path in MODULES if path.parent == folder]) <= 13, folder.name
    for path in MODULES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, path.name


def test_few_functions_have_many_parameters() -> None:
    wide = set()
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owners = {
            id(part): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for part in node.body
        }
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([a for a in arguments if a.arg not in ("self", "cls")]) >= 8:
                    wide.add(f"{owners[id(node)]}.{node.name}" if id(node) in owners else node.name)
    assert wide == WIDE


def test_imports_run_one_way() -> None:
    """Hold the contract of setup.cfg: a folder imports only from folders below it."""
    # The settings are those of the checkout, also where the package is an installed one.
    settings = ["--config", str(TESTS.parent / "setup.cfg")]
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", *settings]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_tests_mirror_the_folders() -> None:
    """Hold that tests/<folder>/test_<name>.py tests car_datasets/<folder>/<name>.py, or is listed."""
    # Files right below tests/ are about the repository, or about modules of the root.
    paths = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py") if path.parent != TESTS]
    assert len(paths) > 40
    tested = {path: PACKAGE / path.parent / path.name.removeprefix("test_") for path in paths}
    # Equal, not a subset, so that an entry goes when its file does.
    assert {path.as_posix() for path, module in tested.items() if not module.is_file()} == ACROSS_MODULES
