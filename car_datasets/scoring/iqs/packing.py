"""Texts without padding: laid end to end in one row of tokens, and pooled there, segment by segment.

Does: lay token ids end to end; sum, average and maximise states over texts, or over question and answer, in float32;
put states into the padded grid.
Does not: run an encoder, or know a head.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from car_datasets.scoring.batching import to_device

# Models that number positions from the padding token's id + 1.
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "camembert"}
PACKABLE = {"bert", *POSITIONS_AFTER_PADDING}

# Tokens in a block of a row, over which states are summed by one product. The row is filled up to entire blocks, which
# also keeps the number of different shapes small: a GPU chooses kernels per shape.
BLOCK = 256
FILLER = 64  # tokens in a text of padding; several of them fill the row, as none may be longer than the encoder reads


class Segments(NamedTuple):
    """What sums states by segment: a text, or its question and its answer.

    A segment is cut into pieces, none of which crosses the border of a block. One product per block gives the sums of
    the pieces, of which the segments' are put together.

    Args:
        slots (`Tensor` of shape `(blocks, tokens of a block)`, int16): the piece of each token, counted within its
            block; -1 for a token of no segment.
        pieces (`Tensor` of shape `(segments, most pieces)`, int64): where each segment's pieces are among those of all
            blocks; beyond the last of them for a piece that does not exist.
        most (`int`): pieces in a block.
        lengths (`Tensor` of shape `(segments,)`, float32): tokens of each.
    """

    slots: Tensor
    pieces: Tensor
    most: int
    lengths: Tensor

    def weights(self, kept: Tensor | None = None) -> Tensor:
        """Return the factors of [`sum`], of shape `(blocks, pieces, tokens of a block)`, bool; 0 where `kept` is False."""
        numbers = torch.arange(self.most, dtype=torch.int16, device=self.slots.device)
        weights = self.slots.unsqueeze(1) == numbers[:, None]
        return weights if kept is None else weights & kept.view(len(self.slots), 1, -1)

    def sum(self, states: Tensor, weights: Tensor) -> Tensor:
        """Sum states of shape `(tokens, units)` by segment, in float32: `(segments, units)`."""
        blocks = states.view(len(self.slots), -1, states.shape[-1])
        sums = _products(weights, blocks)
        # One more row, of zeros, for the pieces that do not exist.
        return nn.functional.pad(sums.flatten(0, 1), (0, 0, 0, 1))[self.pieces].sum(dim=1)


def _products(weights: Tensor, blocks: Tensor) -> Tensor:
    """Multiply weights of 0 and 1 with states, block by block, in float32."""
    if blocks.device.type == "cuda" and blocks.dtype in (torch.float16, torch.bfloat16):
        # The products are exact, and their sum is kept in float32, without a copy of the states.
        with contextlib.suppress(RuntimeError, TypeError):  # not every version and device can
            return torch.bmm(weights.to(blocks.dtype), blocks, out_dtype=torch.float32)
    return torch.bmm(weights.float(), blocks.float())


class Packed(NamedTuple):
    """Texts in one row of tokens.

    Args:
        input_ids, position_ids (`Tensor` of shape `(tokens,)`): of the row, filled up with padding.
        bounds (`Tensor` of shape `(texts and fillers + 1,)`, int32): where each text begins, and the end of the last.
        longest (`int`): upper bound of the tokens in a text.
        shape (`tuple[int, int]`): texts, and tokens of the longest.
        grid (`Tensor` of shape `(real tokens,)`): where the tokens of the texts, which begin the row, are in the
            flattened padded batch.
        lengths (`Tensor` of shape `(texts,)`, int64): tokens of each text.
        segments ([`Segments`]): of each text one, or question and answer in turn.
        answer_start (`Tensor` of shape `(texts,)`, *optional*): position of each answer's first token.
        pad_id (`int`): the token of padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: int
    shape: tuple[int, int]
    grid: Tensor
    lengths: Tensor
    segments: Segments
    answer_start: Tensor | None
    pad_id: int

    def spread(self, states: Tensor) -> Tensor:
        """Put states of the row into the padded grid, of shape `(texts, longest, units)`, with 0 at the padding."""
        padded = states.new_zeros((self.shape[0] * self.shape[1], states.shape[-1]))
        padded[self.grid] = states[: len(self.grid)]
        return padded.view(*self.shape, -1)

    def padded_ids(self) -> tuple[Tensor, Tensor]:
        """Return the token ids as a padded tensor and its mask, both of shape `(texts, longest)`, int64."""
        mask = torch.arange(self.shape[1], device=self.lengths.device) < self.lengths[:, None]
        ids = torch.full(self.shape, self.pad_id, device=mask.device).flatten()
        ids[self.grid] = self.input_ids[: len(self.grid)]
        return ids.view(self.shape), mask.long()

    def starts(self) -> Tensor:
        """Return where each text begins in the row."""
        return self.bounds[: self.shape[0]].long()


