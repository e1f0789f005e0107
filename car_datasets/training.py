"""Train a scorer, encoder and all, on transformers' `Trainer`: what `comet-train` was for IQS and for the ranking model.

Does: read either CSV format (or preference pairs) for either kind of model, check everything that can be checked before
the first step, train with the original's schedule on one or many devices, go on after a kill, write an ordinary model
folder with a card that holds its figures, and push it when asked.
Does not: train the head of the embedded default (head_training.py), or prepare files (preparation.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from car_datasets import hub, repositories
from car_datasets.checkpoints import claim, last_whole_checkpoint
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.modeling_iqs import IQSModel
from car_datasets.packing import POSITIONS_AFTER_PADDING
from car_datasets.pairs import Pair, read_labelled_rows, read_pairs, refuse_crossing
from car_datasets.publishing import write_card, write_figures
from car_datasets.schedule import ThawEncoder, parameter_groups
from car_datasets.settings import Settings
from car_datasets.templates import CLEAN_TEMPLATE, TEMPLATES
from car_datasets.training_examples import Collator, compute_kendall, ranking_examples, regression_examples

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

OBJECTIVES = {"iqs": "regression", "ranking": "ranking"}


@dataclass(frozen=True)
class ScorerTraining(Settings):
    """The settings of [`train_scorer`]. The defaults are the original's `instruction_score.yaml` and `trainer.yaml`.

    Args:
        kind (`str`): `"iqs"`, a score for each text by mean squared error; or `"ranking"`, the "Comet" variant, answers
            nearer to or farther from their question by the triplet margin loss.
        encoder (`str`): Hub id or folder of the encoder to start from; revision (`str`): of a Hub id.
        train (`str`): a file for [`read_labelled_rows`] or, for `"ranking"`, [`read_pairs`].
        valid (`str`): a file for [`read_pairs`].
        output (`str`): a new folder. Checkpoints lie beside it, in `<output>.checkpoints`, until it is written.
        template (`str`): of the text, here and whenever the model scores. `"paper"` trains on the files as they are.
        seed (`int`): of weights, order and dropout.
        layer_mix, layer_norm, pooling, hidden_sizes, activation, dropout, max_tokens: see [`IQSConfig`].
        learning_rate (`float`): of head and layer mix; encoder_learning_rate (`float`): of the encoder's top layer.
        layerwise_decay (`float`): each layer below learns at this times the rate of the one above it.
        frozen_epochs (`float`): the encoder stands still for so long; keep_embeddings_frozen (`bool`): they, always.
        warmup_steps (`int`), weight_decay (`float`), max_grad_norm (`float`): of AdamW; the rate is constant.
        epochs, batch_size, accumulation (`int`): batches are per process; one step is `accumulation` of them.
        mixed_precision (`str`): `"no"`, `"fp16"` (needs a GPU) or `"bf16"`; group_by_length (`bool`): batches of like
            length, which saves padding and makes the order less random.
        patience (`int`): epochs without a better Kendall on `valid` before training stops. The best epoch is kept.
        push_to (`str`): Hub id to push the model to, `""` for none; private (`bool`): whether that is to be private.
    """

    kind: str = "iqs"
    encoder: str = "FacebookAI/xlm-roberta-large"
    revision: str = "main"
    train: str = "expert_score_train.csv"
    valid: str = "expert_score_valid.csv"
    output: str = "iqs-xlmr-large"
    template: str = CLEAN_TEMPLATE
    seed: int = 42
    layer_mix: str = "sparsemax"
    layer_norm: bool = False
    pooling: str = "avg"
    hidden_sizes: list[int] = field(default_factory=lambda: [2048, 1024])
    activation: str = "Tanh"
    dropout: float = 0.1
    max_tokens: int = 510
    learning_rate: float = 1.5e-5
    encoder_learning_rate: float = 1e-6
    layerwise_decay: float = 0.95
    frozen_epochs: float = 0.3
    keep_embeddings_frozen: bool = True
    warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    epochs: int = 4
    batch_size: int = 8
    accumulation: int = 2
    mixed_precision: str = "fp16"
    group_by_length: bool = False
    patience: int = 2
    push_to: str = ""
    private: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"kind": list(OBJECTIVES), "template": sorted(TEMPLATES), "mixed_precision": ["no", "fp16", "bf16"]}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {choices}.")
        self.refuse_outside(1, None, "epochs", "batch_size", "accumulation", "patience", "max_tokens")
        self.refuse_outside(
            0, None, "learning_rate", "encoder_learning_rate", "frozen_epochs", "warmup_steps", "weight_decay"
        )
        self.refuse_outside(0, None, "seed", "max_grad_norm")
        self.refuse_outside(0, 1, "dropout", "layerwise_decay")
        if not all(type(size) is int and size > 0 for size in self.hidden_sizes):
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must be positive whole numbers.")


def train_scorer(settings: ScorerTraining, token: str | None = None) -> dict[str, Any]:
    """Train, and write the model with tokenizer, `figures.json` and card into `settings.output`.

    Under `accelerate launch` or `torchrun` every process calls this. Run again after a kill, with the same settings, it
    goes on from the last whole checkpoint and ends with the same weights.

    Returns:
        `dict`: the figures of [`~car_datasets.evaluation.evaluate_scorer`] on `valid`, and `best_kendall`.

    Raises:
        ValueError: before training, for everything that is wrong with settings, files, encoder or folders.
    """
    if settings.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("mixed_precision='fp16' needs a GPU; on this machine pass --set mixed_precision=no, or bf16.")
    valid = read_pairs(settings.valid)
    train = _read_training(settings, valid)
    output, arguments = Path(settings.output), _arguments(settings)
    checkpoints = Path(arguments.output_dir)
    if output.exists() and not checkpoints.exists():
        raise ValueError(f"output={settings.output!r} is there already; name a new folder.")
    if arguments.n_gpu > 1:
        raise ValueError(f"{arguments.n_gpu} GPUs, one process: use `accelerate launch`, or CUDA_VISIBLE_DEVICES=0.")
    model, tokenizer = build_model(settings, token)
    with arguments.main_process_first(local=False):
        claim(checkpoints, settings, arguments.world_size)
        if settings.push_to and arguments.process_index == 0:
            repositories.open_repository(settings.push_to, settings.private, token)
    trainer = _trainer(settings, arguments, model, tokenizer, train, valid)
    if not output.exists():  # else an equal run wrote it and was cut off before it could push
        _train(trainer, last_whole_checkpoint(checkpoints))
    figures: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        if not output.exists():
            _write(settings, trainer.state.best_metric, model, tokenizer, valid, len(train))
        if settings.push_to:
            repositories.push_folder(output, settings.push_to, token)
        shutil.rmtree(checkpoints)
        figures = json.loads((output / "figures.json").read_text(encoding="utf-8"))
    trainer.accelerator.wait_for_everyone()
    return figures


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train on from a checkpoint; where patience had ended there, only load the best."""
    if checkpoint is not None:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
        if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            trainer.args.num_train_epochs = round(state["epoch"])
    with _deterministic():
        trainer.train(resume_from_checkpoint=checkpoint)


