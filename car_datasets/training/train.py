"""Train an entire scorer, encoder included, with transformers' `Trainer`, as `comet-train` did for the original.

Does: check settings and files before the first step, train on one or many devices, resume an interrupted run, write a
model folder with a card, and push it if asked.
Does not: train the head of the embedded default, or prepare the training files.
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

from car_datasets.loading.templates import CLEAN_TEMPLATE, TEMPLATES
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig, check_languages
from car_datasets.scoring.iqs.modeling_iqs import IQSModel
from car_datasets.scoring.iqs.packing import first_position
from car_datasets.training.pairs import Pair, read_labelled_rows, read_pairs, refuse_crossing
from car_datasets.training.trainer import (
    STATE_FILE,
    BudgetTrainer,
    Collator,
    Progress,
    ThawEncoder,
    claim,
    compute_kendall,
    last_whole_checkpoint,
    parameter_groups,
    ranking_examples,
    regression_examples,
)
from car_datasets.utils import hub, revisions
from car_datasets.utils.files import FIGURES_FILE, write_figures, write_folder
from car_datasets.utils.hub import write_card
from car_datasets.utils.settings import SEED, Settings

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# `kind` of a training file -> `objective` of the model's configuration.
OBJECTIVE_OF_KIND = {"iqs": "regression", "ranking": "ranking"}


@dataclass(frozen=True)
class ScorerTraining(Settings):
    """The settings of [`train_scorer`]; the defaults are those of the original's two configuration files.

    The two are `instruction_score.yaml` and `trainer.yaml` of CaR's repository.

    Args:
        kind (`str`): `"iqs"`: score each text, trained by mean squared error; or `"ranking"`: the original's "Comet"
            variant, trained by a triplet margin loss to place better answers nearer to their question.
        encoder (`str`): Hub id or folder of the pretrained encoder to start from.
        revision (`str`): branch, tag or commit of the encoder, if it is a Hub id.
        train (`str`): training file: CSV with `src,score` or `src,pos,neg`, or JSON Lines with `chosen` and `rejected`.
        valid (`str`): validation file of pairs, in one of the same formats.
        output (`str`): a new folder for the model. Until it is complete, checkpoints are kept in
            `<output>.checkpoints`.
        template (`str`): text template, stored in the model's configuration and used again whenever it scores.
            `"paper"` trains on the texts exactly as the files contain them.
        seed (`int`): seeds the initial weights, the order of the examples and dropout.
        layer_mix (`str`): `"sparsemax"` or `"softmax"` weights over the encoder's layers.
        layer_norm (`bool`): normalise each layer before the mix.
        pooling (`str`): `"avg"` or `"max"` over tokens, or `"cls"`, the first token.
        hidden_sizes (`list[int]`): widths of the head's hidden layers; empty for a linear head. Not used for
            `"ranking"`.
        activation (`str`): name of the `torch.nn` activation between the head's layers.
        dropout (`float`): dropout in the head, and of entire layers in the mix.
        max_tokens (`int`): tokens read of a text, special tokens included.
        learning_rate (`float`): learning rate of head and layer mix.
        encoder_learning_rate (`float`): learning rate of the encoder's top layer.
        layerwise_decay (`float`): ratio of each layer's learning rate to that of the layer above it.
        frozen_epochs (`float`): epochs, or a fraction of one, during which the encoder is frozen.
        keep_embeddings_frozen (`bool`): never train the encoder's embeddings.
        warmup_steps (`int`): steps of linear warm-up; the learning rate is constant afterwards.
        weight_decay (`float`): weight decay of AdamW.
        max_grad_norm (`float`): norm to which gradients are clipped.
        epochs (`int`): passes over the training file at most.
        batch_size (`int`): examples per batch and process.
        accumulation (`int`): batches per optimiser step.
        mixed_precision (`str`): `"no"`, `"fp16"` (needs a GPU) or `"bf16"`.
        group_by_length (`bool`): batch texts of similar length, which saves padding but makes the order less random.
        patience (`int`): epochs without a better Kendall tau on `valid` after which training stops. The best epoch is
            kept.
        push_to (`str`): Hub id to push the model to; `""` does not push.
        private (`bool`): require the Hub repository to be private.
        languages (`list[str]`): codes of the languages that the training file is in, such as `["en"]`, for
            configuration and card: `curate` then refuses pools in other languages. Empty: not known.
    """

    kind: str = "iqs"
    encoder: str = "FacebookAI/xlm-roberta-large"
    revision: str = "main"
    train: str = "expert_score_train.csv"
    valid: str = "expert_score_valid.csv"
    output: str = "iqs-xlmr-large"
    template: str = CLEAN_TEMPLATE
    seed: int = SEED
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
    languages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {
            "kind": list(OBJECTIVE_OF_KIND),
            "template": sorted(TEMPLATES),
            "mixed_precision": ["no", "fp16", "bf16"],
        }
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
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must be a list of positive integers.")
        check_languages(self.languages)


def train_scorer(settings: ScorerTraining, token: str | None = None) -> dict[str, Any]:
    """Train a scorer and write model, tokenizer, `figures.json` and card into `settings.output`.

    Under `accelerate launch` or `torchrun`, every process calls this function. If a run is interrupted, call it again
    with the same settings: it resumes from the last complete checkpoint and ends with the same weights.

    Returns:
        `dict`: the figures of [`evaluate_scorer`] on `valid`, with `best_kendall` and the number of training
        `examples`; empty in all processes but the main one.

    Raises:
        ValueError: settings, files, encoder or folders are invalid; raised before training starts.
    """
    if settings.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("mixed_precision='fp16' needs a GPU; on this machine pass --set mixed_precision=no, or bf16.")
    valid = read_pairs(settings.valid)
    train = _read_training(settings, valid)
    output, arguments = Path(settings.output), _arguments(settings)
    checkpoints = Path(arguments.output_dir)
    if output.exists() and not checkpoints.exists():
        raise ValueError(f"output={settings.output!r} already exists; name a new folder.")
    if arguments.n_gpu > 1:
        # `Trainer` would fall back to DataParallel, which changes the batch size and is not reproducible.
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs: use `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
        )
    model, tokenizer = build_model(settings, token)
    # The main process creates the folder, the others then compare their settings with its record.
    with arguments.main_process_first(local=False):
        claim(checkpoints, settings, arguments.world_size)
        # Opened now, so that a missing right to push is an error before training and not after it.
        if settings.push_to and arguments.process_index == 0:
            hub.open_repository(settings.push_to, settings.private, token)
    trainer = _trainer(settings, arguments, model, tokenizer, train, valid)
    if not output.exists():  # otherwise the same run wrote the model earlier and was interrupted before the push
        _train(trainer, last_whole_checkpoint(checkpoints))
    figures: dict[str, Any] = {}
    if trainer.is_world_process_zero():
        if not output.exists():
            _write(settings, trainer.state.best_metric, model, tokenizer, valid, len(train))
        if settings.push_to:
            hub.push_folder(output, settings.push_to, token, settings.private)
        # Last: until the push is done, the checkpoints mark the run as one that can be resumed.
        shutil.rmtree(checkpoints)
        figures = json.loads((output / FIGURES_FILE).read_text(encoding="utf-8"))
    # No process returns before the model is there, so that its caller may load it.
    trainer.accelerator.wait_for_everyone()
    return figures


def _read_training(settings: ScorerTraining, valid: Sequence[Pair]) -> list[Any]:
    """Read pairs for the ranking model or (row, label) for IQS; refuse questions that `valid` shares."""
    examples: list[Any]
    if settings.kind == "ranking":
        examples = read_pairs(settings.train)
        rows = [row for pair in examples for row in pair]
    else:
        rows, labels = read_labelled_rows(settings.train)
        examples = list(zip(rows, labels.tolist(), strict=True))
    refuse_crossing(rows, [row for pair in valid for row in pair], (settings.train, settings.valid))
    return examples


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
        # The best checkpoint and the newest, which may differ.
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="kendall",
        greater_is_better=True,
        # The examples are plain dicts, and the collator needs all their entries.
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,  # `Progress` shows the bar
        **({"train_sampling_strategy": "group_by_length"} if settings.group_by_length else {}),
        restore_callback_states_from_checkpoint=True,  # otherwise a resumed run starts counting patience at zero
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=True,  # a frozen encoder has no gradients
    )


def build_model(settings: ScorerTraining, token: str | None = None) -> tuple[IQSModel, Any]:
    """Return a model with a pretrained encoder and a freshly initialised head, and the encoder's tokenizer.

    Args:
        settings ([`ScorerTraining`]): which encoder, and the shape of the head.
        token (`str`, *optional*): Hub token for a private or gated encoder.

    Raises:
        ValueError: the model is not a plain encoder, is already a scorer, has no padding token, lacks weights, or has
            fewer positions than `max_tokens`.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    # None, because a folder and the default encoder have no branch.
    revision = None if settings.revision == "main" else settings.revision
    folder = revisions.model_folder(settings.encoder, revisions.pin_revision(settings.encoder, revision, token), token)
    with revisions.reading_model(folder):
        encoder_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    encoder_config.dtype = torch.float32  # in half precision, steps of 1e-6 would round to zero
    positions = getattr(encoder_config, "max_position_embeddings", settings.max_tokens)
    if encoder_config.model_type == IQSConfig.model_type or getattr(encoder_config, "is_encoder_decoder", False):
        raise ValueError(f"encoder={settings.encoder!r} is a {encoder_config.model_type!r} model, not a plain encoder.")
    if getattr(encoder_config, "pad_token_id", None) is None:
        raise ValueError(
            f"encoder={settings.encoder!r} ({encoder_config.model_type!r}) has no padding token, so it is not an "
            "encoder; name a model such as 'FacebookAI/xlm-roberta-large'."
        )
    positions -= first_position(encoder_config)  # RoBERTa numbers positions from the padding id + 1
    if settings.max_tokens > positions:
        raise ValueError(
            f"max_tokens={settings.max_tokens}, but {settings.encoder} has {positions} positions; "
            f"pass --set max_tokens={positions}, or less."
        )
    revisions.refuse_other_sizes(folder, encoder_config, revisions.read_shapes(sorted(folder.glob("*.safetensors"))))
    # Directly before the model is built: its initial weights are the next random numbers.
    torch.manual_seed(settings.seed)
    kept = ("layer_mix", "layer_norm", "pooling", "hidden_sizes", "activation", "dropout", "max_tokens", "template")
    model = IQSModel(
        IQSConfig(
            encoder_config=encoder_config,
            objective=OBJECTIVE_OF_KIND[settings.kind],
            languages=settings.languages,
            **{name: getattr(settings, name) for name in kept},
        )
    )
    # Loaded apart and copied, as `from_pretrained` of the IQS model expects weights of its own layout.
    with revisions.reading_model(folder):
        pretrained, report = AutoModel.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"encoder={settings.encoder!r}: its file lacks weights that its configuration requires: {missing[:5]}. "
            "Download or save the encoder again."
        )
    model.encoder.load_state_dict(pretrained.state_dict(), strict=False)  # not strict: no score uses the pooler
    return model, tokenizer


