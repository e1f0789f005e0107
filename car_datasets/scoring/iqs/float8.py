"""Linear layers in float8: weights and states of 8 bits, each row with a scale of its own.

Does: round a weight to float8 once and states as they come; multiply them by torch's scaled product, which GPUs from
Ada and Hopper on compute at twice the speed of half precision; refuse a machine or a model that cannot.
Does not: change the attention, norms, embeddings or the head, which stay in bfloat16 and float32.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8 = "float8"  # as a `dtype`
HIGHEST = 448.0  # the largest number of float8 with 4 bits of exponent and 3 of mantissa
MULTIPLE = 16  # of the units, which the product asks for

Weight: TypeAlias = Tensor | tuple[Tensor, Tensor]  # as it is, or in float8 with the scale of each row


def for_embedder(dtype: str) -> str:
    """Return the precision of an embedder next to a scorer in this one: float8 is for scores."""
    return "bfloat16" if dtype == FLOAT8 else dtype


def refuse_without_float8() -> None:
    """Raise ValueError if this machine cannot compute in float8: torch is too old, or no GPU is there."""
    if not hasattr(F, "scaled_mm"):
        raise ValueError(
            f"dtype={FLOAT8!r} needs torch 2.10 or newer, and this is {torch.__version__}: pip install --upgrade torch, "
            "or pass dtype='float16'."
        )
    if not torch.cuda.is_available():
        raise ValueError(f"dtype={FLOAT8!r} needs a GPU, and none is visible. Pass dtype='float32' on a CPU.")


def refuse_float8_on(device: torch.device, encoder_config: Any, packs: bool) -> None:
    """Raise ValueError if a device or an encoder cannot compute in float8.

    Args:
        device (`torch.device`): of the encoder.
        encoder_config (`PreTrainedConfig`): of the encoder.
        packs (`bool`): the encoder reads texts without padding, as [`can_pack`] says of bfloat16.
    """
    mend = "Pass dtype='float16'."
    if device.type != "cuda":
        raise ValueError(f"dtype={FLOAT8!r} needs a GPU, and this process is to use {device}. Pass dtype='float32'.")
    if torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(f"dtype={FLOAT8!r} needs a GPU from Ada or Hopper on; {device} is an older one. {mend}")
    sizes = (encoder_config.hidden_size, encoder_config.intermediate_size)
    if not packs or any(size % MULTIPLE for size in sizes):
        raise ValueError(
            f"dtype={FLOAT8!r} needs an encoder of BERT's structure with multiples of {MULTIPLE} units; this one is "
            f"{encoder_config.model_type!r} with {sizes[0]} and {sizes[1]}. {mend}"
        )


def to_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of numbers in float8, and the scale of each row, of shape `(rows, 1)`, float32."""
    scale = weight.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / HIGHEST
    return (weight.float() / scale).to(torch.float8_e4m3fn), scale


def linear(states: Tensor, weight: Weight, bias: Tensor) -> Tensor:
    """Return `states @ weight.T + bias`, multiplied in float8 if the weight is.

    Args:
        states (`(tokens, inputs)`): in bfloat16 for a weight in float8.
        weight (`Tensor` or `tuple`): of shape `(outputs, inputs)`; in float8 what [`to_float8`] returned.
        bias (`(outputs,)`): in the precision of the result.

    Returns:
        `Tensor` of shape `(tokens, outputs)`.
    """
    if isinstance(weight, Tensor):
        return F.linear(states, weight, bias)
    rows, scale = to_float8(states)
    by_row = F.ScalingType.RowWise
    product = F.scaled_mm(
        rows, weight[0].t(), scale, by_row, weight[1].t(), by_row, output_dtype=torch.bfloat16, use_fast_accum=True
    )
    return product + bias
