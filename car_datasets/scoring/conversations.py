"""What scorers by models of the Hub share: rows as conversations, options, and a model with its head apart.

Does: turn rows into messages up to the last answer; render them by a model's chat template, on a fixed day; load any
model of transformers once per process and device; apply its head to states that are given; run texts in batches.
Does not: run code of a model, use weights that a file lacks, or know what a head says about a row.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from car_datasets.loading.chats import (
    EMPTY_RESPONSE,
    NO_ASSISTANT_TURN,
    NO_CONTENT,
    OK,
    OTHER_PARTS,
    TOOL_CALL,
    TRUNCATED,
    Turn,
    is_scored,
)
from car_datasets.loading.schemas import Schema, as_column_names, check_schema, conversations_of, find_schema
from car_datasets.loading.templates import CLEAN_TEMPLATE
from car_datasets.loading.values import untouched
from car_datasets.scoring.batching import WINDOW_TEXTS, Tokens, current_watch, refuse_foreign_tokens
from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.packing import first_position
from car_datasets.scoring.stage import check_options, refuse_invalid, refuse_taken, set_fields, text_columns
from car_datasets.utils import revisions
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_tables
from car_datasets.utils.revisions import pin_model
from car_datasets.utils.settings import is_integer

if TYPE_CHECKING:
    from datasets import Features

T = TypeVar("T")
UNREAD = f"{NO_CONTENT}: assistant"  # the status of an answer without a token, which such a model cannot read
NOT_RENDERED = "not_rendered"  # the status of a row whose roles the model's chat template refuses, with its reason
MODEL_DTYPES = ("float32", "bfloat16", "float16")  # of weights that transformers loads
MOST_TOKENS = 8_192  # read of a conversation unless `max_tokens` says more, as the memory of a longer one is large
CONTEXT = 2_048  # tokens of a model that states no limit
# A template may write the date, on which a score must not depend. This macro takes the place of the function that gives
# it: 26 July 2024, which the templates of Llama 3 write where they are not told the date.
DAY = {"%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24", "%A": "Friday", "%a": "Fri"}
_REPLACED = "".join(f"|replace('{sign}', '{text}')" for sign, text in DAY.items())
SAME_DAY = "{%- macro strftime_now(format) -%}{{ format" + _REPLACED + " }}{%- endmacro -%}"


class Conversation(NamedTuple):
    """A row as messages.

    Args:
        prompt (`list[dict[str, str]]`): the messages before the last answer, of `role` and `content`.
        answer (`str`): the last answer.
        status (`str`): `"ok"`, or why the row cannot be scored or deserves a look.
    """

    prompt: list[dict[str, str]]
    answer: str
    status: str

    @property
    def is_scored(self) -> bool:
        """Return True if the row can be scored."""
        return is_scored(self.status)


def read_conversations(
    batch: Mapping[str, Sequence[Any]], schema: Schema, score_thoughts: bool = False
) -> list[Conversation]:
    """Return every row of a batch as messages up to its last answer.

    Args:
        batch (`Mapping[str, Sequence]`): columns of equal length, as `.map(batched=True)` passes them.
        schema ([`Schema`]): the columns that contain the text.
        score_thoughts (`bool`): put the thought of the last answer in front of it, between `<think>` and `</think>`,
            instead of leaving it out.
    """
    return [
        Conversation([], "", turns) if isinstance(turns, str) else _conversation(turns, score_thoughts)
        for turns in conversations_of(batch, schema)
    ]


def _conversation(turns: Sequence[Turn], score_thoughts: bool) -> Conversation:
    if not score_thoughts:
        turns = [turn._replace(thought="") for turn in turns if turn.kind != "thought"]
    prompt, answers = as_example(turns)
    if not answers:
        return Conversation([], "", NO_ASSISTANT_TURN)
    answer = answers[0]["content"]
    last = next(turn for turn in reversed(turns) if turn.kind == "assistant" and turn.scored)
    states = (
        (OTHER_PARTS, any(turn.partial for turn in turns)),
        (TOOL_CALL, bool(last.call)),
        (EMPTY_RESPONSE, not answer.strip()),
    )
    return Conversation(prompt, answer, next((status for status, holds in states if holds), OK))


def as_example(turns: Sequence[Turn]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the messages before the last answer of a chat, and this answer; both are empty if it has none.

    Turns of one speaker in a row are one message. Calls of tools are text of the assistant. A thought is kept, between
    `<think>` and `</think>`, in the last answer only, as chat templates do.

    Args:
        turns (`Sequence[Turn]`): from `conversations_of`.
    """
    joined: list[Turn] = []
    for turn in turns:
        text = "\n".join(part for part in (turn.text, turn.call) if part)
        said = (
            turn._replace(kind="assistant", text="", thought=turn.text)
            if turn.kind == "thought"
            else turn._replace(text=text)
        )
        if joined and joined[-1].kind == said.kind:
            last = joined[-1]
            texts, thoughts = (
                [t for t in pair if t] for pair in ((last.text, said.text), (last.thought, said.thought))
            )
            joined[-1] = said._replace(text="\n".join(texts), thought="\n".join(thoughts))
        else:
            joined.append(said)
    end = max((i for i, turn in enumerate(joined) if turn.kind == "assistant" and turn.scored), default=0)
    if end == 0:  # nothing was said, or nothing before it
        return [], []
    last = joined[end]
    answer = f"<think>\n{last.thought}\n</think>\n\n{last.text}" if last.thought and last.text.strip() else last.text
    prompt = [{"role": turn.kind, "content": turn.text} for turn in joined[:end]]
    return prompt, [{"role": "assistant", "content": answer}]


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]], prompt: bool) -> str:
    """Return messages as the text of a model's chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        messages (`Sequence[Mapping]`): of `role` and `content`.
        prompt (`bool`): end with what begins an answer.

    Raises:
        ValueError: the template refuses the messages; the text is its reason.
    """
    try:
        template = tokenizer.get_chat_template()
        template = SAME_DAY + template if "strftime_now" in template else template
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # jinja's own errors, and whatever a template raises
        raise ValueError(" ".join(str(error).split())[:100] or type(error).__name__) from error
    return str(text)