def _trainer(
    settings: ScorerTraining,
    arguments: TrainingArguments,
    model: IQSModel,
    tokenizer: Any,
    train: Sequence[Any],
    valid: Sequence[Pair],
) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, get_constant_schedule_with_warmup

    examples: Any = ranking_examples
    measured: Sequence[Any] = valid
    if settings.kind == "iqs":
        # A pair is (worse, better), so the position in the pair is the label.
        examples, measured = regression_examples, [(row, float(y)) for pair in valid for y, row in enumerate(pair)]
    how = (tokenizer, settings.template, settings.max_tokens)
    rates = (settings.learning_rate, settings.encoder_learning_rate, settings.layerwise_decay)
    # Freezes the embeddings as well, and so must run before the optimiser is made.
    groups = parameter_groups(model, *rates, settings.keep_embeddings_frozen)
    optimiser = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    trainer = BudgetTrainer(
        model=model,
        args=arguments,
        train_dataset=examples(train, *how),
        eval_dataset=examples(measured, *how),
        data_collator=Collator(tokenizer.pad_token_id),
        compute_metrics=compute_kendall,
        optimizers=(optimiser, get_constant_schedule_with_warmup(optimiser, settings.warmup_steps)),
        callbacks=[
            ThawEncoder(model.encoder, settings.frozen_epochs),
            EarlyStoppingCallback(settings.patience),
            Progress(),
        ],
    )
    # `Trainer` adds it where its own progress bar is off, to print to standard output.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, or resume from a checkpoint; if that run had already stopped early, only load its best weights."""
    if checkpoint is not None:
        state = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))
        if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            # No epoch is left to train then, and `Trainer` goes straight to `load_best_model_at_end`.
            trainer.args.num_train_epochs = round(state["epoch"])
    with deterministic():
        trainer.train(resume_from_checkpoint=checkpoint)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Make torch deterministic inside the block, so that equal settings give equal weights."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it to be deterministic
    # A warning and not an error, since some operations have no deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with sdpa_kernel(SDPBackend.MATH):  # the backward of the fused kernels sums in no fixed order
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _write(
    settings: ScorerTraining,
    best_kendall: float | None,
    model: IQSModel,
    tokenizer: Any,
    valid: Sequence[Pair],
    examples: int,
) -> None:
    """Save the model, evaluate what was saved, write figures and card; `settings.output` appears only when complete."""
    from car_datasets.scoring.scorer import QualityScorer
    from car_datasets.training.evaluation import evaluate_scorer

    output = Path(settings.output)
    with write_folder(output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # Of the saved model, so that the figures are those of what is shipped.
        measured = asdict(evaluate_scorer(QualityScorer(str(partial)), valid))
        figures = {**measured, "model": output.name, "best_kendall": best_kendall, "examples": examples}
        write_figures(partial, figures)
        # The card may leave this machine: it shows the names of local files, not their paths.
        local = Path(settings.encoder).exists()
        names = {name: Path(getattr(settings, name)).name for name in ("train", "valid", "output")}
        shown = settings.changed(**names, **({"encoder": Path(settings.encoder).name} if local else {}))
        base_model = None if local else settings.encoder
        write_card(partial, "trained_scorer_card.md.jinja", settings=shown, figures=figures, base_model=base_model)
