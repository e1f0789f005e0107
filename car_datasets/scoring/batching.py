"""Group texts into batches with little padding: tokenised ahead, sorted by length, cut by a budget of tokens.

Does: make the batches of scoring, embedding and training; put results back in the order of the texts; make batches
smaller when memory runs out; tell a watcher how far the model is.
Does not: know a model, or a row.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
T = TypeVar("T")
WINDOW_TEXTS = 4096  # texts that are tokenised at a time, while the model reads the ones before them
FIRST_TEXTS = 512  # of the first window on a GPU, which waits for it; each further one is twice as large


class Tokens(NamedTuple):
    """Tokenised texts.

    Args:
        ids (`list[list[int]]`): token ids, cut at a limit.
        lengths (`list[int]`): tokens of each text before it was cut.
        answer_starts (`list[int]`): the token at which each answer begins; empty if not asked for.
    """

    ids: list[list[int]]
    lengths: list[int]
    answer_starts: list[int]


def tokenise(tokenizer: Any, texts: Sequence[str], limit: int, answers_at: Sequence[int] | None = None) -> Tokens:
    """Tokenise texts and cut them at `limit` by the tokenizer's own rule.

    Args:
        tokenizer: of transformers; a fast one if `answers_at` is given.
        texts (`Sequence[str]`): entire texts.
        limit (`int`): tokens read of each, special tokens included.
        answers_at (`Sequence[int]`, *optional*): the character at which each answer begins. An answer that is cut off
            entirely begins at the last token, the separator.
    """
    if not texts:
        return Tokens([], [], [])
    ids, first_tokens = _ids_before_cut(tokenizer, list(texts), answers_at)
    lengths = [len(row) for row in ids]
    # `strict=False`: without `answers_at` there are no first tokens, and so no starts. An empty answer has no token.
    starts = [
        min(length, limit) - 1 if at is None else min(at, limit - 1)
        for at, length in zip(first_tokens, lengths, strict=False)
    ]
    # Only the tokenizer knows where it cuts: the special tokens at the end stay.
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=limit)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            ids[i] = row
    return Tokens(ids, lengths, starts)


def refuse_foreign_tokens(tokenizer: Any, rows: int) -> None:
    """Raise ValueError if a tokenizer gives words that the model's table of `rows` embeddings has no row for."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    # Added tokens do not count: some models have a few that no text contains.
    words = backend.get_vocab(with_added_tokens=False)
    if not set(words) - set(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no words, which a file that is missing would hold")
    highest = max(words.values())
    if highest >= rows:
        raise ValueError(f"its tokenizer gives ids up to {highest}, and its weights have {rows} embeddings")


def refuse_long_texts(encoder: Any, argument: str, longest: int) -> None:
    """Raise ValueError if texts of `longest` tokens have more positions than the encoder has a table of."""
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if isinstance(positions, torch.nn.Embedding) and longest > positions.num_embeddings:
        raise ValueError(f"{argument}={longest} is above its {positions.num_embeddings} positions")


def _ids_before_cut(
    tokenizer: Any, texts: list[str], answers_at: Sequence[int] | None
) -> tuple[list[list[int]], list[int | None]]:
    """Return the ids of entire texts, and if asked the token at which each answer begins (`None`: it has no token)."""
    # The Rust backend is called directly: it releases the GIL, so that other threads run meanwhile, and its result is
    # not copied into an attention mask and token types that nobody reads.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer, which keeps no offsets
        return tokenizer(texts, truncation=False, verbose=False)["input_ids"], []
    # Settings of `tokenizer.json`, or those of the last call, would otherwise still apply.
    backend.no_truncation()
    backend.no_padding()
    if answers_at is None:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)], []
    encodings = backend.encode_batch(texts)  # the fast one keeps no offsets
    starts = [encoding.char_to_token(at) for encoding, at in zip(encodings, answers_at, strict=True)]
    return [encoding.ids for encoding in encodings], starts


def tokenised_ahead(
    tokenizer: Any,
    texts: Sequence[str],
    limit: int,
    answers_at: Sequence[int] | None = None,
    first: int | None = None,
) -> Iterator[Tokens]:
    """Tokenise windows of [`WINDOW_TEXTS`] texts, the next one in a thread while the caller works on the current one.

    Worthwhile on a GPU, which is given more texts at a time; on a CPU the tokenizer takes 1 % of the time.

    Args:
        tokenizer: of transformers; a fast one if `answers_at` is given.
        texts (`Sequence[str]`): entire texts.
        limit (`int`): tokens read of each, special tokens included.
        answers_at (`Sequence[int]`, *optional*): the character at which each answer begins.
        first (`int`, *optional*): texts of a smaller first window, for a device that waits for it; the further ones
            double.

    Yields:
        [`Tokens`]: of one window after the other.
    """
    sizes: list[int] = []
    start = 0
    while start < len(texts):
        sizes.append(min((first or WINDOW_TEXTS) << min(len(sizes), 20), WINDOW_TEXTS))
        start += sizes[-1]

    def window(end: int, size: int) -> Tokens:
        part = slice(end - size, end)
        return tokenise(tokenizer, texts[part], limit, None if answers_at is None else answers_at[part])

    # One thread: every window changes the truncation of the same tokenizer.
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: deque[Any] = deque()
        for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
            waiting.append(thread.submit(window, end, size))
            if len(waiting) > 1:  # one window is read by the caller, and one is being tokenised
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# Tokens in a batch. Measured on 2 cores: with 1,024 to 2,048 the model was up to twice as fast as with more.
CPU_BUDGET = 2048

