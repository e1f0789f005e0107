"""Load a scorer once per process and device, and run texts through it.

Does: load model and tokenizer; score texts in batches of similar length, with padding or without.
Does not: know rows or columns.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.loading.templates import Text
from car_datasets.scoring.batching import (
    FIRST_TEXTS,
    pad,
    refuse_foreign_tokens,
    refuse_long_texts,
    run_windows,
    to_device,
    token_budget,
    tokenise,
    tokenised_ahead,
)
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.scoring.iqs.float8 import FLOAT8, refuse_float8_on
from car_datasets.scoring.iqs.heads import read_kernel
from car_datasets.scoring.iqs.layers import closeness
from car_datasets.scoring.iqs.modeling_iqs import HEADS, IQSModel
from car_datasets.scoring.iqs.openvino_encoder import OpenVINOEncoder
from car_datasets.scoring.iqs.packed_encoder import COMPILE_AFTER, PackedEncoder, can_pack
from car_datasets.scoring.iqs.packing import Packed, pack
from car_datasets.utils import digests, revisions

logger = logging.getLogger(__name__)

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
        encoder ([`PackedEncoder`], *optional*): the model's, if it reads texts end to end, without padding.
        exact (`Callable`, *optional*): for a model in half precision: loads it in float32.
    """

    model: IQSModel
    tokenizer: Any
    device: torch.device
    encoder: PackedEncoder | None = None
    exact: Callable[[], LoadedScorer] | None = None

    @property
    def packed(self) -> bool:
        """Return True if the encoder reads texts without padding."""
        return self.encoder is not None

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
            split = [Text.split(text) if isinstance(text, str) else text for text in texts]
            answers_at = [len(text.question) + 1 for text in split]  # one space joins question and answer

        strings = [text if isinstance(text, str) else text.whole for text in texts]
        (columns, *embeddings), tokens = self._read(
            strings, batch_tokens, functools.partial(self._forward, pooling=pooling), answers_at
        )
        cut = tokens > self.model.config.max_tokens
        judged = self.model.judged
        members = columns[:, : columns.shape[1] - judged]
        vectors, parts = embeddings[0] if embeddings else None, columns[:, members.shape[1] :] if judged else None
        found = TextScores(members.mean(axis=1), tokens, cut, vectors, members, parts)
        return self._mended(found, texts, batch_tokens, pooling)

    def count_tokens(self, texts: Sequence[Text]) -> npt.NDArray[np.int32]:
        """Return the length in tokens of each text, as [`~LoadedScorer.score_texts`] would, without running the model."""
        limit = self.model.config.max_tokens
        if self.model.config.objective == "ranking":
            lengths = tokenise(self.tokenizer, [part for text in texts for part in text], limit).lengths
            return np.array(lengths, dtype=np.int32).reshape(-1, 2).sum(axis=1, dtype=np.int32)
        return np.array(tokenise(self.tokenizer, [text.whole for text in texts], limit).lengths, dtype=np.int32)

    def _forward(self, batch: Packed | dict[str, Any], pooling: _Pooling | None) -> tuple[Tensor, ...]:
        """Return the columns of the head for a batch, and if asked the embeddings."""
        if isinstance(batch, Packed):
            assert self.encoder is not None
            columns, states = self.model.packed_scores(batch, self.encoder)
            if pooling is None:
                return (columns,)
            return columns, pooling(batch.spread(states.last()), batch.padded_ids()[1])
        columns, hidden_states = self.model.columns(**batch)
        return (columns,) if pooling is None else (columns, pooling(hidden_states[-1], batch["attention_mask"]))

    def _mended(
        self,
        found: TextScores,
        texts: Sequence[Text | str],
        batch_tokens: int | None,
        pooling: _Pooling | None,
    ) -> TextScores:
        """Compute results that are not finite again in float32: a state of a half-precision encoder may overflow."""
        fine = np.isfinite(found.members).all(axis=1)
        if found.embeddings is not None:
            fine &= np.isfinite(found.embeddings).all(axis=1)
        if self.exact is None or fine.all():
            return found
        bad = np.flatnonzero(~fine).tolist()
        logger.info("%d of %d texts overflow in half precision and are scored again in float32.", len(bad), len(texts))
        again = self.exact().score_texts([texts[i] for i in bad], batch_tokens, pooling)
        found.scores[bad], found.members[bad] = again.scores, again.members
        if found.embeddings is not None and again.embeddings is not None:
            found.embeddings[bad] = again.embeddings
        if found.parts is not None and again.parts is not None:
            found.parts[bad] = again.parts
        return found

    def _rank_texts(self, texts: Sequence[Text | str], batch_tokens: int | None) -> TextScores:
        """Score texts by the ranking variant, which encodes question and answer separately, each up to the limit."""
        if any(isinstance(text, str) for text in texts):
            raise ValueError("This model ranks an answer against its question: pass Text(question, answer).")
        parts = [part for text in texts for part in text]
        # Questions and answers alternate: `vectors` has the shape (2 * texts, units).
        (vectors,), lengths = self._read(parts, batch_tokens, self._pool)
        pairs = torch.from_numpy(vectors)
        scores = closeness(pairs[::2], pairs[1::2]).numpy()
        lengths = lengths.reshape(-1, 2)
        cut = (lengths > self.model.config.max_tokens).any(axis=1)
        return TextScores(scores, lengths.sum(axis=1, dtype=np.int32), cut, None, scores[:, None])

    def _pool(self, batch: Packed | dict[str, Any]) -> tuple[Tensor]:
        if isinstance(batch, Packed):
            assert self.encoder is not None
            return (self.model.pool_packed(self.encoder.states(batch), batch),)
        return (self.model.pool(**batch)[0],)

    def _read(
        self,
        texts: Sequence[str],
        batch_tokens: int | None,
        forward: Callable[[Packed | dict[str, Any]], tuple[Tensor, ...]],
        answers_at: Sequence[int] | None = None,
    ) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[np.int32]]:
        """Run texts through the model in batches of similar length.

        Args:
            texts (`Sequence[str]`): in the template.
            batch_tokens (`int`, *optional*): tokens in one forward pass, padding included.
            forward (`Callable`): a function of a batch, packed or the model's arguments, that returns tensors of shape
                `(batch, ...)`.
            answers_at (`Sequence[int]`, *optional*): the character at which the answer of each text begins.

        Returns:
            The tensors of all batches as arrays of shape `(texts, ...)`, in the order of the texts, and the token
            counts.
        """
        config = self.model.config
        budget = token_budget(self.device, config.encoder_config.hidden_size, batch_tokens, self.packed)
        first = None if self.device.type == "cpu" else FIRST_TEXTS
        # Window by window: while the model reads one, the next is tokenised.
        windows = tokenised_ahead(self.tokenizer, texts, config.max_tokens, answers_at, first)

        def run(ids: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor, ...]:
            return forward(self._batch(ids, None if answers_at is None else starts))

        return run_windows(windows, len(texts), budget, self.device, run, padded=not self.packed)

    def _batch(self, ids: Sequence[Sequence[int]], answer_starts: Sequence[int] | None) -> Packed | dict[str, Any]:
        """Return texts end to end, or the model's arguments for texts with padding."""
        config = self.model.config
        if self.packed:
            return pack(ids, config.encoder_config, config.max_tokens, self.device, answer_starts)
        input_ids, mask = pad(ids, self.tokenizer.pad_token_id, self.device)
        batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask}
        if answer_starts is not None:
            batch["answer_start"] = to_device(np.array(answer_starts), self.device)
        return batch


