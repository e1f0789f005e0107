"""Forward passes without padding: texts are laid end to end in one row, and each attends to itself alone.

Does: register torch's variable-length attention (torch >= 2.10, GPUs from Ampere on) with transformers; lay texts end
to end; put the encoder's states back into the padded grid that heads read. Needs no flash-attn.
Does not: change a score beyond rounding. On the CPU, for tests, each text is attended to in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from car_datasets.scoring.batching import to_device

ATTENTION = "car_datasets_packed"  # the name of `attend_packed` in transformers

# Models that number positions from the padding token's id + 1.
POSITIONS_AFTER_PADDING = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert"}
PACKABLE = {"bert", *POSITIONS_AFTER_PADDING}
TOKENS_MULTIPLE = 256  # keeps the number of different shapes small: a GPU chooses, and compiles, kernels per shape


class Packed(NamedTuple):
    """Texts end to end in one row.

    Args:
        input_ids, position_ids (`Tensor` of shape `(1, tokens)`): the row may end with a text of padding.
        bounds (`Tensor` of shape `(texts + 1,)`, int32): where each text begins, and the end of the last.
        longest (`int`): upper bound of the tokens in a text.
        grid (`Tensor` of shape `(real tokens,)`): position of every token in the flattened padded batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    bounds: Tensor
    longest: int
    grid: Tensor


def first_position(encoder_config: Any) -> int:
    """Return the position id of a text's first token: 0, or for the RoBERTa family the padding token's id + 1."""
    after = encoder_config.model_type in POSITIONS_AFTER_PADDING
    return int(encoder_config.pad_token_id) + 1 if after else 0


def can_pack(encoder_config: Any, dtype: str, device: torch.device) -> bool:
    """Return True if packing is faster than padding: in half precision, on a GPU from Ampere on."""
    # The kernel computes in half precision only.
    if device.type != "cuda" or dtype == "float32" or encoder_config.model_type not in PACKABLE:
        return False
    size = encoder_config.hidden_size // encoder_config.num_attention_heads
    if size % 8 or size > 256:  # sizes of an attention head that the kernel supports
        return False
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:  # torch < 2.10
        return False
    # 8.0 is Ampere.
    return torch.cuda.get_device_capability(device) >= (8, 0)


def use_packing(encoder: nn.Module) -> None:
    """Switch the encoder to the attention of this module; from now on it reads [`Packed`] texts only."""
    from transformers import AttentionInterface

    # transformers looks the function up by this name in every layer, so no class of a model is patched.
    AttentionInterface.register(ATTENTION, attend_packed)
    encoder.set_attn_implementation(ATTENTION)


def pack(ids: Sequence[Sequence[int]], pad_id: int, position: int, limit: int, device: torch.device) -> Packed:
    """Lay token ids end to end.

    Args:
        ids (`Sequence[Sequence[int]]`): token ids of each text, at most `limit`.
        pad_id (`int`): fills the row up to a multiple of [`TOKENS_MULTIPLE`] on a GPU.
        position (`int`): position id of a text's first token.
        limit (`int`): tokens that the encoder reads; a constant, so that no kernel waits for the longest of a batch.
        device (`torch.device`): of the encoder.
    """
    lengths = [len(row) for row in ids]
    real, width = sum(lengths), max(lengths)
    # Token j of text i is at i * width + j of the flattened padded batch of shape (texts, width).
    grid = np.concatenate([np.arange(n) + i * width for i, n in enumerate(lengths)])
    filler = -real % TOKENS_MULTIPLE if device.type == "cuda" and limit >= TOKENS_MULTIPLE else 0
    texts = [*ids, [pad_id] * filler] if filler else ids  # the filler is a text of its own, which no other attends to
    bounds = np.cumsum([0, *(len(row) for row in texts)])
    positions = np.concatenate([np.arange(len(row)) + position for row in texts])
    # Types: int64 for ids and positions, as embeddings take them; int32 for the bounds, as the kernel takes them.
    return Packed(
        to_device(np.concatenate(texts).astype(np.int64)[None], device),
        to_device(positions[None], device),
        to_device(bounds.astype(np.int32), device),
        limit,
        to_device(grid, device),
    )


def encode_packed(encoder: nn.Module, packed: Packed, shape: tuple[int, int], **kwargs: Any) -> tuple[Tensor, ...]:
    """Run the encoder on packed texts and return its hidden states in the padded grid, with 0 at the padding.

    Args:
        encoder (`nn.Module`): after [`use_packing`].
        packed ([`Packed`]): the texts.
        shape (`tuple[int, int]`): texts and tokens of the padded batch.
        kwargs: passed to the encoder.

    Returns:
        n + 1 tensors of shape `(texts, longest, units)`, the embedding output first.
    """
    output = encoder(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        output_hidden_states=True,
        cu_seq_lens_q=packed.bounds,
        max_length_q=packed.longest,
        **kwargs,
    )

    def spread(states: Tensor) -> Tensor:
        # states: (1, tokens, units); the tokens beyond the grid are those of the filler.
        padded = states.new_zeros((shape[0] * shape[1], states.shape[-1]))
        padded[packed.grid] = states[0, : len(packed.grid)]
        return padded.view(*shape, -1)

    return tuple(spread(states) for states in output.hidden_states)


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text; the attention function that transformers calls in every layer.

    Args:
        module (`nn.Module`): the layer; not used.
        query (`Tensor` of shape `(1, heads, tokens, size)`): of all texts, end to end.
        key (`Tensor` of shape `(1, heads, tokens, size)`): likewise.
        value (`Tensor` of shape `(1, heads, tokens, size)`): likewise.
        attention_mask (`Tensor`, *optional*): not used, as there is no padding.
        scaling (`float`, *optional*): factor of the scores; if given, it must be 1 / sqrt(size), the kernel's own.
        kwargs: `cu_seq_lens_q` (`Tensor`) and `max_length_q` (`int`): [`Packed`]'s `bounds` and `longest`, by the names
            of transformers.

    Returns:
        `Tensor` of shape `(1, tokens, heads, size)`, and `None` instead of attention weights.

    Raises:
        ValueError: the texts are not packed, or the encoder scales by another factor.
    """
    bounds: Tensor | None = kwargs.get("cu_seq_lens_q")
    if bounds is None or (scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6):
        raise ValueError(
            f"attention {ATTENTION!r} reads packed texts, with scores scaled by 1 / sqrt(head size), only."
        )
    # Queries and keys have the same bounds, as each text attends to itself.
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        longest = kwargs["max_length_q"]
        by_token = [part[0].transpose(0, 1) for part in (query, key, value)]  # (tokens, heads, size)
        return varlen_attn(*by_token, bounds, bounds, longest, longest).unsqueeze(0), None
    parts = [
        nn.functional.scaled_dot_product_attention(*(part[:, :, start:end] for part in (query, key, value)))
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None  # (1, heads, tokens, size) to (1, tokens, heads, size)