def rendered(
    conversations: Sequence[Conversation], render: Callable[[Conversation], T]
) -> tuple[list[Conversation], dict[int, T]]:
    """Render the conversations that can be scored; those that a template refuses get the status `"not_rendered"`.

    Args:
        conversations (`Sequence[Conversation]`): all rows of a batch.
        render (`Callable`): a function of one, which raises ValueError where the template does.

    Returns:
        The conversations with their final statuses, and what `render` returned, by row.
    """
    found, texts = list(conversations), {}
    for i, chat in enumerate(conversations):
        if chat.is_scored:
            try:
                texts[i] = render(chat)
            except ValueError as error:
                found[i] = chat._replace(status=f"{NOT_RENDERED}: {error}")
    return found, texts


@dataclass(frozen=True)
class ConversationScorer:
    """The options and columns that scorers by models of the Hub have in common.

    The classes of these scorers, such as [`RewardScorer`], say what each option is for. A subclass has a `__call__`, which
    reads the rows by `_conversations`, and a default for `output_column`; it raises `VERSION` when its numbers change.
    """

    model_id: str
    revision: str | None = None
    token: InitVar[str | None] = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    score_thoughts: bool = False
    output_column: str = "score"
    on_invalid: str = "error"
    dtype: str = "float32"
    batch_tokens: int | None = None
    max_tokens: int | None = None
    cache_version: str = field(init=False, repr=False)

    VERSION = "1"  # no field; of a subclass, and raised when its numbers change

    # What `curate` asks of a scorer. These read rows by templates of their own, and embed none: the template is that of
    # the text which an embedder reads.
    template: ClassVar[str] = CLEAN_TEMPLATE
    objective: ClassVar[str] = "regression"
    languages: ClassVar[tuple[str, ...]] = ()
    shares_encoder: ClassVar[bool] = False
    embedding_column: ClassVar[str | None] = None

    def __post_init__(self, token: str | None) -> None:
        columns = as_column_names(self.columns)
        check_schema(self.schema, columns)
        if self.dtype not in MODEL_DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not known; choose one of {list(MODEL_DTYPES)}.")
        check_options(
            template=self.template,
            on_invalid=self.on_invalid,
            dtype=self.dtype,
            embedding_dtype="float32",
            batch_tokens=self.batch_tokens,
            new_columns=self.output_columns,
        )
        if self.max_tokens is not None and (not is_integer(self.max_tokens) or self.max_tokens < 2):
            raise ValueError(f"max_tokens={self.max_tokens!r} must be a number of tokens, at least 2.")
        model = pin_model(self.model_id, self.revision, token)
        set_fields(self, columns=columns, revision=model.revision, cache_version=self.VERSION)
        files = self._files()
        if self.max_tokens is not None and self.max_tokens > files.context:
            raise ValueError(
                f"max_tokens={self.max_tokens} is above the {files.context} tokens that {self.model_id} reads. Leave it "
                "out, or pass a smaller number."
            )

    @property
    def names(self) -> ColumnNames:
        """Return the names of the columns that describe the score, such as `reward_status`."""
        return ColumnNames(score=self.output_column)

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that this stage adds, in order."""
        return tuple(self._types())

    def output_features(self) -> Features:
        """Return the types of the new columns."""
        from datasets import Features, Value

        return Features({name: Value(kind) for name, kind in self._types().items()})

    def _types(self) -> dict[str, str]:
        """Return the type of each new column by its name."""
        names = self.names
        return {names.score: "float32", names.tokens: "int32", names.truncated: "bool", names.status: "string"}

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        """Return the columns of the text.

        Raises:
            ValueError: no schema fits.
        """
        return text_columns(column_names, self.schema, self.columns)

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of columns; each scorer has its own."""
        raise NotImplementedError

    def _files(self) -> ModelFiles:
        return read_model_files(self.model_id, str(self.revision))

    @property
    def limit(self) -> int:
        """Return the number of tokens that are read of a conversation."""
        return self.max_tokens or min(self._files().context, MOST_TOKENS)

    def _conversations(
        self, batch: Mapping[str, Sequence[Any]], render: Callable[[Conversation], T]
    ) -> tuple[list[Conversation], dict[int, T]]:
        """Return the rows of a batch and their rendered texts.

        Raises:
            ValueError: the batch already has one of the columns, no schema fits, or a row cannot be scored and
                `on_invalid="error"`.
        """
        batch = untouched(batch)
        refuse_tables(batch, f"add_columns(dataset, {type(self).__name__}(...), 'Scoring')")
        refuse_taken(batch, self)
        schema = find_schema(batch, self.schema, self.columns)
        found, texts = rendered(read_conversations(batch, schema, self.score_thoughts), render)
        refuse_invalid(batch, [chat.status for chat in found], self.on_invalid)
        return found, texts

    def _diagnostics(self, statuses: Sequence[str], tokens: Mapping[int, int], limit: int) -> dict[str, list[Any]]:
        """Return the columns that say more about a score; a row without tokens was not read."""
        names = self.names
        lengths = [tokens.get(i, 0) for i in range(len(statuses))]
        cut = [length > limit for length in lengths]
        return {
            names.tokens: lengths,
            names.truncated: cut,
            names.status: [
                TRUNCATED if long and status == OK else status for long, status in zip(cut, statuses, strict=True)
            ],
        }


