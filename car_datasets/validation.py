"""Validation while a scorer trains: the whole file, in batches of like length by the token budget of scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from car_datasets.batching import in_order, run_batches, token_budget


class BudgetTrainer(Trainer):
    """`Trainer`, but its evaluation cuts batches by tokens, not rows. Each process takes every n-th example and all get
    all results, so that early stopping decides alike everywhere."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, with `compute_metrics` on predictions and labels in no particular order."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        examples: Sequence[dict[str, Any]] = dataloader.dataset
        if len(examples) < world:  # on every process alike: none must wait for one that failed
            raise ValueError(f"{len(examples)} validation examples for {world} processes: start fewer processes.")
        own = [examples[i] for i in range(rank, len(examples), world)]
        lengths = [max(len(ids) for name, ids in example.items() if name.endswith("_ids")) for example in own]
        model = self.accelerator.unwrap_model(self.model)
        model.eval()

        def forward(places: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.data_collator([own[i] for i in places])
            # Not the wrapped model: it would wait, at every batch, for processes that have fewer.
            loss, scores, labels = self.prediction_step(model, batch, prediction_loss_only=False)
            if loss is None or not isinstance(scores, Tensor) or not isinstance(labels, Tensor):
                raise TypeError("A scorer gives loss, scores and labels.")
            return loss.expand(len(places)), scores, labels

        ran = run_batches(lengths, token_budget(self.args.device, model.config.encoder_config.hidden_size), forward)
        places = [at for at, _ in ran]
        losses, scores, labels = (in_order(places, [part[i] for _, part in ran]) for i in range(3))
        losses, scores, labels = (self._of_all(part) for part in (losses, scores, labels))
        found = (
            self.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels)) if self.compute_metrics else {}
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_loss"] = float(losses.mean())
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=metrics, num_samples=len(examples))

    def _of_all(self, part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        from accelerate.utils import gather_object

        return np.concatenate(gather_object([part])) if torch.distributed.is_initialized() else part
