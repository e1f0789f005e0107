"""SCORE by other judges: `RewardScorer`, a `.map` callable for reward models and classifiers of the Hub.

Does: run any sequence classifier of transformers on a conversation, on prompt and answer as a pair, or on the answer;
turn its labels into one number by an expression; read texts without padding where the encoder allows it.
Does not: choose a model, or run its code. A row's score does not depend on the rows in its batch (to 1e-5 in float32).
"""

from __future__ import annotations

import ast
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from car_datasets.scoring.batching import Tokens, pad, run_windows, to_device, token_budget
from car_datasets.scoring.conversations import (
    UNREAD,
    Conversation,
    ConversationScorer,
    HubModel,
    load_hub_model,
    note_texts,
    read_model_files,
    render_chat,
    windows_ahead,
)
from car_datasets.scoring.iqs.packed_encoder import COMPILE_AFTER, PackedEncoder, can_pack
from car_datasets.scoring.iqs.packing import pack
from car_datasets.scoring.stage import refuse_not_finite, set_fields
from car_datasets.utils import revisions
from car_datasets.utils.digests import public
from car_datasets.utils.processes import device_for

logger = logging.getLogger(__name__)

CHAT, PAIR, ANSWER = "chat", "pair", "answer"
TEXTS = ("auto", CHAT, PAIR, ANSWER)
Floats = npt.NDArray[np.float64]


class _Text(NamedTuple):
    first: str
    second: str | None = None


# --- labels

# What a label counts with: its logit, or its probability among all labels, or by itself.
MEASURES: dict[str, Callable[[Floats], Floats]] = {
    "logit": lambda logits: logits,
    "softmax": lambda logits: np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)),
    "sigmoid": lambda logits: np.exp(-np.logaddexp(0, -logits)),
}
LONGEST_EXPRESSION = 2_000  # characters


class LabelSum(NamedTuple):
    """A weighted sum over labels.

    Args:
        terms (`tuple`): of each term the weight, a key of [`MEASURES`] and the number of the label.
        constant (`float`): added to them.
    """

    terms: tuple[tuple[float, str, int], ...]
    constant: float = 0.0

    def __call__(self, logits: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return one number per text for logits of shape `(texts, labels)`."""
        wide = logits.astype(np.float64)
        measured = {kind: MEASURES[kind](wide) for kind in {kind for _, kind, _ in self.terms}}
        total = np.full(len(wide), self.constant)
        for weight, kind, label in self.terms:
            total += weight * measured[kind][:, label]
        return total.astype(np.float32)


def read_labels(expression: str | None, names: Mapping[int, str]) -> LabelSum:
    """Read an expression over the labels of a classifier, such as `"softmax(good) - 0.5 * softmax(bad)"`.

    Args:
        expression (`str`, *optional*): a sum of labels, each with a number before it or without. A label alone means its
            logit; `softmax(label)` is its probability among all, `sigmoid(label)` its own. A label is named as the model
            names it, in quotes if it is more than one word, or `LABEL_2` by its number. Without an expression, the model
            has one label, whose logit is the score.
        names (`Mapping[int, str]`): of the labels, by number.

    Raises:
        ValueError: the expression is not such a sum, names an unknown label, or is missing for a model with several.
    """
    shown = ", ".join(repr(name) for name in list(names.values())[:20])
    if expression is None:
        if len(names) == 1:
            return LabelSum(((1.0, "logit", 0),))
        raise ValueError(
            f"labels is missing: the model has {len(names)} labels ({shown}), and a score is one number. Say how it "
            f"follows from them, such as labels='softmax({_spelt(names[len(names) - 1])})', or after the model in a name: "
            f"'reward:MODEL,labels=softmax({_spelt(names[len(names) - 1])})'."
        )
    try:
        if not isinstance(expression, str) or len(expression) > LONGEST_EXPRESSION:
            raise TypeError
        terms, constant = _sum(ast.parse(expression.strip(), mode="eval").body, 1.0, names)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"labels={str(expression)[:100]!r} must be a sum of labels with numbers before them, such as "
            f"'softmax({_spelt(names[len(names) - 1])})' or '1 * {_spelt(names[0])} - 0.5'; the labels are {shown}."
        ) from error
    except KeyError as error:
        raise ValueError(
            f"labels={expression!r} names {error.args[0]!r}, and the labels of the model are {shown}."
        ) from error
    if not terms or not np.isfinite([constant, *(weight for weight, _, _ in terms)]).all():
        raise ValueError(f"labels={expression!r} must name a label, with finite numbers; the labels are {shown}.")
    return LabelSum(tuple(terms), constant)


def _spelt(name: str) -> str:
    return name if name.isidentifier() else repr(name)


def _sum(node: ast.expr, factor: float, names: Mapping[int, str]) -> tuple[list[tuple[float, str, int]], float]:
    """Return the terms and the constant of a part of an expression, times a factor; TypeError for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return _sum(node.operand, -factor if isinstance(node.op, ast.USub) else factor, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = (
            _sum(node.left, factor, names),
            _sum(node.right, -factor if isinstance(node.op, ast.Sub) else factor, names),
        )
        return [*left[0], *right[0]], left[1] + right[1]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div)):
        (numbers, number), (terms, constant) = _sum(node.left, 1.0, names), _sum(node.right, 1.0, names)
        if isinstance(node.op, ast.Div) or terms == []:  # the number may come second
            (numbers, number), (terms, constant) = (terms, constant), (numbers, number)
        if numbers or (isinstance(node.op, ast.Div) and number == 0):
            raise TypeError
        scale = factor / number if isinstance(node.op, ast.Div) else factor * number
        return [(weight * scale, kind, label) for weight, kind, label in terms], constant * scale
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return [], factor * float(node.value)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MEASURES:
        [argument] = node.args if len(node.args) == 1 and not node.keywords else [None]
        return [(factor, node.func.id, _label(argument, names))], 0.0
    return [(factor, "logit", _label(node, names))], 0.0