def build_model(settings: ScorerTraining, token: str | None = None) -> tuple[IQSModel, Any]:
    """The model, its encoder pretrained and its head new, and the encoder's tokenizer.

    Raises:
        ValueError: the encoder is none, is a scorer already, has no padding, or reads fewer tokens than asked for.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    revision = None if settings.revision == "main" else settings.revision
    folder = hub.model_folder(settings.encoder, hub.pin_revision(settings.encoder, revision, token), token)
    encoder_config = AutoConfig.from_pretrained(folder)
    encoder_config.dtype = torch.float32  # a half-precision file would be trained so, and its small steps lost
    room = getattr(encoder_config, "max_position_embeddings", settings.max_tokens)
    if encoder_config.model_type in POSITIONS_AFTER_PADDING:
        room -= encoder_config.pad_token_id + 1
    if encoder_config.model_type == IQSConfig.model_type or getattr(encoder_config, "is_encoder_decoder", False):
        raise ValueError(f"encoder={settings.encoder!r} is a {encoder_config.model_type!r} model, not a plain encoder.")
    if getattr(encoder_config, "pad_token_id", None) is None:
        raise ValueError(
            f"encoder={settings.encoder!r} ({encoder_config.model_type!r}) has no padding token: no encoder."
        )
    if settings.max_tokens > room:
        raise ValueError(f"max_tokens={settings.max_tokens}, but {settings.encoder} has {room} positions.")
    torch.manual_seed(settings.seed)
    shape = ("layer_mix", "layer_norm", "pooling", "hidden_sizes", "activation", "dropout", "max_tokens", "template")
    model = IQSModel(
        IQSConfig(
            encoder_config=encoder_config,
            objective=OBJECTIVES[settings.kind],
            **{name: getattr(settings, name) for name in shape},
        )
    )
    pretrained, report = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"encoder={settings.encoder!r}: its file lacks weights of the configuration's shape: {missing[:5]}."
        )
    model.encoder.load_state_dict(pretrained.state_dict(), strict=False)  # no score uses the pooler
    return model, AutoTokenizer.from_pretrained(folder)


def _read_training(settings: ScorerTraining, valid: Sequence[Pair]) -> list[Any]:
    """Pairs for the ranking model, (row, label) for IQS; refused if they share a question with the validation file."""
    found: list[Any]
    if settings.kind == "ranking":
        found = read_pairs(settings.train)
        rows = [row for pair in found for row in pair]
    else:
        rows, labels = read_labelled_rows(settings.train)
        found = list(zip(rows, labels.tolist(), strict=True))
    refuse_crossing(rows, [row for pair in valid for row in pair], (settings.train, settings.valid))
    return found


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.MATH):  # the others' backward adds up in no fixed order
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _arguments(settings: ScorerTraining) -> TrainingArguments:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=f"{settings.output.rstrip('/')}.checkpoints",
        seed=settings.seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.max_grad_norm,
        fp16=settings.mixed_precision == "fp16",
        bf16=settings.mixed_precision == "bf16",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="kendall",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        **({"train_sampling_strategy": "group_by_length"} if settings.group_by_length else {}),
        restore_callback_states_from_checkpoint=True,  # else a resumed run forgets how patient it has been
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=True,  # while the encoder stands still its parameters get no gradient
    )


def _trainer(
    settings: ScorerTraining,
    arguments: TrainingArguments,
    model: IQSModel,
    tokenizer: Any,
    train: Sequence[Any],
    valid: Sequence[Pair],
) -> Trainer:
    from transformers import EarlyStoppingCallback, get_constant_schedule_with_warmup

    from car_datasets.validation import BudgetTrainer

    examples: Any = ranking_examples
    measured: Sequence[Any] = valid
    if settings.kind == "iqs":
        examples, measured = regression_examples, [(row, float(y)) for pair in valid for y, row in enumerate(pair)]
    how = (tokenizer, settings.template, settings.max_tokens)
    rates = (settings.learning_rate, settings.encoder_learning_rate, settings.layerwise_decay)
    groups = parameter_groups(model, *rates, settings.keep_embeddings_frozen)
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    return BudgetTrainer(
        model=model,
        args=arguments,
        train_dataset=examples(train, *how),
        eval_dataset=examples(measured, *how),
        data_collator=Collator(tokenizer.pad_token_id),
        compute_metrics=compute_kendall,
        optimizers=(optimiser, get_constant_schedule_with_warmup(optimiser, settings.warmup_steps)),
        callbacks=[ThawEncoder(model.encoder, settings.frozen_epochs), EarlyStoppingCallback(settings.patience)],
    )


def _write(
    settings: ScorerTraining,
    best_kendall: float | None,
    model: IQSModel,
    tokenizer: Any,
    valid: Sequence[Pair],
    examples: int,
) -> None:
    """Save, measure the saved model, write the card; the folder gets its name when all of it is there."""
    from car_datasets.evaluation import evaluate_scorer
    from car_datasets.scoring import QualityScorer

    output = Path(settings.output)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    found = asdict(evaluate_scorer(QualityScorer(str(partial)), valid))
    figures = {**found, "model": output.name, "best_kendall": best_kendall, "examples": examples}
    write_figures(partial, figures)
    local = Path(settings.encoder).exists()
    names = {name: Path(getattr(settings, name)).name for name in ("train", "valid", "output")}
    shown = settings.changed(**names, **({"encoder": Path(settings.encoder).name} if local else {}))
    base_model = None if local else settings.encoder
    write_card(partial, "trained_scorer_card.md.jinja", settings=shown, figures=figures, base_model=base_model)
    partial.replace(output)
