"""preparation.py: which revisions stay, on which side of the split, and whether their labels can be read off single words."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from sklearn.model_selection import train_test_split
from typer.testing import CliRunner

from car_datasets.cli import app
from car_datasets.loading.templates import Exchange
from car_datasets.training.pairs import (
    Pair,
    as_given,
    cleaned,
    question,
    read_labelled_rows,
    read_pairs,
    refuse_crossing,
)
from car_datasets.training.preparation import (
    SIDES,
    Prepared,
    audit_labels,
    audit_table,
    drop_smallest_edits,
    near_duplicates,
    prepare,
    read_revisions,
    split_pairs,
)

ENDS = ("erby", "ford", "ham", "ton", "mouth")
NAMES = [f"{start}{end}" for start in ("Ell", "Bran", "Ost", "Wick", "Hol", "Mar") for end in ENDS]
TREES = ["oak", "ash", "elm", "yew", "fir", "birch", "willow", "alder"]
FILES = {*(f"{kind}_{side}.csv" for kind in ("score", "ranking") for side in SIDES), "report.json"}


def made_up(count: int) -> list[Pair]:
    """Return pairs of a place each, their words drawn alike; only the worse half's line break is typed out, as in CaR's."""
    pairs = []
    for i in range(count):
        place, words = f"{NAMES[i % 30]}{'s' * (i // 30)}", random.Random(i)
        asked = Exchange(f"What grows near {place} {i}?", f"{place} lies {7 * i} m high" if i % 3 == 0 else "", "")
        told = [f"{place} {i}{end}{' '.join(words.choices(TREES, k=3 + i % 5))}" for end in ("\\n", "\n")]
        pairs.append(Pair(*(asked._replace(response=text) for text in told)))
    return pairs


def write(path: Path, pairs: list[Pair]) -> Path:
    """Yield both forms of a side, and both names of the sides, in turn."""
    content = []
    for i, pair in enumerate(pairs):
        texts = [as_given(row).whole for row in pair]
        objects = [{"instruction": r.instruction, "input": r.input or None, "output": r.response} for r in pair]
        names, sides = (("original", "revised"), objects) if i % 2 else (("input", "output"), texts)
        content.append(dict(zip(names, sides, strict=True)))
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    return path


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return made_up(90)


@pytest.fixture(scope="module")
def revisions(pairs: list[Pair], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("revisions") / "revisions.json", pairs)


@pytest.fixture(scope="module")
def prepared(revisions: Path) -> Prepared:
    return prepare(revisions, revisions.parent / "cleaned", drop=0.2)


def files_of(prepared: Prepared, kind: str) -> list[list[Pair]]:
    return [read_pairs(prepared.files[f"{kind}_{side}"]) for side in SIDES]


# --- distance


def slow_distance(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


TEXTS = st.one_of(st.text(max_size=20), st.text("ab", max_size=80), st.text("aé😀\u0301\n", max_size=40))


@given(TEXTS, TEXTS)
@settings(deadline=None, max_examples=200)
def test_edit_distance_is_that_of_the_table(first: str, second: str) -> None:
    distance = Levenshtein.distance
    assert distance(first, second) == distance(second, first) == slow_distance(first, second)


def test_edit_distance_by_hand() -> None:
    known = [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("", "", 0),
        ("a" * 500, "a" * 499 + "b", 1),
        ("naïve", "naive", 1),
    ]
    assert [Levenshtein.distance(first, second) for first, second, _ in known] == [expected for *_, expected in known]


def test_without_rapidfuzz_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(ValueError, match=r"rapidfuzz: pip install 'car-datasets\[train\]'"):
        prepare(tmp_path / "not-there.json", tmp_path / "out")


# --- dropping


@pytest.mark.parametrize(("drop", "dropped"), [(0, 0), (0.5, 10), (0.26, 5), (1, 1), (7, 7), (10.0, 10)])
def test_the_smallest_edits_are_dropped(drop: float, dropped: int) -> None:
    pairs = made_up(20)
    distances = [slow_distance(as_given(worse).whole, as_given(better).whole) for worse, better in pairs]
    order = sorted(range(20), key=lambda i: (distances[i], i))
    assert drop_smallest_edits(pairs, drop) == [pairs[i] for i in order[dropped:]]


@pytest.mark.parametrize("drop", [-1, -0.01, 11, 0.6, 21, float("nan"), float("inf")])
def test_at_least_ten_pairs_must_stay(drop: float) -> None:
    with pytest.raises(ValueError, match=r"drop=\S+ of 20 pairs leaves too few to split; at least 10 must stay"):
        drop_smallest_edits(made_up(20), drop)


# --- splitting


def test_the_split_of_the_original(revisions: Path, pairs: list[Pair], tmp_path: Path) -> None:
    """Compare with sorting by distance, cutting the front off, then scikit-learn's `train_test_split` twice; nothing cleaned."""
    found = prepare(revisions, tmp_path / "out", drop=30, clean_text=False, similarity=None)
    kept = sorted(pairs, key=lambda pair: slow_distance(as_given(pair.worse).whole, as_given(pair.better).whole))[30:]
    train, rest = train_test_split(kept, test_size=0.2, random_state=42)
    expected = [train, *train_test_split(rest, test_size=0.5, random_state=42)]
    assert [len(part) for part in expected] == [48, 6, 6]
    assert files_of(found, "score") == expected
    assert found.moved == found.counts["groups_of_near_duplicates"] == 0


