"""Find the kind of task of each row, and the form of its answer, by plain rules over its prompt and its answer.

Does: tell code, maths, lists, short facts, writing and other tasks apart, and answers that are code, lists, a few words,
one paragraph or several; without a model, in any order of rows.
Does not: judge quality, or read languages other than English, except for code, figures and the form of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from car_datasets.loading.schemas import Schema, exchanges_of

if TYPE_CHECKING:
    from datasets import Dataset

# The kinds in the order in which their rules are tried: the first that fits names the row.
KINDS = ("code", "maths", "writing", "lists", "short facts", "other")
# The forms in the order in which their rules are tried.
FORMS = ("code", "list", "a few words", "one paragraph", "several paragraphs")
SHORT_ANSWER = 12  # words of an answer that can only be a fact, a name, a number or a label

# A block of code; one of data or text is none, nor is what comes after it.
_FENCE = re.compile(r"\A(?:(?!```).)*```(?!json|yaml|csv|text|markdown)", re.DOTALL)
_CODE_ASKED = re.compile(
    r"\b(?:python|javascript|typescript|java|c\+\+|c#|(?-i:Rust|Linux)|golang|kotlin|sql|html|css|bash|regex|regular expression"
    r"|unit tests?|stack trace|source code|pseudocode|database|foreign key|chmod|command line|code snippet|piece of code)(?!\w)"
    r"|\b(?:write|implement|create|debug|refactor|fix|complete)\b.{0,40}\b(?:function|method|class|script|program|query"
    r"|algorithm|api|code)\b",
    re.IGNORECASE,
)
_CODE_SEEN = re.compile(
    r"^\s*(?:def \w+\(|class \w+[(:{]|import \w+|from \w+ import |#include\b|public (?:static|class)|function \w*\("
    r"|SELECT\b.+\bFROM\b|(?:const|let|var) \w+ =|<(?:html|div|p|ul|body|!DOCTYPE)\b|for \(|if \(.+\) ?\{|return .+;$)",
    re.MULTILINE,
)
_MATHS_ASKED = re.compile(
    r"\b(?:calculate|compute|solve|equation|derivative|integral|probability|percentage|how many|how much|square root"
    r"|perimeter|fraction|polynomial|triangle|average speed|prime number|arithmetic|divide|multiply"
    r"|(?:sum|product|mean|median|area|volume) of|least common|greatest common|prove that)\b"
    r"|\d\s+[-/]\s+\d|\d\s*[+*×÷^=]\s*\d|\bx\s*[+=^-]\s*\d",
    re.IGNORECASE,
)
_MATHS_SEEN = re.compile(r"\\(?:frac|boxed|sqrt|times|cdot)\b|\d\s*[-+*/×÷]\s*\d[\d.,]*\s*=|=\s*-?\$?\d|\bx\s*=\s*-?\d")
_BLANK_LINE = re.compile(r"\n\s*\n")
_FIGURE = re.compile(r"\d")
_WRITING_ASKED = re.compile(
    r"\b(?:write|compose|draft|create|generate|craft|invent|tell|pen)\b.{0,60}\b(?:story|tale|poem|haiku|limerick|sonnet"
    r"|verse|song|lyrics|rap|essay|letter|e-?mail|speech|article|blog|post|tweet|dialogue|scene|script|monologue|slogan"
    r"|tagline|advert\w*|review|cover letter|press release|novel|paragraph|toast|obituary|fable|description|caption"
    r"|diary|invitation|announcement|newsletter|message|note|statement|summary of a fictional)s?\b"
    r"|^\s*(?:story|poem|haiku|essay|limerick)\b",
    re.IGNORECASE,
)
_LIST_ASKED = re.compile(
    r"\b(?:list|enumerate|name|give|suggest|recommend|provide|generate|brainstorm|identify|find|come up with|think of)\b"
    r".{0,40}\b(?:two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|several|some|\d+)\b"
    r"|\b(?:list|enumerate)\b|\bbullet(?:ed)? (?:points?|list)\b|\bto-do\b|\bchecklist\b",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,2}[.)]|[a-z][.)])\s+\S", re.MULTILINE)


def kinds_of(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Return the kind of task of each row: one of `KINDS`.

    The rules, of which the first that fits decides:

    - **code**: a block of code or a line that starts as code does, in prompt or answer, or a prompt that asks for code.
    - **maths**: the prompt asks for a calculation or a proof, and prompt or answer has a figure.
    - **writing**: the prompt asks for a story, a poem, a letter, an advertisement or another text to be written.
    - **lists**: the answer has three or more items on lines of their own, or the prompt asks for several things.
    - **short facts**: an answer of at most `SHORT_ANSWER` words.
    - **other**: everything else, such as explanations and rewritten texts.

    Args:
        prompts (`Sequence[str]`): what was asked in each row; of a chat, its last question or all of its turns.
        answers (`Sequence[str]`): the answer of each row.

    Returns:
        `list[str]`: one kind per row.

    Raises:
        ValueError: there are not as many answers as prompts.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers has {len(answers)} rows and prompts {len(prompts)}; pass one of each per row.")
    return [_kind(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def forms_of(answers: Sequence[str]) -> list[str]:
    """Return the form of each answer, by the answer alone: one of `FORMS`.

    Code is a block of code, or has a line that starts as code does; a list has three or more items on lines of their
    own; a few words are at most `SHORT_ANSWER`; a blank line parts paragraphs.
    """
    return [_form(answer.strip()) for answer in answers]


def kinds_of_rows(dataset: Dataset, schema: Schema) -> list[str]:
    """Return the kind of task of each row: of a chat, that of its last question and answer; `"other"` without text.

    Args:
        dataset (`Dataset`): checked rows.
        schema ([`Schema`]): of these rows.
    """
    # Imported here, because it takes long.
    from car_datasets.loading.templates import join_lines
    from car_datasets.loading.values import carried

    kinds: list[str] = []
    rows = carried(dataset.select_columns(list(schema.read_columns)).with_format(None))
    for batch in rows.iter(batch_size=1_000):
        for row in exchanges_of(batch, schema):
            kinds.append(
                KINDS[-1]
                if isinstance(row, str)
                else _kind(join_lines(row[-1].instruction, row[-1].input), row[-1].response)
            )
    return kinds


def _kind(prompt: str, answer: str) -> str:
    if _CODE_ASKED.search(prompt) or any(p.search(text) for p in (_FENCE, _CODE_SEEN) for text in (prompt, answer)):
        return "code"
    asked = _MATHS_ASKED.search(prompt)
    if (asked or _MATHS_SEEN.search(answer)) and _FIGURE.search(prompt) and _FIGURE.search(answer):
        return "maths"
    if _WRITING_ASKED.search(prompt):
        return "writing"
    if len(_LIST_ITEM.findall(answer)) >= 3 or _LIST_ASKED.search(prompt):
        return "lists"
    return "short facts" if len(answer.split()) <= SHORT_ANSWER else "other"


def _form(answer: str) -> str:
    if _FENCE.search(answer) or _CODE_SEEN.search(answer):
        return "code"
    if len(_LIST_ITEM.findall(answer)) >= 3:
        return "list"
    if len(answer.split()) <= SHORT_ANSWER:
        return "a few words"
    return "several paragraphs" if _BLANK_LINE.search(answer) else "one paragraph"
