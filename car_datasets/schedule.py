"""What learns how fast, and from when on: the original's optimiser settings for transformers' `Trainer`."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import TrainerCallback

from car_datasets.modeling_iqs import IQSModel

_LAYER = re.compile(r"\b(?:layer|layers|h|block|blocks)\.(\d+)\.")


def parameter_groups(
    model: IQSModel,
    learning_rate: float,
    encoder_learning_rate: float,
    layerwise_decay: float,
    keep_embeddings_frozen: bool = True,
) -> list[dict[str, Any]]:
    """AdamW's groups: head and layer mix at `learning_rate`, the encoder at its own, less for each layer further down.

    Layer i of n (0 nearest to the embeddings) learns at `encoder_learning_rate * layerwise_decay ** (n - 1 - i)`: the
    top layer fastest, since what lies below is the more general (Howard and Ruder 2018, sec. 3.2). The original's code
    does the reverse, gives layer i the factor decay ** i, and leaves layer 0 out altogether. Embeddings that are not
    kept frozen count as one layer below layer 0.
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
            found = _LAYER.search(name)
            below_top = layers - 1 - int(found.group(1)) if found else 0
            rate = encoder_learning_rate * layerwise_decay**below_top
        groups.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class ThawEncoder(TrainerCallback):
    """Keeps the encoder still for the first `epochs` (a fraction is meant), then lets it learn.

    Frozen after `Trainer` has wrapped the model, so that the wrapper knows of every parameter that will ever learn.
    """

    def __init__(self, encoder: nn.Module, epochs: float) -> None:
        self.parameters = [p for p in encoder.parameters() if p.requires_grad]
        self.epochs = epochs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze, unless a resumed run is past it."""
        self._set((state.epoch or 0.0) >= self.epochs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Thaw when the time has come."""
        if (state.epoch or 0.0) >= self.epochs:
            self._set(True)

    def _set(self, learns: bool) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(learns)
