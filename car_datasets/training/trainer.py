"""Provide the parts of a run of transformers' `Trainer`: examples, learning rates, evaluation and checkpoints.

Does: turn rows and pairs into padded batches; decay learning rates layer by layer and unfreeze the encoder; evaluate by
Kendall's tau in batches cut by the token budget; find the last complete checkpoint, and refuse to resume a run that
differs.
Does not: read training files, or save the final model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.utils import tqdm
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from car_datasets.loading.templates import PAPER_TEMPLATE, Exchange, Text, render
from car_datasets.scoring.batching import in_order, pad, run_batches, token_budget, tokenise
from car_datasets.scoring.iqs.modeling_iqs import IQSModel
from car_datasets.training.evaluation import kendall
from car_datasets.training.pairs import Pair, as_given
from car_datasets.utils import digests
from car_datasets.utils.files import write_folder
from car_datasets.utils.settings import Settings

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"  # the last file of a checkpoint that `Trainer` writes


def regression_examples(
    rows: Sequence[tuple[Exchange, float]], tokenizer: Any, template: str, max_tokens: int
) -> list[dict[str, Any]]:
    """Tokenise labelled rows for the regression model, one example with `input_ids` and `labels` per row.

    Args:
        rows (`Sequence[tuple[Exchange, float]]`): rows and their labels in [0, 1].
        tokenizer: the encoder's tokenizer, of transformers.
        template (`str`): name of the text template.
        max_tokens (`int`): tokens read of a text, special tokens included.
    """
    ids = tokenise(tokenizer, [_text(row, template).whole for row, _ in rows], max_tokens).ids
    return [{"input_ids": i, "labels": label} for i, (_, label) in zip(ids, rows, strict=True)]


def ranking_examples(pairs: Sequence[Pair], tokenizer: Any, template: str, max_tokens: int) -> list[dict[str, Any]]:
    """Tokenise pairs for the ranking model, one example per pair.

    An example has `question_ids`, `input_ids` (the better answer), `rejected_ids` and `labels`. The question is the one
    of the better half, as in the original's files. The label is always 1: the first answer is the better one.

    Args:
        pairs (`Sequence[Pair]`): worse and better answers.
        tokenizer: the encoder's tokenizer, of transformers.
        template (`str`): name of the text template.
        max_tokens (`int`): tokens read of a question or of an answer, special tokens included.
    """
    better = [_text(pair.better, template) for pair in pairs]
    worse = [_text(pair.worse, template) for pair in pairs]
    parts = {
        "question_ids": [text.question for text in better],
        "input_ids": [text.answer for text in better],
        "rejected_ids": [text.answer for text in worse],
    }
    ids = {name: tokenise(tokenizer, texts, max_tokens).ids for name, texts in parts.items()}
    return [{**{name: rows[i] for name, rows in ids.items()}, "labels": 1.0} for i in range(len(pairs))]


def _text(row: Exchange, template: str) -> Text:
    """Return the text to train on; for the paper's template the file's own text, as in the original's training."""
    # The paper's inference template leaves two spaces where the input is empty; its training files do not.
    return as_given(row) if template == PAPER_TEMPLATE else render(row, template)


@dataclass(frozen=True)
class Collator:
    """A callable that pads a batch of examples, each kind of text to its own longest."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `*_ids` and their masks, int64 (batch, longest), and `labels`, float32 (batch,)."""
        # The names are those of the arguments of `IQSModel.forward`.
        masks = {"input_ids": "attention_mask", "question_ids": "question_mask", "rejected_ids": "rejected_mask"}
        batch = {"labels": torch.tensor([example["labels"] for example in examples])}
        for name, mask in masks.items():
            if name in examples[0]:
                batch[name], batch[mask] = pad([e[name] for e in examples], self.pad_token_id, torch.device("cpu"))
        return batch


# The number of a layer in a parameter's name: `layer.3.` in BERT, `layers.3.`, `h.3.` or `block.3.` elsewhere.
_LAYER = re.compile(r"\b(?:layer|layers|h|block|blocks)\.(\d+)\.")


