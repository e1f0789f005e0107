"""Evaluate a scorer during training, in batches cut by the token budget that scoring uses."""

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
    """A `Trainer` whose evaluation cuts batches by tokens instead of rows.

    Each process evaluates every n-th example and receives the results of all, so that early stopping takes the same
    decision in every process.
    """

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate all examples, as `Trainer` does.

        `compute_metrics` gets predictions and labels in no particular order.

        Args:
            dataloader (`DataLoader`): only its `dataset` is read.
            description (`str`), prediction_loss_only (`bool`), ignore_keys (`list[str]`): of `Trainer`; not used.
            metric_key_prefix (`str`): prefix of the metrics' names.

        Raises:
            ValueError: there are fewer examples than processes.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        examples: Sequence[dict[str, Any]] = dataloader.dataset
        if len(examples) < world:  # true in all processes or in none, so none blocks
            raise ValueError(f"{len(examples)} validation examples for {world} processes: start fewer processes.")
        own = [examples[i] for i in range(rank, len(examples), world)]
        lengths = [max(len(ids) for name, ids in example.items() if name.endswith("_ids")) for example in own]
        model = self.accelerator.unwrap_model(self.model)
        model.eval()

        def forward(places: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.data_collator([own[i] for i in places])
            # Not the wrapped model, which synchronises at every batch: processes have different numbers of batches.
            loss, scores, labels = self.prediction_step(model, batch, prediction_loss_only=False)
            if loss is None or not isinstance(scores, Tensor) or not isinstance(labels, Tensor):
                raise TypeError("The model must return loss, scores and labels.")
            # A batch's mean loss counts once per example, so that the mean over all does not depend on the batches.
            return loss.expand(len(places)), scores, labels

        ran = run_batches(lengths, token_budget(self.args.device, model.config.encoder_config.hidden_size), forward)
        places = [at for at, _ in ran]
        losses, scores, labels = (in_order(places, [part[i] for _, part in ran]) for i in range(3))
        losses, scores, labels = (self._gather(part) for part in (losses, scores, labels))
        computed = (
            self.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels)) if self.compute_metrics else {}
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in computed.items()}
        metrics[f"{metric_key_prefix}_loss"] = float(losses.mean())
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=metrics, num_samples=len(examples))

    def _gather(self, part: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the results of all processes, one process after the other."""
        from accelerate.utils import gather_object

        return np.concatenate(gather_object([part])) if torch.distributed.is_initialized() else part
