"""reward.py: the numbers of the plain model, row by row, in any company; labels to one number; rows without a score."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from car_datasets import RewardScorer, score_in_shards, select_car
from car_datasets.scoring import reward
from car_datasets.scoring.engines import OnRay, estimate_scoring
from car_datasets.scoring.reward import LabelSum, read_labels
from car_datasets.scoring.stage import Stage, add_columns
from tests.scoring.tiny_models import TEMPLATE, save_classifier, save_words

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4


def prompt_of(row: dict[str, Any]) -> str:
    return "\n\n".join(part for part in (row["instruction"], row["input"]) if part)


def plainly(folder: str, rows: Dataset, text: str) -> list[list[float]]:
    """Return the logits of a model that transformers runs on one row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        asked, said = prompt_of(row), row["output"]
        if text == "chat":
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        else:
            inputs = tokenizer(*([[asked], [said]] if text == "pair" else [[said]]), return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0].tolist())
    return found


@pytest.mark.parametrize(
    ("kind", "text"),
    [("bert", "pair"), ("bert", "answer"), ("roberta", "pair"), ("electra", "pair"), ("llama", "chat")],
)
def test_scores_equal_the_model_run_on_each_row_alone(
    kind: str, text: str, classifiers: dict[str, str], pairs: Dataset
) -> None:
    expected = [row[0] for row in plainly(classifiers[kind], pairs, text)]
    scorer = RewardScorer(classifiers[kind], **({"text": "answer"} if text == "answer" else {}))
    assert scorer.text == text
    scored = add_columns(pairs, scorer, "Scoring")
    assert scored["reward_score"][:] == pytest.approx(expected, abs=TOLERANCE)
    assert len({round(score, 4) for score in expected}) == len(expected)  # else the comparison says nothing
    assert scored["reward_status"][:] == ["ok", "ok", "ok", "empty_response", "ok", "ok"]
    assert [scored.features[name].dtype for name in scorer.output_columns] == ["float32", "int32", "bool", "string"]
    for budget, rows in ((1, pairs), (10_000, pairs.select(range(5, -1, -1)))):
        found = RewardScorer(classifiers[kind], text=text, batch_tokens=budget)(rows[:])["reward_score"]
        assert found[:: 1 if budget == 1 else -1] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "text", "packs"), [("bert", "pair", False), ("bert", "answer", True), ("roberta", "pair", True)]
)
def test_without_padding_the_scores_are_the_same(
    kind: str, text: str, packs: bool, classifiers: dict[str, str], pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [row[0] for row in plainly(classifiers[kind], pairs, text)]
    runs: list[int] = []
    ordinary = reward.PackedEncoder.states

    def watched(self: Any, packed: Any) -> Any:
        runs.append(1)
        return ordinary(self, packed)

    monkeypatch.setattr(reward, "can_pack", lambda *_: True)  # as on a GPU in half precision
    monkeypatch.setattr(reward.PackedEncoder, "states", watched)
    reward._load.cache_clear()
    reward.load_hub_model.cache_clear()
    found = RewardScorer(classifiers[kind], text=text)(pairs[:])["reward_score"]
    reward._load.cache_clear()  # its weights are views of fused ones
    reward.load_hub_model.cache_clear()
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert bool(runs) == packs


def test_texts_beyond_the_limit_are_cut_and_said(classifiers: dict[str, str]) -> None:
    rows = {"prompt": ["the sea"] * 2, "completion": ["red " * 70, "red " * 16]}
    found = RewardScorer(classifiers["bert"], text="pair", max_tokens=21)(rows)
    assert found["reward_tokens"] == [75, 21]
    assert found["reward_truncated"] == [True, False]
    assert found["reward_status"] == ["truncated", "ok"]
    assert found["reward_score"][0] == pytest.approx(found["reward_score"][1], abs=TOLERANCE)


def test_a_reward_model_reads_the_turns_of_a_chat(classifiers: dict[str, str]) -> None:
    roles = ["user", "assistant", "user", "assistant"]
    said = ["name the sea", "the red sea", "a poem", "wide and deep"]
    chat = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    model = AutoModelForSequenceClassification.from_pretrained(classifiers["llama"]).eval()
    ids = AutoTokenizer.from_pretrained(classifiers["llama"]).apply_chat_template(
        chat, return_tensors="pt", return_dict=False
    )
    expected = model(ids).logits.item()
    found = RewardScorer(classifiers["llama"])({"messages": [chat, [*chat, {"role": "user", "content": "thanks"}]]})
    assert found["reward_score"] == pytest.approx([expected, expected], abs=TOLERANCE)


def test_rows_that_cannot_be_scored_raise_or_are_marked(classifiers: dict[str, str]) -> None:
    rows = {
        "messages": [
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            None,
            [{"role": who, "content": "a"} for who in ("system", "user", "assistant")],
        ],
        "source_index": [7, 8, 9],
    }
    with pytest.raises(
        ValueError, match=r"2 of 3 rows cannot be scored: 1 null \(rows 8\), |1 not_rendered: no system"
    ):
        RewardScorer(classifiers["llama"])(rows)
    found = RewardScorer(classifiers["llama"], on_invalid="mark")(rows)
    assert [score is None for score in found["reward_score"]] == [False, True, True]
    assert found["reward_status"] == ["ok", "null", "not_rendered: no system prompt, please"]
    assert found["reward_tokens"][1:] == [0, 0]
    only = RewardScorer(classifiers["llama"], on_invalid="mark")({"messages": [None]})
    assert only["reward_score"] == [None]


def test_an_empty_text_has_no_score(tmp_path: Path) -> None:
    folder = save_classifier(str(tmp_path), "llama")  # adds no special tokens
    rows = {"prompt": ["the sea", "the sea"], "completion": ["", "wide"]}
    found = RewardScorer(folder, text="answer")(rows)
    assert found["reward_score"][0] is None
    assert np.isfinite(found["reward_score"][1])
    assert found["reward_status"] == ["no_content: assistant", "ok"]


def test_in_half_precision_the_head_stays_exact(classifiers: dict[str, str]) -> None:
    words = ["red", "green", "blue", "wide", "deep", "sea", "sum", "poem"]
    rows = {"prompt": [a for a in words for _ in words], "completion": [b for _ in words for b in words]}
    full = np.array(RewardScorer(classifiers["bert"])(rows)["reward_score"])
    half = np.array(RewardScorer(classifiers["bert"], dtype="bfloat16")(rows)["reward_score"])
    assert np.abs(full - half).max() < 0.2 * full.std()
    assert len(np.unique(half)) > 55
    assert len(torch.from_numpy(half).bfloat16().unique()) < len(np.unique(half))


def test_what_overflows_in_half_precision_is_scored_again(
    classifiers: dict[str, str], pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, half = (RewardScorer(classifiers["bert"], dtype=dtype) for dtype in ("float32", "float16"))
    expected, close = full(pairs[:])["reward_score"], half(pairs[:])["reward_score"]
    ordinary = reward._Classifier.logits

    def broken(*dtypes: torch.dtype) -> Any:
        return lambda self, *rest, **options: (
            ordinary(self, *rest, **options)[0] * (float("nan") if self.hub.trunk.dtype in dtypes else 1),
        )

    monkeypatch.setattr(reward._Classifier, "logits", broken(torch.float16))
    assert half(pairs[:])["reward_score"] == expected != close
    monkeypatch.setattr(reward._Classifier, "logits", broken(torch.float16, torch.float32))
    with pytest.raises(ValueError, match=r"6 scores are not finite, rows \[0, 1, 2, 3, 4\]"):
        half(pairs[:])


def test_it_is_a_stage_like_the_others(classifiers: dict[str, str], pairs: Dataset, tmp_path: Path) -> None:
    scorer = RewardScorer(classifiers["llama"])
    assert isinstance(scorer, Stage)
    assert pickle.loads(pickle.dumps(scorer)) == dataclasses.replace(scorer) == scorer
    assert Hasher.hash(scorer) == Hasher.hash(RewardScorer(classifiers["llama"], token="hf_secret"))
    for other in ({"text": "pair"}, {"max_tokens": 30}, {"score_thoughts": True}, {"dtype": "bfloat16"}):
        assert Hasher.hash(scorer) != Hasher.hash(RewardScorer(classifiers["llama"], **other))
    expected = add_columns(pairs, scorer, "Scoring").to_dict()
    assert score_in_shards(pairs, scorer, tmp_path / "shards", shard_rows=4).to_dict() == expected
    table = OnRay(scorer)(pairs.with_format("arrow")[:])
    assert table.column("reward_score").to_pylist() == pytest.approx(expected["reward_score"], abs=TOLERANCE)
    assert estimate_scoring(pairs, scorer).rows_per_second > 0
    clustered = Dataset.from_dict({**expected, "cluster": [0, 0, 0, 1, 1, 1]})
    chosen = select_car(clustered, n1=1, n2=1, score_column="reward_score")
    best = int(np.argmax(expected["reward_score"]))
    assert chosen["output"][0] == pairs["output"][best]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "question"}, r"text='question' is not known; choose one of \['auto', 'chat', 'pair', 'answer'\]"),
        ({"text": "chat"}, r"text='chat': .* has no chat template\. Pass text='pair'"),
        ({"labels": "softmax(bad)"}, r"labels='softmax\(bad\)' names 'bad', and the labels of the model are 'good'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"revision": "main"}, "Leave revision out"),
        ({"schema": "alpacka"}, "schema='alpacka'"),
    ],
)
def test_mistakes_are_named_when_the_scorer_is_made(
    options: dict[str, Any], message: str, classifiers: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=message):
        RewardScorer(classifiers["bert"], **options)


