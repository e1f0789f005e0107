"""conversations.py: rows as messages, the day of a template, and models that would score by chance are refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from car_datasets import IFDScorer, RewardScorer
from car_datasets.loading.schemas import SCHEMAS
from car_datasets.scoring.conversations import read_conversations, render_chat, windows_ahead
from car_datasets.utils.digests import folder_digest
from tests.conftest import DAMAGED_MODELS, damaged_copy
from tests.scoring.tiny_models import TEMPLATE, save_classifier, save_language_model, save_words

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a sea."},
    {"role": "assistant", "content": "<think>Salt?</think>The Red Sea."},
    {"role": "user", "content": "Another."},
    {"role": "assistant", "content": "<think>Ice?</think>The White Sea."},
    {"role": "user", "content": "Thanks."},
]


@pytest.mark.parametrize("thoughts", [False, True])
def test_a_chat_is_read_up_to_its_last_answer(thoughts: bool) -> None:
    [found] = read_conversations({"messages": [CHAT]}, SCHEMAS["messages"], thoughts)
    assert [message["content"] for message in found.prompt] == ["Be short.", "Name a sea.", "The Red Sea.", "Another."]
    assert found.answer == ("<think>\nIce?\n</think>\n\nThe White Sea." if thoughts else "The White Sea.")


def test_statuses_are_those_of_other_scorers() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    chats: dict[str, Any] = {
        "ok": CHAT,
        "empty_response": [CHAT[1], {"role": "assistant", "content": " "}],
        "tool_call": [CHAT[1], call],
        "other_parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, CHAT[2]],
        "no_assistant_turn": [CHAT[1]],
        "null": None,
        "unknown_role: poet": [CHAT[1], {"role": "poet", "content": "a"}],
    }
    found = read_conversations({"messages": list(chats.values())}, SCHEMAS["messages"])
    assert [chat.status for chat in found] == list(chats)
    assert [chat.is_scored for chat in found] == [True] * 4 + [False] * 3


def test_a_template_that_writes_the_date_writes_the_same_every_day(tmp_path: Path) -> None:
    save_words(str(tmp_path), "llama", "{{ strftime_now('%d %b %Y') + messages[1].content }}")
    assert render_chat(AutoTokenizer.from_pretrained(tmp_path), CHAT, prompt=True) == "26 Jul 2024Name a sea."


def test_windows_come_in_order() -> None:
    texts = [str(i) for i in range(9_000)]
    found = windows_ahead(texts, lambda part: SimpleNamespace(texts=part))  # type: ignore[arg-type, return-value]
    assert [len(window.texts) for window in found] == [4096, 4096, 808]  # type: ignore[attr-defined]


def test_a_chat_template_is_part_of_a_model(tmp_path: Path) -> None:
    """It may be a file of its own, and the scores depend on it."""
    folder = save_classifier(str(tmp_path), "llama", template=TEMPLATE)
    before = RewardScorer(folder)
    assert (tmp_path / "chat_template.jinja").is_file()
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("<bot>", "<user>"))
    assert RewardScorer(folder).revision == folder_digest(tmp_path) != before.revision


# --- models that are refused


def test_weights_that_a_file_lacks_are_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save_classifier(str(tmp_path), "bert")
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # without the head
    with pytest.raises(ValueError, match=r"no weights for \['classifier\.bias', 'classifier\.weight'\].*at random"):
        RewardScorer(folder)({"prompt": ["a"], "completion": ["b"]})


@pytest.mark.parametrize("fault", DAMAGED_MODELS)
def test_a_damaged_model_is_refused_in_one_line(fault: str, tmp_path: Path, classifiers: dict[str, str]) -> None:
    name, change = DAMAGED_MODELS[fault]
    folder = damaged_copy(classifiers["bert"], tmp_path / "copy", name, change)
    with pytest.raises(ValueError, match=r"cannot be loaded|is not a model|no weights for") as error:
        RewardScorer(folder)({"prompt": ["a"], "completion": ["b"]})
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_never_run(tmp_path: Path, classifiers: dict[str, str]) -> None:
    entries = {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}
    folder = damaged_copy(classifiers["bert"], tmp_path / "copy", "config.json", entries)
    with pytest.raises(ValueError, match="names Python code that would run"):
        RewardScorer(folder)


def test_the_context_is_the_smallest_that_model_and_tokenizer_state(tmp_path: Path) -> None:
    folder = save_classifier(str(tmp_path), "roberta")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert RewardScorer(folder).limit == tokenizer.model_max_length == 60
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).max_position_embeddings == 64
    assert RewardScorer(folder).limit == 63  # positions begin after the padding token's id
    assert RewardScorer(folder, max_tokens=20).limit == 20
    for wrong, message in ((64, "max_tokens=64 is above the 63 tokens"), (1, "max_tokens=1 must be")):
        with pytest.raises(ValueError, match=message):
            RewardScorer(folder, max_tokens=wrong)


def test_a_model_that_reads_ahead_tells_no_perplexity(tmp_path: Path) -> None:
    folder = save_language_model(str(tmp_path), "bert")
    with pytest.raises(ValueError, match="its tokens read those after them"), torch.no_grad():
        IFDScorer(folder)({"prompt": ["a"], "completion": ["b"]})