def first_position(encoder_config: Any) -> int:
    """Return the position id of a text's first token: 0, or for the RoBERTa family the padding token's id + 1."""
    after = encoder_config.model_type in POSITIONS_AFTER_PADDING
    return int(encoder_config.pad_token_id) + 1 if after else 0


def pack(
    ids: Sequence[Sequence[int]],
    encoder_config: Any,
    limit: int,
    device: torch.device,
    answer_starts: Sequence[int] | None = None,
) -> Packed:
    """Lay token ids end to end.

    Args:
        ids (`Sequence[Sequence[int]]`): token ids of each text, at most `limit`.
        encoder_config (`PreTrainedConfig`): tells the padding token, and how positions are numbered.
        limit (`int`): tokens that the encoder reads; a constant, so that no kernel waits for the longest of a batch.
        device (`torch.device`): of the encoder.
        answer_starts (`Sequence[int]`, *optional*): the token at which each answer begins, to sum question and answer
            separately.
    """
    pad_id = int(encoder_config.pad_token_id or 0)
    lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    count, real, longest = len(ids), int(lengths.sum()), int(lengths.max())
    total = -(-real // BLOCK) * BLOCK
    row = np.full(total, pad_id, dtype=np.int64)
    row[:real] = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.int64, count=real)
    first = np.cumsum(lengths) - lengths  # of each text
    bounds = np.concatenate([first, np.arange(real, total, FILLER), [total]])
    starts = None if answer_starts is None else np.asarray(answer_starts, dtype=np.int64)
    parts = lengths if starts is None else np.stack([starts, lengths - starts], axis=1).ravel()
    slots, tokens, pieces = _pieces(parts, total)
    # One copy, as each one costs a thread more than the kernels that it would save; what has a number per token is
    # spread on the device.
    sent = [row, bounds, lengths, first, parts, slots, tokens, pieces.ravel(), *([] if starts is None else [starts])]
    row_, bounds_, lengths_, first_, parts_, slots_, tokens_, pieces_, *starts_ = to_device(
        np.concatenate(sent), device
    ).split([len(values) for values in sent])
    texts = torch.repeat_interleave(torch.arange(count, device=device), lengths_, output_size=real)
    within = torch.arange(real, device=device) - first_[texts]
    positions = _positions(row_[:real], texts, within, first_, encoder_config)
    slot_of = torch.repeat_interleave(slots_, tokens_, output_size=real)
    return Packed(
        row_,
        nn.functional.pad(positions, (0, total - real)),
        bounds_.to(torch.int32),  # as the kernel takes them
        limit,
        (count, longest),
        within + texts * longest,
        lengths_,
        Segments(
            nn.functional.pad(slot_of, (0, total - real), value=-1).to(torch.int16).view(-1, BLOCK),
            pieces_.view(pieces.shape),
            int(slots.max()) + 1,
            parts_.float(),
        ),
        starts_[0] if starts_ else None,
        pad_id,
    )


def _positions(row: Tensor, texts: Tensor, within: Tensor, first: Tensor, encoder_config: Any) -> Tensor:
    """Return the position id of every real token, as the encoder itself numbers them."""
    start = first_position(encoder_config)
    if not start:
        return within
    # RoBERTa's do not count a padding token, also where a text spells one out.
    is_word = row != encoder_config.pad_token_id
    counted = is_word.cumsum(0)
    before = counted[first] - is_word[first].long()
    return torch.where(is_word, counted - before[texts] + start - 1, start - 1)


