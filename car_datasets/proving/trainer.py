"""TRL's `SFTTrainer` for packed rows whose answers alone are learnt: its settings, its loss, and what it leaves behind.

Does: make a trainer that waits for the GPU as rarely as can be; keep a process as it was before, with its random state,
its logging and its models' own forward passes.
Does not: choose rows, batches or rates, or measure.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from car_datasets.proving.token_rows import IGNORED

LORA, ALL = "lora", "all"
RANK = 16  # of LoRA


@dataclass(frozen=True)
class Schedule:
    """How every run of a proof is trained; equal for all arms.

    Args:
        trained (`str` or `int`): `"all"`, `"lora"`, or a number of last layers.
        epochs (`int`): passes over the rows of an arm.
        batch_tokens (`int`): the most tokens of a batch, prompts included.
        updates (`int`): the fewest updates of the weights; a small arm has smaller batches.
        warmup (`float`): share of the updates in which the learning rate rises; it falls linearly afterwards.
    """

    trained: str | int = ALL
    epochs: int = 1
    batch_tokens: int = 8_192
    updates: int = 16
    warmup: float = 0.05


class Settings(NamedTuple):
    """How one run is trained.

    Args:
        schedule ([`Schedule`]): that of all runs.
        device (`torch.device`): where.
        steps (`int`): updates of the weights.
        pieces (`int`): packs whose gradients are summed for an update.
        learning_rate (`float`): the highest of the schedule.
        seed (`int`): of LoRA's first weights.
    """

    schedule: Schedule
    device: torch.device
    steps: int
    pieces: int
    learning_rate: float
    seed: int


def make_trainer(
    model: Any, tokenizer: Any, packed: Mapping[str, Sequence[Sequence[int]]], folder: str, settings: Settings
) -> Any:
    """Return TRL's trainer of a model on packs of rows.

    Args:
        model (`PreTrainedModel`): is changed; LoRA wraps it.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        packed (`Mapping`): `input_ids`, `labels` and `seq_lengths` of every pack.
        folder (`str`): which the trainer wants, though nothing is saved there.
        settings ([`Settings`]): of the run.
    """
    import datasets
    from peft import LoraConfig
    from transformers import PrinterCallback

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = _trainer_class()(
        model=model,
        args=_arguments(folder, settings),
        train_dataset=datasets.Dataset.from_dict(packed),
        processing_class=tokenizer,
        peft_config=lora if settings.schedule.trained == LORA else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = _naming_answers(trainer.data_collator)
    return trainer


def _arguments(folder: str, settings: Settings) -> Any:
    """Return TRL's configuration of a run."""
    from trl.trainer.sft_config import SFTConfig

    on_gpu = settings.device.type == "cuda"
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=1,  # one pack
        gradient_accumulation_steps=settings.pieces,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(settings.schedule.warmup * settings.steps),  # a share would be rounded up
        weight_decay=0.0,
        optim="adamw_torch_fused",
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        use_cpu=settings.device.type == "cpu",
        packing=True,  # rows come packed; this makes the trainer keep them apart
        packing_strategy="bfd",
        completion_only_loss=False,  # the labels say which tokens are learnt
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # What would make the processor wait for the GPU in every step, so that the next one is launched late.
        dataloader_pin_memory=on_gpu,
        accelerator_config={"non_blocking": on_gpu},
        logging_nan_inf_filter=False,
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would be wrapped in DataParallel
    return arguments


def _naming_answers(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Return a function that makes batches as another does, and adds the places before the tokens that are learnt."""

    def collated(examples: Any) -> dict[str, Any]:
        batch = collate(examples)
        batch.pop("seq_idx", None)  # for layers that attend in no way, which no model here has
        # Before the batch is on a GPU, which would have to be waited for.
        batch["logits_to_keep"] = (batch["labels"][0, 1:] != IGNORED).nonzero().flatten()
        return batch

    return collated


def _trainer_class() -> Any:
    """Return TRL's trainer with a loss that computes logits for the tokens of answers alone.

    TRL's own does so by a Triton kernel, but counts right tokens and reads four numbers back from the GPU in every
    step; without a GPU it computes the logits of all tokens, twice.
    """
    from trl.trainer.sft_trainer import SFTTrainer

    class AnswerTrainer(SFTTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            learnt = inputs.pop("labels")[0, 1:][inputs["logits_to_keep"]]
            logits = model(**inputs, use_cache=False).logits[0]
            loss = nn.functional.cross_entropy(logits.float(), learnt, reduction="sum")
            return loss / (len(learnt) if num_items_in_batch is None else num_items_in_batch)

    return AnswerTrainer


def unwrap(*models: Any) -> None:
    """Undo what TRL and accelerate set on a model's instance: a forward pass of their own, one more for every run."""
    for model in models:
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Give the caller's random state back after a block in which the trainer sets seeds."""
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def own_garbage() -> Iterator[None]:
    """Let the garbage collector see what this block makes, and nothing older, and collect it at the end.

    accelerate has all garbage collected when a training begins. Of a process that has loaded these libraries that takes
    a quarter of a second, more than a short training. What one trainer held is free before the next one begins.
    """
    if gc.get_freeze_count():  # the caller has frozen objects, which must stay so
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the trainer prints and warns of in every run."""
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with without_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that TRL and transformers are changing
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off in this block, where many steps would each draw one."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
