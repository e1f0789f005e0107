"""Texts without padding: laid end to end in one row of tokens, and pooled there, segment by segment.

Does: lay token ids end to end, or in a grid if their lengths hardly differ; sum, average and maximise states over texts,
or over question and answer, in float32; put states into the padded grid.
Does not: run an encoder, or know a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
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

# Texts whose common length would add at most this share of padding are laid out as a grid: padded attention was 1.6 times
# faster than attention over texts of any length, and attention is a tenth of the time.
GRID_PADDING = 0.02


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
        is_grid (`bool`): True if every text takes as many tokens as the longest; the row then has this shape.
        keys (`Tensor` of shape `(texts, 1, 1, longest)`, *optional*): for a grid of different lengths, True for real
            tokens.
        places (`Tensor` of shape `(real tokens,)`): where the tokens of the texts are in the row.
        grid (`Tensor` of shape `(real tokens,)`): where they are in the flattened padded batch.
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
    is_grid: bool
    keys: Tensor | None
    places: Tensor
    grid: Tensor
    lengths: Tensor
    segments: Segments
    answer_start: Tensor | None
    pad_id: int

    def spread(self, states: Tensor) -> Tensor:
        """Put states of the row into the padded grid, of shape `(texts, longest, units)`, with 0 at the padding."""
        if self.is_grid and self.keys is None:
            return states.view(*self.shape, -1)
        padded = states.new_zeros((self.shape[0] * self.shape[1], states.shape[-1]))
        padded[self.grid] = states[self.places]
        return padded.view(*self.shape, -1)

    def padded_ids(self) -> tuple[Tensor, Tensor]:
        """Return the token ids as a padded tensor and its mask, both of shape `(texts, longest)`, int64."""
        mask = torch.arange(self.shape[1], device=self.lengths.device) < self.lengths[:, None]
        ids = torch.full(self.shape, self.pad_id, device=mask.device).flatten()
        ids[self.grid] = self.input_ids[self.places]
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
    """Lay token ids end to end, or as a grid if that adds next to no padding.

    Args:
        ids (`Sequence[Sequence[int]]`): token ids of each text, at most `limit`.
        encoder_config (`PreTrainedConfig`): tells the padding token, and how positions are numbered.
        limit (`int`): tokens that the encoder reads; a constant, so that no kernel waits for the longest of a batch.
        device (`torch.device`): of the encoder.
        answer_starts (`Sequence[int]`, *optional*): the token at which each answer begins, to sum question and answer
            separately.
    """
    pad_id = int(encoder_config.pad_token_id or 0)
    lengths = np.array([len(row) for row in ids])
    flat = np.concatenate(ids).astype(np.int64)
    count, real, longest = len(ids), len(flat), int(lengths.max())
    is_grid = count * longest - real <= GRID_PADDING * real
    first = np.cumsum(lengths) - lengths  # of each text among the real tokens
    within = np.arange(real) - np.repeat(first, lengths)
    grid = within + np.repeat(np.arange(count) * longest, lengths)
    places, total, block = (
        (grid, count * longest, longest) if is_grid else (np.arange(real), -(-real // BLOCK) * BLOCK, BLOCK)
    )
    row = np.full(total, pad_id)
    row[places] = flat
    positions = np.zeros(total, dtype=np.int64)
    positions[places] = _positions(flat, within, first, lengths, encoder_config)
    if is_grid:
        bounds = np.arange(count + 1) * longest
    else:
        filler = np.arange(real + FILLER, total, FILLER)
        bounds = np.concatenate([first, [real], filler, [total] if total > real else []])
    different = is_grid and count * longest > real
    starts = None if answer_starts is None else np.asarray(answer_starts, dtype=np.int64)
    return Packed(
        to_device(row, device),
        to_device(positions, device),
        to_device(bounds.astype(np.int32), device),  # int32, as the kernel takes them
        limit,
        (count, longest),
        is_grid,
        to_device(np.arange(longest) < lengths[:, None], device)[:, None, None] if different else None,
        to_device(places, device),
        to_device(grid, device),
        to_device(lengths, device),
        _segments(places, total, block, lengths if starts is None else _halves(lengths, starts), device),
        None if starts is None else to_device(starts, device),
        pad_id,
    )


def _positions(
    flat: npt.NDArray[Any],
    within: npt.NDArray[Any],
    first: npt.NDArray[Any],
    lengths: npt.NDArray[Any],
    encoder_config: Any,
) -> npt.NDArray[Any]:
    """Return the position id of every real token, as the encoder itself numbers them."""
    start = first_position(encoder_config)
    is_pad = flat == encoder_config.pad_token_id
    if not start or not is_pad.any():
        return within + start
    # RoBERTa's do not count a padding token, also where a text spells one out.
    counted = np.cumsum(~is_pad)
    before = (counted - ~is_pad)[first]
    return np.where(is_pad, start - 1, counted - np.repeat(before, lengths) + start - 1)


def _halves(lengths: npt.NDArray[Any], starts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the lengths of question and answer of each text in turn."""
    return np.stack([starts, lengths - starts], axis=1).ravel()


def _segments(
    places: npt.NDArray[Any], total: int, block: int, lengths: npt.NDArray[Any], device: torch.device
) -> Segments:
    """Cut consecutive segments of these lengths, whose tokens are at `places` of the row, into pieces."""
    number = np.repeat(np.arange(len(lengths)), lengths)
    at = places // block
    begins = np.ones(len(places), dtype=bool)  # True for the first token of every piece
    begins[1:] = (np.diff(number) != 0) | (np.diff(at) != 0)
    blocks, owners = at[begins], number[begins]  # of each piece
    slot = np.arange(len(blocks)) - np.searchsorted(blocks, blocks)
    most = int(slot.max()) + 1
    slots = np.full(total, -1, dtype=np.int16)
    slots[places] = slot[np.cumsum(begins) - 1]
    per_segment = np.bincount(owners, minlength=len(lengths))
    rank = np.arange(len(owners)) - (np.cumsum(per_segment) - per_segment)[owners]
    pieces = np.full((len(lengths), int(per_segment.max())), total // block * most)
    pieces[owners, rank] = blocks * most + slot
    return Segments(
        to_device(slots.reshape(-1, block), device),
        to_device(pieces, device),
        most,
        to_device(lengths.astype(np.float32), device),
    )


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
        places = packed.starts() if config.pooling == "cls" else packed.places
        states = state[places].float()
        if shift is None or scale is None:
            return states
        if config.pooling == "max":  # of each token, that of its text
            texts = torch.repeat_interleave(packed.lengths, output_size=len(places))
            shift, scale = shift[texts], scale[texts]
        return (states - shift) * scale

    found: Tensor = next(map(pooled, states)) if combine is None else combine(map(pooled, states))
    if config.pooling == "max":
        found = found.masked_fill(~real[packed.places].unsqueeze(-1), float("-inf"))
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
