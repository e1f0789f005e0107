"""naming.py: clusters are named by what their rows alone are about, in any order of rows and in several scripts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import SelectionReport, select_car
from car_datasets.reporting.naming import keywords, words_of

TOPICS = ("bread flour oven", "comet orbit star", "violin chord tune", "goal referee team", "river bridge boat")
COMMON = "please write what you know of the {} and then also of the {} for this reader"


def make_pool(rows: int = 200) -> Dataset:
    """Return rows about one of five topics each, in sentences of the same words; every third row has no score."""
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, 5, rows)
    pairs = [rng.choice(TOPICS[c].split(), 2, replace=False) for c in cluster]
    return Dataset.from_dict(
        {
            "instruction": [COMMON.format(*pair) for pair in pairs],
            "output": [f"the number {i} is about {pair[0]}" for i, pair in enumerate(pairs)],
            "source_index": [f"id{i}" for i in range(rows)],
            "iqs_score": [None if i % 3 == 0 else float(x) for i, x in enumerate(rng.normal(size=rows))],
            "cluster": cluster,
            "cluster_distance": rng.permutation(rows).astype(np.float32),
        }
    )


def test_planted_topics_are_the_names() -> None:
    pool = make_pool()
    selected = select_car(pool, 20, 1)
    report = SelectionReport.from_selection(pool, selected)
    assert list(report.named_clusters) == list("01234")
    rows = pool.to_list()
    for label, named in report.named_clusters.items():
        members = [row for row in rows if row["cluster"] == int(label) and row["iqs_score"] is not None]
        assert set(named.keywords) == set(TOPICS[int(label)].split())
        assert named.typical == min(members, key=lambda row: row["cluster_distance"])["source_index"]
        assert (named.rows, named.selected) == (len(members), selected["cluster"][:].count(int(label)))
    assert SelectionReport.from_selection(pool, selected, seed=7).named_clusters == report.named_clusters


def test_without_text_or_distances_a_cluster_has_its_counts() -> None:
    pool = make_pool().select_columns(["source_index", "iqs_score", "cluster"])
    named = SelectionReport.from_selection(pool, select_car(pool, 20, 1)).named_clusters
    assert {(tuple(each.keywords), each.typical) for each in named.values()} == {((), None)}
    assert sum(each.rows for each in named.values()) == 133


def counted(*texts: str) -> tuple[Counter[str], int]:
    return Counter(word for text in texts for word in words_of(text)), len(texts)


def test_one_cluster_has_no_words_of_its_own() -> None:
    assert keywords([counted("a red boat", "a red car")]) == [[]]


def test_of_two_forms_of_a_word_the_more_frequent_is_taken_and_ties_are_alphabetical() -> None:
    [first, _] = keywords([counted("recipes zinc alum", "recipe zinc alum", "recipe", "recipe recipes"), counted("x")])
    assert first == ["recipe", "alum", "zinc"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't STOP the e-mail of 2024, x_y!", {"don't", "stop", "the", "mail"}),
        ("Über die Straße", {"über", "die", "straße"}),
        ("हिन्दी भाषा", {"हिन्दी", "भाषा"}),
        ("प्र", {"प्र"}),
        ("設定をプログラミングで", {"設定", "プログラミング"}),
        ("人工智能AI", {"人工", "工智", "智能", "人工智", "工智能", "人工智能"}),
        ("ปัญญาประดิษฐ์คืออะไร", set()),
        ("a" * 31 + " bc", set()),
    ],
)
def test_words_of_several_scripts(text: str, words: set[str]) -> None:
    assert words_of(text) == words


def test_chinese_names_are_words_and_not_sentences() -> None:
    # About artificial intelligence, about cooking, and about poems.
    minds = counted("请介绍人工智能的用处。", "人工智能是什么？", "机器学习和人工智能有何区别？", "请解释机器学习。")
    meals = counted("麻婆豆腐怎样做？", "请教我做麻婆豆腐。", "红烧肉要炖多久？", "做红烧肉用哪种酱油？")
    poems = counted("写一首春天的诗。", "请写一首月亮的诗。", "写一首大海的诗。", "把诗译成英文。")
    named = keywords([minds, meals, poems])
    assert named[0][:2] == ["人工智能", "机器学习"]
    assert set(named[1][:2]) == {"麻婆豆腐", "红烧肉"}
    assert named[2][0] == "写一首"
