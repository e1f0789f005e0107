"""Decide whether two rows are the same text, edited: by the words of prompt and answer, each compared apart.

Does: read prompt and answer of rows; digest normalised texts; weigh words by how rare they are in the pool; tell copies
with edits from rows that share a template; reject most pairs of rows by small signatures, many at a time.
Does not: look for pairs, or read scores and embeddings.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.loading.schemas import Schema, conversations_of
from car_datasets.loading.templates import join_lines
from car_datasets.utils.files import sample_file

# Reading ---------------------------------------------------------------------------------------------------------------


class Sides(NamedTuple):
    """The text of a row: what was asked and what was answered, and the system prompt."""

    system: str
    prompt: str
    answer: str


def sides_of(batch: Mapping[str, Sequence[Any]], schema: Schema) -> list[Sides | None]:
    """Return the text of every row of a batch, `None` for a row that cannot be read.

    The prompt of a chat is all that users and tools say, its answer all that the assistant thinks, says and calls.
    """
    names = [schema.instruction, schema.response, schema.input, schema.system]
    columns = [batch[name] if name in batch else None for name in names]
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
    return Sides(system or "", f"{instruction}\n{context}" if context else instruction, response)


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
_TOKEN = re.compile(rf"[{_SIGNS}]|[^\W{_SIGNS}]+(?:(?:['’]|(?<=\d)[.,](?=\d))[^\W{_SIGNS}]+)*|[-+*/=<>%^&|~$€£#@×÷√]")
_MINUS = re.compile(r"-(?=\s?\d)")
_INSIDE = re.compile(r"[ ,'’&/-]*\Z")  # between two words of one sentence
_DIGIT = re.compile(r"\d")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+\Z")
_NUMBERS = dict(
    zip(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen".split(),
        map(str, range(16)),
        strict=True,
    )
)
_NUMBERS |= {"twenty": "20", "thirty": "30", "forty": "40", "fifty": "50", "hundred": "100", "thousand": "1000"}
_NEGATIONS = frozenset("not no never cannot none neither nor without except".split())


class Words(NamedTuple):
    """The words of one side of a row.

    Args:
        counts (`Counter[str]`): how often each word occurs, in lower case; numbers in figures.
        pairs (`frozenset`): neighbouring words.
        figures (`frozenset[str]`): numbers, and words with a digit.
        signs (`frozenset[str]`): signs of calculation, of code and of money.
        names (`frozenset[str]`): words with a capital letter inside a sentence.
    """

    counts: Counter[str]
    pairs: frozenset[tuple[str, str]]
    figures: frozenset[str]
    signs: frozenset[str]
    names: frozenset[str]


def words_of(text: str) -> Words:
    """Return the words of a text."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    words: list[str] = []
    figures, signs, names, end = set(), set(), set(), 0
    for found in _TOKEN.finditer(text):
        token, start = found[0], found.start()
        word = token.casefold().replace("’", "'")
        if _DIGIT.search(word):
            word = word.replace(",", "") if _THOUSANDS.match(word) else word
            figures.add(word)
        elif word in _NUMBERS:
            word = _NUMBERS[word]
            figures.add(word)
        elif not token[0].isalpha():
            if token == "-" and not _MINUS.match(text, start):
                continue  # a hyphen or a dash
            signs.add(word)
        elif len(token) > 1 and token[0].isupper() and words and _INSIDE.match(text, end, start):
            names.add(word)
        words.append(word)
        end = found.end()
    pairs = frozenset(zip(words, words[1:], strict=False))
    return Words(Counter(words), pairs, frozenset(figures), frozenset(signs), frozenset(names))


class Weights:
    """The weight of each word, by how few rows have it: a word of a template that fills the pool weighs little.

    The rows that the package ships are counted too, so that common English words weigh little in a small pool.

    Args:
        rows (`Iterable[Sides]`): rows of the pool, at most some ten thousand.
    """

    def __init__(self, rows: Iterable[Sides]) -> None:
        self.rows = 0
        self._found = (Counter[str](), Counter[str]())
        for sides in (*_shipped(), *rows):
            self.rows += 1
            for counter, text in zip(self._found, sides[1:], strict=True):
                counter.update(words_of(text).counts.keys())

    def of(self, side: int, words: Counter[str]) -> int:
        """Return the sum of the weights of these words of prompts (0) or answers (1), each as often as it occurs."""
        return sum(self.of_word(side, word) * count for word, count in words.items())

    def found(self, side: int, word: str) -> int:
        """Return in how many of the rows a word was found."""
        return self._found[side][word]

    def of_word(self, side: int, word: str) -> int:
        """Return the weight of a word, an integer, so that sums are equal on all machines: 1 or more."""
        return max(1, round(4 * math.log2((self.rows + 1) / (self._found[side][word] + 1))))


