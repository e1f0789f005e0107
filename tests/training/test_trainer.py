"""trainer.py: evaluation in batches by tokens gives the figures of `Trainer`'s own evaluation, whatever the budget."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from car_datasets import IQSModel
from car_datasets.scoring.batching import Budget
from car_datasets.training import trainer
from car_datasets.training.trainer import BudgetTrainer, Collator, compute_kendall


@pytest.fixture(scope="module")
def examples() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (23,), generator=random).tolist()
    ids = [[2, *torch.randint(5, 60, (n,), generator=random).tolist(), 3] for n in lengths]
    return [{"input_ids": row, "labels": float(i % 2)} for i, row in enumerate(ids)]


def evaluate(kind: type[Trainer], model: str, examples: list[dict[str, Any]], folder: Path) -> dict[str, float]:
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", remove_unused_columns=False, label_names=["labels"]
    )
    options = {"data_collator": Collator(0), "compute_metrics": compute_kendall, "eval_dataset": examples}
    found = kind(model=IQSModel.from_pretrained(model), args=arguments, **options).evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_kendall")}


@pytest.mark.parametrize("tokens", [1, 40, 100_000])
def test_the_figures_of_trainers_own_evaluation(
    tokens: int, tiny_iqs: str, examples: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate(Trainer, tiny_iqs, examples, tmp_path)
    monkeypatch.setattr(trainer, "token_budget", lambda *_: Budget(tokens))
    assert evaluate(BudgetTrainer, tiny_iqs, examples, tmp_path) == pytest.approx(expected, abs=1e-5)
    assert expected["eval_kendall"] != 0
