"""Token-budget batches cover every text once and keep to the budget."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from car_datasets import hub
from car_datasets.batching import pad, token_batches, tokenise


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
    tokenizer = AutoTokenizer.from_pretrained(hub.default_encoder_folder())
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