# Tokens in a batch times units of the encoder: 32k tokens for 1,024 units, 87k for 384, as narrow layers take less time
# than launching them unless the batch is large.
ACCELERATOR_BUDGET = 32768 * 1024


class Budget:
    """The number of tokens, padding included, that fit a batch; halved when memory runs out."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def halve(self) -> None:
        """Halve the budget from now on."""
        self.tokens //= 2
        logger.warning("Out of memory: batches of %d tokens from now on.", self.tokens)


# The budgets of this process, by device, width of the encoder and the caller's own number of tokens. All stages share
# them, so that a batch size which did not fit the memory is not tried again: if one stage runs out of memory, the
# batches of every other stage with the same key become smaller too.
BUDGETS: dict[tuple[torch.device, int, int | None], Budget] = {}


def token_budget(device: torch.device, units: int, tokens: int | None = None) -> Budget:
    """Return the budget of this process, the same object for the same arguments.

    Args:
        device (`torch.device`): of the encoder.
        units (`int`): width of the encoder.
        tokens (`int`, *optional*): start from this number instead of the device's default.
    """
    default = CPU_BUDGET if device.type == "cpu" else ACCELERATOR_BUDGET // units
    return BUDGETS.setdefault((device, units, tokens), Budget(default if tokens is None else tokens))


def token_batches(lengths: Sequence[int], budget: int, padded: bool = True) -> Iterator[list[int]]:
    """Cut texts into batches of at most `budget` tokens, longest first, so that memory peaks at the start.

    Args:
        lengths (`Sequence[int]`): tokens per text.
        budget (`int`): rows times the longest row of a batch; a text longer than that is a batch of its own.
        padded (`bool`): pass `False` to count each text with its own length, for an encoder that reads them end to end.

    Yields:
        `list[int]`: positions in `lengths`; together they are every position once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    ends = np.cumsum([lengths[i] for i in order])
    start = 0
    while start < len(order):
        if padded:
            rows = max(1, budget // max(1, lengths[order[start]]))  # the first is the longest, and sets the padding
        else:
            before = ends[start - 1] if start else 0
            rows = max(1, int(np.searchsorted(ends, before + budget, side="right")) - start)
        yield order[start : start + rows]
        start += rows


def padding_waste(lengths: Sequence[int], budget: int) -> float:
    """Return the share of padding among the tokens of [`token_batches`]."""
    sizes = [len(places) * max(lengths[i] for i in places) for places in token_batches(lengths, budget)]
    return 1 - sum(lengths) / sum(sizes)


class Watch:
    """The progress of a stage within its calls, told after every forward pass.

    Args:
        tell (`Callable`): gets the number of rows that are done since the watch began.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.called = tell, False
        self._before = self._rows = self._texts = 0
        self._read = 0.0

    def begin(self, rows: int, texts: int) -> None:
        """Note that a call with so many rows begins, which hold so many texts."""
        self.called = True
        self._before += self._rows
        self._rows, self._texts, self._read = rows, texts, 0.0

    def passed(self, texts: float) -> None:
        """Note that the model has read so many more texts; parts count, as long texts take longer."""
        self._read += texts
        # A second pass, over texts that are longer than the embedder reads, moves nothing.
        share = min(1.0, self._read / max(1, self._texts))
        self.tell(self._before + int(self._rows * share + 1e-6))


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextlib.contextmanager
def watching(tell: Callable[[int], None]) -> Iterator[Watch]:
    """Call `tell(rows)` after every forward pass of the stages that are called in this block.

    Args:
        tell (`Callable`): gets the number of rows that are done since the block began. On a GPU it is called when a
            pass has been launched, as waiting for its end would slow it down.
    """
    watch = Watch(tell)
    before = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(before)


def current_watch() -> Watch | None:
    """Return the watch of the surrounding `watching` block, if there is one."""
    return _watch.get()


def run_batches(
    lengths: Sequence[int], budget: Budget, forward: Callable[[list[int]], T], padded: bool = True
) -> list[tuple[list[int], T]]:
    """Call `forward` on the positions of every batch; if memory runs out, halve the budget and batch the rest again.

    Args:
        lengths (`Sequence[int]`): tokens per text.
        budget ([`Budget`]): tokens per batch.
        forward (`Callable`): a function of positions in `lengths`.
        padded (`bool`): as in [`token_batches`].

    Returns:
        The positions of each batch and what `forward` returned for them.

    Raises:
        RuntimeError: memory does not suffice for a single text (`torch.OutOfMemoryError` on CUDA).
    """
    from accelerate.utils.memory import should_reduce_batch_size  # recognises the errors of all devices

    done: list[tuple[list[int], T]] = []
    watch, total = current_watch(), max(1, sum(lengths))
    waiting = deque(token_batches(lengths, budget.tokens, padded))
    while waiting:
        places = waiting.popleft()
        try:
            done.append((places, forward(places)))
        except RuntimeError as error:
            if len(places) == 1 or not should_reduce_batch_size(error):
                raise
        else:
            if watch is not None:  # by tokens, because the longest texts come first
                watch.passed(len(lengths) * sum(lengths[i] for i in places) / total)
            continue
        budget.halve()  # after the `except` block, which keeps the failed call's tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # else blocks cached for the larger batch stay reserved
        rest = [i for batch in (places, *waiting) for i in batch]
        left = [lengths[i] for i in rest]
        waiting = deque([rest[i] for i in batch] for batch in token_batches(left, budget.tokens, padded))
    return done


# A text that waits for its batch: its number among all, its tokens, and the token at which its answer begins.
_Waiting = tuple[int, Sequence[int], int]


def run_windows(
    windows: Iterable[Tokens],
    total: int,
    budget: Budget,
    device: torch.device,
    forward: Callable[[Sequence[Sequence[int]], Sequence[int]], tuple[Tensor, ...]],
    padded: bool = True,
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int32]]:
    """Run tokenised texts through a model, window by window, without waiting for a GPU before the end.

    Args:
        windows (`Iterable[Tokens]`): from [`tokenised_ahead`].
        total (`int`): texts in all windows, at least 1.
        budget ([`Budget`]): tokens per batch.
        device (`torch.device`): of the model.
        forward (`Callable`): a function of token ids and answer starts of a batch, that returns tensors of shape
            `(batch, ...)`.
        padded (`bool`): as in [`token_batches`]; if `False`, a batch that is not full waits for the next window.

    Returns:
        The tensors of all batches as arrays of shape `(texts, ...)`, in the order of the texts, and the token counts.
    """
    numbers: list[list[int]] = []  # of the texts in each of `results`
    results: list[list[Tensor]] = []
    lengths: list[int] = []
    waiting: list[_Waiting] = []
    for tokens in windows:
        starts = tokens.answer_starts or [0] * len(tokens.ids)
        waiting += zip(itertools.count(len(lengths)), tokens.ids, starts)
        lengths += tokens.lengths
        now, waiting = waiting, []
        if not padded and len(lengths) < total:
            now, waiting = _full_batches(now, budget.tokens)

        # A default binds the value of `now`; the name itself is reassigned by the loop.
        def step(places: list[int], now: list[_Waiting] = now) -> tuple[Tensor, ...]:
            _, ids, starts = zip(*(now[i] for i in places), strict=True)
            with torch.inference_mode():
                return forward(ids, starts)

        ran = run_batches([len(ids) for _, ids, _ in now], budget, step, padded)
        if ran:
            numbers.append([now[i][0] for places, _ in ran for i in places])
            # Copied to the host window by window, so that the device holds the results of few windows only.
            results.append([_fetch(parts) for parts in zip(*(output for _, output in ran), strict=True)])
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the copies of `_fetch` are not complete before
    arrays = [in_order(numbers, parts) for parts in zip(*results, strict=True)]
    return arrays, np.array(lengths, dtype=np.int32)


def _full_batches(texts: list[_Waiting], budget: int) -> tuple[list[_Waiting], list[_Waiting]]:
    """Return the texts of all batches but the last, and those of the last, which further texts may fill."""
    *full, last = token_batches([len(ids) for _, ids, _ in texts], budget, padded=False)
    return [texts[i] for batch in full for i in batch], [texts[i] for i in last]


def _fetch(parts: Sequence[Tensor]) -> Tensor:
    """Join results of batches in float32, and begin to copy them to the host; only a synchronisation waits for it."""
    joined = torch.cat(list(parts)).float()
    if joined.device.type != "cuda":
        return joined
    return torch.empty(joined.shape, pin_memory=True).copy_(joined, non_blocking=True)


def in_order(places: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> npt.NDArray[np.float32]:
    """Join results of batches, each of shape `(texts of the batch, ...)`, to one array in the order of the texts.

    Args:
        places (`Sequence[Sequence[int]]`): positions of the texts of each batch.
        parts (`Sequence[Tensor]`): the result of each batch.
    """
    # Copied from the device all at once, unless [`_fetch`] has: a copy after each batch would make the host wait for it.
    rows: npt.NDArray[np.float32] = torch.cat(list(parts)).float().cpu().numpy()
    ordered = np.empty_like(rows)
    ordered[np.concatenate(places)] = rows
    return ordered


def pad(ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids as a padded tensor and its mask, both of shape `(texts, longest)`, int64."""
    lengths = np.array([len(row) for row in ids])
    # One assignment through the mask fills all rows, in their order: many times faster than a loop over rows.
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, pad_id, dtype=np.int64)
    padded[mask] = np.concatenate(ids)
    return to_device(padded, device), to_device(mask.astype(np.int64), device)


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
