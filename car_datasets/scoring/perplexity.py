"""SCORE by a causal language model: `IFDScorer` and `PerplexityScorer`, two `.map` callables.

Does: measure how likely an answer is given its prompt, and how much likelier the prompt makes it (instruction-following
difficulty, Li et al. 2024); say which answers do not fit into the context.
Does not: train, generate, or hold the logits of more than some tokens at a time. A row's score does not depend on the
rows in its batch (to 1e-4 in float32).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from car_datasets.loading.chats import TOO_LONG
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
)
from car_datasets.scoring.stage import refuse_not_finite
from car_datasets.utils import revisions
from car_datasets.utils.column_names import further_column
from car_datasets.utils.digests import public
from car_datasets.utils.processes import device_for

logger = logging.getLogger(__name__)

# Logits that are held at a time, in float32 128 MiB: 680 tokens of a vocabulary of 49,152.
LOGITS = 2**25
PROMPT, NOTHING = "prompt", "nothing"
GIVEN = (PROMPT, NOTHING)


class _Pair(NamedTuple):
    """What an answer is read after, and the answer, as token ids."""

    before: list[int]
    answer: list[int]


@dataclass(frozen=True)
class LanguageModelScorer(ConversationScorer):
    """What the two scorers share: rows to token ids, and ids to the mean loss of an answer's token."""

    def __post_init__(self, token: str | None) -> None:
        super().__post_init__(token)
        _opening(self.model_id, str(self.revision))  # a model without one is refused now

    @property
    def _measures(self) -> tuple[bool, ...]:
        """Return, for each pass over an answer, whether the prompt is given."""
        raise NotImplementedError

    def _values(self, losses: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        """Return the numbers of the columns for losses of shape `(rows, passes)`."""
        raise NotImplementedError

    @property
    def _further(self) -> str:
        """Return the name of the column of plain numbers, of which the score is made."""
        return further_column(self.output_column, type(self)._NUMBER)

    _NUMBER = "number"

    def _types(self) -> dict[str, str]:
        score, *others = super()._types().items()
        return dict([score, (self._further, "float32"), *others])

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of `.map(batched=True)`.

        Raises:
            ValueError: the batch already has one of the columns, no schema fits, a score is not a number, or a row
                cannot be read and `on_invalid="error"`.
        """
        chats, texts = self._conversations(batch, self._render)
        statuses = [chat.status for chat in chats]
        read = dict(zip(texts, self._tokenise(list(texts.values())), strict=True))
        alone = _opening(self.model_id, str(self.revision))
        lengths = {i: len(pair.before) + len(pair.answer) for i, pair in read.items()}
        fitting: dict[int, _Pair] = {}
        for i, pair in read.items():
            room = self.limit - max(len(pair.before), len(alone))
            if not pair.answer or not chats[i].answer.strip():
                statuses[i] = UNREAD
            elif room < 1:
                statuses[i] = f"{TOO_LONG}: prompt of {len(pair.before)} tokens"
            else:
                fitting[i] = pair._replace(answer=pair.answer[:room])
        note_texts(len(chats), len(fitting) * len(self._measures))
        losses = self._losses(list(fitting.values()), alone, rank)
        bad = np.flatnonzero(~np.isfinite(losses).all(axis=1)).tolist()
        refuse_not_finite(batch, [list(fitting)[i] for i in bad])
        columns: dict[str, Any] = {}
        for name, values in self._values(losses).items():
            numbers = dict(zip(fitting, values.astype(np.float32), strict=True))
            columns[name] = [numbers.get(i) for i in range(len(chats))]
        return {**columns, **self._diagnostics(statuses, lengths, self.limit)}

    def _render(self, chat: Conversation) -> tuple[str, str]:
        tokenizer = self._files().tokenizer
        if tokenizer.chat_template:
            return render_chat(tokenizer, chat.prompt, prompt=True), chat.answer
        return "".join(f"{message['content']}\n" for message in chat.prompt), chat.answer

    def _tokenise(self, texts: Sequence[tuple[str, str]]) -> list[_Pair]:
        """Return prompts and answers as token ids, each by itself, so that an answer has the same in both passes."""
        if not texts:
            return []
        tokenizer = self._files().tokenizer
        sides = [
            tokenizer(list(side), add_special_tokens=False, verbose=False)["input_ids"]
            for side in zip(*texts, strict=True)
        ]
        # A chat template writes the token with which texts begin itself.
        first = [] if tokenizer.chat_template else _opening(self.model_id, str(self.revision))
        return [_Pair([*first, *before], answer) for before, answer in zip(*sides, strict=True)]

    def _losses(
        self, pairs: Sequence[_Pair], alone: list[int], rank: int | None, dtype: str | None = None
    ) -> npt.NDArray[np.float64]:
        """Return the mean loss of the tokens of each answer in each pass, shape `(rows, passes)`, in nats."""
        if not pairs:  # the model need not be loaded
            return np.zeros((0, len(self._measures)))
        model = _load(self.model_id, str(self.revision), dtype or self.dtype, device_for(rank))
        befores = [pair.before if given else alone for pair in pairs for given in self._measures]
        answers = [pair.answer for pair in pairs for _ in self._measures]
        ids = [[*before, *answer] for before, answer in zip(befores, answers, strict=True)]
        window = Tokens(ids, [len(row) for row in ids], [len(before) for before in befores])
        budget = token_budget(model.device, model.config.hidden_size, self.batch_tokens)
        run = functools.partial(answer_losses, model)
        (found,), _ = run_windows([window], len(ids), budget, model.device, run)
        losses = found.reshape(len(pairs), -1).astype(np.float64)
        again = np.flatnonzero(~np.isfinite(losses).all(axis=1)).tolist()
        if again and (dtype or self.dtype) != "float32":  # a state overflows in half precision
            logger.info("%d of %d rows overflow in half precision and are scored again.", len(again), len(pairs))
            losses[again] = self._losses([pairs[i] for i in again], alone, rank, "float32")
        return losses


@public
@dataclass(frozen=True)
class IFDScorer(LanguageModelScorer):
    """A stage that adds the instruction-following difficulty: `dataset.map(IFDScorer(id), batched=True)`.

    IFD (Cherry_LLM, Li et al. 2024) is the perplexity of the answer given the prompt over that of the answer alone: near
    0 if the prompt says all of the answer, near 1 if it helps little, above 1 if it misleads. The published rule drops
    rows from 1 on and keeps the highest below. The column `ifd` is this ratio. `ifd_score` orders rows by that rule,
    higher is better: it equals the ratio below 1, and is 1 minus the ratio from 1 on, at most 0, so that such rows come
    after all others, and still can be ranked.

    Both perplexities are over the same tokens, all of the answer, and none that ends it. Given the prompt, the answer
    follows the messages in the model's chat template; without one, their texts, each with a line break. Alone, it
    follows what the template writes in front of any answer; without one, the token with which texts begin
    (`bos_token`, or else `eos_token`). Of a chat, the last answer is scored, given all that is before it.

    A frozen record of plain values, as [`QualityScorer`]: equal records have equal fingerprints in every process.
    Batches have padding, and rows of similar length.

    Args:
        model_id (`str`): a causal language model, on the Hub or in a folder. Small ones do: GPT-2 ranks much as models
            of 7B do (Superfiltering, 2024).
        revision (`str`, *optional*): branch, tag or commit. The field holds the immutable revision that it resolves to:
            a commit SHA, or for a folder a content digest.
        token (`str`, *optional*): for a private model; used to look it up and download it, never stored.
        schema (`str`): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for the schema's columns, such as `{"response": "answer"}`.
        score_thoughts (`bool`): put the thought of the last answer in front of it, between `<think>` and `</think>`.
        output_column (`str`): the new column, float32. Further ones are named after it: `ifd` (float32: the ratio; for a
            name without `_score`, the name with `_ratio`), `ifd_tokens` (int32: length of prompt and answer),
            `ifd_truncated` (bool: the end of the answer did not fit, and the score is that of its beginning) and
            `ifd_status`.
        on_invalid (`str`): a row that cannot be read raises (`"error"`), or gets a null score and its reason in
            `ifd_status` (`"mark"`). Either way, an empty answer has no score, nor has one whose prompt fills the
            context; `ifd_status` says `"no_content: assistant"` or `"too_long"`.
        dtype (`str`): of the model, `"float32"`, `"bfloat16"` or `"float16"`. Rows that overflow in half precision are
            scored again in float32.
        batch_tokens (`int`, *optional*): tokens in one forward pass, padding included; by default chosen by the device.
            Halved when memory runs out.
        max_tokens (`int`, *optional*): tokens that are read of a row; by default as many as the model reads, at most
            8,192.

    Raises:
        ValueError: the model does not exist, is damaged or reads ahead, or an option is invalid.
        ConnectionError: the Hub does not answer.
    """

    output_column: str = "ifd_score"
    _NUMBER = "ratio"

    @property
    def _measures(self) -> tuple[bool, ...]:
        return (True, False)

    def _values(self, losses: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        ratio = np.exp(losses[:, 0] - losses[:, 1])
        return {self.output_column: np.where(ratio < 1, ratio, 1 - ratio), self._further: ratio}


@public
@dataclass(frozen=True)
class PerplexityScorer(LanguageModelScorer):
    """A stage that adds how likely a causal language model finds the answer.

    `perplexity` is the perplexity of the answer, and `perplexity_score` the mean log-probability of its tokens, minus
    the logarithm of the perplexity, in nats: higher is likelier. Which of the two ends is better, the data decide; a
    negative weight in [`combine_scores`] turns the order round.

    Args:
        model_id (`str`), revision, token, schema, columns, score_thoughts, on_invalid, dtype, batch_tokens, max_tokens:
            as in [`IFDScorer`].
        output_column (`str`): the new column, float32. Further ones are named after it: `perplexity` (float32; for a
            name without `_score`, the name with `_perplexity`), `perplexity_tokens`, `perplexity_truncated` and
            `perplexity_status`.
        given (`str`): `"prompt"`: the answer given the prompt; `"nothing"`: the answer alone.

    Raises:
        ValueError: the model does not exist, is damaged or reads ahead, or an option is invalid.
        ConnectionError: the Hub does not answer.
    """

    output_column: str = "perplexity_score"
    given: str = PROMPT
    _NUMBER = "perplexity"

    def __post_init__(self, token: str | None) -> None:
        if self.given not in GIVEN:
            raise ValueError(f"given={self.given!r} is not known; choose one of {list(GIVEN)}.")
        super().__post_init__(token)

    @property
    def _measures(self) -> tuple[bool, ...]:
        return (self.given == PROMPT,)

    def _values(self, losses: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
        return {self.output_column: -losses[:, 0], self._further: np.exp(losses[:, 0])}


@functools.lru_cache(maxsize=8)
def _opening(model_id: str, revision: str) -> list[int]:
    """Return the token ids after which an answer is read alone; the list is shared, and must not be changed.

    Raises:
        ValueError: the model has neither a chat template nor a token with which texts begin or end.
    """
    tokenizer = read_model_files(model_id, revision).tokenizer
    begins = tokenizer.bos_token or tokenizer.eos_token
    if tokenizer.chat_template:
        asked = [{"role": "user", "content": "a"}]
        before, after = (render_chat(tokenizer, asked, prompt=prompt) for prompt in (False, True))
        header = after[len(before) :] if after.startswith(before) else ""
        bos = tokenizer.bos_token or ""
        # The text of a chat may begin with a token of its own, and so does the answer alone.
        header = bos + header if bos and after.startswith(bos) and not header.startswith(bos) else header
        ids: list[int] = tokenizer(header, add_special_tokens=False)["input_ids"] if header else []
        if ids:
            return ids
    if begins is None:
        raise ValueError(
            f"model_id={model_id!r}: its tokenizer has no chat template and no token with which texts begin or end "
            "(bos_token, eos_token), after which an answer could be read alone. Choose another model."
        )
    return [int(tokenizer.convert_tokens_to_ids(begins))]


def answer_losses(model: HubModel, ids: Sequence[Sequence[int]], starts: Sequence[int]) -> tuple[Tensor]:
    """Return the mean loss of the tokens of each answer, in nats, of shape `(texts,)`, float32.

    Args:
        model ([`HubModel`]): a causal language model.
        ids (`Sequence[Sequence[int]]`): of what is before the answer, and the answer.
        starts (`Sequence[int]`): the token at which each answer begins, from 1 on; it has one token at least.
    """
    # No mask: what comes after a token, as padding does, is not read by a causal model, and attention is faster so.
    input_ids, _ = pad(ids, 0, model.device)
    outputs = model.outputs(input_ids=input_ids)
    counts = np.array([len(row) - start for row, start in zip(ids, starts, strict=True)])
    owners = np.repeat(np.arange(len(ids)), counts)
    places = np.concatenate([np.arange(start, len(row)) for row, start in zip(ids, starts, strict=True)])
    texts, at = to_device(owners, model.device), to_device(places, model.device)
    states, targets = outputs.last_hidden_state[texts, at - 1], input_ids[texts, at]
    size = max(1, LOGITS // model.config.vocab_size)
    losses = []
    for part, wanted in zip(states.split(size), targets.split(size), strict=True):
        logits = model.head(type(outputs)(last_hidden_state=part[None]), input_ids=wanted[None])[0]
        losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
    # In float64, as the order in which a GPU adds is not fixed.
    sums = torch.zeros(len(ids), dtype=torch.float64 if model.device.type != "mps" else torch.float32)
    sums = sums.to(model.device).index_add(0, texts, torch.cat(losses).to(sums.dtype))
    return ((sums / to_device(counts, model.device)).float(),)


# Few entries, as each keeps a model in memory.
@functools.lru_cache(maxsize=2)
def _load(model_id: str, revision: str, dtype: str, device: torch.device) -> HubModel:
    """Load a causal model, and see that its head can be applied to some tokens at a time, and that it is causal.

    Raises:
        ValueError: the model is damaged, its tokens read those after them, or its head reads more than the states.
    """
    model = load_hub_model("AutoModelForCausalLM", model_id, revision, dtype, device)
    error = 1e-3 if dtype == "float32" else 0.1
    first, second = [[1, 2, 3, 1, 2], [1, 2, 3, 3, 3]]
    with torch.inference_mode(), revisions.reading_model(revisions.model_folder(model_id, revision)):
        ids = torch.tensor([first, second], device=device)
        expected = model.model(input_ids=ids).logits.float()
        if not torch.allclose(expected[0, :3], expected[1, :3], rtol=error, atol=error):
            raise ValueError("its tokens read those after them, so that it tells no perplexity")
        (found,) = answer_losses(model, [first, second], [1, 1])
        wanted = F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if not torch.allclose(found, wanted.view(2, -1).mean(dim=1), rtol=error, atol=error):
            raise ValueError("its logits do not follow from its last hidden states alone")
    return model
