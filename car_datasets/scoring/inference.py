"""Load a scorer once per process and device, and run texts through it.

Does: load model and tokenizer; score texts in batches of similar length, with padding or without.
Does not: know rows or columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.loading.templates import Text
from car_datasets.scoring.batching import (
    Tokens,
    in_order,
    pad,
    refuse_foreign_tokens,
    refuse_long_texts,
    run_batches,
    to_device,
    token_budget,
    tokenised_ahead,
)
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.scoring.iqs.layers import closeness
from car_datasets.scoring.iqs.modeling_iqs import HEADS, IQSModel
from car_datasets.scoring.iqs.openvino_encoder import OpenVINOEncoder
from car_datasets.scoring.iqs.packing import can_pack, first_position, pack, use_packing
from car_datasets.utils import digests, revisions

# A function of the last hidden state, of shape (texts, tokens, units), and its mask, that returns embeddings.
_Pooling = Callable[[Tensor, Tensor], Tensor]


class TextScores(NamedTuple):
    """The result of one pass over texts, in their order.

    Args:
        scores (`(texts,)` float32): higher is better.
        tokens (`(texts,)` int32): length of the entire text, special tokens included.
        truncated (`(texts,)` bool): True if the text was longer than the model reads.
        embeddings (`(texts, units)` float32, *optional*): if asked for.
        members (`(texts, members)` float32): the score by each member of the head; `scores` is their mean.
        parts (`(texts, judgements)` float32, *optional*): what the head `"parts"` judges, in the order of
            [`~car_datasets.scoring.iqs.heads.PartsHead.judge`]; the other heads have none.
    """

    scores: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    truncated: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float32] | None
    members: npt.NDArray[np.float32]
    parts: npt.NDArray[np.float32] | None = None


class LoadedScorer(NamedTuple):
    """A model on a device, ready to score.

    Args:
        model ([`IQSModel`]): in evaluation mode.
        tokenizer: the one that the model was trained with.
        device (`torch.device`): of the model.
        packed (`bool`): True if the encoder reads texts end to end, without padding.
    """

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
            batch_tokens (`int`, *optional*): tokens in one forward pass, padding included; by default chosen by the
                device.
            pooling (`Callable`, *optional*): pools the last hidden state to embeddings; without it there are none.

        Raises:
            ValueError: the model reads question and answer separately, and a string has no mark between them.
        """
        # Another model, not another head: it embeds two texts, and its score is how close they are.
        if self.model.config.objective == "ranking":
            return self._rank_texts(texts, batch_tokens)
        # A head that reads the answer separately is told its first token, which the tokenizer finds from the character.
        answers_at = None
        if HEADS[self.model.config.head].reads_answer_start:
            parts = [Text.split(text) if isinstance(text, str) else text for text in texts]
            answers_at = [len(text.question) + 1 for text in parts]  # one space joins question and answer

        def forward(batch: dict[str, Any]) -> tuple[Tensor, ...]:
            members, parts, states = self.model.judge(**batch)
            return (members, parts, *(() if pooling is None else (pooling(states[-1], batch["attention_mask"]),)))

        strings = [text if isinstance(text, str) else text.whole for text in texts]
        (members, judged, *embeddings), tokens = self._read(strings, batch_tokens, forward, answers_at)
        cut = tokens > self.model.config.max_tokens
        vectors = embeddings[0] if embeddings else None
        return TextScores(members.mean(axis=1), tokens, cut, vectors, members, judged if judged.shape[1] else None)

    def _rank_texts(self, texts: Sequence[Text | str], batch_tokens: int | None) -> TextScores:
        """Score texts by the ranking variant, which encodes question and answer separately, each up to the limit."""
        if any(isinstance(text, str) for text in texts):
            raise ValueError("This model ranks an answer against its question: pass Text(question, answer).")
        parts = [part for text in texts for part in text]
        # Questions and answers alternate: `vectors` has the shape (2 * texts, units).
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
        """Run texts through the model in batches of similar length.

        Args:
            texts (`Sequence[str]`): in the template.
            batch_tokens (`int`, *optional*): tokens in one forward pass, padding included.
            forward (`Callable`): a function of the model's arguments for a batch that returns tensors of shape
                `(batch, ...)`.
            answers_at (`Sequence[int]`, *optional*): the character at which the answer of each text begins.

        Returns:
            The tensors of all batches as arrays of shape `(texts, ...)`, in the order of the texts, and the token
            counts.
        """
        config = self.model.config
        budget = token_budget(self.device, config.encoder_config.hidden_size, batch_tokens)
        windows: list[list[Any]] = []
        lengths: list[int] = []
        # Window by window: while the model reads one, the next is tokenised.
        for tokens in tokenised_ahead(self.tokenizer, texts, config.max_tokens, answers_at):
            # A default binds the value of `tokens` now; the name itself is reassigned by the loop.
            def step(places: list[int], tokens: Tokens = tokens) -> tuple[Tensor, ...]:
                with torch.inference_mode():
                    return forward(self._batch(tokens, places))

            ran = run_batches([len(ids) for ids in tokens.ids], budget, step)
            positions = [places for places, _ in ran]
            outputs = zip(*(output for _, output in ran), strict=True)
            # Copied to the host window by window, so that the device holds the results of one window only.
            windows.append([in_order(positions, parts) for parts in outputs])
            lengths += tokens.lengths
        return [np.concatenate(parts) for parts in zip(*windows, strict=True)], np.array(lengths, dtype=np.int32)

    def _batch(self, tokens: Tokens, places: Sequence[int]) -> dict[str, Any]:
        """Return the model's arguments for the texts at `places`."""
        ids, pad_id = [tokens.ids[i] for i in places], self.tokenizer.pad_token_id
        input_ids, mask = pad(ids, pad_id, self.device)
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if tokens.answer_starts:
            batch["answer_start"] = to_device(np.array([tokens.answer_starts[i] for i in places]), self.device)
        if self.packed:  # the padded ids stay in the batch: heads read the padded grid
            config = self.model.config
            first = first_position(config.encoder_config)
            batch["packed"] = pack(ids, pad_id, first, config.max_tokens, self.device)
        return batch


