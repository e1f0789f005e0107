"""Optimiser parameter groups with layer-wise learning-rate decay, and a callback that unfreezes the encoder."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import TrainerCallback

from car_datasets.modeling_iqs import IQSModel

# The number of a layer in a parameter's name: `layer.3.` in BERT, `layers.3.`, `h.3.` or `block.3.` elsewhere.
_LAYER = re.compile(r"\b(?:layer|layers|h|block|blocks)\.(\d+)\.")


def parameter_groups(
    model: IQSModel,
    learning_rate: float,
    encoder_learning_rate: float,
    layerwise_decay: float,
    keep_embeddings_frozen: bool = True,
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, with rates that decay from the encoder's top layer downwards.

    Layer i of n (0 is next to the embeddings) learns at `encoder_learning_rate * layerwise_decay ** (n - 1 - i)`: the
    top layer fastest, since lower layers are more general (Howard and Ruder 2018, sec. 3.2). The original's code does
    the reverse: it gives layer i the factor decay ** i, and never trains layer 0.

    Args:
        model ([`IQSModel`]): the model; its embeddings are frozen in place if `keep_embeddings_frozen`.
        learning_rate (`float`): learning rate of head and layer mix.
        encoder_learning_rate (`float`): learning rate of the encoder's top layer.
        layerwise_decay (`float`): ratio of each layer's learning rate to that of the layer above it.
        keep_embeddings_frozen (`bool`): do not train the embeddings; otherwise they count as one layer below layer 0.
    """
    layers = model.config.encoder_config.num_hidden_layers
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            rate = learning_rate
        elif name.startswith("encoder.embeddings."):
            if keep_embeddings_frozen:
                parameter.requires_grad_(False)
                continue
            rate = encoder_learning_rate * layerwise_decay**layers
        else:
            match = _LAYER.search(name)
            # Without a number it is a pooler or a final norm, above the top layer.
            below_top = layers - 1 - int(match.group(1)) if match else 0
            rate = encoder_learning_rate * layerwise_decay**below_top
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class ThawEncoder(TrainerCallback):
    """A callback that freezes the encoder for the first `epochs` epochs (may be a fraction), then unfreezes it.

    It freezes when training begins, after `Trainer` has wrapped the model: DistributedDataParallel registers only the
    parameters that require gradients when it is created, so an encoder frozen earlier would never be synchronised.
    """

    def __init__(self, encoder: nn.Module, epochs: float) -> None:
        self.parameters = [p for p in encoder.parameters() if p.requires_grad]
        self.epochs = epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze the encoder, unless a resumed run is already past that point."""
        self._require_gradients((state.epoch or 0.0) >= self.epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unfreeze the encoder once `epochs` have passed."""
        if (state.epoch or 0.0) >= self.epochs:
            self._require_gradients(True)

    def _require_gradients(self, required: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(required)