def _pieces(
    lengths: npt.NDArray[np.int64], total: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Cut consecutive segments into pieces, none of which crosses the border of a block.

    Args:
        lengths (`(segments,)`): tokens of each.
        total (`int`): tokens of the row.

    Returns:
        Of each piece, which follow one another, the number within its block and the tokens; and the `pieces` of
        [`Segments`].
    """
    ends = np.cumsum(lengths)
    starts = ends - lengths
    opened = starts // BLOCK  # the first block of each segment
    per_segment = np.where(lengths > 0, (ends - 1) // BLOCK - opened + 1, 0)
    owners = np.repeat(np.arange(len(lengths)), per_segment)
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    blocks = opened[owners] + rank
    tokens = np.minimum(ends[owners], (blocks + 1) * BLOCK) - np.maximum(starts[owners], blocks * BLOCK)
    slots = np.arange(len(blocks)) - np.searchsorted(blocks, blocks)
    most = int(slots.max()) + 1
    pieces = np.full((len(lengths), int(per_segment.max())), total // BLOCK * most)
    pieces[owners, rank] = blocks * most + slots
    return slots, tokens, pieces


def pool_packed(states: Iterable[Tensor], packed: Packed, config: Any, combine: nn.Module | None) -> Tensor:
    """Combine the layers and pool the tokens of packed texts as [`IQSModel.reduce`] does those of padded ones.

    Args:
        states (`Iterable[Tensor]`): the states that are read, of shape `(tokens, units)`, one at a time.
        packed ([`Packed`]): the texts, each of which is one segment.
        config ([`IQSConfig`]): tells the pooling.
        combine (`nn.Module`, *optional*): the combination of layers; without it there is one state.

    Returns:
        `Tensor` of shape `(texts, units)`, float32.
    """
    segments = packed.segments
    # As in the original, the sum leaves out padding tokens that a text spells out, and the denominator counts them.
    real = packed.input_ids != packed.pad_id
    every, kept = segments.weights(), segments.weights(real)
    norm = config.layer_norm and combine is not None
    numbers = segments.sum(real.unsqueeze(-1).float(), every)  # of the tokens that are kept, by text

    def pooled(state: Tensor) -> Tensor:
        shift, scale = _moments(state, segments, every) if norm else (None, None)
        if config.pooling == "avg":
            sums = segments.sum(state, kept)
            if shift is not None:
                sums = (sums - numbers * shift) * scale
            return sums / segments.lengths.unsqueeze(-1)
        states = (state[packed.starts()] if config.pooling == "cls" else state[: len(packed.grid)]).float()
        if shift is None or scale is None:
            return states
        if config.pooling == "max":  # of each token, that of its text
            texts = torch.repeat_interleave(packed.lengths, output_size=len(packed.grid))
            shift, scale = shift[texts], scale[texts]
        return (states - shift) * scale

    found: Tensor = next(map(pooled, states)) if combine is None else combine(map(pooled, states))
    if config.pooling == "max":
        found = found.masked_fill(~real[: len(packed.grid)].unsqueeze(-1), float("-inf"))
        found = torch.segment_reduce(found, "max", lengths=packed.lengths, unsafe=True)  # unsafe: no wait for a check
    return found


def _moments(states: Tensor, segments: Segments, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of each text over tokens and units, and the inverse of its standard deviation: `(texts, 1)`."""
    # By token first: a sum and a length of the vector, in float32 without a copy of the states.
    sums = states.sum(dim=-1, dtype=torch.float32)
    squares = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32).square()
    count = segments.lengths.unsqueeze(-1) * states.shape[-1]
    mean, square = (segments.sum(torch.stack([sums, squares], dim=-1), weights) / count).split(1, dim=-1)
    return mean, (square - mean.square() + 1e-12).rsqrt()


def packed_segment_features(states: Iterable[Tensor], packed: Packed) -> Tensor:
    """Pool packed texts, whose segments are question and answer, as [`segment_features`] does padded ones."""
    segments = packed.segments
    weights = segments.weights()
    lengths = segments.lengths.clamp(min=1).unsqueeze(-1)
    parts: list[Tensor] = []
    for state in states:
        question, answer = (segments.sum(state, weights) / lengths).unflatten(0, (-1, 2)).unbind(1)
        square = (segments.sum(state.float().square(), weights) / lengths)[1::2]
        parts += [question, answer, (square - answer.square()).clamp(min=1e-6).sqrt()]
    return torch.cat([*parts, parts[-3] * parts[-2], segments.lengths.view(-1, 2).log1p()], dim=1)


class Running:
    """The states of an encoder, one at a time, of which only the newest is kept.

    Args:
        states (`Iterator[Tensor]`): the embedding output first.
    """

    def __init__(self, states: Iterator[Tensor]) -> None:
        self._states, self._newest = states, torch.empty(0)

    def __iter__(self) -> Iterator[Tensor]:
        """Return itself; what was read before is not read again."""
        return self

    def __next__(self) -> Tensor:
        """Return the next state."""
        self._newest = next(self._states)
        return self._newest

    def last(self) -> Tensor:
        """Run the encoder to its end, and return its last state, of shape `(tokens, units)`."""
        for _ in self:
            pass
        return self._newest
