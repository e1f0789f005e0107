"""A scorer in memory, once per process and device; never part of a callable.

Does: load model and tokenizer, run texts through them in batches of like length, with padding or without.
Does not: know rows or columns (scoring.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets import hub
from car_datasets.batching import Tokens, in_order, pad, run_batches, to_device, token_budget, tokenised_ahead
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.layers import closeness
from car_datasets.modeling_iqs import IQSModel
from car_datasets.openvino_encoder import OpenVINOEncoder
from car_datasets.packing import can_pack, first_position, pack, use_packing
from car_datasets.templates import Text

_Pooling = Callable[[Tensor, Tensor], Tensor]


class TextScores(NamedTuple):
    """What one pass over texts gives.

    Args:
        scores (`(texts,)` float32); tokens (`(texts,)` int32): of the whole text; truncated (`(texts,)` bool): cut.
        embeddings (`(texts, units)` float32, *optional*): if asked for.
        members (`(texts, members)` float32): the score by each member of the head; `scores` is their mean.
    """

    scores: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32] | None
    members: npt.NDArray[np.float32]


class LoadedScorer(NamedTuple):
    """The model in evaluation mode on its device, the tokenizer that it was trained with, and whether it reads texts
    without padding."""

    model: IQSModel
    tokenizer: Any
    device: torch.device
    packed: bool

    def score_texts(
        self, texts: Sequence[Text | str], batch_tokens: int | None = None, pooling: _Pooling | None = None
    ) -> TextScores:
        """Score texts, in order.

        Args:
            texts (`Sequence`): [`Text`]s, or strings that are already in the template.
            batch_tokens (`int`, *optional*): padded tokens in one forward pass; chosen by the device.
            pooling (`Callable`, *optional*): the last hidden state and its mask to embeddings.

        Raises:
            ValueError: strings for a model that reads question and answer apart and finds no mark between them.
        """
        if self.model.config.objective == "ranking":
            return self._rank_texts(texts, batch_tokens)
        answers_at = None
        if self.model.config.head == "segments":
            parts = [Text.split(text) if isinstance(text, str) else text for text in texts]
            answers_at = [len(text.question) + 1 for text in parts]

        def forward(batch: dict[str, Any]) -> tuple[Tensor, ...]:
            members, hidden_states = self.model.member_scores(**batch)
            return (members,) if pooling is None else (members, pooling(hidden_states[-1], batch["attention_mask"]))

        whole = [text if isinstance(text, str) else text.whole for text in texts]
        (members, *embeddings), tokens = self._read(whole, batch_tokens, forward, answers_at)
        cut = tokens > self.model.config.max_tokens
        return TextScores(members.mean(axis=1), tokens, cut, embeddings[0] if embeddings else None, members)

    def _rank_texts(self, texts: Sequence[Text | str], batch_tokens: int | None) -> TextScores:
        """The ranking variant: question and answer are texts of their own, each with the whole limit."""
        if any(isinstance(text, str) for text in texts):
            raise ValueError("This model ranks an answer against its question: pass Text(question, answer).")
        parts = [part for text in texts for part in text]
        (vectors,), lengths = self._read(parts, batch_tokens, lambda batch: (self.model.pool(**batch)[0],))
        pairs = torch.from_numpy(vectors)
        scores = closeness(pairs[::2], pairs[1::2]).numpy()
        lengths = lengths.reshape(-1, 2)
        cut = (lengths > self.model.config.max_tokens).any(axis=1)
        return TextScores(scores, lengths.sum(axis=1, dtype=np.int32), cut, None, scores[:, None])

    def _read(
        self,
        texts: Sequence[str],
        batch_tokens: int | None,
        forward: Callable[[dict[str, Any]], tuple[Tensor, ...]],
        answers_at: Sequence[int] | None = None,
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int32]]:
        """Run texts through the model in batches of like length: what `forward` gives, and the texts' token counts."""
        config = self.model.config
        budget = token_budget(self.device, config.encoder_config.hidden_size, batch_tokens)
        windows: list[list[Any]] = []
        lengths: list[int] = []
        for tokens in tokenised_ahead(self.tokenizer, texts, config.max_tokens, answers_at):

            def step(places: list[int], tokens: Tokens = tokens) -> tuple[Tensor, ...]:
                with torch.inference_mode():
                    return forward(self._batch(tokens, places))

            ran = run_batches([len(ids) for ids in tokens.ids], budget, step)
            columns = zip(*(found for _, found in ran), strict=True)
            places = [at for at, _ in ran]
            windows.append([in_order(places, column) for column in columns])
            lengths += tokens.lengths
        return [np.concatenate(parts) for parts in zip(*windows, strict=True)], np.array(lengths, dtype=np.int32)

    def _batch(self, tokens: Tokens, places: Sequence[int]) -> dict[str, Any]:
        """The arguments of the model for some of the texts."""
        ids, pad_id = [tokens.ids[i] for i in places], self.tokenizer.pad_token_id
        input_ids, mask = pad(ids, pad_id, self.device)
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if tokens.answer_starts:
            batch["answer_start"] = to_device(np.array([tokens.answer_starts[i] for i in places]), self.device)
        if self.packed:
            config = self.model.config
            first = first_position(config.encoder_config)
            batch["packed"] = pack(ids, pad_id, first, config.max_tokens, self.device)
        return batch


