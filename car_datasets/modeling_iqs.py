"""IQS, the instruction quality model, as an ordinary transformers model.

Does: encoder -> combination of its layers -> pooling over tokens -> feed-forward head -> one score per text; the
original's architecture (CaR sec. 3.1, COMET's regression metric) is `IQSConfig()`, the embedded default is another
configuration of the same parts, and so is the ranking variant, which has a distance in the head's place.
Does not: read text (formatting.py), make batches (batching.py), or find weights (hub.py).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from car_datasets import digests, hub
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.layers import LayerCombination, SegmentHead, closeness, feed_forward, normalise_text
from car_datasets.packing import Packed, encode_packed
from car_datasets.publishing import write_card
from car_datasets.segments import hashed_words, segment_features


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
    accepts_loss_kwargs = False  # forward's **kwargs are the encoder's; Trainer would take them for its own

    def __init__(self, config: IQSConfig) -> None:
        super().__init__(config)
        encoder = config.encoder_config
        if config.layer is not None and not 0 <= config.layer <= encoder.num_hidden_layers:
            raise ValueError(
                f"layer={config.layer}; the encoder has the hidden states 0 to {encoder.num_hidden_layers}."
            )
        self.encoder = AutoModel.from_config(encoder, **_without_pooler(encoder))
        if config.head == "segments":
            self.head: nn.Module = SegmentHead(config)
        elif config.layer is None:
            self.layers = LayerCombination(encoder.num_hidden_layers + 1, config.layer_mix, config.dropout)
        if config.objective == "regression" and config.head == "feed_forward":
            self.head = feed_forward(config, encoder.hidden_size)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model; where its folder holds the head only, the encoder comes from `config.encoder_source`.

        Args:
            pretrained_model_name_or_path (`str`): a Hub id or a folder; `car_datasets.hub.default_scorer_folder()` is
                the embedded default's. A folder, file or Hub id in the original's layout is converted on the way.
            tokenizer (`str`, *optional*): for the original's layout only, see [`convert`].
            kwargs: as in `PreTrainedModel.from_pretrained` (`dtype`, `revision`, `token`, `attn_implementation`, ..., and
                fields of the configuration, which win over the file's). Weights of the Hub are safetensors, or the
                original's, at the commit that `revision` means now.

        Raises:
            ConnectionError: the Hub does not answer.
            ValueError: there is no such model; weights are missing, unknown, or of another shape (transformers itself only
                warns, the original says nothing: either way random weights would give scores).
        """
        kwargs.setdefault("dtype", torch.float32)  # else a half-precision file would run so, on CPUs too
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        info = kwargs.pop("output_loading_info", False)
        tokenizer = kwargs.pop("tokenizer", None)
        token = kwargs.get("token")
        place = _find(pretrained_model_name_or_path, kwargs)
        found: Path | None = place
        if (checkpoint := digests.find_checkpoint(place)) is not None:
            converted = convert(checkpoint, tokenizer)
            options = inspect.signature(IQSConfig).parameters
            changes = {name: kwargs.pop(name) for name in list(kwargs) if name in options}
            config = IQSConfig(**{**converted.config, **changes})
            found, kwargs["state_dict"] = None, _without_unused_mix(converted.state, config)
        else:
            given = kwargs.pop("config", None)
            config = given or IQSConfig.from_pretrained(place)
            if config.encoder_source is not None:
                head = load_file(place / "model.safetensors")
                found, kwargs["state_dict"] = None, {**head, **_source_encoder(config, token)}
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

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, **kwargs: Any) -> str:
        """As in transformers, but a new repository is private unless `private=False` (transformers: public).

        The card is transformers' own; `car-datasets train ... --set push_to=you/name` pushes the one with the figures.
        """
        return str(super().push_to_hub(repo_id, private=private, **kwargs))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        question_ids: Tensor | None = None,
        question_mask: Tensor | None = None,
        rejected_ids: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        answer_start: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score a batch of tokenised texts.

        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids, of the whole text; with the objective
                `"ranking"`, of the answer.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 1 for real tokens; defaults to all ones.
            labels (`Tensor` of shape `(batch,)`, *optional*): targets; gives the mean squared error as `loss`.
            question_ids, question_mask (`Tensor`, *optional*): of the question, with the objective `"ranking"` only.
            rejected_ids, rejected_mask (`Tensor`, *optional*): of a worse answer, with the objective `"ranking"` only;
                gives the triplet margin loss of the original (margin 1, Euclidean) as `loss`, whatever `labels` say.
            answer_start (`Tensor` of shape `(batch,)`): with the head `"segments"` only: the position of the first token of
                the answer, "response".

        Returns:
            `SequenceClassifierOutput`: `logits` of shape `(batch, 1)` in float32, the scores, not bounded (in (0, 1) with
            the objective `"ranking"`; with a worse answer its score is a second column); `hidden_states` of `input_ids`,
            the embedding output first.
        """
        if self.config.objective == "regression":
            members, hidden_states = self.member_scores(input_ids, attention_mask, answer_start, **kwargs)
            logits = members.mean(dim=-1, keepdim=True)
        elif question_ids is None:
            raise ValueError("A ranking model scores an answer against its question: pass question_ids as well.")
        else:
            pooled, hidden_states = self.pool(input_ids, attention_mask, **kwargs)
            question, _ = self.pool(question_ids, question_mask, **kwargs)
            logits = closeness(question, pooled).unsqueeze(-1)
            if rejected_ids is not None:
                rejected, _ = self.pool(rejected_ids, rejected_mask, **kwargs)
                loss = nn.functional.triplet_margin_loss(question.float(), pooled.float(), rejected.float())
                both = torch.cat([logits, closeness(question, rejected).unsqueeze(-1)], dim=-1)
                return SequenceClassifierOutput(loss=loss, logits=both, hidden_states=hidden_states)
        loss = nn.functional.mse_loss(logits.squeeze(-1), labels.float()) if labels is not None else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states)

    def member_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        answer_start: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The score by each member of the head, of shape `(batch, members)`, float32, and the encoder's hidden states.

        Arguments as for [`~IQSModel.forward`]. Only the head `"segments"` has more than one member; their mean is the
        score, their standard deviation how far they disagree.
        """
        if self.config.head == "feed_forward":
            pooled, hidden_states = self.pool(input_ids, attention_mask, **kwargs)
            return self.head(pooled).float(), hidden_states
        if answer_start is None:
            raise ValueError("The head 'segments' reads question and answer apart: pass answer_start as well.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self._encode(input_ids, attention_mask, **kwargs)
        features = segment_features(hidden_states, attention_mask, answer_start)
        numbers, weights = hashed_words(input_ids, attention_mask, answer_start, self.config.word_bits)
        return self.head(features, numbers, weights).float(), hidden_states

    def _encode(
        self, input_ids: Tensor, attention_mask: Tensor, packed: Packed | None = None, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        if packed is not None:  # the same texts without the padding
            return encode_packed(self.encoder, packed, (input_ids.shape[0], input_ids.shape[1]), **kwargs)
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
        states: tuple[Tensor, ...] = found.hidden_states
        return states

    def pool(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One vector per text, of shape `(batch, units)`, before any head, and the encoder's hidden states.

        The combination of layers and all that follows is computed in the head's own precision, so that a half-precision
        encoder still tells texts apart.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self._encode(input_ids, attention_mask, **kwargs)
        return self._reduce(hidden_states, input_ids, attention_mask), hidden_states

    def _reduce(self, hidden_states: tuple[Tensor, ...], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Layers and tokens to one vector per text.

        Tokens are pooled first where the order is no matter, layer by layer: the whole stack in float32, 25 states for
        XLM-RoBERTa-large, would cost more memory than the forward pass.
        """
        layer, norm = self.config.layer, self.config.layer_norm
        precision = self.head[0].weight.dtype if self.config.objective == "regression" else torch.float32
        read = hidden_states if layer is None else (hidden_states[layer],)

        def prepared() -> Iterator[Tensor]:  # one at a time
            for states in read:
                states = states.to(precision)
                yield normalise_text(states, attention_mask) if norm and layer is None else states

        def combined(states: Iterable[Tensor]) -> Tensor:
            found: Tensor = next(iter(states)) if layer is not None else self.layers(list(states))
            return found

        if self.config.pooling == "max":
            return self._pool(combined(prepared()), input_ids, attention_mask)
        return combined(self._pool(states, input_ids, attention_mask) for states in prepared())

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


def _find(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """The folder or file behind a name; a Hub id's is downloaded, all of it at the commit that the id means now."""
    if Path(name).exists():
        return Path(name)
    revision, token = kwargs.pop("revision", None), kwargs.pop("token", None)
    return hub.model_folder(str(name), hub.pin_revision(str(name), revision, token), token)


def _without_unused_mix(state: dict[str, Tensor], config: IQSConfig) -> dict[str, Tensor]:
    """A model that reads one layer has no mix; the original may have saved one all the same."""
    return state if config.layer is None else {n: w for n, w in state.items() if not n.startswith("layers.")}


def _source_encoder(config: IQSConfig, token: str | None) -> dict[str, Tensor]:
    source = config.encoder_source or {}
    folder = hub.model_folder(source["model_id"], source["revision"], token)
    unused = ("pooler.", "embeddings.position_ids")
    seen = digests.file_digest(folder / "model.safetensors")
    if seen != source["sha256"]:
        raise ValueError(f"The head was trained on an encoder with sha256 {source['sha256']}; {folder} holds {seen}.")
    weights = load_file(folder / "model.safetensors")
    return {f"encoder.{name}": tensor for name, tensor in weights.items() if not name.startswith(unused)}


def _without_pooler(encoder: PreTrainedConfig) -> dict[str, bool]:
    """BERT-like encoders carry a pooler that no score uses; leaving it out keeps it out of the weights file."""
    return {"add_pooling_layer": False} if encoder.model_type in {"bert", "roberta", "xlm-roberta"} else {}


def convert_checkpoint(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], tokenizer: str | None = None
) -> None:
    """Write a checkpoint of the original's as an ordinary model folder: configuration, safetensors, tokenizer, card.

    Args:
        checkpoint (`str`): a `.ckpt`, or a folder or Hub id in the original's layout.
        output (`str`): a new folder.
        tokenizer (`str`, *optional*): folder or Hub id of the base model's tokenizer, see [`convert`].

    Raises:
        ValueError: `output` is there already, `checkpoint` is not in the original's layout, or see [`convert`].
    """
    if Path(output).exists():
        raise ValueError(f"output={str(output)!r} is there already; name a new folder.")
    found = digests.find_checkpoint(_find(checkpoint, {}))
    if found is None:
        raise ValueError(f"checkpoint={str(checkpoint)!r} holds no .ckpt file: it is not in the original's layout.")
    reader = load_tokenizer(base_model(found, tokenizer))
    model = IQSModel.from_pretrained(found, tokenizer=tokenizer)
    check_tokenizer(reader, model.config)
    reader.model_max_length = model.config.max_tokens
    model.save_pretrained(output)
    reader.save_pretrained(output)
    name = Path(output).resolve().name
    digest = digests.file_digest(found)
    write_card(
        Path(output), "converted_scorer_card.md.jinja", name=name, config=model.config, file=found.name, sha256=digest
    )


AutoModel.register(IQSConfig, IQSModel)