@functools.cache
def _shipped() -> tuple[Sides, ...]:
    rows = json.loads(sample_file().read_text(encoding="utf-8"))
    return tuple(Sides("", join_lines(row["instruction"], row["input"]), row["output"]) for row in rows)


class Row(NamedTuple):
    """The words of a row's prompt and answer, and a digest of its system prompt."""

    prompt: Words
    answer: Words
    system: int

    @classmethod
    def of(cls, sides: Sides) -> Row:
        """Return the words of a row."""
        system = zlib.crc32(normalised(sides.system).encode("utf-8", "surrogatepass"))
        return cls(words_of(sides.prompt), words_of(sides.answer), system)


class Difference(NamedTuple):
    """How one side of two rows differs, after words that are spelled alike are paired off.

    Args:
        missing (`float`): weight of the words of the lighter text that the heavier lacks, as a share of the lighter.
        extra (`int`), extra_share (`float`): weight of the words of the heavier text that the lighter lacks, and that
            as a share of the heavier.
        pairs (`float`): share of the lighter text's pairs of neighbouring words that the heavier has.
        weight (`int`): weight of the lighter text.
        decisive (`bool`): a number, name or sign is in the place of another one, so that this is no small edit.
        content (`tuple[frozenset[str], frozenset[str]]`): words that say what a text is about and that only the
            lighter, or only the heavier, has.
        negated (`bool`): a negation is in one of the texts only.
    """

    missing: float
    extra: int
    extra_share: float
    pairs: float
    weight: int
    decisive: bool
    content: tuple[frozenset[str], frozenset[str]]
    negated: bool


def difference(side: int, one: Words, other: Words, weights: Weights) -> Difference:
    """Return how one side (0 for prompts, 1 for answers) of two rows differs."""
    low, high = sorted(((weights.of(side, words.counts), i, words) for i, words in enumerate((one, other))))
    lacks, has = low[2].counts - high[2].counts, high[2].counts - low[2].counts
    _pair_off(lacks, has, side, weights)
    kinds = ((low[2].figures, high[2].figures), (low[2].signs, high[2].signs), (low[2].names, high[2].names))
    heaviest = max((weights.of_word(side, word) for word in low[2].counts), default=1)
    least = min(CONTENT, 0.8 * heaviest)
    content = tuple(frozenset(w for w in words if weights.of_word(side, w) >= least) for words in (lacks, has))
    pairs = len(low[2].pairs & high[2].pairs) / len(low[2].pairs) if low[2].pairs else 1.0
    extra = weights.of(side, has)
    return Difference(
        weights.of(side, lacks) / max(low[0], 1),
        extra,
        extra / max(high[0], 1),
        pairs,
        low[0],
        any(lacks.keys() & ours and has.keys() & theirs for ours, theirs in kinds),
        (content[0], content[1]),
        any(word in _NEGATIONS or word.endswith("n't") for word in (*lacks, *has)),
    )


def _pair_off(lacks: Counter[str], has: Counter[str], side: int, weights: Weights) -> None:
    """Remove a word and its other spelling or form from both counts."""
    for word in sorted(lacks):
        for other in sorted(has):
            if has[other] and _is_alike(word, other, side, weights):
                both = min(lacks[word], has[other])
                lacks[word] -= both
                has[other] -= both
    for counter in (lacks, has):
        for word in [word for word, count in counter.items() if count <= 0]:
            del counter[word]


_FORMS = re.compile(r"(?:'s|s|es|d|ed|ing|ly|er|r)?\Z")


def _is_alike(word: str, other: str, side: int, weights: Weights) -> bool:
    """Return True for two forms of a word, and for a word and a misspelling of it, which the pool does not know."""
    if word[0] != other[0] or min(len(word), len(other)) < 4 or abs(len(word) - len(other)) > 3:
        return False
    if _DIGIT.search(word) or _DIGIT.search(other):
        return False
    shorter, longer = sorted((word, other), key=len)
    if longer.startswith(shorter) and _FORMS.fullmatch(longer[len(shorter) :]):
        return True
    rare = min(weights.found(side, word), weights.found(side, other)) <= 1
    return rare and len(longer) >= 5 and _is_one_edit(shorter, longer)


