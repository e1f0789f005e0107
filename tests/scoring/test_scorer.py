"""QualityScorer: right numbers in the right rows, whatever the batch; failure is loud."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import AutoTokenizer

from car_datasets import IQSModel, QualityScorer, TextEmbedder
from car_datasets.loading.templates import Exchange, render
from car_datasets.receipt import scorer_pins
from car_datasets.scoring import scorer as scoring
from car_datasets.scoring.iqs.heads import FAULTS
from car_datasets.utils import revisions
from tests.conftest import DAMAGED_MODELS, SIZES, damaged_copy

TOLERANCE = 1e-5  # in float32, whatever the company of a row
HALF_TOLERANCE = 0.5  # in bfloat16, 8 bits of mantissa, as a share of the spread of tiny_iqs' scores; 0.14 was seen
HALF_COMPANY = {"bfloat16": 0.03, "float16": 0.005}  # the embedded scorer's; its scores' standard deviation is 0.46


def texts(rows: Dataset) -> list[str]:
    return [render(Exchange(r["instruction"], r["input"] or "", r["output"])).whole for r in rows]


def test_scores_equal_the_model_run_on_each_text_alone(tiny_iqs: str, pairs: Dataset) -> None:
    model, tokenizer = IQSModel.from_pretrained(tiny_iqs).eval(), AutoTokenizer.from_pretrained(tiny_iqs)
    expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts(pairs)]
    scored = pairs.map(QualityScorer(tiny_iqs), batched=True, with_rank=True)
    assert scored["iqs_score"][:] == pytest.approx(expected, abs=TOLERANCE)
    assert scored.features["iqs_score"].dtype == "float32"
    assert scored.column_names == [*pairs.column_names, "iqs_score"]
    assert len({round(s, 4) for s in expected}) == len(expected)  # else the comparison says nothing


def test_diagnostics_count_tokens_and_mark_rows(make_tiny_iqs: Any, pairs: Dataset) -> None:
    scored = pairs.map(QualityScorer(make_tiny_iqs(max_tokens=16), diagnostics=True), batched=True)
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_iqs(max_tokens=16))
    lengths = [len(tokenizer(t)["input_ids"]) for t in texts(pairs)]
    assert scored["iqs_tokens"][:] == lengths
    assert list(QualityScorer(make_tiny_iqs(max_tokens=16)).count_tokens(pairs)) == lengths
    assert scored["iqs_truncated"][:] == [n > 16 for n in lengths]
    assert scored["iqs_status"][1] == "truncated"
    assert scored["iqs_status"][3] == "empty_response"
    assert [scored.features[c].dtype for c in ("iqs_tokens", "iqs_truncated", "iqs_status")] == [
        "int32",
        "bool",
        "string",
    ]


def test_a_truncated_text_scores_as_its_beginning(make_tiny_iqs: Any) -> None:
    scorer = QualityScorer(make_tiny_iqs(max_tokens=16))
    long = "Instruction: write a list Response: " + "red " * 40
    start = "Instruction: write a list Response: " + "red " * (
        16 - 9
    )  # 2 special tokens, 2 x ":" and 5 words come before
    found = scorer.score_texts([long, start])
    assert found.truncated.tolist() == [True, False]
    assert found.scores[0] == pytest.approx(found.scores[1], abs=TOLERANCE)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(order=st.permutations(range(12)), batch_size=st.integers(1, 12), budget=st.sampled_from([1, 30, 100, 5000]))
def test_a_score_does_not_depend_on_its_company(tiny_iqs: str, order: list[int], batch_size: int, budget: int) -> None:
    rows = {
        "prompt": [f"write {'the sea ' * (i % 5)}" for i in range(12)],
        "completion": ["good and bad " * (i * i % 13) for i in range(12)],
    }
    alone = QualityScorer(tiny_iqs, batch_tokens=1)
    together = QualityScorer(tiny_iqs, batch_tokens=budget)
    expected = alone(rows)["iqs_score"]
    shuffled = {name: [values[i] for i in order] for name, values in rows.items()}
    found = []
    for start in range(0, 12, batch_size):
        found += together({name: values[start : start + batch_size] for name, values in shuffled.items()})["iqs_score"]
    assert found == pytest.approx([expected[i] for i in order], abs=TOLERANCE)


def test_bfloat16_stays_close_and_keeps_scores_apart(tiny_iqs: str, sample_rows: list[dict]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_iqs)
    different: dict[tuple[int, ...], Any] = {}  # the vocabulary is so small that some rows are equal as tokens
    for row in sample_rows[:64]:
        text = render(Exchange(row["instruction"], row["input"], row["output"]), "clean-1")
        different[tuple(tokenizer(text.whole, truncation=True, max_length=48)["input_ids"])] = text
    full = QualityScorer(tiny_iqs).score_texts(list(different.values())).scores
    half = QualityScorer(tiny_iqs, dtype="bfloat16").score_texts(list(different.values())).scores
    assert np.abs(full - half).max() < HALF_TOLERANCE * full.std()
    assert len(np.unique(half)) == len(different) > 50
    assert len(torch.from_numpy(full).bfloat16().unique()) < 30  # what a head in bfloat16 could tell apart


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(HALF_COMPANY))
def test_in_half_precision_company_moves_a_score_within_its_tolerance(
    dtype: str, sample_rows: list[dict[str, Any]]
) -> None:
    """Score real rows alone, in small and large batches and backwards, and compare the ranking with that of float32."""
    rows = [Exchange(row["instruction"], row["input"], row["output"]) for row in sample_rows[:80]]
    texts = [render(row, "clean-1") for row in rows]
    full = QualityScorer().score_texts(texts).scores
    alone = QualityScorer(dtype=dtype, batch_tokens=1).score_texts(texts).scores
    company = []
    for budget in (512, 4096):
        scorer = QualityScorer(dtype=dtype, batch_tokens=budget)
        company += [scorer.score_texts(texts).scores, scorer.score_texts(texts[::-1]).scores[::-1]]
    assert max(np.abs(scores - alone).max() for scores in company) < HALF_COMPANY[dtype]
    assert full.std() > 10 * HALF_COMPANY[dtype]
    assert all(spearmanr(full, scores).statistic > 0.999 for scores in company)


@pytest.mark.parametrize(("turns", "fold"), [("mean", np.mean), ("min", min), ("sum", sum), ("last", lambda s: s[-1])])
def test_a_chat_scores_by_its_exchanges(tiny_iqs: str, turns: str, fold: Any) -> None:
    chat = [
        {"role": "system", "content": "the list is short"},
        {"role": "user", "content": "write a poem"},
        {"role": "assistant", "content": "the sea, the sea"},
        {"role": "user", "content": "name three colours"},
        {"role": "assistant", "content": "red and good"},
    ]
    parts = QualityScorer(tiny_iqs).score_texts(
        [
            "Instruction: the list is short write a poem Response: the sea, the sea",
            "Instruction: the list is short write a poem the sea, the sea name three colours Response: red and good",
        ]
    )
    found = QualityScorer(tiny_iqs, turns=turns, diagnostics=True)({"messages": [chat]})
    assert found["iqs_score"][0] == pytest.approx(fold(parts.scores.tolist()), abs=TOLERANCE)
    assert found["iqs_tokens"][0] == parts.tokens.sum()


def test_thoughts_are_scored_and_embedded_on_request() -> None:
    rows = {"instruction": ["Name a sea."], "output": ["<think>Salt water?</think>The Red Sea."]}
    for thoughts, answer in ((False, "The Red Sea."), (True, "Salt water? The Red Sea.")):
        scorer = QualityScorer(embedding_column="embedding", score_thoughts=thoughts)
        found, text = scorer(rows), f"Instruction: Name a sea. Response: {answer}"
        assert found["iqs_score"][0] == pytest.approx(float(scorer.score_texts([text]).scores[0]), abs=TOLERANCE)
        apart = scorer.embedder()
        assert np.allclose(found["embedding"][0], apart(rows)["embedding"][0], atol=1e-5)
        assert np.allclose(found["embedding"][0], apart.embed_texts([text])[0], atol=1e-5)


def test_rows_that_cannot_be_scored_stop_the_run_by_name(tiny_iqs: str) -> None:
    rows = {"instruction": ["a", None, "b"], "output": ["c", "d", None], "source_index": [7, 8, 9]}
    with pytest.raises(ValueError, match=r"2 of 3 rows cannot be scored: 2 null \(rows 8, 9\).*on_invalid='mark'"):
        QualityScorer(tiny_iqs)(rows)


def test_marked_rows_get_a_null_and_a_reason_never_a_score(tiny_iqs: str) -> None:
    rows = Dataset.from_dict({"instruction": ["a", None, "name the sea"], "output": ["c", "d", "good"]})
    scored = rows.map(QualityScorer(tiny_iqs, on_invalid="mark"), batched=True)
    assert scored["iqs_status"][:] == ["ok", "null", "ok"]
    assert scored["iqs_score"][1] is None
    clean = rows.select([0, 2]).map(QualityScorer(tiny_iqs), batched=True)
    assert [scored["iqs_score"][i] for i in (0, 2)] == pytest.approx(clean["iqs_score"][:], abs=TOLERANCE)


def test_scores_that_are_not_finite_stop_the_run(make_tiny_iqs: Any, pairs: Dataset) -> None:
    folder = make_tiny_iqs(seed=3)
    state = load_file(f"{folder}/model.safetensors")
    state["head.3.bias"] = torch.tensor([math.nan])
    save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"6 scores are not finite, rows \[0, 1, 2, 3, 4\]"):
        QualityScorer(folder)(pairs[:])


def test_an_existing_column_is_not_overwritten(tiny_iqs: str, pairs: Dataset) -> None:
    once = pairs.map(QualityScorer(tiny_iqs), batched=True)
    with pytest.raises(ValueError, match=r"already has the column\(s\) \['iqs_score'\].*output_column"):
        once.map(QualityScorer(tiny_iqs), batched=True)
    twice = once.map(QualityScorer(tiny_iqs, output_column="second_score", diagnostics=True), batched=True)
    assert {"second_score", "second_tokens", "second_truncated", "second_status"} <= set(twice.column_names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_id": "./no/such/folder"}, "no such folder"),
        ({"model_id": "not a model id!"}, "not a model id!"),
        ({"turns": "median"}, "turns='median'"),
        ({"template": "fancy"}, "template='fancy'"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"on_invalid": "ignore"}, "on_invalid='ignore'"),
        ({"revision": "main"}, "Leave revision out"),
        ({"schema": "alpacka"}, "schema='alpacka'"),
        ({"columns": {"quest": "a"}}, "columns has the keys"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"output_column": "x", "embedding_column": "x"}, "must have different names"),
    ],
)
def test_mistakes_are_named_when_the_scorer_is_made(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QualityScorer(**options)


def test_a_hub_that_may_not_be_asked_is_named() -> None:
    with pytest.raises(
        ConnectionError, match=r"no-such-owner/no-such-model.*HF_HUB_OFFLINE=1 forbids requests to the Hub"
    ):
        QualityScorer("no-such-owner/no-such-model")


def test_a_folder_that_is_no_iqs_model_is_refused(tiny_embedder: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="not an IQS model"):
        QualityScorer(tiny_embedder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        QualityScorer(str(tmp_path))


def test_a_model_with_its_own_encoder_gives_no_embedding(tiny_iqs: str) -> None:
    with pytest.raises(ValueError, match="TextEmbedder"):
        QualityScorer(tiny_iqs, embedding_column="embedding")


@pytest.mark.slow
def test_one_pass_gives_what_the_two_stages_give(sample_rows: list[dict]) -> None:
    rows = sample_rows[:24]
    rows = [
        *rows,
        {**rows[0], "output": " ".join(r["output"] for r in sample_rows[:12])},
    ]  # beyond the embedder's 256 tokens
    rows = Dataset.from_list(rows)
    both = rows.map(QualityScorer(embedding_column="embedding", diagnostics=True), batched=True, with_rank=True)
    apart = rows.map(QualityScorer(), batched=True, with_rank=True).map(TextEmbedder(), batched=True, with_rank=True)
    assert both["iqs_tokens"][-1] > 256
    assert both["iqs_score"][:] == pytest.approx(apart["iqs_score"][:], abs=TOLERANCE)
    assert np.abs(np.array(both["embedding"][:]) - np.array(apart["embedding"][:])).max() < TOLERANCE


def test_typed_out_escapes_do_not_change_the_default_score() -> None:
    plain = 'First: "one".\nSecond: it’s two.'
    escaped = 'First: \\"one\\".\\nSecond: it\\u2019s two.'
    scores = QualityScorer()({"prompt": ["Count."] * 2, "completion": [plain, escaped]})["iqs_score"]
    assert render(Exchange("Count.", "", plain)) == render(Exchange("Count.", "", escaped))
    assert scores[0] == pytest.approx(scores[1], abs=TOLERANCE)


def test_the_default_prefers_better_answers_to_the_same_question(sample_rows: list[dict]) -> None:
    """Refuse an inverted or random scorer; the figures of quality are in the card."""
    scores = QualityScorer()({c: [r[c] for r in sample_rows] for c in ("instruction", "input", "output")})["iqs_score"]
    by_question: dict[tuple, dict[str, float]] = {}
    for row, score in zip(sample_rows, scores, strict=True):
        by_question.setdefault((row["instruction"], row["input"]), {})[row["grade"]] = score
    pairs = [(a["good"], a["mediocre"]) for a in by_question.values() if {"good", "mediocre"} <= set(a)]
    assert len(pairs) >= 20
    assert sum(good > mediocre for good, mediocre in pairs) / len(pairs) > 0.7


def test_an_empty_batch_and_dataset_pass_through(tiny_iqs: str, pairs: Dataset) -> None:
    assert QualityScorer(tiny_iqs)({"instruction": [], "output": []})["iqs_score"] == []
    assert len(concatenate_datasets([pairs]).select([]).map(QualityScorer(tiny_iqs), batched=True)) == 0


SEGMENTS = {"head": "segments", "hidden_sizes": (4, 3), "members": 3, "word_bits": 6}


def test_uncertainty_is_the_spread_of_the_members(make_tiny_iqs: Any, pairs: Dataset) -> None:
    folder = make_tiny_iqs(**SEGMENTS)
    scorer = QualityScorer(folder, uncertainty=True, diagnostics=True)
    scored = pairs.map(scorer, batched=True)
    assert scored.column_names[len(pairs.column_names) :][:2] == ["iqs_score", "iqs_score_std"]
    assert scored.features["iqs_score_std"].dtype == "float32"
    model, tokenizer = IQSModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for row, whole in zip(scored, texts(pairs), strict=True):
        encoded = tokenizer(whole, return_tensors="pt")
        start = torch.tensor([encoded.char_to_token(0, whole.index("Response:"))])
        members, _ = model.member_scores(**encoded, answer_start=start)
        assert row["iqs_score"] == pytest.approx(members.mean().item(), abs=TOLERANCE)
        assert row["iqs_score_std"] == pytest.approx(members.std(unbiased=False).item(), abs=TOLERANCE)
    assert max(scored["iqs_score_std"]) > 0.01


def test_uncertainty_of_a_chat_is_that_of_its_score(make_tiny_iqs: Any) -> None:
    folder = make_tiny_iqs(**SEGMENTS)
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    found = QualityScorer(folder, uncertainty=True, turns="sum")({"messages": [chat]})
    texts = [render(Exchange("a", "", "b")), render(Exchange("a\nb\nc", "", "d"))]
    members = QualityScorer(folder).score_texts(texts).members
    assert found["iqs_score_std"][0] == pytest.approx(members.sum(axis=0).std(), abs=TOLERANCE)


def test_a_model_of_one_member_has_no_uncertainty(tiny_iqs: str) -> None:
    with pytest.raises(ValueError, match="has one member, which cannot disagree"):
        QualityScorer(tiny_iqs, uncertainty=True)


PARTS = {"head": "parts", "hidden_sizes": (8,), "members": 2, "fork_layers": 1, "queries": 2}


def test_parts_come_with_the_score_from_one_pass(make_tiny_iqs: Any, pairs: Dataset) -> None:
    folder = make_tiny_iqs(**PARTS)
    scored = pairs.map(QualityScorer(folder, parts=True, on_invalid="mark"), batched=True)
    added = ["iqs_score", "iqs_expert", "iqs_soundness", "iqs_worth", "iqs_fault", "iqs_status"]
    assert scored.column_names[len(pairs.column_names) :] == added
    assert [scored.features[name].dtype for name in added[1:5]] == ["float32"] * 3 + ["string"]
    assert scored["iqs_score"] == pairs.map(QualityScorer(folder), batched=True)["iqs_score"]
    assert all(0 <= row["iqs_soundness"] <= 10 and 0 <= row["iqs_worth"] <= 10 for row in scored)
    assert {row["iqs_fault"] for row in scored} <= set(FAULTS)
    empty = QualityScorer(folder, parts=True)({"instruction": [], "output": []})
    assert all(len(column) == 0 for column in empty.values()) and "iqs_fault" in empty


@pytest.mark.parametrize(("turns", "fold"), [("mean", np.mean), ("min", np.min), ("last", lambda x: x[-1])])
def test_parts_of_a_chat_are_combined_as_its_score_is(turns: str, fold: Any, make_tiny_iqs: Any) -> None:
    scorer = QualityScorer(make_tiny_iqs(**PARTS), parts=True, turns=turns)
    chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)]
    found = scorer({"messages": [chat]})
    parts = scorer.score_texts([render(Exchange("a", "", "b")), render(Exchange("a\nb\nc", "", "d"))]).parts
    assert found["iqs_soundness"][0] == pytest.approx(fold(parts[:, 1]), abs=TOLERANCE)
    assert found["iqs_fault"] == [FAULTS[int(parts[:, 3:].mean(axis=0).argmax())]]


def test_the_default_takes_its_parts_from_the_package_and_keeps_its_score(pairs: Dataset) -> None:
    plain, scorer = QualityScorer(), QualityScorer(parts=True)
    read = texts(pairs)
    without, found = plain.score_texts(read), scorer.score_texts(read)
    assert found.scores.tobytes() == without.scores.tobytes() and without.parts is None
    alone = np.concatenate([scorer.score_texts([text]).parts for text in read])
    assert found.parts == pytest.approx(alone, abs=10 * TOLERANCE)  # ratings are from 0 to 10
    own = QualityScorer(revisions.DEFAULT_PARTS)
    assert own.score_texts(read).parts == pytest.approx(found.parts, abs=10 * TOLERANCE)
    assert scorer.parts_revision == own.revision and plain.parts_revision is None
    assert plain.cache_version == scoring.CACHE_VERSION and str(own.revision) in scorer.cache_version
    assert plain.with_parts() == scorer and scorer_pins(scorer)["parts_revision"] == own.revision


def test_a_model_without_parts_says_so(tiny_iqs: str) -> None:
    with pytest.raises(ValueError, match="judges no parts"):
        QualityScorer(tiny_iqs, parts=True)


def test_a_text_whose_answer_cannot_be_found_is_refused(make_tiny_iqs: Any) -> None:
    scorer = QualityScorer(make_tiny_iqs(**SEGMENTS))
    with pytest.raises(ValueError, match="does not contain ' Response:'; pass Text"):
        scorer.score_texts(["no such mark"])


def test_an_answer_that_was_cut_off_still_gets_a_score(make_tiny_iqs: Any) -> None:
    scorer = QualityScorer(make_tiny_iqs(max_tokens=16, **SEGMENTS))
    found = scorer.score_texts([render(Exchange("red " * 40, "", "blue")), render(Exchange("red", "", "blue " * 40))])
    assert np.isfinite(found.scores).all()
    assert found.truncated.all()


@pytest.mark.parametrize("stage", ["scorer", "embedder"])
def test_a_forgotten_batched_is_named(stage: str, tiny_iqs: str, tiny_embedder: str, pairs: Dataset) -> None:
    fn = QualityScorer(tiny_iqs) if stage == "scorer" else TextEmbedder(tiny_embedder)
    with pytest.raises(ValueError, match="batched=True"):
        pairs.map(fn)


def test_with_embeddings_keeps_the_pins_and_checks_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, wanted = QualityScorer(diagnostics=True), QualityScorer(diagnostics=True, embedding_column="vector")
    monkeypatch.setattr("car_datasets.scoring.scorer.pin_model", lambda *_: pytest.fail("looked up again"))
    found = scorer.with_embeddings("vector")
    assert found == wanted
    assert Hasher.hash(found) == Hasher.hash(wanted)
    assert scorer.embedding_column is None
    for name in ("iqs_score", "iqs_tokens", "iqs_status"):
        with pytest.raises(ValueError, match="must have different names"):
            scorer.with_embeddings(name)


def test_with_embeddings_needs_an_encoder_that_is_shared(tiny_iqs: str) -> None:
    with pytest.raises(ValueError, match="has an encoder of its own"):
        QualityScorer(tiny_iqs).with_embeddings("embedding")


DAMAGES: dict[str, tuple[str, Any]] = {
    **DAMAGED_MODELS,
    **{
        f"{name} {value}": ("config.json", {"encoder_config": {name: value}})
        for name, values in SIZES.items()
        for value in values
    },
    **{
        f"{name} {value}": ("config.json", {name: value})
        for name, values in {
            "hidden_sizes": ([-3], 5, [10**12]),
            "max_tokens": (-5, "x", 10**9),
            "members": (0, "x"),
            "layer": ("x", 7),
            "dropout": ("x", 7),
            "word_bits": (64,),
            "activation": ("Module", "Linear", 5),
            "template": (5,),
            "languages": (5,),
            "encoder_source": ([], {"model_id": "x"}),
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize(("name", "change"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_model_is_named_in_one_line(name: str, change: Any, tiny_iqs: str, tmp_path: Path) -> None:
    folder = damaged_copy(tiny_iqs, tmp_path / "model", name, change)
    with pytest.raises(
        ValueError, match=r"(cannot be loaded|do not fit the configuration): .+ Download or save"
    ) as error:
        QualityScorer(folder).score_texts(["Instruction: write a list Response: " + "the sea " * 100])
    assert folder in str(error.value) and "\n" not in str(error.value)
