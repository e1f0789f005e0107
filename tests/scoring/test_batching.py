"""Token-budget batches cover every text once and keep to the budget."""

import logging
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from car_datasets.scoring import batching
from car_datasets.scoring.batching import (
    Budget,
    Tokens,
    in_order,
    pad,
    run_batches,
    run_windows,
    token_batches,
    token_budget,
    tokenise,
    tokenised_ahead,
)
from car_datasets.utils import revisions


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 60), max_size=60), budget=st.integers(1, 400))
def test_every_text_once_within_the_budget_longest_first(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(lengths, budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    tops = [max(lengths[i] for i in batch) for batch in batches]
    assert tops == sorted(tops, reverse=True)


def test_pad_fills_and_masks() -> None:
    ids, mask = pad([[5, 6, 7], [8]], pad_id=1, device=torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_answers_begin_where_their_first_token_is() -> None:
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    texts = [
        "Instruction: say hi Response: hi there",
        "Instruction: " + "a " * 30 + "Response: b",
        "x Response: " + "c " * 30,
    ]
    found = tokenise(tokenizer, texts, 12, [text.index("Response:") for text in texts])
    assert [len(ids) for ids in found.ids] == [10, 12, 12]
    assert found.lengths == [10, 37, 35]
    assert found.answer_starts == [5, 11, 2]  # the second was cut off: its last token, the separator
    assert tokenizer.convert_ids_to_tokens(found.ids[0])[5] == "response"
    assert tokenise(tokenizer, texts, 12).answer_starts == []


def test_the_fast_way_gives_the_ids_of_the_ordinary_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    texts = ["Instruction: say hi Response: h\u00e9 there", "", "a " * 60, "\u65e5\u672c\u8a9e [SEP] <pad>"]
    expected = tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    assert tokenise(tokenizer, texts, 12).ids == expected  # after a call that cut, which the tokenizer remembers
    assert tokenise(tokenizer, texts, 12, [0, 0, 0, 0]).ids == expected
    assert tokenise(tokenizer, texts, 12).lengths == [len(ids) for ids in tokenizer(texts)["input_ids"]]


def test_windows_are_tokenised_ahead_in_another_thread_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(revisions.default_encoder_folder())
    texts = [f"number {i}" for i in range(10)]
    whole = tokenise(tokenizer, texts, 12, [0] * 10)
    seen, threads = [], set()
    ordinary = batching.tokenise

    def watched(*args: object) -> object:
        threads.add(threading.current_thread())
        seen.append(len(args[1]))
        return ordinary(*args)

    monkeypatch.setattr(batching, "WINDOW_TEXTS", 4)
    monkeypatch.setattr(batching, "tokenise", watched)
    windows = tokenised_ahead(tokenizer, texts, 12, list(range(10)))
    first = next(windows)
    assert len(first.ids) == 4
    found = [first, *windows]
    assert seen == [4, 4, 2]
    assert threading.current_thread() not in threads
    assert [ids for window in found for ids in window.ids] == whole.ids
    assert list(tokenised_ahead(tokenizer, [], 12)) == []
    growing = tokenised_ahead(tokenizer, texts, 12, first=1)  # for a device that waits for the first
    assert [len(window.ids) for window in growing] == [1, 2, 4, 3]


def test_batches_of_texts_end_to_end_are_full_across_windows() -> None:
    rows = [[i] * (1 + i * 7 % 13) for i in range(60)]
    lengths = [len(row) for row in rows]
    windows = [Tokens(rows[a:b], lengths[a:b], []) for a, b in ((0, 5), (5, 25), (25, 60))]
    sizes = []

    def forward(ids: Any, starts: Any) -> tuple[torch.Tensor, ...]:
        sizes.append(sum(map(len, ids)))
        return (torch.tensor([[float(row[0])] for row in ids]),)

    (found,), tokens = run_windows(windows, 60, Budget(50), torch.device("cpu"), forward, padded=False)
    assert found[:, 0].tolist() == list(range(60))
    assert tokens.tolist() == lengths
    assert max(sizes) <= 50
    assert min(sizes[:-1]) > 50 - 13  # only the very last may be far from full


@pytest.mark.parametrize("message", ["CUDA out of memory.", "MPS backend out of memory"])
@pytest.mark.parametrize("fits", [1, 7, 20, 1000])
def test_where_memory_runs_out_batches_are_halved_and_nothing_is_lost(
    fits: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = torch.OutOfMemoryError if message.startswith("CUDA") else RuntimeError
    lengths = [3, 7, 1, 5, 2, 6, 4, 7, 1, 2]
    budget = Budget(64)
    calls: list[int] = []

    def forward(places: list[int]) -> torch.Tensor:
        size = len(places) * max(lengths[i] for i in places)
        calls.append(size)
        if len(places) > 1 and size > fits:
            raise error(message)
        return torch.tensor([[10.0 * i] for i in places])

    with caplog.at_level(logging.WARNING):
        ran = run_batches(lengths, budget, forward)
    assert in_order([places for places, _ in ran], [part for _, part in ran]).ravel().tolist() == [
        10.0 * i for i in range(10)
    ]
    assert (budget.tokens == 64) == (fits == 1000)
    assert ("Out of memory" in caplog.text) == (fits < 1000)
    first = calls[0]
    again = run_batches(lengths, budget, forward)  # what was learned is kept
    assert fits == 1 or max(len(places) * max(lengths[i] for i in places) for places, _ in again) <= first // (
        1 if fits == 1000 else 2
    )


def test_one_text_that_does_not_fit_is_an_error() -> None:
    def forward(places: list[int]) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        run_batches([5, 5, 5], Budget(100), forward)


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    budget = Budget(100)

    def forward(places: list[int]) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_batches([5, 5, 5], budget, forward)
    assert budget.tokens == 100


def test_budgets_fit_the_device_and_are_remembered() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert 1024 <= token_budget(cpu, 384).tokens <= 2048
    assert token_budget(gpu, 1024).tokens == 32768
    assert token_budget(gpu, 384).tokens > 65536
    assert token_budget(gpu, 384) is token_budget(gpu, 384)
    assert token_budget(cpu, 384, 77).tokens == 77