def note_texts(rows: int, texts: int) -> None:
    """Tell the progress bar, if there is one, what a call of a stage will read.

    Args:
        rows (`int`): rows of the batch.
        texts (`int`): texts of these rows that a model reads.
    """
    if (watch := current_watch()) is not None:
        watch.begin(rows, texts)


def windows_ahead(texts: Sequence[T], tokenise: Callable[[Sequence[T]], Tokens]) -> Iterator[Tokens]:
    """Tokenise texts window by window, the next one in a thread while the model reads the last.

    Args:
        texts (`Sequence`): what `tokenise` takes, in order.
        tokenise (`Callable`): returns the tokens of some of them.

    Returns:
        an iterator over the tokens of `WINDOW_TEXTS` texts each.
    """
    parts = [texts[at : at + WINDOW_TEXTS] for at in range(0, len(texts), WINDOW_TEXTS)]
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting = [thread.submit(tokenise, part) for part in parts[:1]]
        for part in parts[1:]:
            waiting.append(thread.submit(tokenise, part))
            yield waiting.pop(0).result()
        for last in waiting:
            yield last.result()


# --- models


class ModelFiles(NamedTuple):
    """What is known of a model without its weights.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        config (`PreTrainedConfig`): of the model.
        context (`int`): tokens that it can read.
    """

    tokenizer: Any
    config: Any
    context: int


