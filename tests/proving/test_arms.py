"""arms.py, overlap.py, examples.py: the arms that issue from a real result, of equal size, without what is evaluated on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from car_datasets import curate
from car_datasets.loading.chats import read_turns
from car_datasets.proving.arms import ARMS, Pool, available, draw_arms, hold_out, read_pool, stages_of
from car_datasets.proving.examples import as_example, digest_of, shuffle_words
from car_datasets.proving.experiment import EDITION
from tests.proving.conftest import planted_rows


def count_words(rows: Any) -> list[int]:
    return [len(row["completion"][0]["content"].split()) for row in rows]


def messages(asked: str, said: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": said}],
    }


@pytest.fixture(scope="module")
def pool(result: Path) -> Pool:
    return read_pool(result, count_words, group_column="from")


def test_a_pool_has_all_rows_that_can_be_trained_on(pool: Pool) -> None:
    assert len(pool.rows) == len(pool.scored) == 60
    assert pool.left_out == {"unreadable": 0, "empty answer": 1, "too long": 0}
    row = planted_rows()[7]
    assert pool.rows[7]["prompt"] == [{"role": "user", "content": row["instruction"]}]
    assert pool.rows[7]["completion"] == [{"role": "assistant", "content": row["output"]}]
    assert pool.tokens.tolist() == [len(row["output"].split()) for row in planted_rows()]
    assert np.isfinite(pool.scores).all()


@pytest.mark.parametrize("budget", [{"tokens": 100}, {"rows": 5}, {}], ids=["tokens", "rows", "the smallest arm's"])
def test_arms_have_equal_size_and_are_what_they_are_called(pool: Pool, budget: dict[str, int]) -> None:
    arms = draw_arms(pool, 1, **budget)
    assert tuple(arms) == ARMS
    tokens = budget.get("tokens", int(pool.tokens[pool.chosen["selection"]].sum()))
    for arm in arms.values():
        assert len(set(arm.rows.tolist())) == len(arm.rows)
        assert arm.tokens == pool.tokens[arm.rows].sum()
        assert len(arm.rows) == 5 if "rows" in budget else abs(arm.tokens - tokens) <= 20
    assert set(arms["selection"].rows) <= set(pool.chosen["selection"])
    others = np.setdiff1d(pool.scored, arms["longest"].rows)
    # But for the last row, by which the budget is met.
    assert np.sort(pool.tokens[arms["longest"].rows])[1] >= pool.tokens[others].max()
    assert np.median(pool.scores[arms["bottom"].rows]) < np.median(pool.scores)
    if "rows" not in budget:
        small = pool.groups == "small"
        share = min(tokens / 2, pool.tokens[small].sum())
        assert pool.tokens[arms["balanced"].rows][small[arms["balanced"].rows]].sum() == pytest.approx(share, abs=20)


def test_the_control_has_the_rows_of_the_selection_with_the_words_of_each_answer_shuffled(pool: Pool) -> None:
    arms, other = (draw_arms(pool, seed, tokens=90) for seed in (2, 3))
    selection, control = arms["selection"], arms["control"]
    assert selection.rows.tolist() == control.rows.tolist()
    assert control.answers == draw_arms(pool, 2, tokens=90, names=("random", "control"))["control"].answers
    found, later = dict(control.lessons), dict(other["control"].lessons)
    longest = max(set(found) & set(later), key=lambda row: pool.tokens[row])
    assert found[longest] != later[longest]
    for own, mixed in zip(pool.examples(selection.lessons), pool.examples(control.lessons), strict=True):
        assert mixed["prompt"] == own["prompt"]
        before, after = (each["completion"][0]["content"].split() for each in (own, mixed))
        assert sorted(after) == sorted(before)
        assert len(set(before)) < len(before) or all(map(str.__ne__, before, after))


def test_words_are_shuffled_in_every_script_and_none_is_lost() -> None:
    rng = np.random.default_rng(0)
    assert shuffle_words("yes\n  no", rng) == "no yes"
    assert shuffle_words(" Paris ", rng) == "Paris"
    said = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少"
    mixed = shuffle_words(f"{said}\n{said}", rng)
    assert sorted(mixed) == sorted(2 * said) and mixed != 2 * said


def test_arms_follow_from_the_seed_and_not_from_each_other(pool: Pool) -> None:
    one, again, other = (draw_arms(pool, seed, tokens=90) for seed in (1, 1, 2))
    alone = draw_arms(pool, 1, tokens=90, names=("random",))
    for name in ARMS:
        assert one[name].rows.tolist() == again[name].rows.tolist()
        assert one[name].rows.tolist() != other[name].rows.tolist()
    assert alone["random"].rows.tolist() == one["random"].rows.tolist()


def test_the_edition_is_raised_when_arms_are_drawn_in_another_way() -> None:
    rng = np.random.default_rng(0)
    rows = [messages(f"asked {i}", " ".join(f"word{i}{j}" for j in range(3 + i % 7))) for i in range(200)]
    known = Pool(
        rows=Dataset.from_list(rows),
        scores=rng.normal(size=200),
        clusters=np.arange(200) % 9,
        tokens=np.array([3 + i % 7 for i in range(200)]),
        groups=np.array(["small" if i % 10 == 0 else "large" for i in range(200)]),
        grouped_by="from",
        scored=np.arange(200),
        chosen={"selection": np.arange(0, 200, 5)},
        left_out={},
    )
    drawn = [(name, arm.lessons) for seed in range(2) for name, arm in draw_arms(known, seed, tokens=90).items()]
    # Old runs would be resumed with the new arms: raise the number, and then write both here.
    assert (EDITION, hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]) == (2, "d7e60f58dd7faca9")


def test_length_matched_rows_are_as_long_as_the_selected(pool: Pool) -> None:
    longest = np.argsort(-pool.tokens)[:20]
    long = Pool(**{**vars(pool), "chosen": {"selection": longest}})
    arm = draw_arms(long, 0, rows=15, names=("length-matched", "selection", "random"))
    mean = {name: pool.tokens[each.rows].mean() for name, each in arm.items()}
    assert abs(mean["length-matched"] - mean["selection"]) < 4 < mean["selection"] - mean["random"]


def test_rows_of_an_evaluation_set_are_left_out(pool: Pool) -> None:
    rows = pool.rows.to_list()
    selected = next(int(row) for row in pool.chosen["selection"] if row not in (30, 31))
    said = rows[30]["completion"][0]["content"]
    near = messages(f"{rows[30]['prompt'][0]['content']} Please!", f"Well, {said}")
    evaluation = [
        messages(rows[selected]["prompt"][0]["content"].upper(), rows[selected]["completion"][0]["content"]),
        near,
        messages(rows[31]["prompt"][0]["content"], "Quite another answer, which nobody has given before."),
        messages("Who keeps the keys of the tower?", "The warden keeps them in a drawer."),
    ]
    held = hold_out(pool, Dataset.from_list(evaluation))
    assert held[1:] == (1, 1, 1, len({selected, 30, 31} & set(pool.chosen["selection"].tolist())))
    assert len(held.pool.rows) == 57
    kept = {digest_of(row) for row in held.pool.rows}
    assert kept == {digest_of(row) for i, row in enumerate(rows) if i not in (selected, 30, 31)}
    assert held.pool.chosen["selection"].tolist() != pool.chosen["selection"].tolist()
    with pytest.raises(ValueError, match=r"All 2 evaluation rows are in the pool.*--eval FILE"):
        hold_out(pool, Dataset.from_list(evaluation[:2]))


class Planted:
    """A stage that gives every row the same embedding."""

    output_columns = ("embedding",)

    def __call__(self, batch: Any, rank: int | None = None) -> dict[str, Any]:
        return {"embedding": np.tile(np.array([0.0, 2.0, 0.1], dtype=np.float32), (len(batch["prompt"]), 1))}


def test_rows_with_the_embedding_of_an_evaluation_row_are_left_out(result: Path, pool: Pool) -> None:
    assert stages_of(result) is None  # the receipt has the name of a folder, and not its path
    vectors = np.tile(np.array([1, 0, 0], dtype=np.float32), (len(pool.rows), 1))
    vectors[12] = (0.1, 1, 0)
    rows = pool.rows.remove_columns("embedding").add_column("embedding", list(vectors))
    own = Pool(**{**vars(pool), "rows": rows})
    evaluation = Dataset.from_list([messages("Who keeps the keys of the tower?", "The warden keeps them in a drawer.")])
    held = hold_out(own, evaluation, Planted())
    assert held[1:4] == (0, 1, 0)
    assert digest_of(rows[12]) not in {digest_of(row) for row in held.pool.rows}
    assert hold_out(own, evaluation).near == 0


def test_an_arm_of_the_caller_may_come_from_another_pool(
    result: Path, tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    new = {"instruction": "Who invented the fork?", "output": "Nobody knows for certain who it was.", "from": "x"}
    curate([*planted_rows(9), new], tmp_path / "b", scorer=tiny_iqs, embedder=tiny_embedder, n1=10, n2=0, k=2)
    pool = read_pool(result, count_words, own={"theirs": tmp_path / "b"})
    assert len(pool.rows) == 61
    assert len(pool.scored) == 60
    assert pool.grouped_by == "kind of task"
    assert sorted(pool.chosen["theirs"]) == [*range(9), 60]
    arms = draw_arms(pool, 0, names=("random", "selection"))
    assert list(arms) == ["random", "selection", "theirs"]
    assert 60 not in arms["random"].rows
    with pytest.raises(ValueError, match=r"'random', which an arm of the package has"):
        read_pool(result, count_words, own={"random": tmp_path / "b"})


def test_bad_input_is_refused_with_the_mend(pool: Pool, result: Path, tmp_path: Path) -> None:
    most = available(pool)["selection"][0]
    with pytest.raises(ValueError, match=rf"tokens={most + 1}, but the arm 'selection' has {most} .*--tokens {most}"):
        draw_arms(pool, 0, tokens=most + 1)
    with pytest.raises(ValueError, match="two budgets"):
        draw_arms(pool, 0, tokens=10, rows=2)
    with pytest.raises(ValueError, match=r"'best'; the arms are selection, random"):
        draw_arms(pool, 0, names=("best",))
    with pytest.raises(ValueError, match="nowhere"):
        read_pool(result, count_words, group_column="nowhere")
    with pytest.raises(ValueError, match="name a folder that `car-datasets curate` wrote"):
        read_pool(tmp_path, count_words)


def test_chats_end_with_their_last_answer() -> None:
    chat = [
        ("system", "Be brief."),
        ("user", "Hello!"),
        ("assistant", "<think>greet</think>Hi."),
        ("user", "And?"),
        ("user", "Well?"),
        ("assistant", "<think>\nwhat now\n</think>\nFine."),
        ("user", "Bye."),
    ]
    turns = read_turns([{"role": role, "content": content} for role, content in chat])
    assert not isinstance(turns, str)
    prompt, completion = as_example(turns)
    assert [(m["role"], m["content"]) for m in prompt] == [*chat[:2], ("assistant", "Hi."), ("user", "And?\nWell?")]
    assert completion == [{"role": "assistant", "content": "<think>\nwhat now\n</think>\n\nFine."}]
    assert as_example(turns[:2]) == ([], [])
