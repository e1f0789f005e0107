"""One fine-tune after another of one model, each from the same start, by TRL's `SFTTrainer`.

Does: train on the answers of packed rows; train all weights, LoRA or the last layers alone, in which case the hidden
states below them are computed once for all runs; measure the nats of answers; answer prompts greedily; halve batches
that do not fit into memory, at the same effective size.
Does not: choose rows, write checkpoints, or compare runs.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from car_datasets.proving.base_model import BaseModel
from car_datasets.proving.token_rows import (
    IGNORED,
    TokenRow,
    by_length,
    fill_packs,
    keep_rows_apart,
    lay_end_to_end,
    prompt_ids,
    sum_nats,
)
from car_datasets.proving.trainer import (
    ALL,
    LORA,
    Schedule,
    Settings,
    as_before,
    make_trainer,
    own_garbage,
    quiet,
    unwrap,
)

LAST_LAYERS = 4  # trained by default without a GPU
MOST_STATES = 2 * 2**30  # bytes of hidden states that are kept
ANSWERED_AT_ONCE = 128  # prompts
SAME = 2e-3  # nats by which the upper layers on kept states may differ from the model
Value = TypeVar("Value")


class Trained(NamedTuple):
    """What one run of training did.

    Args:
        steps (`int`): updates of the weights.
        tokens (`int`): tokens that were read, prompts included.
        answer_tokens (`int`): tokens that were learnt.
        seconds (`float`): of training alone.
        loss (`float`): mean nats per answer token while it trained.
        order (`str`): sha256 over the ids and the borders of all batches in order.
        pieces (`int`): parts that each batch was divided into, to fit into memory.
    """

    steps: int
    tokens: int
    answer_tokens: int
    seconds: float
    loss: float
    order: str
    pieces: int


class Tuner:
    """A model that is fine-tuned from the same start again and again.

    Args:
        base ([`BaseModel`]): the model; its weights change while a run is trained, and are put back.
        rows (`Sequence[TokenRow]`): all rows that any run trains on or measures.
        schedule ([`Schedule`]): how it is trained.
        device (`torch.device`): where.

    Raises:
        ValueError: the model has fewer layers than are to be trained, or cannot read packed rows.
    """

    def __init__(self, base: BaseModel, rows: Sequence[TokenRow], schedule: Schedule, device: torch.device) -> None:
        self.base, self.rows, self.schedule, self.device = base, rows, schedule, device
        self.lengths = [len(row.ids) for row in rows]
        self.full = base.model.to(device).eval()
        self.attention = keep_rows_apart(self.full)
        self.places: list[int] | None = None
        self.model = self.full
        self.pieces = 1
        self.measured_at_once = 2_048 if device.type == "cpu" else 16_384
        self.full.requires_grad_(True)  # an earlier tuner of the same model may have trained a part
        if isinstance(schedule.trained, int):
            self._freeze_below(schedule.trained)
        trained = self.full.parameters() if schedule.trained == ALL else self._trained()
        # A copy of what training changes; LoRA adds weights of its own and removes them.
        self.start = [] if schedule.trained == LORA else [(weight, weight.detach().clone()) for weight in trained]

    def _trained(self) -> list[nn.Parameter]:
        return [weight for weight in self.full.parameters() if weight.requires_grad]

    def _freeze_below(self, count: int) -> None:
        """Leave only the last layers to be trained, on hidden states that are computed once."""
        decoder = self.full.get_decoder()
        layers = getattr(decoder, "layers", None)
        if layers is None or not 1 <= count <= len(layers):
            known = f"has {len(layers)} layers" if layers is not None else "does not name its layers"
            raise ValueError(f"trained={count}: the model {known}. Pass a number of them, 'lora' or 'all'.")
        self.full.requires_grad_(False)
        for layer in layers[-count:]:
            layer.requires_grad_(True)
        size = sum(self.lengths) * self.full.config.get_text_config().hidden_size * 4
        if count < len(layers) and size <= MOST_STATES and self.rows:
            self._keep_states(decoder, count)

    def _keep_states(self, decoder: Any, count: int) -> None:
        """Replace the layers that stay as they are by a table of their output, if that gives the same losses."""
        probe = sorted(range(len(self.rows)), key=lambda row: self.lengths[row])[:2]
        before = self.nats(probe)
        try:
            lower = _with_layers(self.full, decoder.layers[:-count], nn.Identity(), decoder.embed_tokens)
            places = np.concatenate([[0], np.cumsum(self.lengths)])
            states = torch.empty(int(places[-1]), self.full.config.get_text_config().hidden_size, device=self.device)
            for chosen in by_length(self.lengths, range(len(self.rows)), 4_096):
                pack = lay_end_to_end(self.rows, chosen, None, self.device)
                with torch.no_grad():
                    found = lower.get_decoder()(**pack.inputs).last_hidden_state[0]
                at = np.concatenate([np.arange(self.lengths[row]) + places[row] for row in chosen])
                states[torch.as_tensor(at, device=self.device)] = found.float()
            table = nn.Embedding.from_pretrained(states, freeze=True)
            self.model = _with_layers(self.full, decoder.layers[-count:], decoder.norm, table)
            self.places = places[:-1].tolist()
            same = np.allclose(self.nats(probe), before, rtol=SAME, atol=SAME)
        except (AttributeError, TypeError, NotImplementedError):  # a model of other parts
            same = False
        if not same:
            self.model, self.places = self.full, None

    def restore(self) -> None:
        """Put the weights back to where every run starts."""
        if self.schedule.trained == LORA and self.model is not self.full:
            self.model.unload()
            self.model = self.full
        with torch.no_grad():
            for weight, before in self.start:
                weight.copy_(before)

    def train(self, order: Sequence[int], learning_rate: float, seed: int) -> Trained:
        """Train the model from its start, on rows in order, which each further epoch shuffles by the seed.

        Args:
            order (`Sequence[int]`): places in `rows`.
            learning_rate (`float`): the highest of the schedule.
            seed (`int`): of the later epochs' orders and of LoRA's first weights.

        Raises:
            RuntimeError: a single row does not fit into memory.
        """
        batches = []
        epochs = self.schedule.epochs
        wanted = epochs * sum(self.lengths[row] for row in order) // self.schedule.updates
        for epoch in range(epochs):
            shuffled = order if epoch == 0 else [order[i] for i in _permutation(seed, epoch, len(order))]
            batches += fill_packs(self.lengths, shuffled, max(1, min(self.schedule.batch_tokens, wanted)))
        while True:
            pieces = min(self.pieces, min(len(batch) for batch in batches))
            try:
                return self._train(batches, learning_rate, seed, pieces)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not _lacks_memory(error) or 2 * pieces > min(len(batch) for batch in batches):
                    raise
            # Outside of the handler, whose traceback holds the tensors that have filled the memory.
            self.pieces = 2 * pieces
            _free_memory(self.device)

    def _train(self, batches: Sequence[list[int]], learning_rate: float, seed: int, pieces: int) -> Trained:
        self.restore()
        parts = [list(map(int, part)) for batch in batches for part in np.array_split(np.asarray(batch), pieces)]
        packed: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "labels", "seq_lengths")}
        for part in parts:
            for name, values in self._packed(part).items():
                packed[name].append(values)
        begun = time.perf_counter()
        # Nothing is saved there, but the trainer wants a folder.
        with tempfile.TemporaryDirectory() as folder, as_before(), quiet(), own_garbage():
            settings = Settings(self.schedule, self.device, len(batches), pieces, learning_rate, seed)
            result = self._fit(packed, folder, settings)
        self.model.eval()
        rows = [row for batch in batches for row in batch]
        return Trained(
            steps=int(result.global_step),
            tokens=sum(self.lengths[row] for row in rows),
            answer_tokens=sum(self.rows[row].answer_tokens for row in rows),
            seconds=time.perf_counter() - begun,
            loss=float(result.training_loss),
            order=_order_digest(self.rows, batches),
            pieces=pieces,
        )

    def _fit(self, packed: Mapping[str, Sequence[Sequence[int]]], folder: str, settings: Settings) -> Any:
        """Train on packs of rows by a trainer that does not outlive the call, and return what it returns."""
        trainer = make_trainer(self.model, self.base.tokenizer, packed, folder, settings)
        try:
            return trainer.train()
        finally:
            self.model = trainer.model
            unwrap(self.full, self.model)

    def _packed(self, chosen: Sequence[int]) -> dict[str, list[int]]:
        """Return rows end to end with their labels, as TRL's packing returns them."""
        ids, labels = [], []
        for row in chosen:
            found = self.rows[row]
            ids.append(found.ids if self.places is None else np.arange(len(found.ids)) + self.places[row])
            labels.append(np.where(np.arange(len(found.ids)) < found.prompt, IGNORED, found.ids))
        return {
            "input_ids": np.concatenate(ids).tolist(),
            "labels": np.concatenate(labels).tolist(),
            "seq_lengths": [self.lengths[row] for row in chosen],
        }

    def nats(self, chosen: Sequence[int]) -> np.ndarray:
        """Return the summed nats of the answer of each row, of shape `(rows,)`, by the model as it is now.

        Args:
            chosen (`Sequence[int]`): places in `rows`.
        """
        found = dict.fromkeys(chosen, 0.0)
        with _precise_products():
            self.measured_at_once, sums = _within_memory(self.measured_at_once, self.device, self._sums, tuple(found))
        found.update(sums)
        return np.array([found[row] for row in chosen])

    def _sums(self, tokens: int, chosen: Sequence[int]) -> dict[int, float]:
        packs = [
            lay_end_to_end(self.rows, part, self.places, self.device)
            for part in by_length(self.lengths, chosen, tokens)
        ]
        # Read back at the end: a GPU would wait after every pack.
        sums = [sum_nats(self.model, pack) for pack in packs]
        values = torch.cat(sums).tolist() if sums else []
        return dict(zip((row for pack in packs for row in pack.rows), values, strict=True))

    def answers(self, prompts: Sequence[Sequence[Mapping[str, str]]], most_tokens: int) -> list[str]:
        """Return greedy answers to prompts, of at most `most_tokens` tokens each."""
        ids = prompt_ids(prompts, self.base.tokenizer)
        # LoRA wraps the model; otherwise its layers are the trained ones, also where only the upper ones were run.
        model = self.model if self.schedule.trained == LORA else self.full
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        found = [""] * len(ids)
        self.full.set_attn_implementation("sdpa")
        try:
            with _precise_products():
                for first in range(0, len(order), ANSWERED_AT_ONCE):
                    chosen = order[first : first + ANSWERED_AT_ONCE]
                    texts = self._answer(model, [ids[place] for place in chosen], most_tokens)
                    for place, text in zip(chosen, texts, strict=True):
                        found[place] = text
        finally:
            self.full.set_attn_implementation(self.attention)
        return found

    def _answer(self, model: Any, ids: Sequence[Sequence[int]], most_tokens: int) -> list[str]:
        width, pad = max(map(len, ids)), self.base.tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (width - len(row)) + list(row) for row in ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        with torch.no_grad():
            made = model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=most_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                eos_token_id=self.base.tokenizer.eos_token_id,
            )
        return list(self.base.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True))

    def describe(self) -> dict[str, Any]:
        """Return the settings of all runs, for the record of a proof."""
        return {
            **asdict(self.schedule),
            "optimizer": "AdamW, no weight decay, gradients clipped at norm 1, linear decay",
            "precision": "bfloat16 autocast" if self.device.type == "cuda" else "float32",
            "attention": self.attention,
            "device": self.device.type,
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "states_kept": self.places is not None,
        }