@functools.lru_cache(maxsize=8)
def read_model_files(model_id: str, revision: str) -> ModelFiles:
    """Read tokenizer and configuration of a model, once per process.

    Args:
        model_id (`str`): Hub id or folder.
        revision (`str`): commit SHA or content digest.

    Raises:
        ValueError: a file is missing or damaged, or names code.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = revisions.model_folder(model_id, revision)
    with revisions.reading_model(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if isinstance(config, IQSConfig):
        raise ValueError(f"model_id={model_id!r} is an IQS model: QualityScorer({model_id!r}) scores by it.")
    with revisions.reading_model(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text = config.get_text_config()
        refuse_foreign_tokens(tokenizer, text.vocab_size)
        limits = [tokenizer.model_max_length, getattr(text, "max_position_embeddings", None)]
        if limits[1] is not None and limits[1] > 0:
            limits[1] -= first_position(text)
        known = [int(limit) for limit in limits if is_integer(limit) and 0 < limit < 10**9]
    return ModelFiles(tokenizer, config, min(known, default=CONTEXT))


class _Given(nn.Module):
    """A trunk that returns what it was given, whatever it is called with."""

    outputs: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.outputs


class HubModel:
    """A model of transformers on a device, whose head can be applied to states that were computed before.

    The head is the model itself with its trunk replaced by states. So a head that does more than multiply by a matrix
    (pooling, capped or scaled logits) is applied as its own code does.

    Args:
        model (`PreTrainedModel`): in evaluation mode.
        device (`torch.device`): of the model.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.config = model.config.get_text_config()
        self.trunk = model.base_model
        self._given = _Given()
        self._head = copy.copy(model)
        # Another mapping of modules; the modules in it are those of the model.
        self._head.__dict__["_modules"] = {**model._modules, model.base_model_prefix: self._given}

    def outputs(self, **inputs: Tensor) -> Any:
        """Return what the trunk gives for token ids and the like."""
        return self.trunk(**inputs)

    def head(self, outputs: Any, **inputs: Tensor) -> Tensor:
        """Return the logits of the head for what a trunk gave."""
        self._given.outputs = outputs
        try:
            logits: Tensor = self._head(**inputs).logits
        finally:
            self._given.outputs = None
        return logits


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def load_hub_model(kind: str, model_id: str, revision: str, dtype: str, device: torch.device) -> HubModel:
    """Load a model, once per process and device; never part of a callable, so never hashed or pickled.

    Args:
        kind (`str`): the class of transformers, such as `"AutoModelForCausalLM"`.
        model_id (`str`): Hub id or folder.
        revision (`str`): commit SHA or content digest.
        dtype (`str`): of the weights.
        device (`torch.device`): to load it to.

    Raises:
        ValueError: the files are damaged, hold another kind of model, or lack weights of its head, which would be drawn
            at random.
    """
    import transformers

    folder = revisions.model_folder(model_id, revision)
    shapes = revisions.read_shapes(sorted(folder.glob("*.safetensors")))
    revisions.refuse_other_sizes(folder, read_model_files(model_id, revision).config, shapes)
    with revisions.reading_model(folder):
        model, info = getattr(transformers, kind).from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model.config.use_cache = False
    _refuse_random_weights(folder, info, kind)  # outside of the block, which would cut the message short
    return HubModel(model.eval().to(device), device)


def _refuse_random_weights(folder: Path, info: Mapping[str, Any], kind: str) -> None:
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise ValueError(
            f"{folder} is no model of transformers' class {kind}, which this scorer loads: it has no weights for "
            f"{missing[:3]}, and these would be drawn at random. Name the scorer that fits the model, reward:MODEL for a "
            "sequence classifier, and ifd:MODEL or perplexity:MODEL for a causal language model, or pass another model."
        )
