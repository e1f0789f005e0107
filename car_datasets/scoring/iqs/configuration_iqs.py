"""`IQSConfig`: the configuration of an IQS model, which names its parts and how they are combined.

Does: check the values, and name the argument in the error.
Does not: build a model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from car_datasets.loading.templates import PAPER_TEMPLATE
from car_datasets.utils.digests import public
from car_datasets.utils.settings import is_integer

OBJECTIVE_NAMES = ("regression", "ranking")
LAYER_MIXES = ("sparsemax", "softmax")
POOLINGS = ("avg", "max", "cls")
# The keys of `HEADS`, which is defined with the model: a configuration must be checked without building one.
HEAD_NAMES = (
    "feed_forward",
    "segments",
    "parts",
    "kernel",
)


@public
class IQSConfig(PreTrainedConfig):
    """Configuration of [`IQSModel`]. The defaults are the original's (`configs/models/instruction_score.yaml` of CaR).

    Args:
        encoder_config (`dict` or `PreTrainedConfig`, *optional*): the configuration of the encoder; defaults to the
            shape of XLM-RoBERTa-large.
        objective (`str`): `"regression"`: a head scores the entire text. `"ranking"`, the original's "Comet" variant:
            question and answer are encoded separately and the score is `1 / (1 + distance)`.
        head (`str`): `"feed_forward"`, the original's, reads the pooled combination of layers. `"segments"`, the
            default scorer's, reads question and answer, pooled separately, and the words of the answer; `layer_mix`,
            `layer`, `layer_norm` and `pooling` do not apply to it. `"parts"` also reads both apart, from a state below
            its own copy of the encoder's top layers, and judges soundness, worth and an expert's revision as well.
        layer_mix (`str`): how the encoder's n + 1 hidden states (the embedding output counts as one) are combined:
            `"sparsemax"` or `"softmax"` weights times `gamma`.
        layer (`int`, *optional*): read this hidden state alone instead of a mix; 0 is the embedding output.
        layer_norm (`bool`): normalise each layer over a text's tokens and units before the mix (ELMo's scheme).
        pooling (`str`): `"avg"` over tokens (special tokens included), `"max"`, or `"cls"`, the first token.
        hidden_sizes (`Sequence[int]`): widths of the head's hidden layers; empty for a linear head. With `"segments"`
            two: the width of each member's network and that of the integrity network; with `"parts"` one, of each
            member's network.
        activation (`str`): name of a `torch.nn` activation, between the head's layers.
        final_activation (`str`, *optional*): the same, after the last layer. `None`: scores are not bounded.
        dropout (`float`): in training only: in the head, and of entire layers in a weighted mix, as in COMET.
        max_tokens (`int`): tokens read of a text, special tokens included. The original's 510 is 514 positions - 4.
        template (`str`): name of the text template that the weights were trained with.
        members (`int`): with `"segments"` and `"parts"`: networks that vote on quality.
        word_bits (`int`): with `"segments"`: bits of the hash of words.
        penalty (`float`): with `"segments"` and `"parts"`: the most that a broken answer loses.
        fork_layers (`int`): with `"parts"`: top layers of the encoder that the head has a copy of; 0 reads its last
            state.
        fork_dropout (`float`): with `"parts"`: dropout in the fork, in training only.
        queries (`int`): with `"parts"`: learned queries that pool tokens by attention.
        encoder_source (`dict`, *optional*): for a model whose weights file leaves out an unchanged encoder:
            `{"model_id", "revision", "sha256"}` of the model that the encoder comes from.
        languages (`Sequence[str]`): codes (ISO 639-1) of the languages that the model was made to score; empty if that
            is not known. `curate` refuses pools in other languages.

    Raises:
        ValueError: a value is invalid; the message names the argument.
    """

    model_type = "car_iqs"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["hidden_states"]  # `Trainer` gathers all other outputs

    # Every argument needs a default: transformers builds `IQSConfig()` to save only the values that differ from it.
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
        template: str = PAPER_TEMPLATE,
        members: int = 1,
        word_bits: int = 17,
        penalty: float = 1.0,
        fork_layers: int = 0,
        fork_dropout: float = 0.1,
        queries: int = 0,
        encoder_source: dict[str, str] | None = None,
        languages: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        # Here, because the model is built after its weights were downloaded, and would fail with a KeyError.
        for argument, value, known in (
            ("objective", objective, OBJECTIVE_NAMES),
            ("head", head, HEAD_NAMES),
            ("layer_mix", layer_mix, LAYER_MIXES),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in known:
                raise ValueError(f"{argument}={value!r} is not known; choose one of {known}.")
        _check_numbers(hidden_sizes, layer, dropout, max_tokens, members, word_bits, penalty)
        _check_fork(fork_layers, fork_dropout, queries)
        for argument, name in (("activation", activation), ("final_activation", final_activation)):
            if not (name is None and argument == "final_activation") and not _is_activation(name):
                raise ValueError(f"{argument}={name!r} is not the name of a torch.nn activation, such as 'Tanh'.")
        if not isinstance(template, str):
            raise ValueError(f"template={template!r} is not the name of a template, such as 'paper'.")
        if encoder_source is not None and not _names_model(encoder_source):
            raise ValueError(f"encoder_source={encoder_source!r} must have the texts 'model_id', 'revision', 'sha256'.")
        if head in ("segments", "kernel") and (objective != "regression" or len(hidden_sizes) != 2):
            raise ValueError(
                f"head={head!r} needs objective='regression' and two hidden_sizes, not {objective!r} and "
                f"{list(hidden_sizes)}."
            )
        if head == "parts" and (objective != "regression" or len(hidden_sizes) != 1):
            raise ValueError(
                f"head='parts' needs objective='regression' and one hidden size, not {objective!r} and "
                f"{list(hidden_sizes)}."
            )
        self.encoder_config = _as_config(encoder_config)
        if head == "parts" and fork_layers > self.encoder_config.num_hidden_layers:
            raise ValueError(
                f"fork_layers={fork_layers}, but the encoder has {self.encoder_config.num_hidden_layers} layers."
            )
        self.objective = objective
        self.head = head
        self.layer_mix = layer_mix
        self.layer = layer
        self.layer_norm = layer_norm
        self.pooling = pooling
        # A list, as JSON gives it back, so that a configuration equals the one that was saved.
        self.hidden_sizes = list(hidden_sizes)
        self.activation = activation
        self.final_activation = final_activation
        self.dropout = dropout
        self.max_tokens = max_tokens
        self.template = template
        self.members = members
        self.word_bits = word_bits
        self.penalty = penalty
        self.fork_layers = fork_layers
        self.fork_dropout = fork_dropout
        self.queries = queries
        self.encoder_source = encoder_source
        self.languages = check_languages(languages)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, the encoder's included."""
        values: dict[str, Any] = super().to_dict()
        values["encoder_config"] = self.encoder_config.to_dict()  # else an object, which JSON cannot hold
        values["encoder_config"].pop("_name_or_path", None)  # a path of the machine, which published models would show
        return values


