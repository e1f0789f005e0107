"""configs/ and hub_cards/ are in the wheel, and are found from a wheel, an editable install and a checkout."""

import configparser
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from car_datasets import __version__
from car_datasets.utils import revisions
from car_datasets.utils.hub import card_templates
from tests.conftest import ROOT

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
FIND = """
from car_datasets.utils import files, revisions
print(sorted(p.name for p in files.data_folder("configs").iterdir() if p.suffix in (".yaml", ".sbatch")))
print(sorted(p.name for p in files.data_folder("hub_cards").glob("*.jinja")))
print(sorted(p.name for p in files.ASSETS.iterdir()))
weights = revisions.default_scorer_folder() / "model.safetensors"
print(files.sample_file().is_file(), weights.is_file(), files.__file__)
"""


def expected(where: str) -> list[str]:
    return sorted(p.name for p in (ROOT / where).iterdir() if p.suffix in (".yaml", ".sbatch", ".jinja"))


def run(code: str, folder: Path, path: str) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_found_in_a_checkout(tmp_path: Path) -> None:
    lines = run(FIND, tmp_path, str(ROOT))
    assert lines[:2] == [str(expected("configs")), str(expected("hub_cards"))]
    assert expected("configs")
    assert expected("hub_cards")


def test_the_version_is_one_in_code_citation_and_changelog() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.search(r"^## \[([\d.]+)\] - \d{4}-\d\d-\d\d$", CHANGELOG, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == citation["version"] == __version__


def test_every_folder_of_modules_is_a_package_of_the_wheel() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "car_datasets").rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(settings["options"]["packages"].split()) == packages | {"car_datasets.configs", "car_datasets.hub_cards"}


def run_module(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_found_in_a_wheel(tmp_path: Path) -> None:
    run_module("build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20_000_000
    names = zipfile.ZipFile(wheel).namelist()
    folders = {name.split("/")[0] for name in names}
    assert folders == {"car_datasets", f"car_datasets-{__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".ipynb", ".pyc"))]
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}
    # An sdist lacks what MANIFEST.in forgets, and then the wheel that is made of it lacks it too.
    run_module("build", "--no-isolation", "--outdir", str(tmp_path / "release"), str(ROOT))
    release = sorted((tmp_path / "release").iterdir())
    assert zipfile.ZipFile(release[0]).namelist() == names
    run_module("twine", "check", "--strict", *map(str, release))
    metadata = zipfile.ZipFile(wheel).read(f"car_datasets-{__version__}.dist-info/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(wheel).extractall(unpacked)
    assert (unpacked / "car_datasets" / "py.typed").is_file()
    lines = run(FIND, tmp_path, str(unpacked))
    assert lines[:2] == [str(expected("configs")), str(expected("hub_cards"))]
    proof = ["proof.html.jinja", "report.css", "report.html.jinja", "report.js", "verifiable.json"]
    models = ["iqs-minilm", "iqs-minilm-parts", "iqs-minilm-parts.ratings.json", "iqs-minilm.ratings.json"]
    assert lines[2] == str(["evaluation.json", "instructions.json", *models, *proof])
    assert lines[3].startswith("True True")
    assert str(unpacked) in lines[3]


def test_every_card_template_parses() -> None:
    environment = card_templates()
    names = environment.list_templates()
    assert len(names) >= 2
    for name in names:
        environment.get_template(name)


def test_the_shipped_card_is_the_template_with_the_shipped_figures() -> None:
    import json

    from car_datasets import IQSConfig
    from car_datasets.training.head import HeadTraining

    folder = revisions.default_scorer_folder()
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    # Not in the folder, whose files make the revision of the scorer.
    ratings = json.loads((folder.parent / "iqs-minilm.ratings.json").read_text(encoding="utf-8"))
    settings = HeadTraining()
    card = (
        card_templates()
        .get_template("default_scorer_card.md.jinja")
        .render(
            settings=settings,
            files=[settings.train, settings.valid],
            of_car=True,
            figures=figures,
            ratings=ratings,
            config=IQSConfig.from_pretrained(folder),
            pairs=figures["training_pairs"],
        )
    )
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "apache-2.0"
    assert header["base_model"] == revisions.DEFAULT_ENCODER


def test_the_card_of_the_shipped_parts_is_the_template_with_their_figures() -> None:
    import json

    from car_datasets import IQSConfig
    from car_datasets.training.parts import PartsTraining

    folder = revisions.model_folder(revisions.DEFAULT_PARTS, revisions.pin_revision(revisions.DEFAULT_PARTS))
    config = IQSConfig.from_pretrained(folder)
    card = (
        card_templates()
        .get_template("parts_scorer_card.md.jinja")
        .render(
            settings=PartsTraining.from_yaml(ROOT / "configs" / "train_iqs_parts.yaml"),
            figures=json.loads((folder / "figures.json").read_text(encoding="utf-8")),
            ratings=json.loads((folder.parent / "iqs-minilm-parts.ratings.json").read_text(encoding="utf-8")),
            config=config,
            kept=config.hidden_sizes[1],
        )
    )
    assert (folder / "README.md").read_text(encoding="utf-8") == card
    assert "nan" not in card and "What the score keeps" in card