class Weights(NamedTuple):
    """What a model is loaded from; scorers that differ in other things share it.

    Args:
        model_id, revision, dtype (`str`), compiled (`bool`): see [`~car_datasets.QualityScorer`].
        tokenizer (`str`, *optional*), tokenizer_pin (`str`, *optional*): of an original checkpoint, and its digest.
        engine (`str`, *optional*), engine_pin (`str`, *optional*): a folder in int8, and its digest.
    """

    model_id: str
    revision: str
    tokenizer: str | None = None
    tokenizer_pin: str | None = None
    dtype: str = "float32"
    compiled: bool = False
    engine: str | None = None
    engine_pin: str | None = None


@functools.lru_cache(maxsize=2)
def load_scorer(weights: Weights, device: torch.device) -> LoadedScorer:
    """Model and tokenizer, once per process and device; never part of a callable, so never hashed or pickled.

    Raises:
        ValueError: an engine is given, and the device is not the CPU.
    """
    from transformers import AutoTokenizer

    model_id, tokenizer, dtype, engine = weights.model_id, weights.tokenizer, weights.dtype, weights.engine
    if engine is not None and device.type != "cpu":
        raise ValueError(
            f"engine={engine!r} runs on the CPU only, and this process is to use {device}. Leave it out, or hide the GPU: set "
            "CUDA_VISIBLE_DEVICES to nothing."
        )

    folder = hub.model_folder(model_id, weights.revision)
    model = IQSModel.from_pretrained(folder, tokenizer=tokenizer)
    model.encoder.to(getattr(torch, dtype))  # not the head: in half precision it gives many texts the same score
    if engine is not None:
        model.encoder = OpenVINOEncoder(engine)
    source, checkpoint = model.config.encoder_source, hub.find_checkpoint(folder)
    if checkpoint is not None:
        reader = load_tokenizer(base_model(checkpoint, tokenizer))
        check_tokenizer(reader, model.config)
    else:
        at = folder if source is None else hub.model_folder(source["model_id"], source["revision"])
        reader = AutoTokenizer.from_pretrained(at)
    packed = can_pack(model.config.encoder_config, dtype, device)
    if packed:
        use_packing(model.encoder)
    if weights.compiled:
        model.encoder.compile(dynamic=True)
    return LoadedScorer(model.eval().to(device), reader, device, packed)


@functools.lru_cache(maxsize=8)
def read_scorer_config(model_id: str, revision: str, tokenizer: str | None, tokenizer_pin: str | None) -> IQSConfig:
    """The configuration of a scorer, of the original's layout as well.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    from transformers import AutoConfig

    folder = hub.model_folder(model_id, revision)
    if (checkpoint := hub.find_checkpoint(folder)) is not None:
        return IQSConfig(**convert(checkpoint, tokenizer).config)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, IQSConfig):
        raise ValueError(
            f"model_id={model_id!r} is a {config.model_type!r} model, not an IQS model ({IQSConfig.model_type!r})."
        )
    return config
