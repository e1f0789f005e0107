"""card.py and its template: every figure that the card states, and nothing that nobody said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset, Features, Value
from huggingface_hub import DatasetCard

from car_datasets import SelectionReport, select_car
from car_datasets.publishing.card import (
    END,
    SplitFiles,
    Target,
    check_header,
    describe,
    forget,
    merge_header,
    place_of,
    read_header,
    render_section,
    size_category,
    with_section,
)
from car_datasets.receipt import Receipt

FEATURES = Features({"text": Value("string")})


def files(name: str = "selected", rows: int = 3) -> dict[str, SplitFiles]:
    return {name: SplitFiles([f"data/{name}-00000-of-00001.parquet"], rows, 30, 20)}


def with_header(
    card: str, held: list[str], config_name: str, features: Features, splits: dict[str, SplitFiles], repo_id: str
) -> tuple[DatasetCard, dict[str, int]]:
    """Return the card after a push to a repository that holds these files, and the rows of each split."""
    header, target = read_header(card, repo_id), Target(repo_id, config_name, "selected")
    check_header(header, target, features, splits, held)
    return header.card, merge_header(header, target, features, splits)


X = Target("me/x", "default", "selected")
BEGIN = "<!-- car_datasets: begin config=default split=selected -->"
OLD_BEGIN = "<!-- car_datasets: begin -->"  # of 0.1


@pytest.fixture(scope="module")
def report() -> SelectionReport:
    rng = np.random.default_rng(0)
    pool = Dataset.from_dict(
        {
            "iqs_score": rng.normal(size=50),
            "iqs_tokens": rng.integers(5, 99, 50),
            "cluster": np.arange(50) % 4,
            "iqs_status": ["truncated"] * 3 + ["ok"] * 47,
            "source_index": range(50),
        }
    )
    return SelectionReport.from_selection(pool, select_car(pool, 10, 1))


def receipt(**source: Any) -> Receipt:
    model = {"model_id": "me/iqs", "revision": "a" * 40, "weights": "sha256:0"}
    recipe = {"n1": 10, "scorer": "me/iqs"}
    return Receipt(source, "alpaca", "clean-1", model, model, recipe, {"selected": 10}, "0", {"torch": "2"})


HUB = {"kind": "hub", "id": "you/rows", "revision": "b" * 40}
FILE = {"kind": "file", "name": "rows`<!-- x -->\n.json", "sha256": "c" * 64}


@pytest.mark.parametrize("source", [HUB, {**HUB, "revision": None}, FILE, {"kind": "memory", "sha256": "d" * 64}, None])
@pytest.mark.parametrize("with_report", [True, False])
@pytest.mark.parametrize("carried", [{}, {"license": "mit"}, {"license": "other", "license_name": "mine"}])
def test_section_renders_whatever_is_known(
    report: SelectionReport, source: dict[str, Any] | None, with_report: bool, carried: dict[str, str]
) -> None:
    known = None if source is None else receipt(**source)
    rows = {"selected": 12, "scored": 50, "random_control": 12}
    text = render_section(
        Target("me/car", "small", "selected"),
        rows,
        ["text"],
        report if with_report else None,
        known,
        carried,
        ["plots/a.png"],
    )
    assert 'load_dataset("me/car", "small", split="selected")' in text
    assert "| `scored` | 50 |" in text
    assert ("plots/a.png" in text) is with_report
    assert ("recipe.yaml" in text) is (source is not None)
    assert (f"`{carried['license']}`" in text) if carried else ("no card that names one" in text)
    assert "<!--" not in text and "Licence" in text
    if with_report:
        assert f"Spearman {report.score_length_correlation['spearman']:+.2f}" in text
        assert all(sentence in text for sentence in report.sentences())
        assert "| mean score | " + " | ".join(report.comparison()[2][1:]) + " |" in text
        assert "Of 3 rows of the pool the scorer did not see the end" in text
    if source is HUB:
        assert "car-datasets curate you/rows --output out" in text and "at commit `" + "b" * 40 in text


def test_the_limits_say_what_the_score_likes() -> None:
    code = [i % 4 == 0 for i in range(400)]
    pool = Dataset.from_dict(
        {
            "instruction": [f"Write a function for {i}." if of else f"Who is {i}?" for i, of in enumerate(code)],
            "output": ["x = 1" if of else "Nobody." for of in code],
            "iqs_score": [i / 400 - 2 * of for i, of in enumerate(code)],
            "iqs_tokens": [10 + i % 3 for i in range(400)],
            "cluster": [0] * 400,
            "source_index": range(400),
        }
    )
    known = SelectionReport.from_selection(pool, select_car(pool, 40, 0))
    text = render_section(Target("me/car", "small", "selected"), {"selected": 40}, ["output"], known, None, {}, [])
    limits = " ".join(text.partition("## Limits")[2].split())
    assert "Kinds of answer.** They explain 9" in limits
    assert "code 25.0, 0.0 and 0.0 %; short facts 75.0, 100.0 and 100.0 %." in limits
    assert "all but lost: code (kind of answer), 25.0 % of the pool" in text


def test_header_is_what_datasets_reads() -> None:
    card, rows = with_header("", [], "default", FEATURES, files(), "me/x")
    assert rows == {"selected": 3}
    card, rows = with_header(str(card), [], "default", FEATURES, files("test", 4), "me/x")
    assert rows == {"selected": 3, "test": 4}
    data = yaml.safe_load(str(card).split("---")[1])
    paths = [{"split": name, "path": f"data/{name}-*"} for name in ("selected", "test")]
    assert data["configs"] == [{"config_name": "default", "data_files": paths}]
    assert data["dataset_info"]["features"] == [{"name": "text", "dtype": "string"}]
    assert (data["dataset_info"]["dataset_size"], data["dataset_info"].get("download_size")) == (60, None)
    again, _ = with_header(str(card), [], "default", FEATURES, files("test", 4), "me/x")
    assert str(again) == str(card)


def test_what_could_not_be_loaded_any_more_is_refused() -> None:
    card, _ = with_header("", [], "default", FEATURES, files("old"), "me/x")
    other = Features({"text": Value("int64"), "n": Value("int64")})
    with pytest.raises(ValueError, match=r"the split\(s\) \['old'\] with other columns or types \(\['n', 'text'\]\)"):
        with_header(str(card), [], "default", other, files(), "me/x")
    with_header(str(card), [], "default", other, files("old"), "me/x")
    with_header(str(card), [], "other", other, files(), "me/x")
    named = "---\nconfigs:\n- config_name: default\n  data_files: '*.parquet'\n---\n"
    empty = "---\nconfigs:\n- config_name: default\n---\n"
    hidden = [("", "a.csv"), (named, "a.parquet"), (empty, "a.csv"), ("", "data/train-00000-of-00001.parquet")]
    for text, held in hidden:
        with pytest.raises(ValueError, match=r"splits that its card does not name"):
            with_header(text, [held], "default", FEATURES, files(), "me/x")
    with_header(
        "", ["data/selected-00000-of-00003.parquet", "receipt.json", "x.txt"], "default", FEATURES, files(), "me/x"
    )
    with pytest.raises(ValueError, match=r"card's header cannot be read.*Fix README\.md"):
        with_header("---\na: [\n---\n", [], "default", FEATURES, files(), "me/x")


def test_nothing_is_invented_and_nothing_of_the_users_is_replaced() -> None:
    def header(card: str, source: str | None) -> dict[str, Any]:
        found, rows = with_header(card, [], "default", FEATURES, files(rows=2000), "me/x")
        describe(found, receipt(**HUB), source, sum(rows.values()))
        return found.data.to_dict()

    for source in (None, "", "# no header", "---\ntags: [a]\n---\n", "---\n: [\n---\n"):
        data = header("", source)
        assert "license" not in data and "language" not in data
        assert data["source_datasets"] == ["you/rows"] and data["size_categories"] == ["1K<n<10K"]
    theirs = "---\nlicense: other\nlicense_name: l\nlicense_link: ./k\nlanguage: [de]\n---\n"
    data = header("", theirs)
    link = f"https://huggingface.co/datasets/you/rows/blob/{HUB['revision']}/k"  # ./k is no file here
    assert [data[name] for name in ("license", "license_name", "license_link")] == ["other", "l", link]
    assert header("", theirs.replace("./k", "https://x.org/k"))["license_link"] == "https://x.org/k"
    assert data["language"] == ["de"]
    data = header("---\nlicense: mit\ntags: [b]\nsource_datasets: [x]\n---\n", theirs)
    assert data["license"] == "mit" and "license_name" not in data
    assert "b" in data["tags"] and data["source_datasets"] == ["x", "you/rows"]


def test_one_value_is_a_list_of_one() -> None:
    card, _ = with_header("---\ntags: mine\nsource_datasets: foo/bar\n---\n", [], "default", FEATURES, files(), "me/x")
    describe(card, receipt(**HUB), None, 3)
    assert card.data["tags"] == ["car", "data-selection", "instruction-tuning", "mine"]
    assert card.data["source_datasets"] == ["foo/bar", "you/rows"]
    card, _ = with_header("---\ntags: 2026\n---\n", [], "default", FEATURES, files(), "me/x")
    describe(card, None, None, 3)
    assert "2026" in card.data["tags"]


def test_licences_of_header_and_section_agree() -> None:
    def section(card: str, source: str) -> str:
        found, rows = with_header(card, [], "default", FEATURES, files(), "me/x")
        carried = describe(found, receipt(**HUB), source, 3)
        return render_section(X, rows, ["text"], None, None, carried, [])

    two = "---\nlicense: [mit, cc-by-4.0]\n---\n"
    assert "its card says: `mit`, `cc-by-4.0`.\n" in section("", two)
    assert "The header of this card" not in section(two, two)
    other = "The header of this card says `mit`, `cc-by-4.0`."
    assert f"its card says: `mit`. {other}" in section(two, "---\nlicense: mit\n---\n")
    assert f"before you pass these rows on. {other}" in section(two, "")


def test_what_an_earlier_source_left_goes_and_the_users_words_stay() -> None:
    theirs = "---\nlicense: other\nlicense_name: l\nlicense_link: k\nlanguage: de\n---\n"

    def left(card: str, source: dict[str, Any], source_card: str | None) -> dict[str, Any]:
        found, _ = with_header(card, [], "default", FEATURES, files(), "me/x")
        describe(found, receipt(**HUB), theirs, 3)
        forget(found, source, source_card)
        names = ("license", "license_name", "license_link", "language", "source_datasets")
        return {name: value for name, value in found.data.to_dict().items() if name in names}

    assert left("", HUB, theirs) == {}
    assert left("---\nsource_datasets: foo/bar\n---\n", HUB, theirs) == {"source_datasets": ["foo/bar"]}
    mine = "---\nlicense: mit\nlanguage: fr\n---\n"
    assert left(mine, HUB, theirs) == {"license": "mit", "language": "fr"}
    assert left(mine, HUB, None) == {}  # nobody can tell whose they are
    assert left(mine, FILE, None) == {"license": "mit", "language": "fr", "source_datasets": ["you/rows"]}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("text", "`text`"),
        ("a|b <c> [d]", "`a|b <c> [d]`"),
        ("the `out`", "`` the `out` ``"),
        ("a``b`c", "```a``b`c```"),
        ("two\nlines", "`two\\nlines`"),
        (" edge ", "`  edge  `"),
        ("", '`""`'),
    ],
)
def test_column_names_are_shown_as_they_are(name: str, shown: str) -> None:
    text = render_section(X, {"selected": 1}, ["a", name], None, None, {}, [])
    assert f"Columns: `a`, {shown}.\n" in text


def test_a_section_that_does_not_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repo_id='me/x': its card has .*begin.* and no .*end"):
        with_section(f"Mine.\n{BEGIN}\nold", "new", X)


def test_where_a_section_is_about() -> None:
    assert place_of("# x") is None
    for config in ("default", "b"):
        target = Target("me/x", config, "top")
        section = render_section(target, {"top": 1}, ["a"], None, None, {}, [])
        text = 'load_dataset("me/x", split="other")\n' + with_section("", section, target)
        assert place_of(text) == (config, "top")
        begin = f"<!-- car_datasets: begin config={config} split=top -->"
        assert place_of(text.replace(begin, OLD_BEGIN)) == (config, "top")


def test_an_edit_of_the_prose_does_not_move_a_section() -> None:
    text = with_section("", "Load it any way you like.", Target("me/x", "b", "top"))
    assert place_of(text) == ("b", "top")
    assert place_of(with_section("", "No example.", X).replace(BEGIN, OLD_BEGIN)) is None


def test_a_marker_in_a_name_does_not_end_the_section() -> None:
    for name in (END, f"<!-- {END}", BEGIN):
        section = render_section(X, {"selected": 1}, [name], None, None, {}, [])
        assert "<!-- car_datasets:" not in section


def test_section_takes_its_place() -> None:
    first = with_section("", "one", X)
    assert first == f"# x\n\n{BEGIN}\none\n{END}\n"
    assert with_section(first + "after\n", "two \\1", X) == f"# x\n\n{BEGIN}\ntwo \\1\n{END}\nafter\n"
    old = first.replace(BEGIN, OLD_BEGIN)
    assert with_section(old + "after\n", "two", X) == f"# x\n\n{BEGIN}\ntwo\n{END}\nafter\n"
    assert with_section("Mine.\n", "one", X) == f"Mine.\n\n{BEGIN}\none\n{END}\n"


def test_sizes() -> None:
    sizes = {0: "n<1K", 999: "n<1K", 1000: "1K<n<10K", 52_000: "10K<n<100K", 10**6: "1M<n<10M", 10**13: "n>1T"}
    assert {rows: size_category(rows) for rows in sizes} == sizes