def _label(node: ast.expr | None, names: Mapping[int, str]) -> int:
    """Return the number of the label that a node names."""
    if isinstance(node, ast.Name):
        name = node.id
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value
    else:
        raise TypeError
    found = [number for number, known in names.items() if known == name]
    by_number = name.removeprefix("LABEL_")
    if not found and name.startswith("LABEL_") and by_number.isdecimal() and int(by_number) in names:
        return int(by_number)
    if len(found) != 1:  # none, or several of one name
        raise KeyError(name)
    return found[0]


# --- the stage


@public
@dataclass(frozen=True)
class RewardScorer(ConversationScorer):
    """A stage that adds the score of a reward model or classifier: `dataset.map(RewardScorer(id), batched=True)`.

    Any model of `AutoModelForSequenceClassification`, such as a reward model, a cross-encoder or a classifier of
    educational value. Of a chat, the conversation up to its last answer is scored.

    A frozen record of plain values, as [`QualityScorer`]: equal records have equal fingerprints in every process. Rows
    of a batch are sorted by length; on a GPU from Ampere on, in half precision, BERT, RoBERTa, XLM-RoBERTa and CamemBERT
    classifiers read texts without padding, unless they tell prompt and answer apart by token types. All other models
    (ELECTRA, DeBERTa, ModernBERT, decoders) read batches with padding.

    Args:
        model_id (`str`): a sequence classifier, on the Hub or in a folder.
        revision (`str`, *optional*): branch, tag or commit. The field holds the immutable revision that it resolves to:
            a commit SHA, or for a folder a content digest.
        token (`str`, *optional*): for a private model; used to look it up and download it, never stored.
        schema (`str`): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for the schema's columns, such as `{"response": "answer"}`.
        score_thoughts (`bool`): put the thought of the last answer in front of it, between `<think>` and `</think>`.
        output_column (`str`): the new column, float32; higher is better if the model or `labels` says so. Further ones
            are named after it: `reward_tokens` (int32: length of the entire text with special tokens),
            `reward_truncated` (bool: the model did not read the end) and `reward_status`.
        on_invalid (`str`): a row that cannot be scored raises (`"error"`), or gets a null score and its reason in
            `reward_status` (`"mark"`).
        dtype (`str`): of the model's trunk, `"float32"`, `"bfloat16"` or `"float16"`; its head stays in float32. Texts
            that overflow in half precision are scored again in float32.
        batch_tokens (`int`, *optional*): tokens in one forward pass, padding included; by default chosen by the device.
            Halved when memory runs out.
        max_tokens (`int`, *optional*): tokens that are read of a text; by default as many as the model reads, at most
            8,192.
        text (`str`): what the model reads: `"chat"`, the messages in the model's chat template; `"pair"`, the prompt and
            the answer as a pair of texts; `"answer"`, the answer alone; or `"auto"`, which is `"chat"` if the model has
            a chat template, else `"pair"`. A template that writes a date gets 26 July 2024, so that a score does not
            depend on the day.
        labels (`str`, *optional*): for a model with several labels: how they make one number, as a sum such as
            `"softmax(good)"` or `"1 * LABEL_1 + 2 * LABEL_2"`; see
            [`~car_datasets.scoring.reward.read_labels`].

    Raises:
        ValueError: the model does not exist or is damaged, or an option is invalid or does not suit the model.
        ConnectionError: the Hub does not answer.
    """

    output_column: str = "reward_score"
    text: str = "auto"
    labels: str | None = None

    def __post_init__(self, token: str | None) -> None:
        if self.text not in TEXTS:
            raise ValueError(f"text={self.text!r} is not known; choose one of {list(TEXTS)}.")
        super().__post_init__(token)
        files = self._files()
        has_template = bool(files.tokenizer.chat_template)
        if self.text == CHAT and not has_template:
            raise ValueError(
                f"text='chat': {self.model_id} has no chat template. Pass text='pair' for prompt and answer, or "
                "text='answer'."
            )
        if self.text == "auto":
            set_fields(self, text=CHAT if has_template else PAIR)
        read_labels(self.labels, files.config.id2label)

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of `.map(batched=True)`.

        Raises:
            ValueError: the batch already has one of the columns, no schema fits, a score is not a number, or a row
                cannot be scored and `on_invalid="error"`.
        """
        chats, texts = self._conversations(batch, self._render)
        note_texts(len(chats), len(texts))
        scores, lengths = self._score(list(texts.values()), rank)
        # A text of no token, as an empty answer may be for a model without special tokens, was not read.
        found = {i: (s, n) for i, s, n in zip(texts, scores.tolist(), lengths.tolist(), strict=True) if n}
        statuses = [UNREAD if i in texts and i not in found else chat.status for i, chat in enumerate(chats)]
        refuse_not_finite(batch, [i for i, (score, _) in found.items() if not np.isfinite(score)])
        return {
            self.output_column: [np.float32(found[i][0]) if i in found else None for i in range(len(chats))],
            **self._diagnostics(statuses, {i: n for i, (_, n) in found.items()}, self.limit),
        }

    def _render(self, chat: Conversation) -> _Text:
        if self.text == CHAT:
            messages = [*chat.prompt, {"role": "assistant", "content": chat.answer}]
            return _Text(render_chat(self._files().tokenizer, messages, prompt=False))
        if self.text == ANSWER:
            return _Text(chat.answer)
        return _Text("\n\n".join(message["content"] for message in chat.prompt), chat.answer)

    def _score(
        self, texts: Sequence[_Text], rank: int | None, dtype: str | None = None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Return scores and lengths of texts, shape `(texts,)`; NaN for a text without tokens."""
        if not texts:  # the model need not be loaded
            return np.zeros(0, np.float32), np.zeros(0, np.int32)
        model = _load(self.model_id, str(self.revision), dtype or self.dtype, device_for(rank))
        windows = windows_ahead(texts, self._tokenise)
        packed = model.encoder is not None and self.text != PAIR
        packed = packed or (model.encoder is not None and not model.has_types)
        budget = token_budget(model.hub.device, model.hub.config.hidden_size, self.batch_tokens, packed)
        run = functools.partial(model.logits, limit=self.limit, packed=packed)
        (logits,), lengths = run_windows(windows, len(texts), budget, model.hub.device, run, padded=not packed)
        scores = read_labels(self.labels, self._files().config.id2label)(logits)
        again = np.flatnonzero(~np.isfinite(logits).all(axis=1) & (lengths > 0)).tolist()
        if again and (dtype or self.dtype) != "float32":  # a state overflows in half precision
            logger.info("%d of %d texts overflow in half precision and are scored again.", len(again), len(texts))
            scores[again] = self._score([texts[i] for i in again], rank, "float32")[0]
        return scores, lengths

    def _tokenise(self, texts: Sequence[_Text]) -> Tokens:
        """Return the tokens of texts; the answer starts at the first token of another type."""
        tokenizer, limit = self._files().tokenizer, self.limit

        def read(part: Sequence[_Text], **options: Any) -> tuple[list[list[int]], list[int]]:
            firsts = [text.first for text in part]
            seconds = [text.second for text in part] if self.text == PAIR else None
            # A chat template writes the special tokens itself.
            found = tokenizer(firsts, seconds, add_special_tokens=self.text != CHAT, verbose=False, **options)
            ids = found["input_ids"]
            types = found.get("token_type_ids") or [[]] * len(ids)
            return ids, [row.index(1) if 1 in row else len(row_ids) for row, row_ids in zip(types, ids, strict=True)]

        ids, starts = read(texts)
        lengths = [len(row) for row in ids]
        if long := [i for i, length in enumerate(lengths) if length > limit]:
            cut, cut_starts = read([texts[i] for i in long], truncation=True, max_length=limit)
            for i, row, start in zip(long, cut, cut_starts, strict=True):
                ids[i], starts[i] = row, start
        return Tokens(ids, lengths, starts)


