"""Texts to batches that waste little: tokenised ahead of the model, sorted by length, cut by a budget of tokens, not rows.

Does: the one place where scoring, embedding, training's evaluation and benchmarks get their batches; puts results back
in the order of the texts; makes batches smaller where memory runs out.
Does not: know a model (packing.py and modeling_iqs.py), or a row (rows.py).
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Measured on 2 cores: 1,024 to 2,048 tokens a batch beat larger ones by up to 2 times.
CPU_BUDGET = 2048
# Times the encoder's units: 32k tokens for 1,024 units, 87k for 384, whose layers are done sooner than they are launched.
ACCELERATOR_BUDGET = 32768 * 1024
WINDOW = 4096  # texts that are tokenised while the model reads the ones before them


class Tokens(NamedTuple):
    """Token ids of texts, cut at a limit; the length of each whole text in tokens; where its answer begins, if asked."""

    ids: list[list[int]]
    lengths: list[int]
    answer_starts: list[int]


class Budget:
    """How many tokens, padding included, fit a batch; halved when memory ran out, and remembered."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self) -> None:
        """Half as many from now on."""
        self.tokens //= 2
        logger.warning("Out of memory: batches of %d tokens from here on.", self.tokens)


@functools.lru_cache(maxsize=16)
def token_budget(device: torch.device, units: int, tokens: int | None = None) -> Budget:
    """The budget on this device for an encoder of so many units, or the user's own; the same object for the same question,
    so that what was learned about the memory is learned once, for this process."""
    if tokens is not None:
        return Budget(tokens)
    return Budget(CPU_BUDGET if device.type == "cpu" else ACCELERATOR_BUDGET // units)


def tokenise(tokenizer: Any, texts: Sequence[str], limit: int, answers_at: Sequence[int] | None = None) -> Tokens:
    """Token ids cut at `limit` by the tokenizer's own rule.

    Args:
        tokenizer: of transformers; a fast one where `answers_at` is given.
        texts (`Sequence[str]`): whole texts.
        limit (`int`): tokens read of each, special tokens included.
        answers_at (`Sequence[int]`, *optional*): the character at which each answer begins. One that was cut off begins
            at the last token, the separator.
    """
    if not texts:
        return Tokens([], [], [])
    ids, found = _whole_ids(tokenizer, list(texts), answers_at)
    lengths = [len(row) for row in ids]
    starts = [
        min(length, limit) - 1 if at is None else min(at, limit - 1) for at, length in zip(found, lengths, strict=False)
    ]
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=limit)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            ids[i] = row
    return Tokens(ids, lengths, starts)


def _whole_ids(
    tokenizer: Any, texts: list[str], answers_at: Sequence[int] | None
) -> tuple[list[list[int]], list[int | None]]:
    """Ids of whole texts, and the token at which each answer begins, if asked. The tokenizer's Rust part is called itself:
    it leaves Python to other threads meanwhile, and its result is not copied into a mask and types that nobody reads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, truncation=False, verbose=False)["input_ids"], []
    backend.no_truncation()
    backend.no_padding()
    if answers_at is None:
        return [found.ids for found in backend.encode_batch_fast(texts)], []
    encodings = backend.encode_batch(texts)  # the fast one keeps no offsets
    starts = [found.char_to_token(at) for found, at in zip(encodings, answers_at, strict=True)]
    return [found.ids for found in encodings], starts


def tokenised_ahead(
    tokenizer: Any, texts: Sequence[str], limit: int, answers_at: Sequence[int] | None = None
) -> Iterator[Tokens]:
    """[`tokenise`] for windows of [`WINDOW`] texts, the next one in a thread while the caller works on this one.

    It pays on a GPU, which is given more texts at a time; on a CPU the tokenizer takes 1 % of the time.
    """

    def window(start: int) -> Tokens:
        part = slice(start, start + WINDOW)
        return tokenise(tokenizer, texts[part], limit, None if answers_at is None else answers_at[part])

    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: deque[Any] = deque()
        for start in range(0, len(texts), WINDOW):
            waiting.append(thread.submit(window, start))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut texts into batches of at most `budget` padded tokens, longest first, so that memory peaks at the start.

    Args:
        lengths (`Sequence[int]`): tokens per text.
        budget (`int`): rows times the longest row of a batch; a text longer than that is a batch of its own.

    Yields:
        `list[int]`: positions in `lengths`; together they are every position once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + rows]
        start += rows


def padding_waste(lengths: Sequence[int], budget: int) -> float:
    """The share of padding among the tokens of [`token_batches`]."""
    sizes = [len(places) * max(lengths[i] for i in places) for places in token_batches(lengths, budget)]
    return 1 - sum(lengths) / sum(sizes)


def run_batches(lengths: Sequence[int], budget: Budget, forward: Callable[[list[int]], T]) -> list[tuple[list[int], T]]:
    """Call `forward` on the positions of every batch; where memory runs out, with half the budget on what is left.

    Raises:
        RuntimeError: memory does not suffice for a single text (`torch.OutOfMemoryError` on CUDA).
    """
    from accelerate.utils.memory import should_reduce_batch_size  # knows how each device says so

    done: list[tuple[list[int], T]] = []
    waiting = deque(token_batches(lengths, budget.tokens))
    while waiting:
        places = waiting.popleft()
        try:
            done.append((places, forward(places)))
        except RuntimeError as error:
            if len(places) == 1 or not should_reduce_batch_size(error):
                raise
        else:
            continue
        budget.halve()  # out here, where the failed call's tensors are gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rest = [i for batch in (places, *waiting) for i in batch]
        waiting = deque([rest[i] for i in batch] for batch in token_batches([lengths[i] for i in rest], budget.tokens))
    return done


def in_order(places: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """Results of batches, each of shape `(texts of the batch, ...)`, as one array in the order of the texts.

    They are copied from the device all at once: a copy after each batch would make the host wait for it.
    """
    rows: npt.NDArray[np.float32] = torch.cat(list(parts)).float().cpu().numpy()
    ordered = np.empty_like(rows)
    ordered[np.concatenate(places)] = rows
    return ordered


def pad(ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids to a padded tensor and its mask, both of shape `(texts, longest)`, int64."""
    lengths = np.array([len(row) for row in ids])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, dtype=np.int64)
    padded[mask] = np.concatenate(ids)
    return to_device(padded, device), to_device(mask.astype(np.int64), device)


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; to a GPU from pinned memory, which does not wait for what runs there."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
