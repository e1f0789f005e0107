"""IQS, the instruction quality model, as an ordinary transformers model.

Does: encoder -> combination of its layers -> pooling over tokens -> feed-forward head -> one score per text; the
original's architecture (CaR sec. 3.1, COMET's regression metric) is `IQSConfig()`, the embedded default is another
configuration of the same parts.
Does not: read text (formatting.py), make batches (batching.py), or find weights (hub.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from car_datasets import hub

LAYER_MIXES = ("sparsemax", "softmax", "concat")
POOLINGS = ("avg", "max", "cls")


class IQSConfig(PreTrainedConfig):
    """Configuration of [`IQSModel`]. The defaults are the original's (`configs/models/instruction_score.yaml` of CaR).

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*): the encoder, as its own configuration; defaults to
            XLM-RoBERTa-large's shape.
        layer_mix (`str`): how the encoder's n + 1 hidden states (the embedding output counts as one) are combined:
            `"sparsemax"` or `"softmax"` weights times `gamma`, or `"concat"`, side by side.
        layer (`int`, *optional*): read this one hidden state instead of a mix; 0 is the embedding output.
        layer_norm (`bool`): normalise each layer over a text's tokens and units before the mix (ELMo's scheme).
        pooling (`str`): `"avg"` over tokens (special tokens included), `"max"`, or `"cls"`, the first token.
        hidden_sizes (`Sequence[int]`): widths of the head's hidden layers; empty for a linear head.
        activation (`str`): name of a `torch.nn` activation, between the head's layers.
        final_activation (`str`, *optional*): the same, after the last layer. `None`: scores are not bounded.
        dropout (`float`): in the head, in training only.
        max_tokens (`int`): tokens read of a text, special tokens included. The original's 510 is 514 positions - 4.
        template (`str`): the name in formatting.py of the template that the weights were trained with.
        encoder_source (`dict`, *optional*): set where the encoder is untouched and not part of the weights file:
            `{"model_id", "revision", "sha256"}` of the model it comes from.
    """

    model_type = "car_iqs"

    def __init__(
        self,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        layer_mix: str = "sparsemax",
        layer: int | None = None,
        layer_norm: bool = False,
        pooling: str = "avg",
        hidden_sizes: Sequence[int] = (2048, 1024),
        activation: str = "Tanh",
        final_activation: str | None = None,
        dropout: float = 0.1,
        max_tokens: int = 510,
        template: str = "paper",
        encoder_source: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if layer_mix not in LAYER_MIXES:
            raise ValueError(f"layer_mix={layer_mix!r} is not known; choose one of {LAYER_MIXES}.")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not known; choose one of {POOLINGS}.")
        for argument, name in (("activation", activation), ("final_activation", final_activation)):
            if name is not None and not hasattr(nn, name):
                raise ValueError(f"{argument}={name!r} is not the name of a torch.nn activation, such as 'Tanh'.")
        self.encoder_config = _as_config(encoder_config)
        self.layer_mix = layer_mix
        self.layer = layer
        self.layer_norm = layer_norm
        self.pooling = pooling
        self.hidden_sizes = list(hidden_sizes)
        self.activation = activation
        self.final_activation = final_activation
        self.dropout = dropout
        self.max_tokens = max_tokens
        self.template = template
        self.encoder_source = encoder_source
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values, the encoder's included."""
        values: dict[str, Any] = super().to_dict()
        values["encoder_config"] = self.encoder_config.to_dict()
        return values


