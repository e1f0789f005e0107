"""perplexity.py: the numbers of a plain loop over rows, in any company; what does not fit is said, and never scored."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import AutoModelForCausalLM, AutoTokenizer

from car_datasets import IFDScorer, PerplexityScorer, score_in_shards
from car_datasets.scoring import perplexity
from car_datasets.scoring.stage import Stage, add_columns
from tests.scoring.tiny_models import save_language_model, save_words

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4


def perplexities(folder: str, rows: Dataset, header: str) -> list[tuple[float, float]]:
    """Return the perplexity of every answer given its prompt and alone, by the loss of transformers, row by row."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def of(before: list[int], answer: list[int]) -> float:
        ids, labels = torch.tensor([before + answer]), torch.tensor([[-100] * len(before) + answer])
        with torch.no_grad():
            return math.exp(model(input_ids=ids, labels=labels).loss.item())

    found = []
    for row in rows:
        asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": asked}]
            before = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        else:
            before = tokenizer(f"<end> {asked}\n", add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        alone = tokenizer(header, add_special_tokens=False)["input_ids"]
        found.append((of(before, answer), of(alone, answer)) if answer else (math.nan, math.nan))
    return found


def score_of(ratio: float) -> float:
    return ratio if ratio < 1 else 1 - ratio


@pytest.mark.parametrize(("kind", "header"), [("llama", "<bot>"), ("gpt2", "<end>"), ("gemma2", "<end>")])
def test_numbers_equal_those_of_a_plain_loop(
    kind: str, header: str, language_models: dict[str, str], pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "LOGITS", 200)  # a few tokens at a time
    expected = perplexities(language_models[kind], pairs, header)
    scored = [row for row in range(6) if row != 3]
    ratios = [expected[row][0] / expected[row][1] for row in scored]
    assert min(ratios) < 1 < max(ratios)  # both sides of the published rule
    found = add_columns(pairs, IFDScorer(language_models[kind]), "Scoring")
    assert [found["ifd"][row] for row in scored] == pytest.approx(ratios, rel=TOLERANCE)
    assert [found["ifd_score"][row] for row in scored] == pytest.approx(list(map(score_of, ratios)), abs=TOLERANCE)
    assert found["ifd_score"][3] is found["ifd"][3] is None
    assert found["ifd_status"][:] == ["ok", "ok", "ok", "no_content: assistant", "ok", "ok"]
    assert [found.features[name].dtype for name in ("ifd_score", "ifd", "ifd_tokens")] == ["float32"] * 2 + ["int32"]
    for place, given in enumerate(("prompt", "nothing")):
        stage = PerplexityScorer(language_models[kind], given=given, output_column="p_score")
        columns = stage(pairs[:])
        wanted = [expected[row][place] for row in scored]
        assert [columns["p"][row] for row in scored] == pytest.approx(wanted, rel=TOLERANCE)
        assert [columns["p_score"][row] for row in scored] == pytest.approx(-np.log(wanted), abs=TOLERANCE)


@pytest.mark.parametrize(("kind", "budget"), [("llama", 1), ("gemma2", 70)])
def test_a_row_scores_the_same_in_any_company(
    kind: str, budget: int, language_models: dict[str, str], pairs: Dataset
) -> None:
    expected = IFDScorer(language_models[kind])(pairs[:])["ifd"]
    backwards = pairs.select(range(5, -1, -1))
    found = IFDScorer(language_models[kind], batch_tokens=budget)(backwards[:])["ifd"][::-1]
    assert [row is None for row in found] == [row is None for row in expected]
    present = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    assert [a for a, _ in present] == pytest.approx([b for _, b in present], rel=TOLERANCE)


def test_answers_that_do_not_fit_are_said(language_models: dict[str, str]) -> None:
    rows = {
        "prompt": ["the sea " * 2, "the sea " * 2, "the sea " * 20, "name the sea"],
        "completion": ["red " * 30, "red " * 14, "red", " \n "],
    }
    found = IFDScorer(language_models["llama"], max_tokens=21)(rows)
    assert found["ifd_status"] == ["truncated", "ok", "too_long: prompt of 43 tokens", "no_content: assistant"]
    assert found["ifd_truncated"] == [True, False, True, False]
    assert found["ifd_tokens"] == [37, 21, 44, 6]
    assert found["ifd"][0] == pytest.approx(found["ifd"][1], rel=TOLERANCE)
    assert found["ifd_score"][2:] == found["ifd"][2:] == [None, None]
    nothing = IFDScorer(language_models["llama"], on_invalid="mark")({"messages": [None]})
    assert (nothing["ifd_score"], nothing["ifd_status"]) == ([None], ["null"])
    with pytest.raises(ValueError, match="1 of 1 rows of this batch cannot be scored: 1 null"):
        IFDScorer(language_models["llama"])({"messages": [None]})


def test_the_last_answer_of_a_chat_is_read_after_all_that_is_before_it(language_models: dict[str, str]) -> None:
    said = ["name the sea", "the red sea", "a poem", "wide and deep"]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    folder = language_models["llama"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    before = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True, return_dict=False)
    answer = tokenizer(said[3], add_special_tokens=False)["input_ids"]
    losses = model(input_ids=torch.tensor([before + answer])).logits.log_softmax(dim=-1)[0]
    expected = np.mean([losses[len(before) - 1 + i, word].item() for i, word in enumerate(answer)])
    assert PerplexityScorer(folder)({"messages": [chat]})["perplexity_score"] == pytest.approx(
        [expected], abs=TOLERANCE
    )


def test_it_is_a_stage_like_the_others(language_models: dict[str, str], pairs: Dataset, tmp_path: Path) -> None:
    for scorer in (IFDScorer(language_models["gpt2"]), PerplexityScorer(language_models["gpt2"])):
        assert isinstance(scorer, Stage)
        assert list(scorer.output_columns) == list(scorer.output_features())
        expected = add_columns(pairs, scorer, "Scoring").to_dict()
        shards = score_in_shards(pairs, scorer, tmp_path / type(scorer).__name__, shard_rows=4).to_dict()
        for name in scorer.output_columns[:2]:
            assert np.array(shards[name], float) == pytest.approx(
                np.array(expected[name], float), rel=1e-4, nan_ok=True
            )
    given = [PerplexityScorer(language_models["gpt2"], given=given) for given in ("prompt", "nothing")]
    assert Hasher.hash(given[0]) != Hasher.hash(given[1])


def test_what_overflows_in_half_precision_is_scored_again(
    language_models: dict[str, str], pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, half = (IFDScorer(language_models["gpt2"], dtype=dtype) for dtype in ("float32", "float16"))
    expected, close = full(pairs[:])["ifd_score"], half(pairs[:])["ifd_score"]
    ordinary = perplexity.answer_losses

    def broken(*dtypes: torch.dtype) -> Any:
        return lambda model, *rest: (ordinary(model, *rest)[0] * (math.nan if model.model.dtype in dtypes else 1),)

    monkeypatch.setattr(perplexity, "answer_losses", broken(torch.float16))
    assert half(pairs[:])["ifd_score"] == expected != close
    monkeypatch.setattr(perplexity, "answer_losses", broken(torch.float16, torch.float32))
    with pytest.raises(ValueError, match=r"5 scores are not finite, rows \[0, 1, 2, 4, 5\]"):
        half(pairs[:])


def test_a_column_of_another_name_keeps_both_numbers(language_models: dict[str, str]) -> None:
    assert IFDScorer(language_models["gpt2"], output_column="hard").output_columns[:2] == ("hard", "hard_ratio")
    assert IFDScorer(language_models["gpt2"], output_column="hard_score").output_columns[:2] == ("hard_score", "hard")


def test_models_and_options_that_do_not_suit_are_refused(language_models: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"given='answer' is not known; choose one of \['prompt', 'nothing'\]"):
        PerplexityScorer(language_models["gpt2"], given="answer")
    folder = save_language_model(str(tmp_path), "gpt2")
    save_words(folder, "roberta")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token is tokenizer.eos_token is None
    with pytest.raises(ValueError, match=r"no chat template and no token with which texts begin or end"):
        IFDScorer(folder)


@pytest.mark.slow
def test_a_real_model_agrees_with_a_plain_loop_and_tells_answers_from_others(
    sample_rows: list[dict[str, Any]], smollm2: str
) -> None:
    kept = sorted(sample_rows, key=lambda row: len(row["output"]))
    kept = [row for row in kept if len(row["output"]) > 30 and row["grade"] == "good"][:3]
    rows = Dataset.from_list([{name: row[name] for name in ("instruction", "input", "output")} for row in kept])
    turned = Dataset.from_dict({**rows.to_dict(), "output": rows["output"][1:] + rows["output"][:1]})
    found = IFDScorer(smollm2)({name: [*rows[name], *turned[name]] for name in rows.column_names})["ifd"]
    expected = perplexities(smollm2, rows, "<|im_start|>assistant\n")
    assert found[:3] == pytest.approx([given / alone for given, alone in expected], rel=TOLERANCE)
    own = [*found[1:3], found[0]]  # of the same answers, given their own prompts
    assert all(a < b for a, b in zip(own, found[3:], strict=True))
