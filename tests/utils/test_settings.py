"""Settings: values are checked by type, and text stays as it was written in a YAML file and in `--set`."""

from pathlib import Path

import pytest

from car_datasets import Recipe
from car_datasets.training.train import ScorerTraining
from car_datasets.utils.settings import read_kind

# What YAML makes something else of: bools, an octal number, a date, an exponent, a commit that is a number.
TEXTS = [
    "no",
    "off",
    "yes",
    "on",
    "0123456",
    "2026-01-01",
    "1e5",
    "1.0e5",
    "1234567",
    "0x1f",
    "1_000",
    "'quoted'",
    "~x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_what_was_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(f"revision: {text}\n")
    assert Recipe.from_yaml(tmp_path / "file.yaml").revision == text.strip("'")
    (tmp_path / "file.yaml").write_text("kind: iqs\n")
    assert ScorerTraining.from_yaml(tmp_path / "file.yaml", given=[f"revision={text}"]).revision == text.strip("'")


def test_other_types_are_read_as_yaml(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(
        "columns: {instruction: no, response: 1}\nname: ~\nk: 5\nn1: 0.5\nuncertainty: yes\nn_init: 0x2\n"
    )
    columns = {"instruction": "no", "response": "1"}
    expected = Recipe(columns=columns, k=5, n1=0.5, uncertainty=True, n_init=2)
    assert Recipe.from_yaml(tmp_path / "file.yaml") == expected


def test_given_settings_win_over_file_and_arguments(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("mixed_precision: no\nepochs: 3\nseed: 5\n")
    given = ["hidden_sizes=[3]", "epochs=2", "learning_rate=1e-4", "push_to="]
    found = ScorerTraining.from_yaml(tmp_path / "file.yaml", given=given, epochs=7, seed=6)
    assert (found.mixed_precision, found.epochs, found.seed, found.push_to) == ("no", 2, 6, "")
    assert (found.hidden_sizes, found.learning_rate) == ([3], 1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs", "--set epochs: write key=value"),
        ("epochs=[1", r"--set epochs=\[1: is not YAML"),
        ("epochs=no", "epochs=False must be of the type int"),
        ("keep_embeddings_frozen='no'", "must be of the type bool"),
        ("mixed_precision=off", "mixed_precision='off' is not known"),
        ("epoch=1", "A training file has no 'epoch'; did you mean 'epochs'"),
        ("zzz=1", r"A training file has no 'zzz'\. Known: "),
    ],
)
def test_a_given_setting_that_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("kind: iqs\n")
    with pytest.raises(ValueError, match=message):
        ScorerTraining.from_yaml(tmp_path / "file.yaml", given=[text])


@pytest.mark.parametrize("key", ["n1", "columns", "template", "kind"])
@pytest.mark.parametrize(("first", "nested"), [("[a]", "[{0}, *{1}]"), ("{{a: b}}", "{{a: {0}, b: *{1}}}")])
def test_aliases_do_not_make_a_message_grow(key: str, first: str, nested: str, tmp_path: Path) -> None:
    value = f"&x0 {first.format()}"
    for i in range(1, 60):  # written out, 2**60 values
        value = f"&x{i} {nested.format(value, f'x{i - 1}')}"
    (tmp_path / "file.yaml").write_text(f"{key}: {value}\n")
    with pytest.raises(ValueError, match=key) as refused:
        read_kind(tmp_path / "file.yaml", ["head"]) if key == "kind" else Recipe.from_yaml(tmp_path / "file.yaml")
    assert len(str(refused.value)) < 3_000


def test_a_file_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("n1: " + "[" * 3_000 + "]" * 3_000)
    with pytest.raises(ValueError, match="is not YAML"):
        Recipe.from_yaml(tmp_path / "file.yaml")
