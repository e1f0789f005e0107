"""Decide whether two rows are the same text, edited: by the words of prompt and answer, each compared apart.

Does: read prompt and answer of rows; digest normalised texts; weigh words by how rare they are in the pool; tell copies
with edits from rows that share a template.
Does not: look for pairs, or read scores and embeddings.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from car_datasets.loading.schemas import Schema, conversations_of
from car_datasets.loading.templates import join_lines
from car_datasets.utils.files import sample_file

# Reading ---------------------------------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """The text of a row.

    Args:
        system (`str`): the system prompt, or `""`.
        prompt (`str`): what was asked.
        answer (`str`): what was answered.
    """

    system: str
    prompt: str
    answer: str


def sides_of(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[Sides | None]:
    """Return the text of every row of a batch, `None` for a row that cannot be read.

    The prompt of a chat is all that users and tools say, its answer all that the assistant thinks, says and calls.

    Args:
        batch (`Mapping[str, Sequence]`): columns of equal length.
        schema ([`Schema`]): the columns that contain the text.
    """
    names = [schema.instruction, schema.response, schema.input, schema.system]
    columns = [None if name is None else batch.get(name) for name in names]
    known = [column for column in columns if column is not None]
    if schema.turns is None and schema.history is None and all(_are_texts(column) for column in known):
        rows = zip(*(column or [""] * len(known[0]) for column in columns), strict=True)
        return [_plain(*row) for row in rows]
    return [None if isinstance(turns, str) else _chat(turns) for turns in conversations_of(batch, schema)]


def _are_texts(column: Sequence[Any]) -> bool:
    return all(value is None or isinstance(value, str) for value in column)


def _plain(instruction: str | None, response: str | None, context: str | None, system: str | None) -> Sides | None:
    if instruction is None or response is None:
        return None
    return Sides(system or "", join_lines(instruction, context or ""), response)


def _chat(turns: Iterable[Any]) -> Sides:
    parts: dict[str, list[str]] = {"system": [], "user": [], "tool": [], "assistant": [], "thought": []}
    for turn in turns:
        parts[turn.kind] += [turn.thought, turn.text, turn.call]
    asked, said = [*parts["user"], *parts["tool"]], [*parts["thought"], *parts["assistant"]]
    return Sides(join_lines(*parts["system"]), join_lines(*asked), join_lines(*said))


# Equal texts -----------------------------------------------------------------------------------------------------------

# Marks that change nothing at the ends of a text. Signs of calculation and of code are not among them.
_ENDS = " .,;:!?…'\"`()[]“”‘’«»。，！？：；"


def normalised(text: str) -> str:
    """Return a text in lower case and Unicode's form NFKC, with single spaces and without punctuation at its ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = " ".join(text.casefold().split())
    return text.strip(_ENDS) or text


def digest_of(sides: Sides) -> bytes:
    """Return 16 bytes that are equal for equal texts after [`normalised`]."""
    text = "\0".join(map(normalised, sides))
    # Lone surrogates, which some files hold, cannot be encoded otherwise.
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# Words -----------------------------------------------------------------------------------------------------------------

