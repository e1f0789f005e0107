"""EMBED: `TextEmbedder`, a `.map` callable that adds the sentence embedding of each row's text.

Does: run any sentence-transformers model on the text that the scorer reads (CaR sec. 3.2), in batches of similar
length; the embeddings equal those of `SentenceTransformer.encode` within 1e-5.
Does not: reduce dimensions or cluster.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.loading.schemas import as_column_names, check_schema, find_schema
from car_datasets.loading.templates import CLEAN_TEMPLATE
from car_datasets.loading.values import untouched
from car_datasets.scoring.batching import (
    FIRST_TEXTS,
    Budget,
    in_order,
    pad,
    refuse_foreign_tokens,
    refuse_long_texts,
    run_batches,
    run_windows,
    token_budget,
    tokenised_ahead,
)
from car_datasets.scoring.iqs.float8 import FLOAT8
from car_datasets.scoring.iqs.packed_encoder import COMPILE_AFTER, PackedEncoder, can_pack
from car_datasets.scoring.iqs.packing import pack
from car_datasets.scoring.stage import (
    Rows,
    check_options,
    refuse_one_text,
    refuse_taken,
    set_fields,
    text_columns,
)
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_tables
from car_datasets.utils.digests import public
from car_datasets.utils.processes import device_for
from car_datasets.utils.revisions import pin_model
from car_datasets.utils.settings import is_integer

if TYPE_CHECKING:
    from datasets import Features
    from sentence_transformers import SentenceTransformer


logger = logging.getLogger(__name__)

CACHE_VERSION = "2"  # datasets hashes the fields below, never our code: raise it when numbers change


@public
@dataclass(frozen=True)
class TextEmbedder:
    """A stage that adds the embedding of a row's text: `dataset.map(TextEmbedder(), batched=True, with_rank=True)`.

    A frozen record of plain values: equal records have equal fingerprints in every process, so the second `.map` is
    read from the cache. The embedding of a chat is the mean over its exchanges, rescaled to their mean length.

    Args:
        model_id (`str`): a sentence-transformers model, on the Hub or in a folder. The default needs no Hub.
        revision (`str`, *optional*): branch, tag or commit. The field holds the immutable revision that it resolves to:
            a commit SHA, or for a folder a content digest.
        token (`str`, *optional*): for a private model; used to look it up and download it, never stored.
        schema (`str`): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for the schema's columns, such as `{"response": "answer"}`.
        template (`str`): the template of the embedded text; the default is the one that the default scorer reads.
        score_thoughts (`bool`): put the thoughts of an answer in front of it, as in [`QualityScorer`].
        output_column (`str`): the new column, float32 lists of the model's dimension.
        on_invalid (`str`): a row without text raises (`"error"`) or gets a null (`"mark"`).
        dtype (`str`): of the model, `"float32"`, `"bfloat16"` or `"float16"`.
        batch_tokens (`int`, *optional*): tokens in one forward pass, padding included; by default chosen by the device.
            Halved when memory runs out.
        embedding_dtype (`str`): of the column, `"float32"` or `"float16"`, which takes half the disk space.

    Raises:
        ValueError: the model does not exist, or an option is invalid.
        ConnectionError: the Hub does not answer.
    """

    model_id: str = revisions.DEFAULT_ENCODER
    revision: str | None = None
    token: InitVar[str | None] = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    template: str = CLEAN_TEMPLATE
    score_thoughts: bool = False
    output_column: str = ColumnNames.embedding
    on_invalid: str = "error"
    dtype: str = "float32"
    batch_tokens: int | None = None
    embedding_dtype: str = "float32"
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self, token: str | None) -> None:
        columns = as_column_names(self.columns)
        check_schema(self.schema, columns)
        if self.dtype == FLOAT8:
            raise ValueError(f"dtype={FLOAT8!r} is for scorers; pass dtype='float16' or 'bfloat16'.")
        check_options(
            template=self.template,
            on_invalid=self.on_invalid,
            dtype=self.dtype,
            embedding_dtype=self.embedding_dtype,
            batch_tokens=self.batch_tokens,
            new_columns=self.output_columns,
        )
        model = pin_model(self.model_id, self.revision, token)
        # The version is set here because a class attribute alone would not be part of the fingerprint.
        set_fields(self, columns=columns, revision=model.revision, cache_version=CACHE_VERSION)

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the name of the new column."""
        return (self.output_column,)

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        """Return the columns of the text.

        Raises:
            ValueError: no schema fits.
        """
        return text_columns(column_names, self.schema, self.columns)

    def output_features(self) -> Features:
        """Return the type of the new column: lists of the model's dimension, for which the model is loaded."""
        from datasets import Features, List, Value

        return Features({self.output_column: List(Value(self.embedding_dtype), length=dimension(self._model()))})

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return `{output_column: one vector per row}` for a batch of `.map(batched=True)`.

        Raises:
            ValueError: the batch already has the column, no schema fits, or a row has no text and `on_invalid="error"`.
        """
        batch = untouched(batch)
        refuse_tables(batch, "embed_texts(texts)")
        refuse_taken(batch, self)
        schema = find_schema(batch, self.schema, self.columns)
        rows = Rows.from_batch(batch, schema, self.template, self.on_invalid, self.score_thoughts)
        vectors = self.embed_texts([text.whole for text in rows.texts], rank)
        return {self.output_column: rows.mean_vectors(vectors, self.embedding_dtype)}

    def embed_texts(self, texts: Sequence[str], rank: int | None = None) -> npt.NDArray[np.float32]:
        """Embed texts that are already in the template.

        Args:
            texts (`Sequence[str]`): one string per text.
            rank (`int`, *optional*): index of the process among those of `.map(num_proc=...)`; chooses its GPU.

        Returns:
            A float32 array of shape `(texts, dimension)`, in the order of the texts.
        """
        refuse_one_text(texts)
        model = self._model(rank)
        if not texts:
            return np.zeros((0, dimension(model)), dtype=np.float32)
        # The budget depends on the width of the encoder, which sets the memory of a token.
        config = getattr(getattr(model[0], "auto_model", None), "config", None)
        units = getattr(config, "hidden_size", dimension(model))  # a Dense module on top may give fewer
        packs = config is not None and reads_plain_tokens(model) and can_pack(config, self.dtype, model.device)
        budget = token_budget(model.device, units, self.batch_tokens, packs)
        longest = model.max_seq_length or 512  # a model without a limit of its own: BERT's
        # `encode` works for every model, but tokenises batch by batch while the device waits.
        read = _embed_tokens if reads_plain_tokens(model) else _encode
        vectors = read(model, texts, longest, budget, self.dtype)
        fine = np.isfinite(vectors).all(axis=1)
        if self.dtype == "float32" or fine.all():
            return vectors
        # A state overflows in half precision.
        bad = np.flatnonzero(~fine).tolist()
        logger.info(
            "%d of %d texts overflow in half precision and are embedded again in float32.", len(bad), len(texts)
        )
        exact = load_sentence_transformer(self.model_id, str(self.revision), "float32", device_for(rank))
        vectors[bad] = read(exact, [texts[i] for i in bad], longest, budget, "float32")
        return vectors

    def _model(self, rank: int | None = None) -> SentenceTransformer:
        return load_sentence_transformer(self.model_id, str(self.revision), self.dtype, device_for(rank))


def _embed_tokens(
    model: SentenceTransformer, texts: Sequence[str], longest: int, budget: Budget, dtype: str
) -> npt.NDArray[np.float32]:
    """Embed texts by a model that reads plain tokens, without padding where that is faster."""
    device, config = model.device, getattr(model[0].auto_model, "config", None)
    packed = _packed_encoder(model) if config is not None and can_pack(config, dtype, device) else None

    def run(ids: Sequence[Sequence[int]], _: Sequence[int]) -> tuple[Tensor, ...]:
        if packed is None:
            input_ids, mask = pad(ids, model.tokenizer.pad_token_id, device)
            return (model({"input_ids": input_ids, "attention_mask": mask})["sentence_embedding"],)
        row = pack(ids, config, longest, device)
        *_, last = packed.states(row)
        return (pool_tokens(model, row.spread(last), row.padded_ids()[1]),)

    first = None if device.type == "cpu" else FIRST_TEXTS
    windows = tokenised_ahead(model.tokenizer, texts, longest, first=first)
    (vectors,), _ = run_windows(windows, len(texts), budget, device, run, padded=packed is None)
    return vectors


def _encode(
    model: SentenceTransformer, texts: Sequence[str], longest: int, budget: Budget, dtype: str
) -> npt.NDArray[np.float32]:
    """Embed texts by the model's own `encode`."""

    def run(places: list[int]) -> Tensor:
        part = [texts[i] for i in places]
        return model.encode(part, batch_size=len(part), convert_to_tensor=True, show_progress_bar=False)

    # An estimate: about 4 bytes a token in English, and two special tokens. It only decides which texts share a batch;
    # the embeddings do not depend on it.
    ran = run_batches([min(longest, 2 + len(text.encode()) // 4) for text in texts], budget, run)
    return in_order([places for places, _ in ran], [vectors for _, vectors in ran])


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def _packed_encoder(model: SentenceTransformer) -> PackedEncoder:
    return PackedEncoder(model[0].auto_model, COMPILE_AFTER)


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def load_sentence_transformer(model_id: str, revision: str, dtype: str, device: torch.device) -> SentenceTransformer:
    """Load a model, once per process and device; never part of a callable, so never hashed or pickled."""
    from sentence_transformers import SentenceTransformer

    # From the folder, not by the id: sentence-transformers would ask the Hub again.
    folder = revisions.model_folder(model_id, revision)
    _check_files(folder)
    with revisions.reading_model(folder):
        model = SentenceTransformer(
            str(folder),
            device=str(device),
            model_kwargs={"dtype": getattr(torch, dtype)},
            trust_remote_code=False,
        )
        _check_lengths(model)
        # One text, since some faults of a configuration show in a forward pass only.
        width = model.encode(["a"], show_progress_bar=False).shape[1]
        if width != dimension(model):
            raise ValueError(f"its embeddings have {width} numbers, not the {dimension(model)} that it declares")
    return model


def _check_files(folder: Path) -> None:
    """Raise ValueError if the encoder's weights are damaged, or far fewer than its configuration asks for."""
    from transformers import AutoConfig

    for at in (folder, *folder.glob("0_*")):  # older models keep the encoder in a folder of its own
        files = sorted(at.glob("*.safetensors"))
        shapes = revisions.read_shapes(files)
        if files and (at / "config.json").is_file():
            with revisions.reading_model(folder):
                config = AutoConfig.from_pretrained(at, trust_remote_code=False)
            revisions.refuse_other_sizes(folder, config, shapes)


def _check_lengths(model: SentenceTransformer) -> None:
    """Raise ValueError if the model's limits do not fit its tables of tokens and positions, which would end a run."""
    longest, encoder = model.max_seq_length, getattr(model[0], "auto_model", None)
    if longest is not None and (not is_integer(longest) or longest < 1):
        raise ValueError(f"max_seq_length={longest!r} is not a number of tokens")
    if longest is not None:
        refuse_long_texts(encoder, "max_seq_length", longest)
    words = None if encoder is None else encoder.get_input_embeddings()
    if isinstance(words, torch.nn.Embedding):
        refuse_foreign_tokens(model.tokenizer, words.num_embeddings)


def dimension(model: SentenceTransformer) -> int:
    """Return the length of the model's embeddings."""
    # Newer versions of sentence-transformers have renamed the method.
    name = (
        "get_embedding_dimension" if hasattr(model, "get_embedding_dimension") else "get_sentence_embedding_dimension"
    )
    return int(getattr(model, name)())


def reads_plain_tokens(model: SentenceTransformer) -> bool:
    """Return True if `encode` passes a text's tokens to the model unchanged, so that all can be tokenised at once.

    False for a model with a default prompt, with embeddings cut to fewer dimensions, or with another kind of first
    module.
    """
    first = model[0]
    tokenizer = model.tokenizer
    return (
        type(first).__name__ == "Transformer"
        and type(first).__module__.startswith("sentence_transformers.")  # a model may bring code of its own
        and not getattr(first, "do_lower_case", False)  # `encode` lowercases before it tokenises
        and hasattr(tokenizer, "backend_tokenizer")
        and tokenizer.pad_token_id is not None
        and tokenizer.padding_side == "right"  # as `pad` does
        and model.default_prompt_name is None
        and model.truncate_dim is None
    )


def pool_tokens(model: SentenceTransformer, last_hidden_state: Tensor, mask: Tensor) -> Tensor:
    """Apply the model's pooling (and normalisation, ...) to token states from another forward pass.

    Args:
        model (`SentenceTransformer`): its first module, the encoder, is skipped.
        last_hidden_state (`Tensor` of shape `(batch, tokens, units)`): of an encoder equal to the model's.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.

    Returns:
        `Tensor` of shape `(batch, dimension)`.
    """
    # The keys by which the modules of sentence-transformers pass tensors on.
    features = {"token_embeddings": last_hidden_state, "attention_mask": mask}
    for module in list(model)[1:]:
        features = module(features)
    return features["sentence_embedding"]
