"""examples.py: the order against a plain round robin, and a planted task found by the embeddings of the package."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from car_datasets import ColumnNames, TextEmbedder
from car_datasets.selection.marks.examples import rank_by_examples

VECTORS = Features({"embedding": List(Value("float32"))})


def vectors(rows: int, seed: int = 0, width: int = 6) -> list[Any]:
    """Return vectors of small whole numbers, of which many have one direction."""
    return np.random.default_rng(seed).integers(1, 4, (rows, width)).astype(np.float32).tolist()


def dataset(rows: list[Any]) -> Dataset:
    return Dataset.from_dict({"embedding": rows}, features=VECTORS)


def plain(pool: list[Any], examples: list[Any], places: int) -> list[int | None]:
    """Return the ranks of a round robin, and behind it by the best likeness, from the definition."""
    rows = [i for i, vector in enumerate(pool) if vector is not None]
    unit = [np.array(v, float) / np.linalg.norm(v) for v in ([pool[i] for i in rows] + examples)]
    likeness = np.round(np.array(unit[len(rows) :]) @ np.array(unit[: len(rows)]).T, 6)
    order: list[int] = []
    while len(order) < min(places, len(rows)):
        of_example = likeness[len(order) % len(examples)]
        order.append(min(set(range(len(rows))) - set(order), key=lambda row: (-of_example[row], row)))
    order += sorted(set(range(len(rows))) - set(order), key=lambda row: (-likeness[:, row].max(), row))
    ranks: list[int | None] = [None] * len(pool)
    for rank, row in enumerate(order, start=1):
        ranks[rows[row]] = rank
    return ranks


@pytest.mark.parametrize("held", [2**26, 400])  # with 400, lists of some rows, made again when they are used up
@pytest.mark.parametrize("places", [100_000, 70])
@pytest.mark.parametrize("alike", [False, True])
def test_a_round_robin_over_the_examples(held: int, places: int, alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("car_datasets.selection.marks.examples.LIKENESSES", held)
    monkeypatch.setattr("car_datasets.selection.marks.examples.EXACT", places)
    pool = vectors(150)
    pool[3] = None
    examples = [vectors(1, seed=1)[0]] * 5 if alike else vectors(5, seed=1)
    found = rank_by_examples(dataset(pool), dataset(examples))
    assert found["like_rank"][:] == plain(pool, examples, places)
    assert found.features["like_rank"].dtype == "int64"
    assert found.remove_columns("like_rank")[:] == dataset(pool)[:]


# A planted task: one instruction with many units and amounts.
UNITS = (
    "kilometres",
    "miles",
    "pounds",
    "kilograms",
    "litres",
    "gallons",
    "inches",
    "centimetres",
    "acres",
    "hectares",
)


def conversion(number: int) -> dict[str, str]:
    first, second = UNITS[number % 10], UNITS[number % 10 ^ 1]
    amount = 3 + 7 * number
    return {
        "instruction": f"Convert {amount} {first} to {second}.",
        "output": f"{amount} {first} are about {amount * 1.6:.1f} {second}.",
    }


@pytest.mark.slow
def test_a_planted_task_is_found(sample_rows: list[dict[str, Any]]) -> None:
    others = [{"instruction": row["instruction"], "output": row["output"][:100]} for row in sample_rows]
    planted = len(others) // 99 + 1  # 1 % of the pool
    embedder = TextEmbedder()
    rows = Dataset.from_list([*others, *(conversion(i) for i in range(planted))])
    pool = rows.map(embedder, batched=True).shuffle(seed=0)
    examples = Dataset.from_list([conversion(1_000 + i) for i in range(5)])
    ranks = rank_by_examples(pool, examples, embedder)["like_rank"][:]
    first = [row["instruction"] for rank, row in zip(ranks, pool, strict=True) if rank <= planted]
    assert sum(text.startswith("Convert") for text in first) >= 0.8 * planted


def test_examples_are_read_by_the_schema_that_they_have(tiny_embedder: str, pairs: Dataset) -> None:
    embedder = TextEmbedder(tiny_embedder)
    pool = pairs.map(embedder, batched=True)
    examples = Dataset.from_dict({"question": [pairs[2]["instruction"]], "answer": ["6"]})
    given = rank_by_examples(pool, examples, embedder)
    embedded = rank_by_examples(pool, examples.map(embedder, batched=True))
    assert given["like_rank"][:] == embedded["like_rank"][:]
    assert sorted(given["like_rank"][:]) == [1, 2, 3, 4, 5, 6]


def test_examples_that_cannot_be_used_are_refused(tiny_embedder: str, pairs: Dataset) -> None:
    pool = dataset(vectors(4))
    marking = TextEmbedder(tiny_embedder, on_invalid="mark")
    empty = Dataset.from_dict({"instruction": ["", "Name three colours."], "output": ["", None]})
    for examples, options, message in (
        (dataset([]), {}, "There are no examples; pass at least one"),
        (dataset([[1.0, 2.0]]), {}, "embeddings of 2 numbers, the pool's column 'embedding' has 6"),
        (empty, {"embed": marking}, r"1 of 2 examples have no text to embed, the first \[1\]"),
        (empty, {"embed": TextEmbedder(tiny_embedder)}, "1 of 2 rows"),
        (pairs, {}, "pass the stage that embedded the pool"),
        (dataset(vectors(1)), {"names": ColumnNames(embedding="vector")}, "has no column 'vector'"),
    ):
        with pytest.raises(ValueError, match=message):
            rank_by_examples(pool, examples, **options)
    with pytest.raises(ValueError, match="already has the column"):
        rank_by_examples(rank_by_examples(pool, pool), pool)