class Weights(NamedTuple):
    """The fields of a scorer that decide which model is loaded; scorers that differ in other fields share the model.

    Args:
        model_id (`str`): Hub id or folder.
        revision (`str`): commit SHA or content digest.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer of a checkpoint in the original's layout.
        tokenizer_pin (`str`, *optional*): its digest or commit. The two pins are part of the key under which the model
            is cached, and are not read otherwise.
        dtype (`str`): of the encoder.
        compiled (`bool`): compile the encoder.
        engine (`str`, *optional*): a folder with the encoder in int8.
        engine_pin (`str`, *optional*): its digest.
    """

    model_id: str
    revision: str
    tokenizer: str | None = None
    tokenizer_pin: str | None = None
    dtype: str = "float32"
    compiled: bool = False
    engine: str | None = None
    engine_pin: str | None = None


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def load_scorer(weights: Weights, device: torch.device) -> LoadedScorer:
    """Load model and tokenizer, once per process and device; never part of a callable, so never hashed or pickled.

    Raises:
        ValueError: an engine is given, and the device is not the CPU.
    """
    from transformers import AutoTokenizer

    model_id, tokenizer, dtype, engine = weights.model_id, weights.tokenizer, weights.dtype, weights.engine
    if engine is not None and device.type != "cpu":
        raise ValueError(
            f"engine={engine!r} runs on the CPU only, and this process is to use {device}. Leave it out, or hide the "
            "GPU: set CUDA_VISIBLE_DEVICES to an empty string."
        )

    # Loaded in float32 in any case: only the encoder is converted below.
    folder = revisions.model_folder(model_id, weights.revision)
    model = IQSModel.from_pretrained(folder, tokenizer=tokenizer)
    model.encoder.to(getattr(torch, dtype))  # not the head: in half precision it would give many texts the same score
    if engine is not None:
        model.encoder = OpenVINOEncoder(engine)  # drops the float32 encoder, the larger part of the model
    # A checkpoint of the original brings no tokenizer, a head without encoder uses the tokenizer of its encoder.
    source, checkpoint = model.config.encoder_source, digests.find_checkpoint(folder)
    if checkpoint is not None:
        reader = load_tokenizer(base_model(checkpoint, tokenizer))
        check_tokenizer(reader, model.config)
    else:
        at = folder if source is None else revisions.model_folder(source["model_id"], source["revision"])
        with revisions.reading_model(at):
            reader = AutoTokenizer.from_pretrained(at, trust_remote_code=False)
            if reader.pad_token_id is None:
                raise ValueError("its tokenizer has no padding token")
            refuse_foreign_tokens(reader, model.config.encoder_config.vocab_size)
            refuse_long_texts(model.encoder, "max_tokens", model.config.max_tokens)
    packed = can_pack(model.config.encoder_config, dtype, device)
    if packed:
        use_packing(model.encoder)
    if weights.compiled:
        # Last, because packing and the engine change the encoder that is compiled.
        model.encoder.compile(dynamic=True)  # batches differ in both dimensions: static shapes would recompile for each
    loaded = LoadedScorer(model.eval().to(device), reader, device, packed)
    if not weights.compiled:  # one text, since some faults of a configuration show in a forward pass only
        with revisions.reading_model(folder):
            loaded.score_texts([Text("a", "b")])
    return loaded


@functools.lru_cache(maxsize=8)
def read_scorer_config(model_id: str, revision: str, tokenizer: str | None, tokenizer_pin: str | None) -> IQSConfig:
    """Read the configuration of a scorer, also of one in the original's layout, without loading its weights.

    Args:
        model_id (`str`): Hub id or folder.
        revision (`str`): commit SHA or content digest; part of the cache's key.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer of a checkpoint in the original's layout.
        tokenizer_pin (`str`, *optional*): its digest or commit; part of the cache's key, as the tokenizer's folder also
            tells the number of attention heads.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    from transformers import AutoConfig

    folder = revisions.model_folder(model_id, revision)
    if (checkpoint := digests.find_checkpoint(folder)) is not None:
        return IQSConfig(**convert(checkpoint, tokenizer).config)
    with revisions.reading_model(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, IQSConfig):
        raise ValueError(
            f"model_id={model_id!r} is a {config.model_type!r} model, not an IQS model ({IQSConfig.model_type!r})."
        )
    return config
