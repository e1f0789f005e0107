"""Name scorers in one word, as a command line and a recipe do: `find_scorer("ifd:HuggingFaceTB/SmolLM2-135M")`.

Does: read a name into kind, model and options; make the stage; write the name of a stage; know the columns of each kind.
Does not: score, or import a heavy library before a stage is made.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from car_datasets.utils.column_names import ColumnNames, further_column

if TYPE_CHECKING:
    from collections.abc import Collection

    from car_datasets.scoring.conversations import ConversationScorer
    from car_datasets.scoring.scorer import QualityScorer

    Scorer = QualityScorer | ConversationScorer  # what `curate` can score by

IQS, JUDGE = "iqs", "judge"


class ScorerKind(NamedTuple):
    """A kind of scorer.

    Args:
        stage (`str`): its class, as `module:name`.
        column (`str`): its column of scores by default, of which higher is better.
        meaning (`str`): what its score says, in a sentence for readers of a dataset.
        number (`str`, *optional*): what its further column holds, such as `"ratio"`.
        options (`tuple[str, ...]`): fields of the class that a name may give.
    """

    stage: str
    column: str
    meaning: str
    number: str | None = None
    options: tuple[str, ...] = ()


SCORERS: dict[str, ScorerKind] = {
    IQS: ScorerKind(
        "car_datasets.scoring.scorer:QualityScorer", ColumnNames.score, "The score measures how an answer reads."
    ),
    "reward": ScorerKind(
        "car_datasets.scoring.reward:RewardScorer",
        "reward_score",
        "The score is what this reward model or classifier says of a row.",
        options=("text", "labels", "max_tokens"),
    ),
    "ifd": ScorerKind(
        "car_datasets.scoring.perplexity:IFDScorer",
        "ifd_score",
        "The score measures how little the prompt helps this language model to predict the answer.",
        "ratio",
        ("max_tokens",),
    ),
    "perplexity": ScorerKind(
        "car_datasets.scoring.perplexity:PerplexityScorer",
        "perplexity_score",
        "The score measures how likely this language model finds the answer.",
        "perplexity",
        ("given", "max_tokens"),
    ),
    JUDGE: ScorerKind(
        "car_datasets.scoring.judges.judge:JudgeScorer",
        "judge_score",
        "The score is what this language model says of a row by a rubric.",
        options=(
            *("base_url", "rubric", "key_variable", "max_tokens", "max_cost", "prices", "answer_tokens"),
            *("concurrency", "timeout", "retries", "cache"),
        ),
    ),
}
# Options that are not texts, and what each is in words.
_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    **dict.fromkeys(("max_tokens", "answer_tokens"), (int, "a number of tokens")),
    **dict.fromkeys(("concurrency", "retries"), (int, "an integer")),
    "max_cost": (float, "a number, in the currency of prices"),
    "timeout": (float, "a number of seconds"),
    "prices": (lambda text: tuple(map(float, text.split(","))), "two numbers, as in prices=0.15,0.6"),
}
_NEXT_OPTION = re.compile(r",\s*(?=\w+=)")  # a label may hold commas, but hardly one that `word=` follows


class ScorerName(NamedTuple):
    """A name of a scorer in its parts; `str` writes it again.

    Args:
        kind (`str`): a key of [`SCORERS`].
        model (`str`): a Hub id or a folder.
        options (`tuple[tuple[str, str], ...]`): names and values, such as `(("labels", "softmax(good)"),)`.
    """

    kind: str
    model: str
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.model if self.kind == IQS else ",".join([f"{self.kind}:{self.model}", *self._options()])

    def _options(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.options]

    @property
    def record(self) -> dict[str, str]:
        """Return what a receipt says of the name next to the model; nothing of an IQS model."""
        kind = {} if self.kind == IQS else {"kind": self.kind}
        return {**kind, "options": ",".join(self._options())} if self.options else kind

    @classmethod
    def of_record(cls, record: dict[str, str]) -> ScorerName:
        """Return the name of the scorer that a receipt records."""
        text = f"{record['kind']}:{record['model_id']}" if "kind" in record else record["model_id"]
        return read_name(f"{text},{record['options']}" if "options" in record else text)

    def further_columns(self, score_column: str) -> tuple[str, ...]:
        """Return the columns that this kind adds to score, tokens, truncation and status."""
        number = SCORERS[self.kind].number
        return () if number is None else (further_column(score_column, number),)


def read_name(name: str) -> ScorerName:
    """Return the parts of a name such as `"reward:OWNER/MODEL,labels=softmax(good)"`.

    Args:
        name (`str`): a key of [`SCORERS`], a colon, a model and its options, separated by commas; a model alone is an IQS
            model. A recipe refuses a judge, as [`refuse_judge`] says.

    Raises:
        ValueError: the name has an unknown kind, no model, an option that this kind does not know, or an option twice.
    """
    kind, colon, rest = name.partition(":")
    if kind.isalpha() and len(kind) > 1 and colon and kind not in SCORERS and not Path(name).exists():
        raise ValueError(f"{name!r} has the kind {kind!r}; write one of {list(SCORERS)} before the colon.")
    if not colon or kind not in SCORERS:
        return ScorerName(IQS, name)
    model, *given = [rest] if kind == IQS else _NEXT_OPTION.split(rest)
    if not model:
        raise ValueError(f"{name!r} names no model; write {kind}:MODEL, a Hub id or a folder.")
    options = tuple((option, value) for option, _, value in (each.partition("=") for each in given))
    known = SCORERS[kind].options
    if unknown := [option for option, _ in options if option not in known]:
        # Without the values, of which one may be a key by mistake.
        shown = f"{kind}:{model}"
        raise ValueError(f"{shown!r} has the option {unknown[0]!r}; a scorer of the kind {kind!r} takes {list(known)}.")
    if len(dict(options)) < len(options):
        raise ValueError(f"{kind}:{model} has an option twice; leave one of them out.")
    return ScorerName(kind, model, options)


def moved(name: str, place: str) -> str:
    """Return a name with the model at another place, such as the folder that it is in on this machine.

    Args:
        name (`str`): the name in a recipe, whose kind and options stay.
        place (`str`): a folder or Hub id; or a name that holds one, of the same kind and with the same options, or none.

    Raises:
        ValueError: the place is a name of another kind, or with other options.
    """
    old, new = read_name(name), read_name(place)
    if new.kind not in (IQS, old.kind) or new.options not in ((), old.options):
        raise ValueError(
            f"scorer={place!r} is of another kind, or has other options, than {name!r}, by which the rows were scored. "
            f"Pass the model alone, {new.model!r}."
        )
    return str(old._replace(model=new.model))


def find_scorer(name: str, token: str | None = None, **settings: Any) -> Any:
    """Return the scorer that a name such as `"reward:OWNER/MODEL"` means.

    Args:
        name (`str`): as [`read_name`] reads it.
        token (`str`, *optional*): for a private model.
        settings: further arguments of the scorer.

    Returns:
        the stage, whose scores are in the column of its field `output_column`.

    Raises:
        ValueError: the name has no model, or the model is not of this kind.
    """
    kind, model, options = read_name(name)
    given = {option: _value(name, option, text) for option, text in options}
    if kind != JUDGE:
        return _class_of(kind)(model, token=token, **given, **settings)
    if "base_url" not in given:
        raise ValueError(
            f"{name!r} names no server; write judge:{model},base_url=http://localhost:8000/v1, for example."
        )
    return _class_of(kind)(model=model, **given, **settings)


def _value(name: str, option: str, text: str) -> Any:
    """Return the value of an option in the type of the scorer's field."""
    read, what = _READERS.get(option, (str, "a text"))
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{name!r}: {option}={text!r} must be {what}.") from error


