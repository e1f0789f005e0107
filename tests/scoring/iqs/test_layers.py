"""layers.py: the features of question and answer and the hashed words of the answer, by hand and under any padding."""

import torch

from car_datasets.scoring.iqs.layers import hashed_words, segment_features

STATES = [torch.arange(24.0).view(2, 4, 3), torch.arange(24.0).view(2, 4, 3).square()]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
STARTS = torch.tensor([2, 1])


def test_features_by_hand() -> None:
    found = segment_features(STATES, MASK, STARTS)
    assert found.shape == (2, (3 * 2 + 1) * 3 + 2)
    state = STATES[0][0]
    expected = [state[:2].mean(0), state[2:].mean(0), state[2:].std(0, unbiased=False)]
    assert torch.allclose(found[0, :9], torch.cat(expected))
    last = STATES[1][1]
    assert torch.allclose(found[1, -5:-2], last[:1].mean(0) * last[1:3].mean(0))
    assert torch.allclose(found[:, -2:], torch.tensor([[2.0, 2.0], [1.0, 2.0]]).log1p())


def test_padding_changes_nothing() -> None:
    longer = [torch.nn.functional.pad(state, (0, 0, 0, 5), value=9.0) for state in STATES]
    mask = torch.nn.functional.pad(MASK, (0, 5))
    assert torch.equal(segment_features(longer, mask, STARTS), segment_features(STATES, MASK, STARTS))


def test_an_answer_that_was_cut_off_gives_numbers_all_the_same() -> None:
    assert segment_features(STATES, MASK, torch.tensor([4, 3])).isfinite().all()


def words(ids: list[int], start: int) -> dict[int, float]:
    numbers, weights = hashed_words(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), torch.tensor([start]), 17
    )
    return {int(n): float(w) for n, w in zip(numbers[0], weights[0], strict=True) if w > 0}


def test_words_and_pairs_of_the_answer_count_once_each() -> None:
    # [CLS] question "response" ":" a b a b [SEP]: a, b, ab, ba
    found = words([101, 7, 8, 3433, 1024, 50, 60, 50, 60, 102], 3)
    assert len(found) == 4
    assert all(abs(weight - 0.5) < 1e-6 for weight in found.values())
    assert words([101, 9, 9, 9, 3433, 1024, 50, 60, 50, 60, 102], 4) == found  # the question is not read
    other = words([101, 7, 8, 3433, 1024, 60, 50, 102], 3)
    assert len(set(other) & set(found)) == 3  # b a: the pair "ab" is missing


def test_an_answer_without_words_has_none() -> None:
    assert words([101, 7, 3433, 1024, 102], 2) == {}
    assert words([101, 7, 102], 2) == {}


def test_words_do_not_depend_on_padding() -> None:
    ids = torch.tensor([[101, 3433, 1024, 50, 60, 102, 0, 0]])
    numbers, weights = hashed_words(ids, (ids > 0).long(), torch.tensor([1]), 17)
    padded = {int(n): float(w) for n, w in zip(numbers[0], weights[0], strict=True) if w > 0}
    assert padded == words([101, 3433, 1024, 50, 60, 102], 1)