def parameter_groups(
    model: IQSModel,
    learning_rate: float,
    encoder_learning_rate: float,
    layerwise_decay: float,
    keep_embeddings_frozen: bool = True,
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, with rates that decay from the encoder's top layer downwards.

    Layer i of n (0 is next to the embeddings) learns at `encoder_learning_rate * layerwise_decay ** (n - 1 - i)`: the
    top layer fastest, since lower layers are more general (Howard and Ruder 2018, sec. 3.2). The original's code does
    the reverse: it gives layer i the factor decay ** i, and never trains layer 0.

    Args:
        model ([`IQSModel`]): the model; its embeddings are frozen in place if `keep_embeddings_frozen`.
        learning_rate (`float`): learning rate of head and layer mix.
        encoder_learning_rate (`float`): learning rate of the encoder's top layer.
        layerwise_decay (`float`): ratio of each layer's learning rate to that of the layer above it.
        keep_embeddings_frozen (`bool`): do not train the embeddings; otherwise they count as one layer below layer 0.
    """
    layers = model.config.encoder_config.num_hidden_layers
    # One group per rate; layers without decay share one.
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            rate = learning_rate
        elif name.startswith("encoder.embeddings."):
            if keep_embeddings_frozen:
                parameter.requires_grad_(False)
                continue
            rate = encoder_learning_rate * layerwise_decay**layers
        else:
            match = _LAYER.search(name)
            # Without a number it is a pooler or a final norm, above the top layer.
            below_top = layers - 1 - int(match.group(1)) if match else 0
            rate = encoder_learning_rate * layerwise_decay**below_top
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class ThawEncoder(TrainerCallback):
    """A callback that freezes the encoder for the first `epochs` epochs (may be a fraction), then unfreezes it.

    It freezes when training begins, after `Trainer` has wrapped the model: DistributedDataParallel registers only the
    parameters that require gradients when it is created, so an encoder frozen earlier would never be synchronised.
    """

    def __init__(self, encoder: nn.Module, epochs: float) -> None:
        # Frozen embeddings are left out, and so stay frozen.
        self.parameters = [p for p in encoder.parameters() if p.requires_grad]
        self.epochs = epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze the encoder, unless a resumed run is already past that point."""
        self._require_gradients((state.epoch or 0.0) >= self.epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unfreeze the encoder once `epochs` have passed."""
        if (state.epoch or 0.0) >= self.epochs:
            self._require_gradients(True)

    def _require_gradients(self, required: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(required)


class Progress(TrainerCallback):
    """A callback that shows steps, time left and the latest Kendall's tau in a progress bar of `datasets`.

    transformers' own callback also writes to standard output, and does not know that progress bars are disabled.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar in the main process; a resumed run begins where it was interrupted."""
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            unit=" steps",
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step."""
        self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the latest result on the validation file."""
        self.bar.set_postfix(kendall=f"{kwargs['metrics']['eval_kendall']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


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
        # Every n-th, so that a sorted file does not give one process all the long texts.
        own = [examples[i] for i in range(rank, len(examples), world)]
        # A ranking example has three texts, and the longest decides the batch that it fits in.
        lengths = [max(len(ids) for name, ids in example.items() if name.endswith("_ids")) for example in own]
        model = self.accelerator.unwrap_model(self.model)
        model.eval()

        def forward(places: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.data_collator([own[i] for i in places])
            # Not the wrapped model, which synchronises at every batch: processes have different numbers of batches.
            loss, scores, labels = self.prediction_step(model, batch, prediction_loss_only=False)
            bar.update(len(places))
            if loss is None or not isinstance(scores, Tensor) or not isinstance(labels, Tensor):
                raise TypeError("The model must return loss, scores and labels.")
            # A batch's mean loss counts once per example, so that the mean over all does not depend on the batches.
            return loss.expand(len(places)), scores, labels

        budget = token_budget(self.args.device, model.config.encoder_config.hidden_size)
        # Not kept on the screen: there is one for every epoch.
        with tqdm(total=len(own), desc="Validating", unit=" examples", leave=False, disable=rank > 0) as bar:
            ran = run_batches(lengths, budget, forward)
        places = [at for at, _ in ran]
        losses, scores, labels = (in_order(places, [part[i] for _, part in ran]) for i in range(3))
        # The order of rows is lost here, which neither tau nor the mean of the losses depends on.
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


def compute_kendall(prediction: Any) -> dict[str, float]:
    """Return Kendall's tau-b of scores and labels, the metric that chooses the best epoch.

    The ranking model scores both answers of a pair: for it, as in the original, (concordant - discordant) / pairs.

    Args:
        prediction (`EvalPrediction`): `predictions`, shape (examples, 1) or (pairs, 2), and `label_ids`.
    """
    scores = np.asarray(prediction.predictions)
    if scores.shape[-1] == 2:  # better and worse answer
        return {"kendall": float(np.sign(scores[:, 0] - scores[:, 1]).mean())}
    return {"kendall": kendall(scores[:, 0], prediction.label_ids)}


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None."""
    complete = []
    for state in folder.glob(f"checkpoint-*/{STATE_FILE}"):
        try:
            # By step and not by name: as text, checkpoint-9 would come after checkpoint-10.
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):  # interrupted while the file was being written
            continue
    return str(max(complete)[1]) if complete else None


def claim(checkpoints: Path, settings: Settings, processes: int) -> None:
    """Create the folder of a run's checkpoints, or check that an interrupted run with equal settings created it.

    Equal runs have the same settings, the same content of training and validation file, and the same number of
    processes: with any other number, batches and weights would differ.

    Args:
        checkpoints (`Path`): the folder.
        settings ([`Settings`]): settings of the run, with `train` and `valid`.
        processes (`int`): number of processes.

    Raises:
        ValueError: the folder belongs to an unfinished run that differs (the message names what differs), or was not
            created by a training run.
    """
    record = checkpoints / RUN_FILE
    run: dict[str, Any] = {**asdict(settings), "processes": processes}
    run |= {f"{name}_sha256": digests.file_digest(Path(run[name])) for name in ("train", "valid")}
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        # A key that only an earlier version wrote is not compared.
        differ = [name for name, value in run.items() if earlier.get(name) != value]
        if differ:
            raise ValueError(
                f"{checkpoints} holds an unfinished run with another {', '.join(differ)} (see its {RUN_FILE}). To "
                "resume, restore these; to start anew, delete the folder."
            )
    elif checkpoints.exists() and any(checkpoints.iterdir()):
        raise ValueError(f"{checkpoints} already exists and was not created by a training run; move it away.")
    else:
        # Atomically, as a folder without a complete record could not be resumed.
        with write_folder(checkpoints) as partial:
            (partial / RUN_FILE).write_text(json.dumps(run, indent=2), encoding="utf-8")