def _check_numbers(
    hidden_sizes: Any, layer: Any, dropout: Any, max_tokens: Any, members: Any, word_bits: Any, penalty: Any
) -> None:
    """Raise ValueError if one of the numbers of a configuration, which a file may give, is no number or no size."""
    if not isinstance(hidden_sizes, (list, tuple)) or not all(is_integer(n) and n > 0 for n in hidden_sizes):
        raise ValueError(f"hidden_sizes={hidden_sizes!r} must be a list of widths, each at least 1.")
    if layer is not None and not is_integer(layer):
        raise ValueError(f"layer={layer!r} must be the number of a hidden state, or None for all.")
    # Of max_tokens two are special tokens. The hash of words has 32 bits, of which some are kept.
    sizes = (("max_tokens", max_tokens, 3, 2**31), ("members", members, 1, 2**31), ("word_bits", word_bits, 1, 31))
    for argument, value, least, most in sizes:
        if not is_integer(value) or not least <= value <= most:
            raise ValueError(f"{argument}={value!r} must be a whole number from {least} to {most}.")
    for argument, value, limit in (("dropout", dropout, 1.0), ("penalty", penalty, float("inf"))):
        if not isinstance(value, (int, float)) or not 0 <= value <= limit:
            raise ValueError(f"{argument}={value!r} must be a number from 0 to {limit}.")


def _check_fork(fork_layers: Any, fork_dropout: Any, queries: Any) -> None:
    """Raise ValueError if one of the numbers of the head "parts" is no number or no size."""
    for argument, value, most in (("fork_layers", fork_layers, 2**10), ("queries", queries, 2**10)):
        if not is_integer(value) or not 0 <= value <= most:
            raise ValueError(f"{argument}={value!r} must be a whole number from 0 to {most}.")
    if not isinstance(fork_dropout, (int, float)) or not 0 <= fork_dropout <= 1:
        raise ValueError(f"fork_dropout={fork_dropout!r} must be a number from 0 to 1.")


def _is_activation(name: Any) -> bool:
    """Return True for the name of an activation in torch.nn; others of its classes would fail later, or do nothing."""
    return isinstance(name, str) and (name in nn.modules.activation.__all__ or name == "Identity")


def _names_model(source: Any) -> bool:
    return isinstance(source, dict) and all(
        isinstance(source.get(name), str) for name in ("model_id", "revision", "sha256")
    )


def check_languages(languages: Sequence[str]) -> list[str]:
    """Return codes of languages as a list.

    Raises:
        ValueError: they are not a list of codes such as "en".
    """
    if not isinstance(languages, (list, tuple)) or not all(
        re.fullmatch("[a-z]{2,3}(-[A-Za-z0-9]+)*", str(code)) for code in languages
    ):
        raise ValueError(f"languages={languages!r} must be a list of codes such as ['en', 'de'] (ISO 639).")
    return [str(code) for code in languages]


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
            max_position_embeddings=514,  # 512, and 2 as positions are counted from the padding token's id + 1
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
    if not isinstance(encoder_config, dict) or not isinstance(encoder_config.get("model_type"), str):
        raise ValueError("encoder_config must be a configuration of transformers, with an entry 'model_type'.")
    return AutoConfig.for_model(**encoder_config)


# So that `AutoConfig.from_pretrained` knows `model_type`, once this module is imported.
AutoConfig.register(IQSConfig.model_type, IQSConfig)
