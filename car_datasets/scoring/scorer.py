"""SCORE: `QualityScorer`, a `.map` callable that adds the IQS score of each row.

Does: turn a batch of rows into texts, score them, and return the scores in row order; on request also the embeddings,
from the same forward pass. A row's score does not depend on the rows in its batch (to 1e-5 in float32).
Does not: load datasets, start processes, or give a score to a row that has no text.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from car_datasets.loading.chats import OK, TRUNCATED
from car_datasets.loading.schemas import as_column_names, check_schema, find_schema
from car_datasets.loading.templates import Text
from car_datasets.loading.values import carried, untouched
from car_datasets.scoring.embedder import TextEmbedder, load_sentence_transformer, pool_tokens
from car_datasets.scoring.inference import LoadedScorer, TextScores, Weights, load_scorer, read_scorer_config
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.convert_comet import base_model, tokenizer_revision
from car_datasets.scoring.iqs.float8 import FLOAT8, for_embedder, refuse_without_float8
from car_datasets.scoring.iqs.heads import FAULTS, JUDGED, PARTS, judges_for
from car_datasets.scoring.iqs.modeling_iqs import HEADS
from car_datasets.scoring.iqs.openvino_encoder import pin_engine
from car_datasets.scoring.stage import (
    CPU_ROWS,
    Rows,
    check_options,
    refuse_not_finite,
    refuse_one_text,
    refuse_taken,
    set_fields,
    text_columns,
)
from car_datasets.utils import digests, revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_tables
from car_datasets.utils.digests import public
from car_datasets.utils.processes import device_for
from car_datasets.utils.revisions import PinnedModel, pin_model

if TYPE_CHECKING:
    from datasets import Dataset, Features

CACHE_VERSION = "3"  # datasets hashes the fields below, never our code: raise it when numbers change

# How the score of a chat follows from the scores of its exchanges.
TURNS: dict[str, Callable[[Any], Any]] = {"mean": np.mean, "min": np.min, "sum": np.sum, "last": lambda s: s[-1]}

# Revisions of tokenizers on the Hub, by (immutable revision of their checkpoint, id of the tokenizer). A copy of a
# scorer, as by `dataclasses.replace`, thus keeps its tokenizer's revision, and does not ask the Hub again.
_TOKENIZER_PINS: dict[tuple[str, str], str | None] = {}


@public
@dataclass(frozen=True)
class QualityScorer:
    """A stage that adds the quality score of a row: `dataset.map(QualityScorer(), batched=True, with_rank=True)`.

    A frozen record of plain values: equal records have equal fingerprints in every process, other weights, dtype or
    template give another fingerprint, and the second `.map` is read from the cache. Higher is better; scores are not
    bounded.

    `dataclasses.replace(scorer, ...)` keeps the resolved revision, and asks no Hub for a model that this process has
    resolved before.

    Args:
        model_id (`str`): an IQS model, on the Hub or in a folder. The default comes with the package and needs no Hub.
        revision (`str`, *optional*): branch, tag or commit. The field holds the immutable revision that it resolves to:
            a commit SHA, or for a folder a content digest.
        token (`str`, *optional*): for a private model; used to look it up and download it, never stored.
        tokenizer (`str`, *optional*): for a checkpoint in the original's layout: folder or Hub id of its base model's
            tokenizer. Default: the base model that the checkpoint names.
        schema (`str`): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for the schema's columns, such as `{"response": "answer"}`.
        template (`str`, *optional*): defaults to the template the model was trained with; change it only for
            experiments.
        turns (`str`): how the scores of a chat's exchanges make one score: `"mean"`, `"min"`, `"last"` or `"sum"`.
        score_thoughts (`bool`): put the thoughts of an answer (`<think>...</think>`, or a key of the message) in front
            of it. By default the answer alone is scored.
        output_column (`str`): the new column, float32. `diagnostics` columns are named after it.
        diagnostics (`bool`): also add `iqs_tokens` (int32: length of the entire text with special tokens, summed over
            exchanges), `iqs_truncated` (bool: the model did not read the end) and `iqs_status`.
        uncertainty (`bool`): also add `iqs_score_std`, the standard deviation over the members of the head, from the
            same forward pass: rank by `iqs_score - iqs_score_std` to prefer answers on which they agree. For models
            with several members, such as the default.
        parts (`bool`): also add `iqs_expert` (probability that an expert has revised the answer), `iqs_soundness` and
            `iqs_worth` (expected ratings, 0 to 10) and `iqs_fault` (the likeliest one of
            [`~car_datasets.scoring.iqs.heads.FAULTS`], or `"none"`), from the same forward pass. A model whose head is
            `"parts"` or `"kernel"` has its own; the default takes them from `car-datasets/iqs-minilm-parts`, which
            comes with the package, and its score stays as it is.
        embedding_column (`str`, *optional*): also add the embedding, from the same forward pass, equal to what
            [`TextEmbedder`] gives. For models whose encoder is an unchanged sentence-transformers model, such as the
            default. Texts longer than that model's own limit (256 tokens for the default) take a second pass.
        on_invalid (`str`): a row that cannot be scored raises (`"error"`), or gets a null score and its reason in
            `iqs_status` (`"mark"`).
        dtype (`str`): of the encoder, `"float32"`, `"float16"` or `"bfloat16"`, which is as fast and ten times less
            exact; the head stays in float32. Texts that overflow in half precision are scored again in float32.
            `"float8"` is bfloat16 with products in float8, for wide encoders on a GPU from Ada or Hopper on.
        batch_tokens (`int`, *optional*): tokens in one forward pass, padding included; by default chosen by the device.
            Halved when memory runs out.
        embedding_dtype (`str`): of the embedding column, `"float32"` or `"float16"`, which takes half the disk space.
        compile (`bool`): `torch.compile` the encoder from the first text on. In half precision on a GPU it is compiled
            anyway, once a run has taken about a minute and is likely to gain by it.
        engine (`str`, *optional*): a folder with the encoder in int8 for OpenVINO, as written by
            [`~car_datasets.training.quantise_encoder`]; on the CPU only. Scores and embeddings then come from it,
            except the embeddings of texts that take a second pass.

    In half precision on a GPU from Ampere on (torch >= 2.10), BERT and RoBERTa encoders read texts without padding.

    Raises:
        ValueError: the model does not exist, or an option is invalid or does not suit the model.
        ConnectionError: the Hub does not answer.
    """

    model_id: str = revisions.DEFAULT_SCORER
    revision: str | None = None
    token: InitVar[str | None] = None
    tokenizer: str | None = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    template: str | None = None
    turns: str = "mean"
    score_thoughts: bool = False
    output_column: str = ColumnNames.score
    diagnostics: bool = False
    uncertainty: bool = False
    parts: bool = False
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
        # What needs no disk and no network is checked first: an invalid option should not cost a download.
        columns = as_column_names(self.columns)
        check_schema(self.schema, columns)
        self._check_options()
        model = pin_model(self.model_id, self.revision, token)
        tokenizer_pin = self._pin_tokenizer(model, token)
        config = read_scorer_config(self.model_id, model.revision, self.tokenizer, tokenizer_pin)
        self._check_model(config)
        engine = self.engine
        judge = _packaged_parts(config) if self.parts and not HEADS[config.head].judged else None
        # The fields hold what was resolved, so that equal stages have equal fingerprints and workers resolve nothing.
        set_fields(
            self,
            columns=columns,
            revision=model.revision,
            template=config.template if self.template is None else self.template,
            tokenizer_revision=tokenizer_pin,
            engine_revision=None if engine is None else pin_engine(engine, self.model_id, model.revision, self.dtype),
            # Set here, as a class attribute alone would not be part of the fingerprint. A field of its own for the parts
            # would give scorers without them another fingerprint, too.
            cache_version=", ".join(filter(None, (CACHE_VERSION, judge))),
        )

    def _check_options(self) -> None:
        """Raise ValueError for options that no model makes valid; without disk and network."""
        check_options(
            template=self.template,
            on_invalid=self.on_invalid,
            dtype=self.dtype,
            embedding_dtype=self.embedding_dtype,
            batch_tokens=self.batch_tokens,
            new_columns=self.output_columns,
        )
        if self.dtype == FLOAT8:
            refuse_without_float8()
        if self.turns not in TURNS:
            raise ValueError(f"turns={self.turns!r} is not known; choose one of {sorted(TURNS)}.")
        if self.engine is not None and self.compile:
            raise ValueError(f"compile=True: engine={self.engine!r} is compiled already; leave one of them out.")

    def _pin_tokenizer(self, model: PinnedModel, token: str | None) -> str | None:
        """Resolve the tokenizer of a checkpoint in the original's layout, which is outside its folder.

        Returns:
            `str`: digests or a commit SHA; `None` for a model that has its tokenizer in its own folder.
        """
        checkpoint = digests.find_checkpoint(model.folder)
        if checkpoint is None:
            return None
        base = base_model(checkpoint, self.tokenizer)
        place = (model.revision, base)
        # Only for a scorer that was given the immutable revision: one made from a branch asks for the newest tokenizer.
        if self.revision == model.revision and place in _TOKENIZER_PINS:
            return _TOKENIZER_PINS[place]
        pin = tokenizer_revision(base, token)
        if not Path(base).is_dir():  # files of a folder may be overwritten: their digest is compared every time
            _TOKENIZER_PINS[place] = pin
        return pin

    def _check_model(self, config: IQSConfig) -> None:
        """Raise ValueError for options that this model does not support."""
        if self.embedding_column is not None and config.encoder_source is None:
            raise ValueError(
                f"embedding_column={self.embedding_column!r}: {self.model_id} has an encoder of its own, which is not "
                "a sentence embedder. Leave it out and map TextEmbedder() over the dataset as well."
            )
        if self.uncertainty and config.members < 2:
            raise ValueError(f"uncertainty=True: the head of {self.model_id} has one member, which cannot disagree.")

        if self.parts and not HEADS[config.head].judged and _packaged_parts(config) is None:
            raise ValueError(
                f"parts=True: the head of {self.model_id} is {config.head!r}, which judges no parts. Leave it out, or "
                "train a scorer that has them (configs/train_iqs_parts.yaml)."
            )

    @property
    def parts_revision(self) -> str | None:
        """Return the digest of the packaged model that gives the parts; `None` without parts, or if the head has them."""
        config = self._config()
        return _packaged_parts(config) if self.parts and not HEADS[config.head].judged else None

    @property
    def objective(self) -> str:
        """Return `"regression"` for IQS, `"ranking"` for the original's "Comet" variant."""
        return str(self._config().objective)

    @property
    def languages(self) -> tuple[str, ...]:
        """Return the codes of the languages that the model was made to score; empty if its configuration has none."""
        return tuple(self._config().languages)

    @property
    def shares_encoder(self) -> bool:
        """Return True if `embedding_column` is possible: the encoder is an unchanged sentence-transformers model."""
        return self._config().encoder_source is not None

    def with_embeddings(self, column: str) -> QualityScorer:
        """Return a copy that also adds the embedding, in this column, with the revisions of this scorer.

        Raises:
            ValueError: another new column has that name, or the model has an encoder of its own.
        """
        # Not dataclasses.replace, which would list and digest the model's folder again, and read its configuration.
        # Equal fields make an equal fingerprint either way.
        scorer = copy.copy(self)
        set_fields(scorer, embedding_column=column)
        scorer._check_options()
        scorer._check_model(scorer._config())
        return scorer

    def with_parts(self) -> QualityScorer:
        """Return a copy that also adds the parts, with the revisions of this scorer; itself if the model has no parts."""
        config = self._config()
        known = HEADS[config.head].judged or _packaged_parts(config) is not None
        return replace(self, parts=True) if known and not self.parts else self

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that this stage adds, in order."""
        names = ColumnNames(score=self.output_column)  # derives the names of the further columns from this one
        columns = [names.score]
        if self.uncertainty:
            columns.append(names.std)
        if self.parts:
            columns += names.parts
        if self.diagnostics:
            columns += [names.tokens, names.truncated, names.status]
        elif self.on_invalid == "mark":  # the reason of every null score
            columns.append(names.status)
        if self.embedding_column is not None:
            columns.append(self.embedding_column)
        return tuple(columns)

    def output_features(self) -> Features:
        """Return the types of the new columns; `.map(features=...)` needs them if a first batch is all null."""
        from datasets import Features, Value

        names = ColumnNames(score=self.output_column)
        types: dict[str, Any] = {
            names.score: Value("float32"),
            names.std: Value("float32"),
            **dict.fromkeys(names.parts, Value("float32")),
            names.fault: Value("string"),
            names.tokens: Value("int32"),
            names.truncated: Value("bool"),
            names.status: Value("string"),
        }
        if self.embedding_column is not None:
            types |= self.embedder().output_features()
        return Features({name: types[name] for name in self.output_columns})

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        """Return the columns of the text.

        Raises:
            ValueError: no schema fits.
        """
        return text_columns(column_names, self.schema, self.columns)

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of `.map(batched=True)`.

        Raises:
            ValueError: the batch already has one of the columns, no schema fits, a score is not a number, or a row
                cannot be scored and `on_invalid="error"`.
        """
        batch = untouched(batch)
        refuse_tables(batch, "curate(dataset)")
        refuse_taken(batch, self)
        # Looked up for every batch, from the column names alone: caching the schema on the scorer, or passing on the one
        # that `curate` has found, would change its fingerprint and that of its shards.
        schema = find_schema(batch, self.schema, self.columns)
        rows = Rows.from_batch(batch, schema, str(self.template), self.on_invalid, self.score_thoughts)
        texts = self.score_texts(rows.texts, rank)
        # All of `TURNS` leave a single score as it is.
        scores = list(texts.scores) if rows.are_texts else rows.fold(texts.scores, TURNS[self.turns])
        self._refuse_nan(scores, batch)
        columns = {self.output_column: scores, **self._diagnostics(rows, texts)}
        if texts.parts is not None:
            columns |= self._judged(rows, texts.parts)
        if self.embedding_column is not None and texts.embeddings is not None:
            columns[self.embedding_column] = rows.mean_vectors(texts.embeddings, self.embedding_dtype)
        # `_diagnostics` computes all of its columns; those that were not asked for are dropped here.
        return {name: columns[name] for name in self.output_columns}

    def _diagnostics(self, rows: Rows, texts: TextScores) -> dict[str, Any]:
        """Return every column that says more about a score: its uncertainty, length, truncation and status."""
        names = ColumnNames(score=self.output_column)
        turn = TURNS[self.turns]
        if rows.are_texts:  # at once, as thousands of small arrays take longer than a GPU
            truncated, lengths, std = texts.truncated, texts.tokens, list(texts.members.std(axis=1))
        else:
            truncated = np.array([bool(part.any()) for part in rows.split(texts.truncated)])
            lengths = np.array([part.sum() for part in rows.split(texts.tokens)], dtype=np.int32)
            # Members are compared on the score of the row: they may disagree on its exchanges and agree on their mean.
            # `members` has the shape (texts of the row, members).
            std = rows.fold(texts.members, lambda members: np.std([turn(member) for member in members.T]))
        return {
            names.std: std,
            names.tokens: lengths,
            names.truncated: truncated,
            names.status: [
                TRUNCATED if cut and status == OK else status
                for cut, status in zip(truncated, rows.status, strict=True)
            ],
        }

    def _judged(self, rows: Rows, parts: Any) -> dict[str, Any]:
        """Return the columns of the parts; the exchanges of a chat are combined as their scores are."""
        names, turn = ColumnNames(score=self.output_column), TURNS[self.turns]
        numbers = {getattr(names, part): rows.fold(parts[:, i], turn) for i, part in enumerate(PARTS)}
        # Of a chat the fault that is likeliest on average, also where the scores are added.
        faults = [
            FAULTS[int(of_row.mean(axis=0).argmax())] if len(of_row) else None
            for of_row in rows.split(parts[:, len(PARTS) :])
        ]
        return {**numbers, names.fault: faults}

    def score_texts(self, texts: Sequence[Text | str], rank: int | None = None) -> TextScores:
        """Score texts that are already in the template.

        Args:
            texts (`Sequence`): [`Text`]s or strings; for a ranking model, which encodes question and answer separately,
                [`Text`]s only.
            rank (`int`, *optional*): index of the process among those of `.map(num_proc=...)`; chooses its GPU.

        Returns:
            [`~car_datasets.scoring.inference.TextScores`]: scores, token counts and, if there is an `embedding_column`,
            embeddings, in the order of the texts.

        Raises:
            ValueError: strings without the mark between question and answer, for a model that reads the two separately.
        """
        refuse_one_text(texts)
        if not texts:  # a batch of rows that cannot be scored; the model need not be loaded
            empty = np.zeros(0, np.float32)
            vectors = None if self.embedding_column is None else empty.reshape(0, 0)
            parts = empty.reshape(0, JUDGED) if self.parts else None
            return TextScores(empty, empty.astype(np.int32), empty.astype(bool), vectors, empty.reshape(0, 1), parts)
        loaded = self.load(device_for(rank))
        if self.embedding_column is None:
            return loaded.score_texts(texts, self.batch_tokens)
        embedder = self.embedder()
        sentences = load_sentence_transformer(embedder.model_id, str(embedder.revision), embedder.dtype, loaded.device)
        scores = loaded.score_texts(texts, self.batch_tokens, functools.partial(pool_tokens, sentences))
        limit, embeddings = sentences.max_seq_length, scores.embeddings
        if limit is not None and embeddings is not None:
            # The scorer reads further than the embedder, whose embedding must not depend on what follows its limit.
            # Both have the same tokenizer, as the encoder is unchanged, so `tokens` counts for the embedder too.
            long = np.flatnonzero(scores.tokens > limit).tolist()
            strings = [text if isinstance(text, str) else text.whole for text in (texts[i] for i in long)]
            embeddings[long] = embedder.embed_texts(strings, rank)
        return scores

    def count_tokens(self, rows: Dataset) -> Iterator[int]:
        """Yield the tokens of each row as its column of tokens will have them, without running the model.

        Args:
            rows (`Dataset`): checked rows.
        """
        read = self.read_columns(rows.column_names)
        for batch in carried(rows.select_columns(read).with_format(None)).iter(batch_size=CPU_ROWS):
            schema = find_schema(batch, self.schema, self.columns)
            found = Rows.from_batch(batch, schema, str(self.template), self.on_invalid, self.score_thoughts)
            counts = self.load().count_tokens(found.texts) if found.texts else np.zeros(0, dtype=np.int32)
            yield from (int(part.sum()) for part in found.split(counts))

    def load(self, device: torch.device | None = None) -> LoadedScorer:
        """Load model and tokenizer to a device, by default this process's; once per process, whatever the columns."""
        weights = Weights(
            self.model_id,
            str(self.revision),
            self.tokenizer,
            self.tokenizer_revision,
            self.dtype,
            self.compile,
            self.engine,
            self.engine_revision,
            self.parts_revision,
        )
        return load_scorer(weights, device or device_for())

    def embedder(self) -> TextEmbedder:
        """Return the [`TextEmbedder`] that gives the same embeddings as `embedding_column`.

        Raises:
            ValueError: the model has an encoder of its own.
        """
        return _embedder_of(self)

    def _config(self) -> IQSConfig:
        return read_scorer_config(self.model_id, str(self.revision), self.tokenizer, self.tokenizer_revision)

    def _refuse_nan(self, scores: Sequence[Any], batch: Mapping[str, Sequence[Any]]) -> None:
        refuse_not_finite(batch, [i for i, s in enumerate(scores) if s is not None and not math.isfinite(s)])


def _packaged_parts(config: IQSConfig) -> str | None:
    """Return the digest of the packaged model that judges by parts, if a model of this configuration can take it."""
    name = revisions.DEFAULT_PARTS
    pin = revisions.pin_revision(name)
    return pin if judges_for(read_scorer_config(name, pin, None, None), config) else None


# Cached, as every batch asks for it, and a new one would resolve its revision again.
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
        score_thoughts=scorer.score_thoughts,
        output_column=scorer.embedding_column or ColumnNames.embedding,
        on_invalid=scorer.on_invalid,
        dtype=for_embedder(scorer.dtype),
        batch_tokens=scorer.batch_tokens,
        embedding_dtype=scorer.embedding_dtype,
    )