def _as_config(encoder_config: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(encoder_config, PreTrainedConfig):
        return encoder_config
    if encoder_config is None:
        return AutoConfig.for_model(
            "xlm-roberta",
            vocab_size=250002,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    return AutoConfig.for_model(**encoder_config)


class LayerCombination(nn.Module):
    """The encoder's hidden states to one state per token (`weighted` mixes) or n + 1 states side by side (`concat`)."""

    def __init__(self, num_states: int, mix: str, layer: int | None, layer_norm: bool) -> None:
        super().__init__()
        self.mix, self.layer, self.layer_norm = mix, layer, layer_norm
        if layer is None and mix != "concat":
            self.weight = nn.Parameter(torch.zeros(num_states))
            self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """`n + 1` tensors (batch, tokens, units) and a mask (batch, tokens) to one (batch, tokens, units or more)."""
        if self.layer is not None:
            return hidden_states[self.layer]
        if self.mix == "concat":
            return torch.cat(list(hidden_states), dim=-1)
        if self.layer_norm:
            hidden_states = [_normalise_text(h, mask) for h in hidden_states]
        weights = sparsemax(self.weight) if self.mix == "sparsemax" else self.weight.softmax(0)
        mixed = torch.einsum("l,lbtu->btu", weights, torch.stack(list(hidden_states)))
        return self.gamma * mixed


def _normalise_text(hidden: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit population variance over all real tokens and units of each text; no affine part."""
    real = mask.to(hidden.dtype).unsqueeze(-1)
    count = real.sum(dim=(1, 2), keepdim=True) * hidden.shape[-1]
    mean = (hidden * real).sum(dim=(1, 2), keepdim=True) / count
    variance = (((hidden - mean) * real) ** 2).sum(dim=(1, 2), keepdim=True) / count
    return (hidden - mean) / torch.sqrt(variance + 1e-12)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of a vector onto the simplex (Martins and Astudillo 2016, algorithm 1): exact zeros."""
    ordered = scores.sort(descending=True).values
    cumulated = ordered.cumsum(0) - 1
    ranks = torch.arange(1, len(scores) + 1, device=scores.device, dtype=scores.dtype)
    support = int((ordered * ranks > cumulated).sum())
    return (scores - cumulated[support - 1] / support).clamp(min=0)


class IQSModel(PreTrainedModel):
    """Scores a text: higher reads more like an expert's revision. Trained on labels 0 (model answer) and 1 (revision).

    Example:

    ```python
    >>> model = IQSModel.from_pretrained("path/to/model")
    >>> model(**tokenizer("Instruction: ... Response: ...", return_tensors="pt")).logits  # shape (1, 1)
    ```
    """

    config_class = IQSConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: IQSConfig) -> None:
        super().__init__(config)
        encoder = config.encoder_config
        if config.layer is not None and not 0 <= config.layer <= encoder.num_hidden_layers:
            raise ValueError(
                f"layer={config.layer}; the encoder has the hidden states 0 to {encoder.num_hidden_layers}."
            )
        num_states = encoder.num_hidden_layers + 1
        self.encoder = AutoModel.from_config(encoder, **_without_pooler(encoder))
        self.layers = LayerCombination(num_states, config.layer_mix, config.layer, config.layer_norm)
        concatenated = config.layer is None and config.layer_mix == "concat"
        self.head = feed_forward(config, encoder.hidden_size * (num_states if concatenated else 1))
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model; where its folder holds the head only, the encoder comes from `config.encoder_source`.

        Args:
            pretrained_model_name_or_path (`str`): a Hub id or a folder; `car_datasets.hub.default_scorer_folder()` is
                the embedded default's.
            kwargs: as in `PreTrainedModel.from_pretrained` (`dtype`, `revision`, `token`, `attn_implementation`, ...).

        Raises:
            ValueError: weights are missing, unknown, or of another shape (transformers itself only warns, the original
                says nothing: either way random weights would give scores).
        """
        kwargs.setdefault(
            "dtype", torch.float32
        )  # a half-precision file would else be run in half precision, on CPUs too
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        info = kwargs.pop("output_loading_info", False)
        config = kwargs.pop("config", None) or IQSConfig.from_pretrained(
            pretrained_model_name_or_path, **_where(kwargs)
        )
        found: str | os.PathLike[str] | None = pretrained_model_name_or_path
        if config.encoder_source is not None:
            head = load_file(Path(pretrained_model_name_or_path) / "model.safetensors")
            found, kwargs["state_dict"] = None, {**head, **_source_encoder(config, kwargs.get("token"))}
        model, report = super().from_pretrained(found, config=config, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
        if wrong:
            raise ValueError(f"The weights in {pretrained_model_name_or_path} do not fit the configuration: {wrong}.")
        return (model, report) if info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers; the folder is whole, with its encoder, which may have been trained since it was loaded."""
        source, self.config.encoder_source = self.config.encoder_source, None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.encoder_source = source

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """Score a batch of tokenised texts.

        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 1 for real tokens; defaults to all ones.
            labels (`Tensor` of shape `(batch,)`, *optional*): targets; gives the mean squared error as `loss`.

        Returns:
            `SequenceClassifierOutput`: `logits` of shape `(batch, 1)` in float32, the scores, not bounded;
            `hidden_states`, the encoder's, the embedding output first.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
        states = self.layers(encoded.hidden_states, attention_mask)
        pooled = self._pool(states, input_ids, attention_mask)
        logits = self.head(pooled.to(self.head[0].weight.dtype)).float()
        loss = nn.functional.mse_loss(logits.squeeze(-1), labels.float()) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)

    def _pool(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return states[:, 0]
        # The original looks for pad *ids*, which a text that spells out "<pad>" also holds; its sum leaves them out and
        # its denominator counts them.
        real = (input_ids != self.config.encoder_config.pad_token_id).unsqueeze(-1)
        if self.config.pooling == "max":
            return states.masked_fill(~real, float("-inf")).max(dim=1).values
        total = (states * real).sum(dim=1)
        return total / attention_mask.sum(dim=1, keepdim=True).to(states.dtype)


def _where(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that say where to look, which the configuration's own loading needs too."""
    names = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    return {name: kwargs[name] for name in names if name in kwargs}


def _source_encoder(config: IQSConfig, token: str | None) -> dict[str, Tensor]:
    source = config.encoder_source or {}
    folder = hub.model_folder(source["model_id"], source["revision"], token)
    unused = ("pooler.", "embeddings.position_ids")
    weights = load_file(folder / "model.safetensors")
    return {f"encoder.{name}": tensor for name, tensor in weights.items() if not name.startswith(unused)}


def _without_pooler(encoder: PreTrainedConfig) -> dict[str, bool]:
    """BERT-like encoders carry a pooler that no score uses; leaving it out keeps it out of the weights file."""
    return {"add_pooling_layer": False} if encoder.model_type in {"bert", "roberta", "xlm-roberta"} else {}


def feed_forward(config: IQSConfig, width: int) -> nn.Sequential:
    """The head: `len(hidden_sizes)` blocks of linear, activation and dropout, then one linear unit."""
    parts: list[nn.Module] = []
    for size in config.hidden_sizes:
        parts += [nn.Linear(width, size), getattr(nn, config.activation)(), nn.Dropout(config.dropout)]
        width = size
    parts.append(nn.Linear(width, 1))
    if config.final_activation is not None:
        parts.append(getattr(nn, config.final_activation)())
    return nn.Sequential(*parts)


AutoConfig.register(IQSConfig.model_type, IQSConfig)
AutoModel.register(IQSConfig, IQSModel)
