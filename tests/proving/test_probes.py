"""probes.py and the evaluation set that the package ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from car_datasets.proving.overlap import find_overlap
from car_datasets.proving.probes import SHIPPED_NAME, read_probe


def test_the_shipped_set_has_eight_kinds_and_nothing_of_the_sample(sample_file: Path) -> None:
    shipped = read_probe()
    assert shipped.name == SHIPPED_NAME
    assert list(shipped.counts.values()) == [15] * 8
    assert shipped.left_out == 0
    said = [row["completion"][0]["content"] for row in shipped.rows]
    assert len(set(said)) == 120
    assert 40 < sum(len(answer.split()) for answer in said) / 120 < 120
    sample = read_probe(sample_file)
    assert len(sample.rows) > 300
    overlap = find_overlap(sample.rows, shipped.rows)
    assert len(overlap.equal) == len(overlap.near) == len(overlap.asked) == 0


def test_domains_come_from_a_column_or_from_the_texts(tmp_path: Path) -> None:
    rows = [
        {"instruction": "What is 3 + 4?", "output": "3 + 4 = 7", "subject": "sums"},
        {"instruction": "Name the capital of Norway.", "output": "Oslo", "subject": "places"},
        {"instruction": "Say nothing.", "output": "", "subject": "places"},
    ]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(rows))
    found = read_probe(path)
    assert (found.name, found.domains, found.domains_by) == ("mine", ["maths", "short facts"], "kind of task")
    assert found.left_out == 1
    named = read_probe(path, domain_column="subject", name="own")
    assert (named.name, named.counts) == ("own", {"sums": 1, "places": 1})
    with pytest.raises(ValueError, match="no_column"):
        read_probe(path, domain_column="no_column")
    path.write_text(json.dumps(rows[2:]))
    with pytest.raises(ValueError, match=r"0 rows with a prompt and an answer.*--eval FILE"):
        read_probe(path)
