"""Padding-free forward passes: texts end to end in one row, each of which attends to itself alone.

Does: register torch's variable-length attention (>= 2.10, on GPUs from Ampere on) as an attention function of transformers,
lay texts end to end, put the encoder's states back into the padded grid that heads read. sentence-transformers does
this for embedders that have flash-attn; this needs torch alone, and scorers have it too.
Does not: change a number beyond rounding: on the CPU, where each text is attended to in turn, it equals the padded way.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from car_datasets.batching import to_device

ATTENTION = "car_datasets_packed"
# Their first position is the padding token's, plus 1.
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"}
PACKABLE = {"bert", *POSITIONS_AFTER_PADDING}
TOKENS_MULTIPLE = 256  # few shapes on a GPU: kernels are chosen, and compiled, per shape


class Packed(NamedTuple):
    """Texts end to end.

    Args:
        input_ids, position_ids (`Tensor` of shape `(1, tokens)`): a last text of padding may fill the row up.
        bounds (`Tensor` of shape `(texts + 1,)`, int32): where each begins, and the end.
        longest (`int`): no text has more tokens than this.
        grid (`Tensor` of shape `(real tokens,)`): the place of every token in a padded batch, flattened.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: int
    grid: Tensor


def first_position(encoder_config: Any) -> int:
    """The position of a text's first token: 0, or for the RoBERTa family the one after the padding token's."""
    after = encoder_config.model_type in POSITIONS_AFTER_PADDING
    return int(encoder_config.pad_token_id) + 1 if after else 0


def can_pack(encoder_config: Any, dtype: str, device: torch.device) -> bool:
    """Whether packing is faster than padding here: torch's kernel reads half precision, on Ampere and later."""
    if device.type != "cuda" or dtype == "float32" or encoder_config.model_type not in PACKABLE:
        return False
    size = encoder_config.hidden_size // encoder_config.num_attention_heads
    if size % 8 or size > 256:  # what the kernel was made for
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:  # torch < 2.10
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def use_packing(encoder: nn.Module) -> None:
    """Give the encoder the attention of this module; from here on it reads [`Packed`] texts only."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_packed)
    encoder.set_attn_implementation(ATTENTION)


def pack(ids: Sequence[Sequence[int]], pad_id: int, position: int, limit: int, device: torch.device) -> Packed:
    """Lay token ids end to end.

    Args:
        ids: of texts of at most `limit` tokens.
        pad_id (`int`): what fills the row up to a multiple of [`TOKENS_MULTIPLE`] on a GPU.
        position (`int`): see [`first_position`].
        limit (`int`): the encoder's; a constant, so that no kernel waits for the host to learn the longest of a batch.
    """
    lengths = [len(row) for row in ids]
    real, width = sum(lengths), max(lengths)
    grid = np.concatenate([np.arange(n) + i * width for i, n in enumerate(lengths)])
    filler = -real % TOKENS_MULTIPLE if device.type == "cuda" and limit >= TOKENS_MULTIPLE else 0
    texts = [*ids, [pad_id] * filler] if filler else ids
    bounds = np.cumsum([0, *(len(row) for row in texts)])
    positions = np.concatenate([np.arange(len(row)) + position for row in texts])
    return Packed(
        to_device(np.concatenate(texts).astype(np.int64)[None], device),
        to_device(positions[None], device),
        to_device(bounds.astype(np.int32), device),
        limit,
        to_device(grid, device),
    )


def encode_packed(encoder: nn.Module, packed: Packed, shape: tuple[int, int], **kwargs: Any) -> tuple[Tensor, ...]:
    """Hidden states of packed texts, each put back into the padded grid of shape `(texts, longest, units)`, 0 between."""
    found = encoder(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        output_hidden_states=True,
        cu_seq_lens_q=packed.bounds,
        max_length_q=packed.longest,
        **kwargs,
    )

    def spread(states: Tensor) -> Tensor:
        padded = states.new_zeros((shape[0] * shape[1], states.shape[-1]))
        padded[packed.grid] = states[0, : len(packed.grid)]
        return padded.view(*shape, -1)

    return tuple(spread(states) for states in found.hidden_states)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: `(1, heads, tokens, size)` three times to `(1, tokens, heads, size)`.

    Raises:
        ValueError: the texts are not packed, or the encoder scales otherwise than by the square root of the size.
    """
    if cu_seq_lens_q is None or (scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6):
        raise ValueError(
            f"attention {ATTENTION!r} reads packed texts, with scores scaled by 1 / sqrt(head size), only."
        )
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        rows = [part[0].transpose(0, 1) for part in (query, key, value)]
        found = varlen_attn(*rows, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        return found.unsqueeze(0), None
    bounds = cu_seq_lens_q.tolist()
    parts = [
        nn.functional.scaled_dot_product_attention(*(part[:, :, start:end] for part in (query, key, value)))
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None
