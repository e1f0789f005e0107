"""SCORE: `JudgeScorer`, a `.map` callable that has a language model rate each row by a rubric.

Does: write each row for the judge, chats in one piece; ask many rows at once; turn valid answers into columns, and say
by a status why a row has no score.
Does not: make calls itself, or give a score to a row whose answer is not valid.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from car_datasets.loading.chats import Turn, is_scored
from car_datasets.loading.schemas import (
    ON_INVALID,
    Schema,
    as_column_names,
    check_schema,
    conversations_of,
    find_schema,
    read_rows,
)
from car_datasets.loading.values import untouched
from car_datasets.scoring.batching import current_watch
from car_datasets.scoring.judges.cache import Caps, JudgeCache, Reply, Spent
from car_datasets.scoring.judges.endpoint import CAP_REACHED, REJECTED, Connection, Endpoint, RowFailure, check_base_url
from car_datasets.scoring.judges.rubric import REPAIR, Judgement, Rubric, parsed_rubric, read_rubric, render_row
from car_datasets.scoring.stage import refuse_invalid, refuse_taken, row_names, set_fields, text_columns
from car_datasets.utils.column_names import ColumnNames
from car_datasets.utils.columns import refuse_tables
from car_datasets.utils.digests import public
from car_datasets.utils.files import cache_folder, user_path
from car_datasets.utils.settings import is_integer, refuse_missing_extra

if TYPE_CHECKING:
    from datasets import Features

CACHE_VERSION = "1"  # datasets hashes the fields below, never our code: raise it when answers or scores change

ON_FAILURE = ("error", "mark")
# Statuses of a row that was answered, and has no score.
INVALID_ANSWER, CUT_OFF, REFUSED = "invalid_answer", "cut_off", "refused"
FIELD_TYPES = {"integer": "float32", "number": "float32", "string": "string", "boolean": "bool"}
NARROW: dict[str, Callable[[Any], Any]] = {"float32": np.float32, "int32": np.int32}
# By address; in memory only, so that a key is neither pickled nor hashed. Forked processes inherit it.
_keys: dict[str, str] = {}


@public
@dataclass(frozen=True)
class JudgeScorer:
    """A stage that has a language model rate each row: `dataset.map(JudgeScorer(url, model), batched=True)`.

    Any server that speaks OpenAI's protocol will do: vLLM, llama.cpp or a vendor. This needs the extra `judge`. A row is
    one call, and a second one if the answer is not valid; a row whose answer stays invalid has no score, and
    `judge_status` says why. Answers are kept in a file as they arrive: a row is not asked about twice, also after a kill.

    The new columns are `judge_score` (float32, higher is better, computed by the rubric's `score`), one column for each
    field of the rubric's schema (`judge_reason`, `judge_fault`, ...), `judge_tokens` (int32, of all calls about the row,
    or null if the server does not count them) and `judge_status` (`"ok"`, or why there is no score or a look is due).

    A frozen record of plain values without the key, which is read when a call is made.

    Args:
        base_url (`str`): address of the server, such as `"http://localhost:8000/v1"`.
        model (`str`): name of the model there.
        rubric (`str`): path of a YAML file, or name of one in `configs/`; see [`~car_datasets.scoring.judges.Rubric`].
            The scorer holds its content.
        api_key (`str`, *optional*): used by this process and those that it forks; never stored. Processes that are
            started anew need the environment variable.
        key_variable (`str`, *optional*): name of the environment variable that holds the key; by default
            `OPENAI_API_KEY` for `api.openai.com` and `JUDGE_API_KEY` for any other server.
        schema (`str`): name of the dataset's schema; `"auto"` recognises it by the column names.
        columns (`Mapping[str, str]`): your names for the schema's columns, such as `{"response": "answer"}`.
        score_thoughts (`bool`): show the judge the thoughts of an answer, too.
        output_column (`str`): the score; the other columns are named after it.
        on_invalid (`str`): a row without text raises (`"error"`) or gets a null (`"mark"`).
        on_failure (`str`): a row that the server does not answer, or for which the cap leaves no room, ends the run
            (`"error"`; answers are kept) or gets a null (`"mark"`).
        answer_tokens (`int`): the most tokens of an answer, thoughts of the model included.
        max_tokens (`int`, *optional*): the most tokens, of prompts and answers, that `cache` may ever record.
        max_cost (`float`, *optional*): the same in money, by `prices`.
        prices (`tuple[float, float]`, *optional*): of a million tokens of prompts and of answers, in any currency.
        concurrency (`int`): calls that are on their way at the same time.
        timeout (`float`): seconds to wait for an answer.
        retries (`int`): repetitions of a call after an error that may pass. The waits between them grow, or are as long
            as the server asks.
        cache (`str`, *optional*): the file of answers and costs, on a disk of this machine; by default one in the cache
            of `datasets` for this address and model.

    Raises:
        ValueError: the rubric cannot be used, an option is invalid, or the extra is not installed. When called: the
            server wants another key or does not know the model.
        ConnectionError: when called: the server does not answer.

    Example:
    ```python
    judge = JudgeScorer("http://localhost:8000/v1", "Qwen/Qwen3-8B", max_tokens=5_000_000)
    rated = dataset.map(judge, batched=True)
    ```
    """

    # With the same answers whatever these are; `rubric_text` is the content of `rubric`.
    free_fields: ClassVar[tuple[str, ...]] = (
        *("rubric", "key_variable", "max_tokens", "max_cost", "prices"),
        *("concurrency", "timeout", "retries", "cache"),
    )

    base_url: str
    model: str
    rubric: str = "soundness_worth"
    api_key: InitVar[str | None] = None
    key_variable: str | None = None
    schema: str = "auto"
    columns: Mapping[str, str] | tuple[tuple[str, str], ...] = ()
    score_thoughts: bool = False
    output_column: str = "judge_score"
    on_invalid: str = "error"
    on_failure: str = "error"
    answer_tokens: int = 512
    max_tokens: int | None = None
    max_cost: float | None = None
    prices: tuple[float, float] | None = None
    concurrency: int = 8
    timeout: float = 120.0
    retries: int = 8
    cache: str | None = None
    rubric_text: str = field(init=False, repr=False)
    cache_version: str = field(init=False, repr=False)

    def __post_init__(self, api_key: str | None) -> None:
        refuse_missing_extra("judge", "JudgeScorer", {"openai": "openai"})
        columns = as_column_names(self.columns)
        check_schema(self.schema, columns)
        base_url = check_base_url(self.base_url)
        self._check_options()
        text = read_rubric(self.rubric)
        Rubric.from_text(text, f"rubric={str(self.rubric)!r}")
        key = _checked_key(api_key, "api_key")
        if key is not None:
            _keys[base_url] = key
        set_fields(
            self,
            base_url=base_url,
            columns=columns,
            rubric=str(self.rubric),
            rubric_text=text,
            prices=None if self.prices is None else tuple(map(float, self.prices)),
            cache=None if self.cache is None else str(user_path(self.cache).absolute()),
            cache_version=CACHE_VERSION,
        )

    def _check_options(self) -> None:
        """Raise ValueError for options that can be told to be invalid without a call."""
        if not isinstance(self.model, str) or not self.model.strip():
            raise ValueError(f"model={self.model!r} must be the name of a model at base_url={self.base_url!r}.")
        for name, allowed in (("on_invalid", ON_INVALID), ("on_failure", ON_FAILURE)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; choose one of {list(allowed)}.")
        for name, least in (("answer_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if not is_integer(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an integer of at least {least}.")
        if not _is_positive(self.timeout):
            raise ValueError(f"timeout={self.timeout!r} must be a number of seconds above 0.")
        for name, right in (("max_tokens", is_integer), ("max_cost", _is_positive)):
            cap = getattr(self, name)
            if cap is not None and not (right(cap) and cap > 0):
                raise ValueError(f"{name}={cap!r} must be above 0, or no call could be made; leave it out for no cap.")
        prices = self.prices
        if self.max_cost is not None and prices is None:
            raise ValueError(
                f"max_cost={self.max_cost!r} needs prices=(0.15, 0.6) (--prices 0.15,0.6), of a million tokens of prompts "
                "and of answers: they differ between models."
            )
        if prices is not None and (len(prices) != 2 or not all(price == 0 or _is_positive(price) for price in prices)):
            raise ValueError(f"prices={prices!r} must be two numbers of at least 0, of a million tokens each.")

    @property
    def output_columns(self) -> tuple[str, ...]:
        """Return the names of the columns that this stage adds, in order."""
        return tuple(self.output_features())

    def output_features(self) -> Features:
        """Return the types of the new columns."""
        from datasets import Features, Value

        names, types = self._names, self._rubric.properties
        return Features(
            {
                self.output_column: Value("float32"),
                **{self._column_of(name): Value(FIELD_TYPES[entry["type"]]) for name, entry in types.items()},
                names.tokens: Value("int32"),
                names.status: Value("string"),
            }
        )

    def read_columns(self, column_names: Sequence[str]) -> list[str]:
        """Return the columns of the text.

        Raises:
            ValueError: no schema fits.
        """
        return text_columns(column_names, self.schema, self.columns)

    @property
    def cache_file(self) -> Path:
        """Return the path of the file that holds the answers and their costs."""
        if self.cache is not None:
            return Path(self.cache)
        place = hashlib.sha256(f"{self.base_url} {self.model}".encode()).hexdigest()[:16]
        return cache_folder() / "judges" / f"{place}.sqlite"

    def spent(self) -> Spent:
        """Return the calls, tokens and money that the cache has recorded, all runs together."""
        with JudgeCache(self.cache_file) as cache:
            return cache.spent()

    def __call__(self, batch: Mapping[str, Sequence[Any]], rank: int | None = None) -> dict[str, Any]:
        """Return the new columns for a batch of `.map(batched=True)`.

        Raises:
            ValueError: the batch already has one of the columns, no schema fits, a row has no text and
                `on_invalid="error"`, the cap is reached and `on_failure="error"`, or the server wants another key or does
                not know the model.
            ConnectionError: the server does not answer.
        """
        batch = untouched(batch)
        refuse_tables(batch, "add_columns(dataset, judge, 'Judging')")
        refuse_taken(batch, self)
        schema = find_schema(batch, self.schema, self.columns)
        rows = self._read(batch, schema)
        texts = list(dict.fromkeys(row.text for row in rows if row.text is not None))
        if (watch := current_watch()) is not None:
            watch.begin(len(rows), len(texts))
        try:
            verdicts = self._judge_all(texts, lambda: None if watch is None else watch.passed(1))
        except RowFailure as failure:
            at = [i for i, row in enumerate(rows) if row.text == failure.row]
            raise self._explained(failure, f"{row_names(batch, at)[:5]}") from None
        return self._columns(
            [Verdict(row.status) if row.text is None else verdicts[row.text].of_row(row.status) for row in rows]
        )

    def _read(self, batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[_Row]:
        """Return the text and the status of each row; a row that cannot be judged has no text.

        Raises:
            ValueError: there are such rows, and `on_invalid="error"`.
        """
        statuses = [row.status for row in read_rows(batch, schema, self.score_thoughts)]
        refuse_invalid(batch, statuses, self.on_invalid)
        chats = conversations_of(batch, schema)
        return [
            _Row(None if isinstance(chat, str) or not is_scored(status) else self._written(chat), status)
            for chat, status in zip(chats, statuses, strict=True)
        ]

    def _written(self, chat: Iterable[Turn]) -> str:
        """Return a chat as the judge reads it."""
        turns = []
        for turn in chat:
            if turn.kind == "thought" and not self.score_thoughts:
                continue
            parts = [turn.thought if self.score_thoughts else "", turn.text, turn.call]
            parts += ["(Parts that are not text are left out here.)"] if turn.partial else []
            who = turn.kind if turn.scored else f"{turn.kind}, context that is not to be judged"
            # A chat that was written as JSON may hold halves of characters, which no request can carry.
            text = "\n".join(filter(None, parts)).encode("utf-8", "replace").decode()
            turns.append((who, text))
        return render_row(turns)

    def _judge_all(self, texts: Sequence[str], passed: Callable[[], None]) -> dict[str, Verdict]:
        """Return the verdict on each text; the server is only asked for answers that are not kept.

        Args:
            texts (`Sequence[str]`): from `render_row`, no two alike.
            passed (`Callable`): called when a text is judged.
        """
        if not texts:
            return {}
        key, source = self._key()
        connection = Connection(
            self.base_url,
            self.model,
            self.answer_tokens,
            self.timeout,
            self.retries,
            self.prices or (0.0, 0.0),
            Caps(self.max_tokens, self.max_cost),
        )
        # Opened for each batch: neither may be taken along by a fork.
        with JudgeCache(self.cache_file) as cache, Endpoint(connection, key, source, cache) as endpoint:
            panel = _Panel(endpoint, self._rubric, self.on_failure == "mark")
            left, verdicts = list(texts), {}
            # One at a time until the server has answered, so that a wrong model is not asked for many times at once.
            while left and not endpoint.has_answered:
                text = left.pop(0)
                verdicts[text] = panel.judge(text)
                passed()
            return verdicts | panel.judge_many(left, self.concurrency, passed)

    def _key(self) -> tuple[str | None, str]:
        """Return the API key, and how a message names the place where it is or should be."""
        host = urlsplit(self.base_url).hostname or ""
        # The key of one vendor must not be sent to another server by itself.
        ours = "OPENAI_API_KEY" if host == "openai.com" or host.endswith(".openai.com") else "JUDGE_API_KEY"
        variable = self.key_variable or ours
        if self.base_url in _keys:
            return _keys[self.base_url], "api_key"
        return _checked_key(os.environ.get(variable) or None, variable), variable

    def _explained(self, failure: RowFailure, rows: str) -> Exception:
        """Return the error that ends a run whose rows may not be left without an answer."""
        kept = (
            "Answers so far are kept, and the same call asks for none of them again. Pass on_failure='mark' (--on-failure "
            "mark) to give rows without an answer no score"
        )
        if failure.status == CAP_REACHED:
            return ValueError(f"{failure}. {kept}, or raise the cap.")
        return ConnectionError(f"base_url={self.base_url!r} did not answer about the rows {rows}: {failure}. {kept}.")

    def _columns(self, verdicts: Sequence[Verdict]) -> dict[str, Any]:
        """Return the new columns of the rows."""
        columns: dict[str, list[Any]] = {
            self.output_column: [None if found.judgement is None else found.judgement.score for found in verdicts],
            **{
                self._column_of(name): [None if v.judgement is None else v.judgement.fields[name] for v in verdicts]
                for name in self._rubric.properties
            },
            self._names.tokens: [found.tokens for found in verdicts],
            self._names.status: [found.status for found in verdicts],
        }
        # In the types of the features, which `.map` would otherwise take from Python's numbers.
        for name, feature in self.output_features().items():
            if (narrow := NARROW.get(feature.dtype)) is not None:
                columns[name] = [None if value is None else narrow(value) for value in columns[name]]
        return columns

    @property
    def _names(self) -> ColumnNames:
        return ColumnNames(score=self.output_column)

    def _column_of(self, name: str) -> str:
        return f"{self.output_column.removesuffix('_score')}_{name}"

    @property
    def _rubric(self) -> Rubric:
        return parsed_rubric(self.rubric_text)


class _Row(NamedTuple):
    """A row as the judge reads it, or None if it cannot be judged, and its status."""

    text: str | None
    status: str


class Verdict(NamedTuple):
    """What became of a row.

    Args:
        status (`str`): the status of the row.
        judgement ([`Judgement`], *optional*): the valid answer.
        tokens (`int`, *optional*): of all calls about the row.
    """

    status: str
    judgement: Judgement | None = None
    tokens: int | None = None

    def of_row(self, status: str) -> Verdict:
        """Return the verdict with the status of its row, such as `"empty_response"`, where the judge found no fault."""
        return self if self.judgement is None else self._replace(status=status)


class _Panel:
    """The judges of a batch: threads that ask one endpoint.

    Args:
        endpoint ([`Endpoint`]): the server.
        rubric ([`Rubric`]): what it is asked.
        goes_on (`bool`): judge the other rows after a row that was not answered.
    """

    def __init__(self, endpoint: Endpoint, rubric: Rubric, goes_on: bool) -> None:
        self._endpoint, self._rubric, self._goes_on = endpoint, rubric, goes_on
        self._schema = rubric.strict_schema()

    def judge_many(self, texts: Sequence[str], threads: int, passed: Callable[[], None]) -> dict[str, Verdict]:
        """Return the verdicts on texts, judged at the same time."""
        found: dict[str, Verdict] = {}
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            asked = {pool.submit(self.judge, text): text for text in texts}
            try:
                for done in concurrent.futures.as_completed(asked):
                    found[asked[done]] = done.result()
                    passed()
            except BaseException:
                # Calls that are on their way are awaited by the pool: their answers are paid for, and are kept.
                self._endpoint.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return found

    def judge(self, text: str) -> Verdict:
        """Return the verdict on a text, after a second call if the first answer is not valid."""
        messages, replies = self._rubric.messages(text), []
        try:
            replies.append(self._endpoint.ask(messages, self._schema))
            found = self._read(replies[0])
            if isinstance(found, str) and found.startswith(INVALID_ANSWER):
                repair = REPAIR.format(fault=found.partition(": ")[2])
                # Some servers refuse an empty turn.
                earlier = replies[0].content.strip() or "(nothing)"
                messages += [{"role": "assistant", "content": earlier}, {"role": "user", "content": repair}]
                replies.append(self._endpoint.ask(messages, self._schema))
                found = self._read(replies[1])
        except RowFailure as failure:
            if failure.status != REJECTED and not self._goes_on:
                failure.row = text
                raise
            return Verdict(f"{failure.status}: {failure}", None, _tokens(replies))
        if isinstance(found, str):
            return Verdict(found, None, _tokens(replies))
        return Verdict("ok", found, _tokens(replies))

    def _read(self, reply: Reply) -> Judgement | str:
        """Return the judgement in an answer, or the status that says why it is none."""
        if reply.refusal or reply.finish == "content_filter":
            return f"{REFUSED}: {' '.join(reply.refusal.split())[:200] or 'by the filter of the endpoint'}"
        found = self._rubric.read(reply.content)
        if isinstance(found, Judgement):
            return found
        if reply.finish == "length":
            return f"{CUT_OFF}: the answer has reached answer_tokens, and is not complete"
        return f"{INVALID_ANSWER}: {found}"


def _tokens(replies: Sequence[Reply]) -> int | None:
    """Return the tokens of all calls about a row, or None if there were none or the endpoint does not count them."""
    counts = [reply.tokens for reply in replies]
    return None if not counts or None in counts else sum(count or 0 for count in counts)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _checked_key(key: str | None, source: str) -> str | None:
    """Return an API key, which is never shown.

    Raises:
        ValueError: it cannot be sent in a header.
    """
    if key is None:
        return None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{source} is not an API key: it is empty, or has spaces or characters beyond ASCII.")
    return key