# Scripts that are written without spaces are read character by character.
_SIGNS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A minus counts before a digit only: elsewhere it is a hyphen or a dash.
_TOKEN = re.compile(
    rf"[{_SIGNS}]|[^\W{_SIGNS}]+(?:(?:'|(?<=\d)[.,](?=\d))[^\W{_SIGNS}]+)*|[+*/=<>%^&|~$€£#@×÷√]|-(?=\s?\d)"
)
_NAME = re.compile(r"(?:(?<=\w )|(?<=, ))[^\W\d_a-z][^\W\d_]+")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+\Z")
_NUMBERS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_NUMBERS |= {"eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "fifteen": "15", "twenty": "20"}
_NUMBERS |= {"thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000", "million": "1000000"}
_NEGATIONS = {"not", "no", "never", "cannot", "none", "neither", "nor", "without", "except"}


def tokens_of(text: str) -> tuple[list[str], set[str]]:
    """Return the words of a text in lower case and in order, numbers in figures; and the figures and signs."""
    words: list[str] = _TOKEN.findall(_plain_text(text).casefold())
    marks: set[str] = set()
    written: dict[str, str] = {}
    for word in set(words):
        if not word.isalpha():
            figure = word.replace(",", "") if _THOUSANDS.match(word) else word
            if "'" not in word:
                marks.add(figure)
        elif word in _NUMBERS:
            figure = _NUMBERS[word]
            marks.add(figure)
        else:
            continue
        if figure != word:
            written[word] = figure
    return [written.get(word, word) for word in words] if written else words, marks


def _names_of(text: str) -> frozenset[str]:
    """Return the words with a capital letter inside a sentence, in lower case."""
    return frozenset(name.casefold() for name in _NAME.findall(_plain_text(text)) if name[0].isupper())


def _plain_text(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text).replace("’", "'")


class Weights:
    """The weight of each word, by how few rows have it: a word of a template that fills the pool weighs little.

    The rows that the package ships are counted too, so that common English words weigh little in a small pool.

    Args:
        rows (`Iterable[Sides]`): rows of the pool, at most some ten thousand.
    """

    def __init__(self, rows: Iterable[Sides]) -> None:
        counts = (Counter[str](), Counter[str]())
        number = 0
        for sides in (*_shipped(), *rows):
            number += 1
            for counter, text in zip(counts, sides[1:], strict=True):
                counter.update(set(tokens_of(text)[0]))
        # Integers, so that their sums are equal on all machines.
        weights = {
            n: max(1, round(4 * math.log2((number + 1) / (n + 1))))
            for n in {0, *counts[0].values(), *counts[1].values()}
        }
        self.unknown = weights[0]
        self.found = counts
        self.by_word = tuple({word: weights[n] for word, n in counter.items()} for counter in counts)

    def of(self, side: int, words: Mapping[str, int]) -> int:
        """Return the sum of the weights of these words of prompts (0) or answers (1), each as often as it occurs."""
        known, unknown = self.by_word[side], self.unknown
        return sum(known.get(word, unknown) * count for word, count in words.items())

    def of_word(self, side: int, word: str) -> int:
        """Return the weight of a word, 1 or more."""
        return self.by_word[side].get(word, self.unknown)


@cache
def _shipped() -> tuple[Sides, ...]:
    rows = json.loads(sample_file().read_text(encoding="utf-8"))
    return tuple(Sides("", join_lines(row["instruction"], row["input"]), row["output"]) for row in rows)


class Words:
    """The words of one side of a row, of which each part is found when it is first asked for.

    Args:
        side (`int`): 0 for a prompt, 1 for an answer.
        text (`str`): what the row has there.
        weights ([`Weights`]): of the pool.
        weight (`int`, *optional*): of all words, if it is known.
    """

    def __init__(self, side: int, text: str, weights: Weights, weight: int | None = None) -> None:
        self._side, self._text, self._weights, self._weight = side, text, weights, weight

    @cached_property
    def _tokens(self) -> tuple[list[str], set[str]]:
        return tokens_of(self._text)

    @property
    def marks(self) -> set[str]:
        """Return numbers, words with a digit, and signs of calculation, of code and of money."""
        return self._tokens[1]

    @cached_property
    def counts(self) -> Counter[str]:
        """Return how often each word occurs, in lower case; numbers in figures."""
        return Counter(self._tokens[0])

    @cached_property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """Return neighbouring words."""
        return frozenset(pairwise(self._tokens[0]))

    @cached_property
    def names(self) -> frozenset[str]:
        """Return words with a capital letter inside a sentence."""
        return _names_of(self._text)

    @cached_property
    def weight(self) -> int:
        """Return the weight of all words."""
        return self._weights.of(self._side, self.counts) if self._weight is None else self._weight


class Row(NamedTuple):
    """A row as [`are_copies`] compares it.

    Args:
        prompt ([`Words`]), answer ([`Words`]): the words of each.
        system (`int`): a digest of the system prompt.
    """

    prompt: Words
    answer: Words
    system: int

    @classmethod
    def of(cls, sides: Sides, weights: Weights, known: tuple[int, int] | None = None) -> Row:
        """Return the words of a row; `known` are the weights of its prompt and its answer."""
        prompt, answer = known or (None, None)
        return cls(
            Words(0, sides.prompt, weights, prompt), Words(1, sides.answer, weights, answer), number_of(sides.system)
        )


def number_of(text: str) -> int:
    """Return 32 bits that are equal for equal texts after [`normalised`], 0 for no text."""
    return zlib.crc32(normalised(text).encode("utf-8", "surrogatepass")) if text else 0


KNOWN = 3  # rows with a word from which on one that differs by a letter may be a misspelling of it
PLAIN = 18  # weight of such a word, at most 4.4 % of the rows, where an answer is short
CONTENT = 24  # weight of a word that at most 1.6 % of the rows have: what a text is about
LONG = 300  # weight of an answer of some fifteen words, which is too long to be equal by chance
INSERTED = 60  # weight of a word or two, among which a negation turns an answer into its opposite
REMARK = 400  # weight of what may be added to any answer, such as a sentence
SMALL = 0.4  # share of the heavier text that an addition may be, in prompts, or in both sides at once
ABOVE = 1.25  # times the mean weight of a text's words: what the text is about, in a pool of its own kind
ORDER = (0.33, 0.5)  # share of neighbouring words that must stay together, in texts below and from 10 such pairs on


class Difference(NamedTuple):
    """How one side of two rows differs, after words that are spelled alike are paired off.

    Args:
        missing (`float`): weight of the words of the lighter text that the heavier lacks, as a share of the lighter.
        extra (`int`), extra_share (`float`): weight of the words of the heavier text that the lighter lacks, and that
            as a share of the heavier.
        weight (`int`): weight of the lighter text.
        decisive (`bool`): a number, name or sign is in place of another one, so that this is no small edit.
        content (`tuple[frozenset[str], frozenset[str]]`): words that say what a text is about and that only the
            lighter, or only the heavier, has.
        changed (`frozenset[str]`): all of these, before words that are spelled alike were paired off.
        negated (`bool`): a negation is in one of the texts only.
    """

    missing: float
    extra: int
    extra_share: float
    weight: int
    decisive: bool
    content: tuple[frozenset[str], frozenset[str]]
    changed: frozenset[str]
    negated: bool


def difference(side: int, one: Words, other: Words, weights: Weights, from_weight: int = CONTENT) -> Difference:
    """Return how one side of two rows differs.

    Args:
        side (`int`): 0 for prompts, 1 for answers.
        one ([`Words`]), other ([`Words`]): of the two rows, in any order.
        weights ([`Weights`]): of the pool.
        from_weight (`int`): of a word, from which on it tells what a text is about; less in a text of light words alone.
    """
    low, high = (one, other) if one.weight <= other.weight else (other, one)
    lacks, has = low.counts - high.counts, high.counts - low.counts
    decisive = bool(lacks and has) and (
        not (lacks.keys().isdisjoint(low.marks) or has.keys().isdisjoint(high.marks))
        or not (lacks.keys().isdisjoint(low.names) or has.keys().isdisjoint(high.names))
    )
    known, unknown = weights.by_word[side], weights.unknown
    least = min(from_weight, ABOVE * low.weight / max(low.counts.total(), 1))
    changed = frozenset(word for word in (*lacks, *has) if known.get(word, unknown) >= least)
    if lacks and has:
        _pair_off(lacks, has, side, weights)
    content = [frozenset(word for word in words if known.get(word, unknown) >= least) for words in (lacks, has)]
    extra = weights.of(side, has)
    return Difference(
        weights.of(side, lacks) / max(low.weight, 1),
        extra,
        extra / max(high.weight, 1),
        low.weight,
        decisive,
        (content[0], content[1]),
        changed,
        any(word in _NEGATIONS or word.endswith("n't") for word in (*lacks, *has)),
    )


def _is_disordered(one: Words, other: Words) -> bool:
    """Return True if too few pairs of neighbouring words are in both texts."""
    low, high = (one, other) if one.weight <= other.weight else (other, one)
    return len(low.pairs & high.pairs) < len(low.pairs) * ORDER[len(low.pairs) >= 10]


def _pair_off(lacks: Counter[str], has: Counter[str], side: int, weights: Weights) -> None:
    """Remove a word and its other spelling or form from both counts."""
    for word in sorted(lacks):
        for other in sorted(has):
            if has[other] and word[0] == other[0] and _is_alike(word, other, side, weights):
                both = min(lacks[word], has[other])
                lacks[word] -= both
                has[other] -= both
    for counter in (lacks, has):
        for word in [word for word, count in counter.items() if count <= 0]:
            del counter[word]


_FORMS = re.compile(r"(?:s|es|d|ed|ing|ly|er|r)\Z")


def _is_alike(word: str, other: str, side: int, weights: Weights) -> bool:
    """Return True for two forms of a word, and for a known word and a misspelling of it, which is not known."""
    shorter, longer = sorted((word, other), key=len)
    if len(shorter) < 4 or len(longer) - len(shorter) > 3 or not (word.isalpha() and other.isalpha()):
        return False
    if longer.startswith(shorter) and _FORMS.fullmatch(longer[len(shorter) :]):
        return True
    if len(longer) < 5 or not _is_one_edit(shorter, longer):
        return False
    rare, common = sorted(weights.found[side][each] for each in (word, other))
    return len(shorter) >= 7 or (rare <= 1 and common >= KNOWN)


def _is_one_edit(shorter: str, longer: str) -> bool:
    """Return True if one sign was left out, changed, or exchanged with its neighbour."""
    same = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    if len(shorter) < len(longer):
        return len(longer) == len(shorter) + 1 and shorter[same:] == longer[same + 1 :]
    swapped = shorter[same : same + 2] == longer[same : same + 2][::-1] and shorter[same + 2 :] == longer[same + 2 :]
    return swapped or shorter[same + 1 :] == longer[same + 1 :]


def are_copies(one: Row, other: Row, weights: Weights, containment: float) -> bool:
    """Return True if two rows are one, edited: the same question, and the same answer.

    Args:
        one ([`Row`]), other ([`Row`]): the words of two rows; their order does not matter.
        weights ([`Weights`]): of the words in this pool.
        containment (`float`): share of the lighter text that the heavier must contain, by weight, in the prompt and in
            the answer.
    """
    if one.system != other.system:
        return False
    is_long = min(one.answer.weight, other.answer.weight) >= LONG
    asked = difference(0, one.prompt, other.prompt, weights, CONTENT if is_long else PLAIN)
    if asked.decisive or asked.negated or asked.missing > 1 - containment or _is_disordered(one.prompt, other.prompt):
        return False
    said = difference(1, one.answer, other.answer, weights)
    if said.decisive or said.missing > 1 - containment or _is_disordered(one.answer, other.answer):
        return False
    if said.extra > REMARK and said.extra_share > 0.5:
        return False
    if said.negated and not is_long and said.extra < INSERTED:
        return False
    # A word that left prompt and answer alike was the content of a slot, not an edit.
    if not asked.changed.isdisjoint(said.changed):
        return False
    # A content word in place of another is another question, unless a long answer remains the same.
    if all(asked.content) or asked.extra_share > SMALL:
        return is_long and said.missing <= (1 - containment) / 2
    return not any(asked.content) or said.extra_share <= SMALL or is_long
