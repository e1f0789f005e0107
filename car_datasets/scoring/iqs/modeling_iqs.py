"""IQS, the instruction quality model, as an ordinary transformers model.

Does: compute one score per text by an encoder, a combination of its layers, pooling over tokens, and a head.
`IQSConfig()` is the original's architecture (CaR sec. 3.1, COMET's regression metric); the default scorer and the
ranking variant, which has a distance instead of a head, are other configurations of the same parts.
Does not: read text, make batches, or train.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.scoring.iqs.heads import JUDGED, KernelHead, PartsHead
from car_datasets.scoring.iqs.layers import (
    LayerCombination,
    SegmentHead,
    closeness,
    feed_forward,
    hashed_words,
    normalise_text,
    segment_features,
)
from car_datasets.scoring.iqs.packed_encoder import PackedEncoder
from car_datasets.scoring.iqs.packing import Packed, Running, packed_segment_features, pool_packed
from car_datasets.utils import digests, revisions
from car_datasets.utils.digests import public
from car_datasets.utils.hub import write_card


@public
class IQSModel(PreTrainedModel):
    """A model that scores texts: the higher, the more a text reads like an expert's revision.

    Trained on the labels 0 (a model's answer) and 1 (an expert's revision of it).

    Example:
    ```python
    >>> model = IQSModel.from_pretrained("path/to/model")
    >>> model(**tokenizer("Instruction: ... Response: ...", return_tensors="pt")).logits  # shape (1, 1)
    ```
    """

    # Attributes that transformers reads from the class. The kinds of attention are those of the encoder.
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
        self.encoder = AutoModel.from_config(encoder, trust_remote_code=False, **_without_pooler(encoder))
        kind = HEADS[config.head]
        if kind.reads_pooled and config.layer is None:
            self.layers = LayerCombination(encoder.num_hidden_layers + 1, config.layer_mix, config.dropout)
        if config.objective == "regression":  # the ranking variant scores by the distance of two pooled vectors
            self.head = kind.build(config)
        self.judge: KernelHead | None = None  # of another model on the same encoder; see `read_kernel`
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a model; if its folder holds the head only, load the encoder from `config.encoder_source`.

        Args:
            pretrained_model_name_or_path (`str`): a Hub id or a folder. A folder, file or Hub id in the original's
                layout is converted on the way. The default scorer is in the folder that
                `car_datasets.utils.revisions.default_scorer_folder()` returns.
            tokenizer (`str`, *optional*): for the original's layout only: folder or Hub id of the base model's
                tokenizer.
            kwargs: as in `PreTrainedModel.from_pretrained` (`dtype`, `revision`, `token`, `attn_implementation`, ...),
                and fields of the configuration, which win over the file's. Weights on the Hub must be safetensors, or
                in the original's layout; `revision` is resolved to a commit first.

        Raises:
            ConnectionError: the Hub does not answer.
            ValueError: the model does not exist, or weights are missing, unknown, or of another shape (transformers
                itself only warns and the original says nothing: either way random weights would give scores).
        """
        kwargs.setdefault("dtype", torch.float32)  # else a half-precision file would run in half precision, on CPUs too
        kwargs["ignore_mismatched_sizes"] = True  # reported below, by name
        kwargs["trust_remote_code"] = False
        info = kwargs.pop("output_loading_info", False)
        tokenizer = kwargs.pop("tokenizer", None)
        token = kwargs.get("token")  # before `_find`, which takes it out for a model on the Hub
        # Given a `config`, transformers would pass fields of the configuration to the model's constructor.
        options = inspect.signature(IQSConfig).parameters
        changes = {name: kwargs.pop(name) for name in list(kwargs) if name in options}
        place = _find(pretrained_model_name_or_path, kwargs)
        # transformers takes weights from a folder or from `state_dict`, never both: `folder` is then None.
        folder: Path | None = place
        if (checkpoint := digests.find_checkpoint(place)) is not None:
            converted = convert(checkpoint, tokenizer)
            config = IQSConfig(**{**converted.config, **changes})
            # Copies: the converted weights are views of the mapped file, which may be overwritten later.
            state = {name: weight.clone() for name, weight in converted.state.items()}
            folder, kwargs["state_dict"] = None, _without_unused_mix(state, config)
        else:
            given = kwargs.pop("config", None)
            with revisions.reading_model(place):
                config = given or IQSConfig.from_pretrained(place)
            if changes:
                config = IQSConfig.from_dict({**config.to_dict(), **changes})  # checks the values, unlike setattr
            if config.encoder_source is not None:
                revisions.read_shapes([place / "model.safetensors"])  # refuses complex numbers
                with revisions.reading_model(place):
                    head = load_file(place / "model.safetensors")
                folder, kwargs["state_dict"] = None, {**head, **_source_encoder(config, token)}
            elif files := sorted(place.glob("*.safetensors")):
                revisions.refuse_other_sizes(place, config, revisions.read_shapes(files))
        with revisions.reading_model(place):
            model, report = super().from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
        # Missing, unexpected and mismatched keys, each by transformers' own name for the kind.
        wrong = {kind: sorted(map(str, keys))[:8] for kind, keys in report.items() if keys}
        if wrong:
            raise ValueError(
                f"The weights in {pretrained_model_name_or_path} do not fit the configuration: {wrong}. Download or save "
                "the model again."
            )
        return (model, report) if info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save as in transformers, always with the encoder, which may have been trained since it was loaded."""
        # Without the source, the model that is read back takes the encoder from the file.
        source, self.config.encoder_source = self.config.encoder_source, None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.encoder_source = source

    def push_to_hub(self, repo_id: str, *, private: bool | None = True, **kwargs: Any) -> str:
        """Push as in transformers, but make a new repository private unless `private=False` (transformers: public).

        The model card is that of transformers; `car-datasets train ... --set push_to=you/name` pushes one with figures.
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
            input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids, of the entire text; with the objective
                `"ranking"`, of the answer.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 1 for real tokens; defaults to all ones.
            labels (`Tensor` of shape `(batch,)`, *optional*): targets; gives the mean squared error as `loss`.
            question_ids (`Tensor`, *optional*): token ids of the question, with the objective `"ranking"` only.
            question_mask (`Tensor`, *optional*): 1 for real tokens of `question_ids`.
            rejected_ids (`Tensor`, *optional*): token ids of a worse answer, with the objective `"ranking"` only; gives
                the triplet margin loss of the original (margin 1, Euclidean) as `loss`, and `labels` are ignored.
            rejected_mask (`Tensor`, *optional*): 1 for real tokens of `rejected_ids`.
            answer_start (`Tensor` of shape `(batch,)`): with the head `"segments"` only: the position of the answer's
                first token, "response".
            kwargs: passed to the encoder.

        Returns:
            `SequenceClassifierOutput`: `logits` of shape `(batch, 1)` in float32, the scores, not bounded (in (0, 1)
            with the objective `"ranking"`; with a worse answer its score is a second column); `hidden_states` of
            `input_ids`, the embedding output first.
        """
        if self.config.objective == "regression":
            members, hidden_states = self.member_scores(input_ids, attention_mask, answer_start, **kwargs)
            logits = members.mean(dim=-1, keepdim=True)
        elif question_ids is None:
            raise ValueError("A ranking model scores an answer against its question: pass question_ids as well.")
        else:
            # Three encodings at most: answer, question, and a worse answer; the vectors have the shape (batch, units).
            pooled, hidden_states = self.pool(input_ids, attention_mask, **kwargs)
            question, _ = self.pool(question_ids, question_mask, **kwargs)
            logits = closeness(question, pooled).unsqueeze(-1)
            if rejected_ids is not None:
                rejected, _ = self.pool(rejected_ids, rejected_mask, **kwargs)
                # In float32: in half precision, close vectors may have the distance 0.
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
        """Score texts by each member of the head.

        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids of the entire text.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 1 for real tokens; defaults to all ones.
            answer_start (`Tensor` of shape `(batch,)`): with the head `"segments"` only: position of the answer's first
                token.
            kwargs: passed to the encoder.

        Returns:
            The scores, of shape `(batch, members)` in float32, and the encoder's hidden states. The mean over the
            members is the score of the text, their standard deviation how far they disagree. The head `"feed_forward"`
            has one member.
        """
        columns, hidden_states = self.columns(input_ids, attention_mask, answer_start, **kwargs)
        return columns[:, : columns.shape[1] - self.judged], hidden_states

    @property
    def judged(self) -> int:
        """Return the number of columns that follow the members' scores: what the head, or the judge, says besides."""
        return HEADS[self.config.head].judged if self.judge is None else JUDGED

    def columns(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, answer_start: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return scores and hidden states as [`member_scores`] does, and after the scores what a head judges besides."""
        kind = HEADS[self.config.head]
        if kind.reads_answer_start and answer_start is None:
            raise ValueError(
                f"The head {self.config.head!r} reads question and answer separately: pass answer_start as well."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self._encode(input_ids, attention_mask, **kwargs)
        scores = kind.score(self, EncodedTexts(hidden_states, input_ids, attention_mask, answer_start))
        return scores.float(), hidden_states

    def packed_scores(self, packed: Packed, encoder: PackedEncoder) -> tuple[Tensor, Running]:
        """Return all that the head says of packed texts, as [`columns`] does of padded ones.

        Args:
            packed ([`Packed`]): the texts; for a head that reads question and answer separately, with answer starts.
            encoder ([`PackedEncoder`]): of this model's encoder.

        Returns:
            float32 of shape `(batch, members + judged)`, and the states, whose last is still to be asked for.
        """
        states = Running(encoder.states(packed))
        return HEADS[self.config.head].score_packed(self, states, packed).float(), states

    def pool_packed(self, states: Iterable[Tensor], packed: Packed) -> Tensor:
        """Combine the layers and pool the tokens of packed texts, as [`reduce`] does those of padded ones."""
        layer = self.config.layer
        read = states if layer is None else itertools.islice(states, layer, layer + 1)
        pooled = pool_packed(read, packed, self.config, self.layers if layer is None else None)
        # The ranking variant has no head whose precision could be taken.
        return pooled.to(self.head[0].weight.dtype) if self.config.objective == "regression" else pooled

    def _encode(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the encoder's n + 1 hidden states, of shape `(batch, tokens, units)`, the embedding output first."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs)
        states: tuple[Tensor, ...] = output.hidden_states
        return states

    def pool(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Encode texts into one vector each, the input of a head.

        Returns:
            The vectors, of shape `(batch, units)`, and the encoder's hidden states.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_states = self._encode(input_ids, attention_mask, **kwargs)
        return self.reduce(hidden_states, input_ids, attention_mask), hidden_states

    def reduce(self, hidden_states: tuple[Tensor, ...], input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Combine the layers and pool the tokens into one vector per text, of shape `(batch, units)`.

        All of it is computed in the head's own precision, so that a half-precision encoder still tells texts apart. The
        tokens are pooled first, layer by layer, unless the order matters (max pooling): the entire stack in float32, 25
        states for XLM-RoBERTa-large, would take more memory than the forward pass.
        """
        layer, norm = self.config.layer, self.config.layer_norm
        # The ranking variant has no head whose precision could be taken.
        precision = self.head[0].weight.dtype if self.config.objective == "regression" else torch.float32
        read = hidden_states if layer is None else (hidden_states[layer],)

        def prepared() -> Iterator[Tensor]:  # one at a time, so that only one float32 copy is alive
            for states in read:
                states = states.to(precision)
                yield normalise_text(states, attention_mask) if norm and layer is None else states

        def combined(states: Iterable[Tensor]) -> Tensor:
            combination: Tensor = next(iter(states)) if layer is not None else self.layers(states)
            return combination

        if self.config.pooling == "max":
            return self._pool(combined(prepared()), input_ids, attention_mask)
        return combined(self._pool(states, input_ids, attention_mask) for states in prepared())

    def _pool(self, states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            return states[:, 0]
        # As in the original, which looks for pad *ids*: a text that spells out "<pad>" contains some too. The sum
        # leaves them out, but the denominator counts them.
        real = (input_ids != self.config.encoder_config.pad_token_id).unsqueeze(-1)
        if self.config.pooling == "max":
            return states.masked_fill(~real, float("-inf")).max(dim=1).values
        total = (states * real).sum(dim=1)
        return total / attention_mask.sum(dim=1, keepdim=True).to(states.dtype)


def convert_checkpoint(
    checkpoint: str | os.PathLike[str], output: str | os.PathLike[str], tokenizer: str | None = None
) -> None:
    """Write a checkpoint of the original's as an ordinary model folder: configuration, safetensors, tokenizer, card.

    Args:
        checkpoint (`str`): a `.ckpt`, or a folder or Hub id in the original's layout.
        output (`str`): a new folder.
        tokenizer (`str`, *optional*): folder or Hub id of the base model's tokenizer. Default: the `pretrained_model`
            of the hyper-parameters.

    Raises:
        ValueError: `output` exists already, `checkpoint` is not in the original's layout, or its options or weights are
            not those of a model of CaR.
    """
    if Path(output).exists():
        raise ValueError(f"output={str(output)!r} exists already; name a new folder.")
    file = digests.find_checkpoint(_find(checkpoint, {}))
    if file is None:
        raise ValueError(f"checkpoint={str(checkpoint)!r} holds no .ckpt file: it is not in the original's layout.")
    reader = load_tokenizer(base_model(file, tokenizer))
    model = IQSModel.from_pretrained(file, tokenizer=tokenizer)
    check_tokenizer(reader, model.config)
    reader.model_max_length = model.config.max_tokens  # else a user's tokenizer would not truncate
    model.save_pretrained(output)
    reader.save_pretrained(output)
    name = Path(output).resolve().name
    digest = digests.file_digest(file)
    write_card(
        Path(output), "converted_scorer_card.md.jinja", name=name, config=model.config, file=file.name, sha256=digest
    )


class EncodedTexts(NamedTuple):
    """A batch of texts after the encoder: all that a head can read.

    Args:
        hidden_states (`tuple[Tensor, ...]`): n + 1 states of shape `(batch, tokens, units)`, the embedding output
            first.
        input_ids, mask (`Tensor` of shape `(batch, tokens)`): token ids, and 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`, *optional*): position of the answer's first token.
    """

    hidden_states: tuple[Tensor, ...]
    input_ids: Tensor
    mask: Tensor
    answer_start: Tensor | None


class HeadKind(NamedTuple):
    """A kind of head: how to build it and how it scores.

    Args:
        build (`Callable`): a function of the configuration that returns the module `model.head`.
        score (`Callable`): a function of model and texts that returns scores of shape `(batch, members)`.
        score_packed (`Callable`): likewise, a function of model, states, one at a time, and packed texts.
        reads_pooled (`bool`): True if it reads the vector of [`~IQSModel.reduce`], which needs a combination of layers.
        reads_answer_start (`bool`): True if it must be told where the answer begins.
        judged (`int`): columns that `score` returns after those of the members.
    """

    build: Callable[[IQSConfig], nn.Module]
    score: Callable[[IQSModel, EncodedTexts], Tensor]
    score_packed: Callable[[IQSModel, Iterable[Tensor], Packed], Tensor]
    reads_pooled: bool = False
    reads_answer_start: bool = False
    judged: int = 0


def _score_pooled(model: IQSModel, texts: EncodedTexts) -> Tensor:
    scores: Tensor = model.head(model.reduce(texts.hidden_states, texts.input_ids, texts.mask))
    return scores


def _score_pooled_packed(model: IQSModel, states: Iterable[Tensor], packed: Packed) -> Tensor:
    scores: Tensor = model.head(model.pool_packed(states, packed))
    return scores


def _score_segments_packed(model: IQSModel, states: Iterable[Tensor], packed: Packed) -> Tensor:
    assert packed.answer_start is not None  # `LoadedScorer` has seen to it
    features = packed_segment_features(states, packed)
    words = hashed_words(*packed.padded_ids(), packed.answer_start, model.config.word_bits)
    return _judged(model, model.head(features, *words), features)


def _score_segments(model: IQSModel, texts: EncodedTexts) -> Tensor:
    assert texts.answer_start is not None  # IQSModel.columns has seen to it
    features = segment_features(texts.hidden_states, texts.mask, texts.answer_start)
    numbers, weights = hashed_words(texts.input_ids, texts.mask, texts.answer_start, model.config.word_bits)
    return _judged(model, model.head(features, numbers, weights), features)


def _judged(model: IQSModel, scores: Tensor, features: Tensor) -> Tensor:
    # The judge's own score, its first column, is left out.
    return scores if model.judge is None else torch.cat([scores, model.judge.columns(features)[:, 1:]], dim=1)


def _score_kernel(model: IQSModel, texts: EncodedTexts) -> Tensor:
    assert texts.answer_start is not None  # IQSModel.columns has seen to it
    columns: Tensor = model.head.columns(segment_features(texts.hidden_states, texts.mask, texts.answer_start))
    return columns


def _score_kernel_packed(model: IQSModel, states: Iterable[Tensor], packed: Packed) -> Tensor:
    columns: Tensor = model.head.columns(packed_segment_features(states, packed))
    return columns


def _score_parts(model: IQSModel, texts: EncodedTexts) -> Tensor:
    columns: Tensor = model.head.columns(texts.hidden_states[model.head.lower], texts.mask, texts.answer_start)
    return columns


def _score_parts_packed(model: IQSModel, states: Iterable[Tensor], packed: Packed) -> Tensor:
    # The fork reads padded states: it is two or three layers, and its attention needs no bounds then.
    below = packed.spread(next(itertools.islice(states, model.head.lower, None)))
    columns: Tensor = model.head.columns(below, packed.padded_ids()[1], packed.answer_start)
    return columns


# To add a head, write a module and a function that scores with it, and add a line here and its name to `HEAD_NAMES`,
# which is defined with the configuration.
HEADS = {
    "feed_forward": HeadKind(feed_forward, _score_pooled, _score_pooled_packed, reads_pooled=True),
    "segments": HeadKind(SegmentHead, _score_segments, _score_segments_packed, reads_answer_start=True),
    "parts": HeadKind(PartsHead, _score_parts, _score_parts_packed, reads_answer_start=True, judged=JUDGED),
    "kernel": HeadKind(KernelHead, _score_kernel, _score_kernel_packed, reads_answer_start=True, judged=JUDGED),
}


def _find(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """Return the folder or file of a model; one on the Hub is resolved to a commit and downloaded."""
    if Path(name).exists():
        return revisions.refuse_code(Path(name))
    revision, token = kwargs.pop("revision", None), kwargs.pop("token", None)
    return revisions.model_folder(str(name), revisions.pin_revision(str(name), revision, token), token)


def _without_unused_mix(state: dict[str, Tensor], config: IQSConfig) -> dict[str, Tensor]:
    """Leave out the layer mix of a model that reads a single layer; the original may have saved one anyway."""
    return state if config.layer is None else {n: w for n, w in state.items() if not n.startswith("layers.")}


def _source_encoder(config: IQSConfig, token: str | None) -> dict[str, Tensor]:
    """Load the encoder that a head was trained on, under the names of `IQSModel`; ValueError if its digest differs."""
    source = config.encoder_source or {}
    folder = revisions.model_folder(source["model_id"], source["revision"], token)
    digest = digests.file_digest(folder / "model.safetensors")
    if digest != source["sha256"]:
        raise ValueError(f"The head was trained on an encoder with sha256 {source['sha256']}; {folder} holds {digest}.")
    # The encoder is built without these (see `_without_pooler`), and unknown weights would be refused.
    unused = ("pooler.", "embeddings.position_ids")
    weights = load_file(folder / "model.safetensors")
    return {f"encoder.{name}": tensor for name, tensor in weights.items() if not name.startswith(unused)}


def _without_pooler(encoder: PreTrainedConfig) -> dict[str, bool]:
    """Return the option that leaves out the pooler of BERT-like encoders, which no score uses."""
    return {"add_pooling_layer": False} if encoder.model_type in {"bert", "roberta", "xlm-roberta"} else {}


# So that `AutoModel.from_pretrained` builds an `IQSModel` for `IQSConfig`, once this module is imported.
AutoModel.register(IQSConfig, IQSModel)