class Weights(NamedTuple):
    """The fields of a scorer that decide which model is loaded; scorers that differ in other fields share the model.

    Args:
        model_id (`str`): Hub id or folder.
        revision (`str`): commit SHA or content digest.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer of a checkpoint in the original's layout.
        tokenizer_pin (`str`, *optional*): its digest or commit. The two pins are part of the key under which the model
            is cached, and are not read otherwise.
        dtype (`str`): of the encoder; `"float8"` for bfloat16 with products in float8.
        compiled (`bool`): compile the encoder.
        engine (`str`, *optional*): a folder with the encoder in int8.
        engine_pin (`str`, *optional*): its digest.
        parts_pin (`str`, *optional*): digest of the packaged model that judges by parts, whose head is read as well.
    """

    model_id: str
    revision: str
    tokenizer: str | None = None
    tokenizer_pin: str | None = None
    dtype: str = "float32"
    compiled: bool = False
    engine: str | None = None
    engine_pin: str | None = None
    parts_pin: str | None = None


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def load_scorer(weights: Weights, device: torch.device) -> LoadedScorer:
    """Load model and tokenizer, once per process and device; never part of a callable, so never hashed or pickled.

    Raises:
        ValueError: an engine is given, and the device is not the CPU; or the device or the encoder has no float8.
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
    packs = can_pack(model.config.encoder_config, dtype, device)
    if dtype == FLOAT8:
        refuse_float8_on(device, model.config.encoder_config, packs)
    if weights.parts_pin is not None:
        model.judge = read_kernel(revisions.model_folder(revisions.DEFAULT_PARTS, weights.parts_pin), model.config)
    # Not the head: in half precision it would give many texts the same score.
    model.encoder.to(torch.bfloat16 if dtype == FLOAT8 else getattr(torch, dtype))
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
    model.eval().to(device)
    encoder = None
    if packs:
        encoder = PackedEncoder(model.encoder, 0.0 if weights.compiled else COMPILE_AFTER, dtype == FLOAT8)
    elif weights.compiled:
        # Last, because the engine changes the encoder that is compiled.
        model.encoder.compile(dynamic=True)  # batches differ in both dimensions: static shapes would recompile for each
    exact = weights._replace(dtype="float32", compiled=False)
    mend = None if dtype == "float32" else functools.partial(load_scorer, exact, device)
    loaded = LoadedScorer(model, reader, device, encoder, mend)
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
            f"model_id={model_id!r} is a {config.model_type!r} model, not an IQS model ({IQSConfig.model_type!r}). To score "
            "by it all the same, write its kind before it: reward:MODEL for a sequence classifier, ifd:MODEL or "
            "perplexity:MODEL for a causal language model."
        )
    return config
