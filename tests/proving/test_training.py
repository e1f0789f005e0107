"""Check fine-tuning: packed rows do not read each other, the same seed gives the same numbers, memory is shared out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.proving.tiny import DIGITS, asked

pytest.importorskip("trl")

from car_datasets.proving.base_model import BaseModel, load_base_model
from car_datasets.proving.token_rows import ATTENTION, TokenRow, tokenise
from car_datasets.proving.trainer import Schedule
from car_datasets.proving.training import Tuner

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
RATE = 1e-2


@pytest.fixture
def base(tiny_llama: str) -> BaseModel:
    return load_base_model(tiny_llama)


def rows_of(base: BaseModel, count: int = 40) -> list[TokenRow]:
    found = [asked(i % 9, " ".join(["?", DIGITS[i % 9 + 1], "what"][i % 3 :])) for i in range(count)]
    return tokenise(found, base.tokenizer, 64)


def tuner(base: BaseModel, **schedule: Any) -> Tuner:
    return Tuner(base, rows_of(base), Schedule(batch_tokens=48, updates=1, **schedule), CPU)


def test_rows_end_with_the_token_that_ends_an_answer(base: BaseModel) -> None:
    row = tokenise([asked(3, "four ?")], base.tokenizer, 64)[0]
    assert base.plain_template
    assert base.tokenizer.convert_ids_to_tokens(row.ids[row.prompt :]) == ["four", "?", "<end>"]
    assert tokenise([asked(3, "four ?")], base.tokenizer, row.prompt)[0].answer_tokens == 0


def test_packed_rows_have_the_losses_that_they_have_alone(base: BaseModel) -> None:
    found = tuner(base)
    assert found.attention == ATTENTION
    alone = np.concatenate([found.nats([row]) for row in range(9)])
    np.testing.assert_allclose(found.nats(range(9)), alone, rtol=1e-5)


@pytest.mark.parametrize("trained", ["all", "lora", 1, 3])
def test_training_lowers_the_loss_and_starts_anew_each_time(base: BaseModel, trained: str | int) -> None:
    found = tuner(base, trained=trained, epochs=2)
    assert (found.places is not None) is (trained == 1)  # states of the lower layers are kept
    before, order = found.nats(range(40)), list(range(30))
    first = found.train(order, RATE, seed=1)
    after, answered = found.nats(range(40)), found.answers([asked(4, "")["prompt"]], 3)
    assert after.sum() < 0.9 * before.sum()
    assert (first.answer_tokens, first.tokens) == (
        2 * sum(found.rows[row].answer_tokens for row in order),
        2 * sum(found.lengths[row] for row in order),
    )
    second = found.train(order, RATE, seed=1)
    np.testing.assert_array_equal(found.nats(range(40)), after)
    assert found.answers([asked(4, "")["prompt"]], 3) == answered
    assert second._replace(seconds=0) == first._replace(seconds=0)
    other = found.train(order[::-1], RATE, seed=1)
    assert other.order != first.order
    found.restore()
    np.testing.assert_allclose(found.nats(range(40)), before, rtol=1e-6)


def test_kept_states_train_as_frozen_layers_do(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuner(base, trained=1)
    kept.train(list(range(30)), RATE, seed=0)
    fast = kept.nats(range(40))
    kept.restore()
    monkeypatch.setattr("car_datasets.proving.training.MOST_STATES", 0)
    frozen = tuner(base, trained=1)
    assert frozen.places is None
    frozen.train(list(range(30)), RATE, seed=0)
    np.testing.assert_allclose(frozen.nats(range(40)), fast, rtol=1e-4)


def test_a_batch_that_does_not_fit_is_halved_at_the_same_effective_size(base: BaseModel) -> None:
    found, order = tuner(base), list(range(30))
    entire = found.train(order, RATE, seed=0)
    expected = found.nats(range(40))

    def refuse_many(module: Any, arguments: Any, options: Any) -> None:
        if options["input_ids"].shape[1] > 40 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    base.model.get_decoder().register_forward_pre_hook(refuse_many, with_kwargs=True)
    halved = found.train(order, RATE, seed=0)
    assert (halved.pieces, halved.steps) == (2, entire.steps)
    np.testing.assert_allclose(found.nats(range(40)), expected, rtol=1e-3)


def test_more_layers_than_the_model_has_are_refused(base: BaseModel) -> None:
    with pytest.raises(ValueError, match="trained=4: the model has 3 layers"):
        tuner(base, trained=4)
