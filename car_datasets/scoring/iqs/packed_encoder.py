"""The forward pass of BERT-like encoders over packed texts, from fused weights, compiled once it pays.

Does: compute the layers in half precision, their products in float8 if asked for (torch >= 2.10, GPUs from Ampere on);
compile what is between two attentions as one function for all layers. Needs no flash-attn.
Does not: change a score beyond rounding, or know the kernels of the attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from car_datasets.scoring.iqs.attention import attend
from car_datasets.scoring.iqs.float8 import Weight, linear, to_float8
from car_datasets.scoring.iqs.packing import PACKABLE, Packed

logger = logging.getLogger(__name__)

# Floating-point operations after which an encoder is compiled, about two minutes of a fast GPU: compiling takes six
# seconds, and saves a twentieth of the time, so that this many more pay for it (measured on an H200). A run that has
# lasted so long is likely to last as long again.
COMPILE_AFTER = 5e16


def can_pack(encoder_config: Any, dtype: str, device: torch.device) -> bool:
    """Return True if packing is faster than padding: in half precision, on a GPU from Ampere on."""
    # The kernel computes in half precision only.
    if device.type != "cuda" or dtype == "float32" or not _is_known(encoder_config):
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


def _is_known(encoder_config: Any) -> bool:
    """Return True for an encoder of BERT's structure, whose layers this module computes itself."""
    return (
        encoder_config.model_type in PACKABLE
        and not getattr(encoder_config, "is_decoder", False)
        and getattr(encoder_config, "position_embedding_type", None) in (None, "absolute")
    )


class Layer(NamedTuple):
    """The weights of a layer.

    Args:
        attention (`tuple[Weight, Tensor]`): weight and bias of query, key and value, one below the other.
        rest (`tuple[Weight, ...]`): what is after the attention: weight and bias of each of the output, its norm, the
            two feed-forward layers, and their norm.
    """

    attention: tuple[Weight, Tensor]
    rest: tuple[Weight, ...]


class PackedEncoder:
    """An encoder that reads packed texts.

    Args:
        encoder (`nn.Module`): a BERT, RoBERTa, XLM-RoBERTa or CamemBERT model, on its device and in its precision. Its
            weights of query, key and value become views of the fused ones, so that nothing is kept twice.
        compile_after (`float`, *optional*): floating-point operations after which it is compiled; `None` for never.
        float8 (`bool`): multiply in float8 the states with weights that are rounded to it, for an encoder in bfloat16.
    """

    def __init__(self, encoder: Any, compile_after: float | None = None, float8: bool = False) -> None:
        config = encoder.config
        self.heads, self.units = config.num_attention_heads, config.hidden_size
        # Products of the linear layers, per token: 4 of the attention, 2 of the feed-forward layers.
        self._work = config.num_hidden_layers * 2 * (4 * self.units + 2 * config.intermediate_size) * self.units
        self._embeddings = encoder.embeddings
        layers = [_layer(layer) for layer in encoder.encoder.layer]
        self._layers = [_in_float8(layer) for layer in layers] if float8 else layers
        self._step = _step_of(encoder.encoder.layer[0].intermediate.intermediate_act_fn, config.layer_norm_eps)
        self._fast: Callable[..., Tensor] | None = None  # the compiled step
        self._left = compile_after  # operations until it is compiled; `None` afterwards, or if it never is

    def states(self, packed: Packed) -> Iterator[Tensor]:
        """Yield the n + 1 hidden states of shape `(tokens, units)`, the embedding output first."""
        self._count(len(packed.input_ids))
        states = self._embed(packed)
        yield states
        for layer in self._layers:
            context = attend(linear(states, *layer.attention), packed, self.heads)
            states = self._after_attention(context, states, layer.rest)
            yield states

    def _embed(self, packed: Packed) -> Tensor:
        parts = self._embeddings
        words = parts.word_embeddings(packed.input_ids) + parts.token_type_embeddings.weight[0]
        embedded: Tensor = parts.LayerNorm(words + parts.position_embeddings(packed.position_ids))
        return embedded

    def _count(self, tokens: int) -> None:
        if self._left is None:
            return
        self._left -= self._work * tokens
        if self._left <= 0:
            self._left = None
            # One compilation for any number of tokens; all layers share it, as their weights are arguments.
            self._fast = torch.compile(self._step)

    def _after_attention(self, context: Tensor, states: Tensor, weights: tuple[Weight, ...]) -> Tensor:
        if self._fast is not None:
            try:
                for tensor in (context, states):
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                return self._fast(context, states, *weights)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                logger.debug("The encoder is not compiled: %s", error)
                self._fast = None
        return self._step(context, states, *weights)

    @property
    def is_compiled(self) -> bool:
        """Return True if the layers run compiled."""
        return self._fast is not None


def _layer(layer: Any) -> Layer:
    own, output = layer.attention.self, layer.attention.output
    parts = (own.query, own.key, own.value)
    weight, bias = (torch.cat([getattr(part, name).detach() for part in parts]) for name in ("weight", "bias"))
    for part, rows, numbers in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
        part.weight.data, part.bias.data = rows, numbers
    rest = (output.dense, output.LayerNorm, layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
    return Layer((weight, bias), tuple(tensor.detach() for part in rest for tensor in (part.weight, part.bias)))


def _in_float8(layer: Layer) -> Layer:
    # Weights are matrices, biases and norms are vectors.
    rest = (to_float8(part) if isinstance(part, Tensor) and part.dim() == 2 else part for part in layer.rest)
    weight, bias = layer.attention
    return Layer((to_float8(weight) if isinstance(weight, Tensor) else weight, bias), tuple(rest))


def _step_of(activation: Callable[[Tensor], Tensor], eps: float) -> Callable[..., Tensor]:
    """Return the function of all that is between two attentions, whose arguments are the weights of a layer."""

    def step(context: Tensor, states: Tensor, *weights: Any) -> Tensor:
        out, out_bias, scale, shift, up, up_bias, down, down_bias, last_scale, last_shift = weights
        units = (states.shape[-1],)
        states = F.layer_norm(linear(context, out, out_bias) + states, units, scale, shift, eps)
        wide = activation(linear(states, up, up_bias))
        return F.layer_norm(linear(wide, down, down_bias) + states, units, last_scale, last_shift, eps)

    return step
