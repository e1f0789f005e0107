"""`IQSConfig`: the parts of an IQS model and how they are put together; every value is checked here, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

OBJECTIVES = ("regression", "ranking")
LAYER_MIXES = ("sparsemax", "softmax")
POOLINGS = ("avg", "max", "cls")
HEADS = ("feed_forward", "segments")


class IQSConfig(PreTrainedConfig):
    """Configuration of [`IQSModel`]. The defaults are the original's (`configs/models/instruction_score.yaml` of CaR).

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*): the encoder, as its own configuration; defaults to
            XLM-RoBERTa-large's shape.
        objective (`str`): `"regression"`, a head scores the whole text; or `"ranking"`, the original's "Comet" variant:
            question and answer are encoded apart and the score is `1 / (1 + distance)`.
        head (`str`): `"feed_forward"`, the original's, on the combination of layers, pooled; or `"segments"`, the embedded
            default's, on question and answer pooled apart and the words of the answer, which the four arguments that
            follow do not concern.
        layer_mix (`str`): how the encoder's n + 1 hidden states (the embedding output counts as one) are combined:
            `"sparsemax"` or `"softmax"` weights times `gamma`.
        layer (`int`, *optional*): read this one hidden state instead of a mix; 0 is the embedding output.
        layer_norm (`bool`): normalise each layer over a text's tokens and units before the mix (ELMo's scheme).
        pooling (`str`): `"avg"` over tokens (special tokens included), `"max"`, or `"cls"`, the first token.
        hidden_sizes (`Sequence[int]`): widths of the head's hidden layers; empty for a linear head. With `"segments"` two:
            of each member's network and of the integrity network.
        activation (`str`): name of a `torch.nn` activation, between the head's layers.
        final_activation (`str`, *optional*): the same, after the last layer. `None`: scores are not bounded.
        dropout (`float`): in training only: in the head, and of whole layers in a weighted mix, as in COMET.
        max_tokens (`int`): tokens read of a text, special tokens included. The original's 510 is 514 positions - 4.
        template (`str`): the name in templates.py of the template that the weights were trained with.
        members (`int`), word_bits (`int`), penalty (`float`): with `"segments"`: networks that vote on quality; bits of
            the hash of words; what a broken answer loses.
        encoder_source (`dict`, *optional*): set where the encoder is untouched and not part of the weights file:
            `{"model_id", "revision", "sha256"}` of the model it comes from.
    """

    model_type = "car_iqs"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states"]  # `Trainer` gathers what is left

    def __init__(
        self,
        encoder_config: dict[str, Any] | PreTrainedConfig | None = None,
        objective: str = "regression",
        head: str = "feed_forward",
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
        members: int = 1,
        word_bits: int = 17,
        penalty: float = 1.0,
        encoder_source: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        for argument, value, known in (
            ("objective", objective, OBJECTIVES),
            ("head", head, HEADS),
            ("layer_mix", layer_mix, LAYER_MIXES),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in known:
                raise ValueError(f"{argument}={value!r} is not known; choose one of {known}.")
        for argument, name in (("activation", activation), ("final_activation", final_activation)):
            if name is not None and not hasattr(nn, name):
                raise ValueError(f"{argument}={name!r} is not the name of a torch.nn activation, such as 'Tanh'.")
        if head == "segments" and (objective != "regression" or len(hidden_sizes) != 2):
            raise ValueError(
                f"head='segments' wants objective='regression' and two hidden_sizes, not {objective!r} and {list(hidden_sizes)}."
            )
        self.encoder_config = _as_config(encoder_config)
        self.objective = objective
        self.head = head
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
        self.members = members
        self.word_bits = word_bits
        self.penalty = penalty
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


AutoConfig.register(IQSConfig.model_type, IQSConfig)