def _is_one_edit(shorter: str, longer: str) -> bool:
    """Return True if one sign was left out, changed, or exchanged with its neighbour."""
    same = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    if len(shorter) < len(longer):
        return len(longer) == len(shorter) + 1 and shorter[same:] == longer[same + 1 :]
    swapped = shorter[same : same + 2] == longer[same : same + 2][::-1] and shorter[same + 2 :] == longer[same + 2 :]
    return swapped or shorter[same + 1 :] == longer[same + 1 :]


CONTENT = 24  # weight of a word that at most 1.6 % of the rows have: what a text is about
LONG = 300  # weight of an answer of some fifteen words, which is too long to be equal by chance
REMARK = 300  # weight of what may be added to any answer, such as a sentence
SMALL = 0.4  # share of the heavier text that an addition may be, in prompts, or in both sides at once
ORDER = 0.33  # share of neighbouring words that must stay together


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
    asked = difference(0, one.prompt, other.prompt, weights)
    if asked.decisive or asked.negated or asked.missing > 1 - containment or asked.pairs < ORDER:
        return False
    said = difference(1, one.answer, other.answer, weights)
    if said.decisive or said.missing > 1 - containment or said.pairs < ORDER:
        return False
    if said.extra > REMARK and said.extra_share > 0.5:
        return False
    if said.negated and said.weight < LONG:
        return False
    # A word that left prompt and answer alike was the content of a slot, not an edit.
    if frozenset.union(*asked.content) & frozenset.union(*said.content):
        return False
    # A content word in the place of another is another question, unless a long answer remains the same.
    if all(asked.content) or asked.extra_share > SMALL:
        return said.weight >= LONG and said.missing <= (1 - containment) / 2
    return not any(asked.content) or said.extra_share <= SMALL or said.weight >= LONG


# Signatures ------------------------------------------------------------------------------------------------------------

_BITS = 256  # of the words of a side that say what it is about; numbers and signs have a quarter of them
_POPULATION = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


class Signatures:
    """Bits and sizes of rows, by which most pairs that [`are_copies`] refuses are refused, a million in a second.

    Args:
        rows (`Sequence[Row]`): their words.
        weights ([`Weights`]): of the words in this pool.
    """

    def __init__(self, rows: Sequence[Row], weights: Weights) -> None:
        self.content = np.zeros((2, len(rows), _BITS // 8), dtype=np.uint8)
        self.figures = np.zeros((2, len(rows), _BITS // 32), dtype=np.uint8)
        self.weight = np.zeros((2, len(rows)), dtype=np.int32)
        self.system = np.array([row.system for row in rows], dtype=np.int64)
        for i, row in enumerate(rows):
            for side, words in enumerate((row.prompt, row.answer)):
                content = [word for word in words.counts if weights.of_word(side, word) >= CONTENT]
                _set_bits(self.content[side, i], content)
                _set_bits(self.figures[side, i], words.figures | words.signs)
                self.weight[side, i] = weights.of(side, words.counts)

    def may_be_copies(self, one: Any, other: Any, containment: float) -> npt.NDArray[np.bool_]:
        """Return a mask of the pairs that [`are_copies`] may accept.

        Args:
            one (`(pairs,)` int64), other (`(pairs,)` int64): positions in the rows.
            containment (`float`): as for [`are_copies`].
        """
        kept: npt.NDArray[np.bool_] = self.system[one] == self.system[other]
        for side in (0, 1):
            ours, theirs = self.figures[side][one], self.figures[side][other]
            kept &= ~((ours & ~theirs).any(axis=1) & (theirs & ~ours).any(axis=1))
            ours, theirs = self.content[side][one], self.content[side][other]
            sizes = self.weight[side][one], self.weight[side][other]
            lighter = (sizes[0] < sizes[1])[:, None]
            lacks = np.where(lighter, ours & ~theirs, theirs & ~ours)
            either = np.where((sizes[0] == sizes[1])[:, None], np.minimum(ours & ~theirs, theirs & ~ours), lacks)
            # One word may be another spelling of one that is there.
            least = (_POPULATION[either].sum(axis=1, dtype=np.int64) - 1) * CONTENT
            kept &= least <= (1 - containment) * np.minimum(*sizes)
        return kept


def _set_bits(target: npt.NDArray[np.uint8], words: Iterable[str]) -> None:
    bits = 8 * len(target)
    for word in words:
        # Python's own hash of a text differs from process to process.
        bit = zlib.crc32(word.encode("utf-8", "surrogatepass")) % bits
        target[bit >> 3] |= 1 << (bit & 7)