def test_another_seed_is_another_split(revisions: Path, prepared: Prepared, tmp_path: Path) -> None:
    same = prepare(revisions, tmp_path / "same", drop=0.2)
    other = prepare(revisions, tmp_path / "other", drop=0.2, seed=1)
    contents = [[path.read_bytes() for path in found.files.values()] for found in (prepared, same, other)]
    assert contents[0] == contents[1] != contents[2]


@given(st.lists(st.integers(0, 15), min_size=10, max_size=60), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_no_group_is_on_two_sides(numbers: list[int], seed: int) -> None:
    pairs, groups = made_up(len(numbers)), np.array(numbers)
    parts, moved = split_pairs(pairs, seed, groups)
    assert sorted(pair for part in parts for pair in part) == sorted(pairs)
    group = dict(zip(pairs, numbers, strict=True))
    sides = [{group[pair] for pair in part} for part in parts]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    alone = split_pairs(pairs, seed, np.arange(len(pairs)))[0]
    assert parts[0][: len(alone[0])] == alone[0]
    assert moved == len(parts[0]) - len(alone[0])


def test_what_counts_as_near(pairs: list[Pair]) -> None:
    first, second, *rest = pairs[:12]
    reworded = first._replace(better=first.better._replace(instruction=f"{first.better.instruction} Tell me."))
    retold = Pair(second.worse._replace(instruction=second.worse.instruction.upper()), Exchange("New?", "", "Yes"))
    found = near_duplicates([first, second, *rest[1:], reworded, retold], 0.7)
    assert found[0] == found[-2]  # nearly the same words
    assert found[1] == found[-1]  # the worse halves ask the same but for the case
    assert len(set(found.tolist())) == 11
    assert near_duplicates([first, second, reworded], 1.0).tolist()[0] == 0  # the worse halves still ask the same
    assert len(set(near_duplicates(pairs[:12], 0.999).tolist())) == 12


def test_near_duplicates_and_equal_questions_stay_on_one_side(pairs: list[Pair], tmp_path: Path) -> None:
    again = [Pair(worse, better._replace(response=f"{better.response} Or moss.")) for worse, better in pairs[:30]]
    found = prepare(write(tmp_path / "revisions.json", [*pairs, *again]), tmp_path / "out", drop=0)
    assert found.moved > 0
    assert found.counts["groups_of_near_duplicates"] == 30
    assert sum(found.counts[side] for side in SIDES) == 120
    rows = [[row for pair in part for row in pair] for part in files_of(found, "score")]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        refuse_crossing(rows[one], rows[other], (SIDES[one], SIDES[other]))
    apart = prepare(tmp_path / "revisions.json", tmp_path / "apart", drop=0, similarity=None)
    train, valid, _ = ({question(row) for pair in part for row in pair} for part in files_of(apart, "score"))
    assert train & valid


def test_a_split_that_leaves_a_file_empty_is_refused(tmp_path: Path) -> None:
    revisions = write(tmp_path / "revisions.json", made_up(5) * 4)
    with pytest.raises(ValueError, match=r"No pairs are left for valid and test: 4 that .* raise similarity=0"):
        prepare(revisions, tmp_path / "out", drop=0)
    assert not (tmp_path / "out").exists()


# --- files


def test_both_formats_are_read_back_and_agree(prepared: Prepared, pairs: list[Pair]) -> None:
    assert {path.name for path in prepared.files.values()} == FILES - {"report.json"}
    scored, ranked = files_of(prepared, "score"), files_of(prepared, "ranking")
    assert [len(part) for part in scored] == [prepared.counts[side] for side in SIDES]
    for part, other in zip(scored, ranked, strict=True):
        assert [pair.better for pair in part] == [pair.better for pair in other]
        assert [pair.worse.response for pair in part] == [pair.worse.response for pair in other]
    written = sorted(pair for part in scored for pair in part)
    expected = [Pair(*(cleaned(row) for row in pair)) for pair in drop_smallest_edits(pairs, 0.2)]
    assert written == sorted(expected)
    assert read_labelled_rows(prepared.files["score_test"]).labels.tolist() == [0, 1] * prepared.counts["test"]


def test_cleaned_files_hold_no_typed_out_escape(prepared: Prepared, revisions: Path, tmp_path: Path) -> None:
    raw = prepare(revisions, tmp_path / "raw", drop=0.2, clean_text=False)
    for name, path in prepared.files.items():
        assert "\\n" not in path.read_text(encoding="utf-8")
        assert "\\n" in raw.files[name].read_text(encoding="utf-8")


def test_odd_characters_survive_the_files(tmp_path: Path) -> None:
    odd = 'a "quoted",\tcell\r\nwith \r returns, é 😀\u2028 and "'
    pairs = [Pair(worse, better._replace(response=f"{better.response} {odd}")) for worse, better in made_up(20)]
    content = [{"original": as_given(w).whole + " \ud83d", "revised": as_given(b).whole} for w, b in pairs]
    (tmp_path / "revisions.json").write_text(json.dumps(content))
    found = prepare(tmp_path / "revisions.json", tmp_path / "out", drop=0, clean_text=False, similarity=None)
    for kind in ("score", "ranking"):
        read = [pair for part in files_of(found, kind) for pair in part]
        assert sorted(pair.better for pair in read) == sorted(pair.better for pair in pairs)
        assert all(pair.worse.response.endswith(" \ufffd") for pair in read)


def test_the_report_says_what_was_done(prepared: Prepared) -> None:
    report = json.loads((prepared.files["score_train"].parent / "report.json").read_text(encoding="utf-8"))
    counts = report["counts"]
    assert counts == prepared.counts
    assert (counts["revisions"], counts["dropped"]) == (90, 18)
    assert counts["train"] + counts["valid"] + counts["test"] == 72
    assert (report["moved_to_training"], report["seed"], report["cleaned"]) == (prepared.moved, 42, True)
    assert report["audits"] == json.loads(json.dumps({name: asdict(a) for name, a in prepared.audits.items()}))


# --- audit


def test_the_audit_finds_the_leak_as_given_and_not_after_cleaning(prepared: Prepared) -> None:
    given, clean_text = prepared.audits["as given"], prepared.audits["cleaned"]
    assert given.leaks
    assert "\\n" in {clue.token for clue in given.clues[:2]}
    assert "\\n" not in {clue.token for clue in clean_text.clues}
    assert not clean_text.leaks


def test_the_table_of_an_audit_says_whether_the_labels_leak() -> None:
    leaking = [Pair(w, b._replace(response=b.response.replace("\n", " "))) for w, b in made_up(60)]
    given, clean_text = audit_labels(leaking, False), audit_labels(leaking, True)
    table = audit_table("as given", given)
    assert f"ranks {100 * given.pairs:.1f} % of unseen pairs right (THE LABELS LEAK)" in str(table.title)
    assert [str(next(iter(column.cells))) for column in table.columns] == [repr("\\n"), "100.0 %", "0.0 %", "worse"]
    assert "no more than style words" in str(audit_table("cleaned", clean_text).title)


# --- mistakes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (b'["caf\xe9"]', "cannot be read as JSON"),
        ("[]", "must hold a list of revisions"),
        ('{"original": "a", "revised": "b"}', "must hold a list of revisions"),
        ('["a"]', r"entry 1: needs original and revised \(or input and output\); it has str"),
        ('[{"original": "a"}]', r"entry 1: needs .*; it has \['original'\]"),
        ('[{"original": "Instruction: a Response: b", "revised": "b"}]', r"row 1: a text must have the form .* 'b'"),
        ('[{"original": "Instruction: a Response: b", "revised": 1}]', "entry 1: revised must be a text, or an object"),
        ('[{"original": {"output": null, "instruction": "a"}, "revised": "b"}]', "entry 1: original must be a text"),
        ('[{"original": {"instruction": " ", "output": ""}, "revised": "b"}]', "entry 1: original must be a text"),
    ],
)
def test_revisions_that_cannot_be_read(content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "revisions.json").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "revisions.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_entry_is_named_by_its_number(revisions: Path, tmp_path: Path) -> None:
    content = json.loads(revisions.read_text(encoding="utf-8-sig"))
    content[4]["output" if "output" in content[4] else "revised"] = None
    (tmp_path / "revisions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"revisions\.json, entry 5: output must be"):
        read_revisions(tmp_path / "revisions.json")
    with pytest.raises(ValueError, match=r"none\.json cannot be read as JSON"):
        read_revisions(tmp_path / "none.json")


@pytest.mark.parametrize("similarity", [0, -0.5, 1.01, float("nan")])
def test_a_similarity_that_is_none(similarity: float, revisions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"similarity={similarity} must be above 0 and at most 1, or None"):
        prepare(revisions, tmp_path / "out", similarity=similarity)


def test_an_existing_output_is_not_overwritten(revisions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="already exists; name a new folder"):
        prepare(revisions, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- the command


@pytest.fixture
def command(revisions: Path) -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(app, ["prepare", str(revisions), *map(str, arguments)])


def test_the_command_writes_the_same_files(command: Callable[..., Any], prepared: Prepared, tmp_path: Path) -> None:
    done = command("-o", tmp_path / "out", "--drop", 0.2)
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for path in prepared.files.values():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "90 revisions, 18 smallest edits dropped; pairs: " in done.stdout
    assert "Text as given: " in done.stdout
    assert "Text cleaned: " in done.stdout


def test_the_command_with_its_options(command: Callable[..., Any], revisions: Path, tmp_path: Path) -> None:
    done = command("-o", tmp_path / "out", "--drop", 12, "--seed", 3, "--similarity", 0, "--no-clean")
    assert done.exit_code == 0, done.output
    expected = prepare(revisions, tmp_path / "same", drop=12, seed=3, similarity=None, clean_text=False)
    for path in expected.files.values():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("options", [("--drop", "85"), ("--similarity", "2"), ("--drop", "inf")])
def test_a_mistake_is_one_line(options: tuple[str, ...], command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("-o", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"car-datasets: {options[0]}=")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