def _with_layers(model: Any, layers: Any, norm: nn.Module, embedding: nn.Module) -> Any:
    """Return a causal model of some of the layers of another, which it shares, on another embedding."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers, text.tie_word_embeddings = len(layers), False
    with torch.device("meta"):  # every part is replaced
        part = type(model)(config)
    decoder = part.get_decoder()
    decoder.layers, decoder.norm = nn.ModuleList(layers), norm
    decoder.rotary_emb, decoder.embed_tokens = model.get_decoder().rotary_emb, embedding
    part.lm_head = model.lm_head
    if any(weight.is_meta for weight in (*part.parameters(), *part.buffers())):
        raise NotImplementedError("a model of other parts")
    part.set_attn_implementation(model.config._attn_implementation)
    return part.eval()


def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(size).tolist()


def _order_digest(rows: Sequence[TokenRow], batches: Sequence[Sequence[int]]) -> str:
    content = hashlib.sha256()
    for batch in batches:
        for row in batch:
            content.update(rows[row].prompt.to_bytes(4, "little") + rows[row].ids.tobytes())
        content.update(b"|")
    return f"sha256:{content.hexdigest()}"


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _free_memory(device: torch.device) -> None:
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _within_memory(
    size: int, device: torch.device, compute: Callable[[int, Any], Value], rows: Any
) -> tuple[int, Value]:
    """Return `compute(size, rows)` and the size, halved until it fits into memory."""
    while True:
        try:
            return size, compute(size, rows)
        except RuntimeError as error:
            if not _lacks_memory(error) or size <= 1:
                raise
        size //= 2
        _free_memory(device)


@contextlib.contextmanager
def _precise_products() -> Iterator[None]:
    """Compute products of float32 matrices in TensorFloat-32 in this block: faster on a GPU, finer than bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