def _class_of(kind: str) -> Any:
    module, _, name = SCORERS[kind].stage.partition(":")
    return getattr(importlib.import_module(module), name)


def refuse_judge(name: ScorerName) -> None:
    """Raise ValueError for a judge, which `curate` does not ask: the message names the commands that select by one."""
    if name.kind == JUDGE:
        raise ValueError(
            f"scorer='judge:{name.model}' is a judge, whose answers are paid for in a step of its own: `car-datasets judge "
            f"SOURCE --output judged.parquet --base-url URL --model {name.model}`, then `car-datasets cluster "
            "judged.parquet --output clustered.parquet` and `car-datasets select clustered.parquet --output "
            "selected.parquet --score-column judge_score`."
        )


def refuse_raw_numbers(score_column: str, columns: Collection[str]) -> None:
    """Raise ValueError for a perplexity, of which the highest is the worst, and for an IFD that puts misled rows first.

    Args:
        score_column (`str`): the column that rows are to be ranked by.
        columns (`Collection[str]`): the columns of the rows.
    """
    for kind in SCORERS.values():
        number = kind.number and further_column(kind.column, kind.number)
        if score_column == number and kind.column in columns:
            raise ValueError(
                f"score_column={score_column!r} (--score-column) would take the rows with the highest {score_column} first. "
                f"Its column {kind.column!r} has the best rows first; choose that. To rank by the plain number in any "
                f"case, rename it: dataset.rename_column({score_column!r}, ...)."
            )


def settings_of(stage: Any, known: Collection[str]) -> dict[str, Any]:
    """Return the settings of a recipe that make a scorer like a given one: model, column, and what is not the default.

    Args:
        stage: a scorer of one of [`SCORERS`] but a judge, such as `RewardScorer("OWNER/MODEL")`.
        known (`Collection[str]`): the names of all settings.

    Raises:
        ValueError: it is no such scorer.
    """
    kinds = [each for each in SCORERS if each != JUDGE]
    kind = next((each for each in kinds if type(stage) is _class_of(each)), None)
    if kind is None:
        raise ValueError(
            f"scorer is a {type(stage).__name__}; pass the name of a model, as scorer='reward:OWNER/MODEL', or a scorer of "
            f"one of the kinds {kinds}. Select by the column that any other stage has added: cluster the rows, "
            "then select_car(rows, score_column=...), or `car-datasets select` with --score-column."
        )
    values = {each.name: getattr(stage, each.name) for each in fields(stage) if each.init}
    given = {each.name for each in fields(stage) if each.init and values[each.name] not in (None, each.default)}
    options = tuple((name, str(values[name])) for name in SCORERS[kind].options if name in given)
    own = given.intersection(known).difference(("revision",))  # which is that of the source
    return {
        **{name: values[name] for name in own},
        "scorer": str(ScorerName(kind, stage.model_id, options)),
        "scorer_revision": stage.revision,
        "score_column": stage.output_column,
    }
