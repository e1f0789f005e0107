"""What the package promises from outside: its names, its lazy import, its documentation, its one-way imports."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import car_datasets

PACKAGE = Path(car_datasets.__file__).parent


def test_all_is_sorted_and_complete() -> None:
    assert car_datasets.__all__ == sorted(car_datasets.__all__)
    assert set(car_datasets.__all__) == {*car_datasets._HOME, "__version__"}
    assert dir(car_datasets) == car_datasets.__all__
    for name in car_datasets._HOME:
        found = getattr(car_datasets, name)
        assert found.__module__ == (
            "car_datasets" if inspect.isclass(found) else f"car_datasets.{car_datasets._HOME[name]}"
        )
    with pytest.raises(AttributeError, match="no_such_name"):
        car_datasets.no_such_name  # noqa: B018


def test_import_alone_is_light() -> None:
    code = "import sys, car_datasets; print([m for m in ('torch', 'transformers', 'datasets', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _public_functions() -> list[tuple[str, object]]:
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        module = __import__(f"car_datasets.{path.stem}", fromlist=["_"]) if path.stem != "__init__" else car_datasets
        if path.stem == "__main__":
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) not in (module.__name__, "car_datasets"):
                continue
            if inspect.isfunction(value):
                found.append((f"{path.stem}.{name}", value))
            elif inspect.isclass(value):
                found.append((f"{path.stem}.{name}", value))
                methods = {n: m for n, m in vars(value).items() if inspect.isfunction(m) and not n.startswith("_")}
                found += [(f"{path.stem}.{name}.{n}", m) for n, m in methods.items()]
    return found


def test_every_public_name_is_documented_and_typed() -> None:
    functions = _public_functions()
    assert len(functions) > 60
    for name, value in functions:
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isfunction(value):
            parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
            bare = [p.name for p in parameters if p.annotation is inspect.Parameter.empty]
            assert not bare, f"{name} leaves {bare} without a type"