def test_a_scorer_of_ours_is_no_sequence_classifier(tiny_iqs: str) -> None:
    with pytest.raises(ValueError, match=r"is an IQS model: QualityScorer\(.*\) scores by it"):
        RewardScorer(tiny_iqs)


# --- labels

NAMES = {0: "bad", 1: "so so", 2: "good"}
LOGITS = np.array([[1.0, 2.0, 4.0], [0.0, -3.0, 900.0]])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("good", [4, 900]),
        ("good - bad", [3, 900]),
        ("0*LABEL_0 + 1*LABEL_1 + 2*LABEL_2", [10, 1797]),
        ("softmax(good)", [np.exp(4) / np.exp([1, 2, 4]).sum(), 1]),
        ("sigmoid(bad) * 2 - 0.5", [2 / (1 + np.exp(-1)) - 0.5, 0.5]),
        ("-('so so' + 2 * bad) / 4", [-1, 0.75]),
        (
            "2 * (softmax('so so') + 2 * softmax(good)) + 1",
            [2 * (np.exp([2, 4]) @ [1, 2]) / np.exp([1, 2, 4]).sum() + 1, 5],
        ),
    ],
)
def test_labels_become_one_number(expression: str, expected: list[float]) -> None:
    found = read_labels(expression, NAMES)
    assert isinstance(found, LabelSum)
    assert found(LOGITS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            "1",
            "good * bad",
            "good ** 2",
            "good / bad",
            "good / 0",
            "good > 1",
            "max(good, bad)",
            "softmax(good, bad)",
        ),
        *("softmax(2 * good)", "__import__('os').system('true')", "good if bad else 1", "good[0]", "1e999 * good"),
        *("(" * 1_000, "-" * 1_999 + "good", "good" * 1_000, "\0", "True * good", "best", "LABEL_3", "LABEL_x", 3),
    ],
)
def test_other_expressions_are_refused_and_never_evaluated(expression: Any) -> None:
    with pytest.raises(ValueError, match=r"^labels=.*'bad', 'so so', 'good'"):
        read_labels(expression, NAMES)


def test_several_labels_need_an_expression(tmp_path: Path, pairs: Dataset) -> None:
    folder = save_classifier(str(tmp_path), "bert", ("bad", "so so", "good"))
    with pytest.raises(ValueError, match=r"labels is missing: the model has 3 labels.*labels='softmax\(good\)'"):
        RewardScorer(folder)
    expected = torch.tensor(plainly(folder, pairs, "pair")).softmax(dim=1)[:, 2]
    found = RewardScorer(folder, labels="softmax(good)")(pairs[:])["reward_score"]
    assert found == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_a_template_without_padding_token_is_read_in_batches_of_any_text(tmp_path: Path) -> None:
    """Its head reads the last token that is not padding, and any token may be the last of a text."""
    folder = save_classifier(str(tmp_path), "llama")
    save_words(folder, "llama", TEMPLATE.replace(" <end>", ""))
    words = ["red", "green", "blue", "wide", "deep", "sea", "sum", "poem"] * 2
    rows = {"prompt": ["the sea " * (i % 3) for i in range(16)], "completion": words}
    alone = RewardScorer(folder, batch_tokens=1)(rows)["reward_score"]
    assert RewardScorer(folder)(rows)["reward_score"] == pytest.approx(alone, abs=TOLERANCE)
