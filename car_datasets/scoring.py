"""SCORE: `QualityScorer`, a `.map` callable that adds the IQS score of each row.

Does: format, tokenise, batch by length, run the model, put the numbers back in row order; on request the embedding out
of the same forward pass. A row's score does not depend on the rows around it (1e-5 in float32).
Does not: load datasets, start processes, or give a score to a row that has no text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from car_datasets import hub
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.convert_comet import base_model, tokenizer_revision
from car_datasets.embedding import TextEmbedder, load_sentence_transformer, pool_tokens
from car_datasets.formatting import OK, TRUNCATED, as_column_names, check_schema, find_schema
from car_datasets.loaded_scorer import LoadedScorer, TextScores, Weights, load_scorer, read_scorer_config
from car_datasets.openvino_encoder import pin_engine
from car_datasets.parallel import device_for
from car_datasets.rows import Rows, check_embedding_dtype, refuse_overwrite, refuse_tables, row_names
from car_datasets.templates import Text

if TYPE_CHECKING:
    from datasets import Features

CACHE_VERSION = "2"  # datasets hashes the fields below, never our code: raise it when numbers change

TURNS: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "min": np.min, "sum": np.sum, "last": lambda s: s[-1]}


@dataclass(frozen=True)
class QualityScorer:
    """Adds the quality score of a row: `dataset.map(QualityScorer(), batched=True, with_rank=True)`.

    A frozen record of plain values: equal records have equal fingerprints in every process, other weights, dtype or
    template another one, and the second `.map` is read from the cache. Higher is better; scores are not bounded.

    Args:
        model_id (`str`): an IQS model, on the Hub or in a folder. The default is in the package and needs no Hub.
        revision (`str`, *optional*): branch, tag or commit; replaced by the commit or digest that it means now.
        token (`str`, *optional*): for a private model; used to look it up and download it, never stored.
        tokenizer (`str`, *optional*): for a checkpoint in the original's layout: folder or Hub id of its base model's
            tokenizer, see [`convert`].
        schema, columns: which columns hold the text, see [`find_schema`].
        template (`str`, *optional*): the model's own, unless you know why not.
        turns (`str`): the score of a chat from those of its exchanges: `"mean"`, `"min"`, `"last"` or `"sum"`.
        output_column (`str`): the new column, float32. `diagnostics` columns are named after it.
        diagnostics (`bool`): also add `iqs_tokens` (int32, of the whole text with special tokens, summed over
            exchanges), `iqs_truncated` (bool: the model did not see the end) and `iqs_status`.
        uncertainty (`bool`): also add `iqs_score_std`, the standard deviation of the members of the head, from the same
            pass: rank by `iqs_score - iqs_score_std` to prefer what they agree on. For models with several, as the default.
        embedding_column (`str`, *optional*): also add the embedding, out of the same forward pass, equal to what
            [`TextEmbedder`] gives. For models whose encoder is a sentence-transformers model left as it was, such as
            the default. Texts longer than that model's own limit (256 tokens for the default) take a second pass.
        on_invalid (`str`): a row that cannot be scored raises (`"error"`), or gets a null score and its reason in
            `iqs_status` (`"mark"`).
        dtype (`str`): of the encoder, `"float32"`, `"bfloat16"` or `"float16"`; the head stays in float32.
        batch_tokens (`int`, *optional*): padded tokens in one forward pass; chosen by the device, and halved where
            memory runs out.
        embedding_dtype (`str`): of the embeddings' column, `"float32"` or `"float16"`, which takes half the disk.
        compile (`bool`): `torch.compile` the encoder. It takes a minute, and pays on a GPU with many rows only.
        engine (`str`, *optional*): a folder with the encoder in int8 for OpenVINO, see
            [`~car_datasets.quantisation.quantise_encoder`]; on the CPU. Scores then come from it, and embeddings as well, but
            for the texts that take a second pass.

    In half precision on a GPU from Ampere on (torch >= 2.10), BERT and RoBERTa encoders read texts without padding.

    Raises:
        ValueError: there is no such model; rows are not what the schema says; a score is not a number.
    """

    model_id: str = hub.DEFAULT_SCORER
    revision: str | None = None
    token: InitVar[str | None] = None
    tokenizer: str | None = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    template: str | None = None
    turns: str = "mean"
    output_column: str = "iqs_score"
    diagnostics: bool = False
    uncertainty: bool = False
    embedding_column: str | None = None
    on_invalid: str = "error"
    dtype: str = "float32"
    batch_tokens: int | None = None
    embedding_dtype: str = "float32"
    compile: bool = False
    engine: str | None = None
    tokenizer_revision: str | None = field(init=False, repr=False)
    engine_revision: str | None = field(init=False, repr=False)
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self, token: str | None) -> None:
        object.__setattr__(self, "tokenizer_revision", None)
        object.__setattr__(self, "cache_version", CACHE_VERSION)  # a default alone would not be hashed
        object.__setattr__(self, "columns", as_column_names(self.columns))
        check_schema(self.schema, self.columns)
        Rows.check_options(self.template, self.on_invalid, self.dtype, self.batch_tokens, self._new_columns())
        check_embedding_dtype(self.embedding_dtype)
        if self.turns not in TURNS:
            raise ValueError(f"turns={self.turns!r} is not known; choose one of {sorted(TURNS)}.")
        revision = hub.pin_revision(self.model_id, self.revision, token)
        folder = hub.model_folder(self.model_id, revision, token)  # here, so that workers find it without a token
        checkpoint = hub.find_checkpoint(folder)
        if checkpoint is not None:  # its tokenizer is no part of its folder, and changes the numbers too
            pin = tokenizer_revision(base_model(checkpoint, self.tokenizer), token)
            object.__setattr__(self, "tokenizer_revision", pin)
        config = read_scorer_config(self.model_id, revision, self.tokenizer, self.tokenizer_revision)
        if self.embedding_column is not None and config.encoder_source is None:
            raise ValueError(
                f"embedding_column={self.embedding_column!r}: {self.model_id} has an encoder of its own, which is no "
                "sentence embedder. Leave it out and map TextEmbedder() over the dataset as well."
            )
        if self.uncertainty and config.members < 2:
            raise ValueError(f"uncertainty=True: the head of {self.model_id} has one member, which cannot disagree.")
        if self.engine is not None and self.compile:
            raise ValueError(f"compile=True: engine={self.engine!r} is compiled already; leave one of them out.")
        engine_pin = None if self.engine is None else pin_engine(self.engine, self.model_id, revision, self.dtype)
        object.__setattr__(self, "engine_revision", engine_pin)
        object.__setattr__(self, "revision", revision)
        if self.template is None:
            object.__setattr__(self, "template", config.template)

    @property
    def objective(self) -> str:
        """`"regression"` for IQS, `"ranking"` for the original's "Comet" variant."""
        return str(self._config().objective)

    @property
    def shares_encoder(self) -> bool:
        """Whether `embedding_column` is possible: the encoder is a sentence-transformers model as it was."""
        return self._config().encoder_source is not None

    @property
    def output_columns(self) -> tuple[str, ...]:
        """The names of the columns that this callable adds."""
        return tuple(self._new_columns())

    def output_features(self) -> Features:
        """The types of the columns that this callable adds; with `.map(features=...)` a first batch may be all null."""
        from datasets import Features, Value

        kinds = {"tokens": Value("int32"), "truncated": Value("bool"), "status": Value("string")}
        stem = self.output_column.removesuffix("_score")
        types: dict[str, Any] = {f"{stem}_{name}": kind for name, kind in kinds.items()}
        types[self.output_column] = types[f"{self.output_column}_std"] = Value("float32")
        if self.embedding_column is not None:
            types[self.embedding_column] = self.embedder().output_features()[self.embedding_column]
        return Features({name: types[name] for name in self._new_columns()})

    def _new_columns(self) -> list[str]:
        stem = self.output_column.removesuffix("_score")
        extra = ["tokens", "truncated", "status"] if self.diagnostics else ["status"] * (self.on_invalid == "mark")
        names = [self.output_column, *(f"{stem}_{name}" for name in extra)]
        if self.uncertainty:
            names.insert(1, f"{self.output_column}_std")
        return names if self.embedding_column is None else [*names, self.embedding_column]

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """A `.map(batched=True)` batch to the new columns only."""
        refuse_tables(batch, "curate(dataset)")
        refuse_overwrite(batch, self.output_columns, "output_column=... (and embedding_column=...)")
        schema = find_schema(batch, self.schema, self.columns)
        rows = Rows.from_batch(batch, schema, str(self.template), self.on_invalid)
        texts = self.score_texts(rows.texts, rank)
        turn = TURNS[self.turns]
        per_row = [turn(part) if len(part) else None for part in rows.split(texts.scores)]
        self._refuse_nan(per_row, batch)
        cut = [bool(part.any()) for part in rows.split(texts.truncated)]
        stem = self.output_column.removesuffix("_score")
        spread = [
            np.std([turn(member) for member in part.T]) if len(part) else None for part in rows.split(texts.members)
        ]
        columns = {
            f"{self.output_column}_std": [None if s is None else np.float32(s) for s in spread],
            self.output_column: [None if s is None else np.float32(s) for s in per_row],
            f"{stem}_tokens": np.array([part.sum() for part in rows.split(texts.tokens)], dtype=np.int32),
            f"{stem}_truncated": np.array(cut),
            f"{stem}_status": [TRUNCATED if c and s == OK else s for c, s in zip(cut, rows.status, strict=True)],
        }
        if self.embedding_column is not None and texts.embeddings is not None:
            columns[self.embedding_column] = rows.mean_vectors(texts.embeddings, self.embedding_dtype)
        return {name: columns[name] for name in self.output_columns}

    def score_texts(self, texts: Sequence[Text | str], rank: int | None = None) -> TextScores:
        """Score ready-made texts, in order; see [`~car_datasets.loaded_scorer.TextScores`].

        Args:
            texts (`Sequence`): [`Text`]s, or strings that are already in the template (a ranking model needs question
                and answer apart, so no strings).
            rank (`int`, *optional*): see [`device_for`].
        """
        if not texts:
            none = np.zeros(0, np.float32)
            vectors = None if self.embedding_column is None else none.reshape(0, 0)
            return TextScores(none, none.astype(np.int32), none.astype(bool), vectors, none.reshape(0, 1))
        loaded = self.load(device_for(rank))
        if self.embedding_column is None:
            return loaded.score_texts(texts, self.batch_tokens)
        embedder = self.embedder()
        sentences = load_sentence_transformer(embedder.model_id, str(embedder.revision), embedder.dtype, loaded.device)
        found = loaded.score_texts(texts, self.batch_tokens, functools.partial(pool_tokens, sentences))
        limit, embeddings = sentences.max_seq_length, found.embeddings
        if limit is not None and embeddings is not None:
            # The scorer reads further than the embedder was made to; what it saw there must not colour the embedding.
            long = np.flatnonzero(found.tokens > limit).tolist()
            whole = [text if isinstance(text, str) else text.whole for text in (texts[i] for i in long)]
            embeddings[long] = embedder.embed_texts(whole, rank)
        return found

    def load(self, device: torch.device | None = None) -> LoadedScorer:
        """Model and tokenizer on a device, by default this process's; loaded once, whatever the columns."""
        weights = Weights(
            self.model_id,
            str(self.revision),
            self.tokenizer,
            self.tokenizer_revision,
            self.dtype,
            self.compile,
            self.engine,
            self.engine_revision,
        )
        return load_scorer(weights, device or device_for())

    def embedder(self) -> TextEmbedder:
        """The [`TextEmbedder`] whose column `embedding_column` equals.

        Raises:
            ValueError: this model's encoder is its own.
        """
        return _embedder_of(self)

    def _config(self) -> IQSConfig:
        return read_scorer_config(self.model_id, str(self.revision), self.tokenizer, self.tokenizer_revision)

    def _refuse_nan(self, scores: Sequence[Any], batch: Mapping[str, Sequence[Any]]) -> None:
        bad = [i for i, s in enumerate(scores) if s is not None and not np.isfinite(s)]
        if bad:
            raise ValueError(
                f"{len(bad)} scores are not finite, rows {row_names(batch, bad)[:5]}. In half precision this is an "
                "overflow: use dtype='float32'. Otherwise the weights are broken."
            )


@functools.lru_cache(maxsize=8)
def _embedder_of(scorer: QualityScorer) -> TextEmbedder:
    source = scorer._config().encoder_source
    if source is None:
        raise ValueError(f"{scorer.model_id} has an encoder of its own; choose a TextEmbedder(...) yourself.")
    return TextEmbedder(
        source["model_id"],
        source["revision"],
        schema=scorer.schema,
        columns=scorer.columns,
        template=str(scorer.template),
        output_column=scorer.embedding_column or "embedding",
        on_invalid=scorer.on_invalid,
        dtype=scorer.dtype,
        batch_tokens=scorer.batch_tokens,
        embedding_dtype=scorer.embedding_dtype,
    )