class _Classifier:
    """A classifier on a device, whose trunk may read texts without padding."""

    def __init__(self, hub: HubModel, tokenizer: Any, encoder: PackedEncoder | None) -> None:
        self.hub, self.encoder = hub, encoder
        config = hub.config
        self.has_types = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1
        self.splits = True  # the head gives the same for states as within the model
        self._pads_freely = config.pad_token_id is None

    def logits(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], limit: int, packed: bool = False
    ) -> tuple[Tensor]:
        """Return the logits of a batch of texts, of shape `(texts, labels)`."""
        if not all(ids):
            return (self._without_empty(ids, starts, limit, packed),)
        if self._pads_freely and len(ids) > 1 and _unlike_ends(ids, self.hub.config.vocab_size) is None:
            return (torch.cat([self.logits([row], [at], limit)[0] for row, at in zip(ids, starts, strict=True)]),)
        if packed:
            return (self._packed(ids, limit),)
        inputs = self._inputs(ids, starts)
        if not self.splits:
            return (self.hub.model(**inputs).logits,)
        outputs = self.hub.outputs(**inputs)
        for name in ("last_hidden_state", "pooler_output"):
            if isinstance(getattr(outputs, name, None), Tensor):
                setattr(outputs, name, getattr(outputs, name).float())
        return (self.hub.head(outputs, **inputs),)

    def _without_empty(self, ids: Any, starts: Any, limit: int, packed: bool) -> Tensor:
        """Return the logits of a batch with texts that have no token, NaN for these."""
        full = [i for i, row in enumerate(ids) if row]
        found = torch.full((len(ids), self.hub.model.config.num_labels), float("nan"), device=self.hub.device)
        if full:
            (logits,) = self.logits([ids[i] for i in full], [starts[i] for i in full], limit, packed)
            found[full] = logits.float()
        return found

    def _inputs(self, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> dict[str, Tensor]:
        config = self.hub.config
        if self._pads_freely:
            config.pad_token_id = _unlike_ends(ids, config.vocab_size)
        input_ids, mask = pad(ids, config.pad_token_id, self.hub.device)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if self.has_types:
            places = torch.arange(input_ids.shape[1], device=self.hub.device)
            second = places >= to_device(np.array(starts), self.hub.device)[:, None]
            inputs["token_type_ids"] = second.long() * mask
        return inputs

    def _packed(self, ids: Sequence[Sequence[int]], limit: int) -> Tensor:
        """Return the logits of texts that are read end to end; heads of these encoders read the first token only."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        assert self.encoder is not None
        row = pack(ids, self.hub.config, limit, self.hub.device)
        *_, last = self.encoder.states(row)
        first = last[row.starts()][:, None]
        pooler = getattr(self.hub.trunk, "pooler", None)
        pooled = None if pooler is None else pooler(first).float()
        return self.hub.head(BaseModelOutputWithPooling(first.float(), pooled))


def _unlike_ends(ids: Sequence[Sequence[int]], words: int) -> int | None:
    """Return a token with which no text ends, or `None` if there is none.

    Heads of decoders read the last token that is not the padding of their configuration. Where that names no padding,
    they take several texts only if it is given one.
    """
    ends = {row[-1] for row in ids}
    return next((word for word in range(words) if word not in ends), None)


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def _load(model_id: str, revision: str, dtype: str, device: torch.device) -> _Classifier:
    """Load a classifier, and see that its head can be applied apart from its trunk, which lets it be more exact."""
    hub = load_hub_model("AutoModelForSequenceClassification", model_id, revision, dtype, device)
    tokenizer = read_model_files(model_id, revision).tokenizer
    classifier = _Classifier(hub, tokenizer, None)
    ids = [row[:16] for row in tokenizer(["a", "a b c"])["input_ids"] if row]
    try_out = functools.partial(classifier.logits, ids, [len(row) for row in ids], 16)
    with torch.inference_mode(), revisions.reading_model(revisions.model_folder(model_id, revision)):
        classifier.splits = False
        (expected,) = try_out()
        for name, child in hub.model.named_children():
            if name != hub.model.base_model_prefix:
                child.float()  # in half precision, many texts would get the same score
        classifier.splits = True
        error = 1e-4 if dtype == "float32" else 0.05
        try:
            same = torch.allclose(try_out()[0], expected.float(), rtol=error, atol=error)
        except Exception:  # a head that reads more of its trunk than the states
            same = False
        if not same:
            classifier.splits = False
            hub.model.to(getattr(torch, dtype))
        elif can_pack(hub.config, dtype, device):
            classifier.encoder = PackedEncoder(hub.trunk, COMPILE_AFTER)
    return classifier
