"""`ItemIndex`: the texts of evaluation items by their word n-grams, and how much of an item a row contains.

Does: normalise texts to words; find candidates by hashed n-grams; compare words and grow matches over small edits; tell
a copy from another problem of the same template, and from a text that shares only a quotation or a formula.
Does not: read files or columns.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

BASE = 0x9E3779B97F4A7C15  # of the hashes; odd, so that no product loses bits
GRAM = 8  # words of an n-gram by which items are found
SHORT = 20  # words up to which an item that is there word for word counts, whatever its words weigh
# Items with fewer words than the first number are found by n-grams of the second. An edit in the middle of a short item
# leaves no n-gram of eight words. Items below 10 words are found word for word only, by their rarest three words.
TIGHT, TIGHT_GRAM = 17, 5
EXACT, EXACT_GRAM = 10, 3
COMMON = 64  # items that may share an n-gram; those of a template that all items share tell nothing apart
RARE = 1_024  # the same for an item that would have no n-gram left
CANDIDATES = 8  # items that a row is compared with, those first of which it contains the largest share of n-grams
JUMPS = tuple(sorted(((i, j) for i in range(4) for j in range(4) if i + j), key=lambda jump: (sum(jump), jump[0] != 1)))
AGREE = 3  # words that must follow a jump over an edit


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


STOP_WORDS = _set_of(
    "a an the this that these those and or but if then than so as of in on at by for from to with without into "
    "over under about after before between is are was were be been being am do does did has have had having will "
    "would can could should may might must shall not no yes it its he she they them his her their we us our you "
    "your i me my there here s t all any each some such one many much more most other following true false"
)
NUMBER_WORDS = _set_of(
    "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion "
    "half twice thrice double triple"
)
QUESTION_WORDS = _set_of("who whom whose which what when where why how")
TASK_WORDS = _set_of(
    "answer question passage problem choose select correct option options choice choices below solve read given "
    "please final step"
)
_KINDS = {
    **dict.fromkeys(NUMBER_WORDS, "number"),
    **dict.fromkeys(QUESTION_WORDS, "question"),
    **dict.fromkeys(TASK_WORDS, "task"),
}
QUOTATION, FORMULA = 1, 2  # what a word is in
STOP_WEIGHT, ASIDE_WEIGHT = 0.5, 0.5  # of stop words; of numbers, symbols and the words of formulas
# Other numbers or symbols in place of this share of an item's, and of so many at least, make another problem.
OTHER_NUMBERS = 0.3
REPLACED = {"number": 1, "symbol": 2}  # a problem with one other letter is the same
LOST, LOST_SHARE = 3, 0.05  # words of a run that a copy may not lack if they ask something; their share of the item
OWN_WORDS = 0.5  # share of an item's words outside quotations and formulas that a copy contains at least
SHARED = 3  # items that may share a short text, and be told apart by other texts, before it names none of them
FEW = 3  # words outside them from which on that is asked

_ASCII = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
# A sign of a script that is written without spaces is a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
# Quotations of some length, formulas, and commands of LaTeX.
_ASIDE = re.compile(
    r"(\"[^\"\n]{20,}\"|“[^”\n]{20,}”|«[^»\n]{20,}»|\$\$.+?\$\$|\$[^$\n]+\$|\\\(.+?\\\)|\\\[.+?\\\]|\\[a-zA-Z]+)",
    re.DOTALL,
)


class Part(NamedTuple):
    """A text of an evaluation item.

    Args:
        item (`int`): number of the item among all.
        is_answer (`bool`): the answer, of which only a long one is looked for; short ones occur anywhere.
        text (`str`): the text.
    """

    item: int
    is_answer: bool
    text: str


class Found(NamedTuple):
    """What a row contains of the items.

    Args:
        item (`int`): the item that it copies, -1 for none.
        share (`float`): the share of that item that it contains; without a copy, the largest share of any item.
    """

    item: int
    share: float


class _Entry(NamedTuple):
    """A text of an item as the index holds it, word by word."""

    item: int
    words: tuple[int, ...]
    weights: npt.NDArray[np.float64]
    kinds: tuple[str, ...]
    aside: npt.NDArray[np.bool_]  # numbers, symbols, quotations, formulas


class _Postings(NamedTuple):
    """Where the n-grams of one length are: `entries[starts[i] : starts[i + 1]]` have the hash `hashes[i]`."""

    length: int
    shift: np.uint64
    known: npt.NDArray[np.bool_]  # by the first bits of a hash, so that most n-grams of a row are put aside quickly
    hashes: Hashes
    starts: Indices
    entries: Indices
    positions: Indices


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; accents count."""
    if text.isascii():
        return text.lower().translate(_ASCII).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def kind_of_word(word: str) -> str:
    """Return the kind of a word: "stop", "question", "task", "number" (digits or words), "symbol" or "word"."""
    if not word.isalpha():
        # "78x" and "x2", but not "covid19"
        is_number = word[:1].isdigit() or (len(word) <= 3 and any(sign.isdigit() for sign in word))
        return "number" if is_number else "word"
    if word in STOP_WORDS:
        return "stop"
    if len(word) == 1 and word.isascii():
        return "symbol"
    return _KINDS.get(word, "word")


class ItemIndex:
    """The texts of evaluation items, which [`~ItemIndex.find`] looks for.

    Texts that say too little to name an item are left out: numbers and single words; short answers; short texts that
    more than three items share.

    Args:
        parts (`Iterable[Part]`): the texts.
        threshold (`float`): share of an item, by the weight of its words, from which on a row copies it.

    Attributes:
        items (`set[int]`): the items that can be found.
    """

    def __init__(self, parts: Iterable[Part], threshold: float) -> None:
        self.threshold = threshold
        self.whole: dict[tuple[str, ...], int] = {}  # texts that count only where a text of a row is nothing else
        kept, self.items = _distinct(parts)
        self.vocabulary = {word: i for i, word in enumerate(sorted({w for words in kept for w in words}), 1)}
        # The number 0 is a word that no item has. The seed makes hashes equal in all processes.
        generator = np.random.default_rng(8)
        self._codes = generator.integers(0, 1 << 64, len(self.vocabulary) + 1, dtype=np.uint64)
        counts = Counter(w for words in kept for w in set(words))
        self._kinds = ["", *map(kind_of_word, self.vocabulary)]
        total = max(1, len(kept))
        rarity = np.log1p(total / np.array([1, *(counts[w] for w in self.vocabulary)])) / np.log1p(total)
        weights = {"stop": STOP_WEIGHT, "question": STOP_WEIGHT, "number": ASIDE_WEIGHT, "symbol": ASIDE_WEIGHT}
        self._weights = rarity * np.array([weights.get(kind, 1.0) for kind in self._kinds])
        self.entries: list[_Entry] = []
        for words, part in kept.items():
            if len(words) < EXACT_GRAM:
                self.whole[words] = part.item
            else:
                self.entries.append(self._entry(words, part))
        self._gram_counts = np.zeros(len(self.entries), dtype=np.int64)
        self._postings = [self._index(length) for length in (EXACT_GRAM, TIGHT_GRAM, GRAM)]

    def _entry(self, words: tuple[str, ...], part: Part) -> _Entry:
        ids = tuple(map(self.vocabulary.__getitem__, words))
        kinds = tuple(map(self._kinds.__getitem__, ids))
        weights, aside = self._weights[list(ids)], _aside(part.text)
        if len(aside) != len(words):  # signs that join only where they are read together
            aside = np.zeros(len(words), dtype=np.int8)
        special = np.array([kind in REPLACED for kind in kinds])
        weights[(aside == FORMULA) & ~special] *= ASIDE_WEIGHT
        return _Entry(part.item, ids, weights, kinds, special | (aside > 0))

    def _index(self, length: int) -> _Postings:
        """Return the n-grams of the entries that are found by n-grams of this length."""
        numbers = [i for i, entry in enumerate(self.entries) if _gram_length(len(entry.words)) == length]
        flat = np.array([w for i in numbers for w in (*self.entries[i].words, 0)], dtype=np.int64)
        ends = np.cumsum([len(self.entries[i].words) + 1 for i in numbers], dtype=np.int64)
        hashes = _grams(self._codes[flat])[length]
        at = np.arange(len(hashes))
        entry = np.searchsorted(ends, at, side="right")
        starts = np.r_[0, ends]
        inside = at + length < ends[entry] if len(at) else np.zeros(0, dtype=bool)
        hashes, entry, at = hashes[inside], entry[inside], at[inside]
        _, inverse, frequency = np.unique(hashes, return_inverse=True, return_counts=True)
        frequency = frequency[inverse]
        # The rarest n-gram of each entry, the first of equals.
        order = np.lexsort((at, frequency, entry))
        rarest = np.zeros(len(at), dtype=bool)
        rarest[order[np.r_[True, np.diff(entry[order]) > 0]] if len(at) else order] = True
        keep = rarest if length == EXACT_GRAM else (frequency <= COMMON) | (rarest & (frequency <= RARE))
        hashes, entry, at = hashes[keep], entry[keep], at[keep]
        order = np.argsort(hashes, kind="stable")
        unique, first = np.unique(hashes[order], return_index=True)
        bits = int(np.clip(np.ceil(np.log2(16 * len(unique) + 1)), 10, 24))
        shift = np.uint64(64 - bits)
        known = np.zeros(1 << bits, dtype=bool)
        known[unique >> shift] = True
        positions = at[order] - starts[entry[order]]
        entries = np.array(numbers, dtype=np.int64)[entry[order]] if numbers else np.zeros(0, dtype=np.int64)
        self._gram_counts += np.bincount(entries, minlength=len(self.entries))
        return _Postings(length, shift, known, unique, np.r_[first, len(hashes)].astype(np.int64), entries, positions)

    def find(self, rows: Sequence[Sequence[str]]) -> list[Found]:
        """Return what each row contains of the items.

        Args:
            rows (`Sequence[Sequence[str]]`): the texts of each row, such as its prompt and its answer.
        """
        numbers: list[int] = []
        ends: list[int] = []
        found = [Found(-1, 0.0)] * len(rows)
        for i, texts in enumerate(rows):
            for text in texts:
                words = words_of(text)
                if len(words) < EXACT and self.whole and (item := self.whole.get(tuple(words))) is not None:
                    found[i] = Found(item, 1.0)
                numbers.extend(map(self.vocabulary.get, words, repeat(0)))
                numbers.append(0)  # no n-gram reaches from one text into the next
            ends.append(len(numbers))
        for i, candidates in self._candidates(np.array(numbers, dtype=np.int64), np.array(ends)).items():
            if found[i].item < 0:
                start = ends[i - 1] if i else 0
                words = [word for text in rows[i] for word in (*words_of(text), "")]
                row = _Row(numbers[start : ends[i]], words)
                found[i] = self._best(row, start, candidates)
        return found

    def _candidates(self, stream: Indices, bounds: Indices) -> dict[int, list[tuple[int, list[tuple[int, int]]]]]:
        """Return the entries that each row may contain, each with its places: in the entry and in the stream."""
        codes = _grams(self._codes[stream])
        hits = [_look_up(codes[each.length], each) for each in self._postings]
        entry, inner, outer = (np.concatenate([hit[i] for hit in hits]) for i in range(3))
        row = np.searchsorted(bounds, outer, side="right")
        order = np.lexsort((outer, inner, entry, row))
        entry, inner, outer, row = entry[order], inner[order], outer[order], row[order]
        if len(row) == 0:
            return {}
        new = np.flatnonzero(np.r_[True, (np.diff(entry) != 0) | (np.diff(row) != 0)])
        grouped = defaultdict(list)
        for start, end in zip(new, np.r_[new[1:], len(row)], strict=True):
            share = len(np.unique(inner[start:end])) / self._gram_counts[entry[start]]
            grouped[int(row[start])].append((-share, int(entry[start]), int(start), int(end)))
        candidates = {}
        for at, groups in grouped.items():
            best = sorted(groups)[:CANDIDATES]
            candidates[at] = [
                (number, list(zip(inner[start:end].tolist(), outer[start:end].tolist(), strict=True)))
                for _, number, start, end in best
            ]
        return candidates

    def _best(self, row: _Row, start: int, candidates: Sequence[tuple[int, list[tuple[int, int]]]]) -> Found:
        """Return the best of the candidates for a row, whose words begin at `start` of the stream."""
        best = Found(-1, 0.0)
        for number, places in candidates:
            entry = self.entries[number]
            share, is_copy = self._compare(entry, row, [(inner, outer - start) for inner, outer in places])
            here = Found(entry.item if is_copy else -1, share)
            if (here.item >= 0, here.share) > (best.item >= 0, best.share):
                best = here
            if is_copy and share == 1:
                break
        return best

    def _compare(self, entry: _Entry, row: _Row, places: Sequence[tuple[int, int]]) -> tuple[float, bool]:
        """Return the share of an entry that a row contains, and whether the row copies it."""
        length = len(entry.words)
        if length <= SHORT:
            starts = {outer - inner for inner, outer in places if outer >= inner}
            if any(tuple(row.numbers[start : start + length]) == entry.words for start in starts):
                return 1.0, True
            if length < EXACT:
                return 0.0, False
        matched = _grow(entry.words, row.numbers, places)
        covered = np.array(matched) >= 0
        share = float(entry.weights[covered].sum() / entry.weights.sum())
        is_copy = share >= self.threshold and _has_own_words(entry, covered) and not _is_other_task(entry, row, matched)
        return share, is_copy


class _Row(NamedTuple):
    """The words of a row, as numbers of the vocabulary and as words; 0 and `""` between two texts."""

    numbers: list[int]
    words: list[str]


def _distinct(parts: Iterable[Part]) -> tuple[dict[tuple[str, ...], Part], set[int]]:
    """Return the texts that can name an item, by their words and of equal texts the first; and all items with one."""
    by_item: dict[int, list[tuple[tuple[str, ...], Part]]] = defaultdict(list)
    for part in parts:
        by_item[part.item].append((tuple(words_of(part.text)), part))
    # Such as "Summarise this text." before different texts, or the name of a subject.
    others: dict[tuple[str, ...], set[tuple[tuple[str, ...], ...]]] = defaultdict(set)
    for texts in by_item.values():
        for words, _ in texts:
            if len(words) <= SHORT:
                others[words].add(tuple(other for other, _ in texts if other != words))
    kept: dict[tuple[str, ...], Part] = {}
    items: set[int] = set()
    for texts in by_item.values():
        for words, part in texts:
            names_one = len(words) > 1 and _says_something(words)
            if names_one and not (len(others[words]) > SHARED or (part.is_answer and len(words) <= SHORT)):
                kept.setdefault(words, part)
                items.add(part.item)
    return kept, items


def _says_something(words: Iterable[str]) -> bool:
    """Return True if a word names something: not all are stop words, numbers, symbols or words of any task."""
    return any(kind_of_word(word) == "word" for word in words)


def _aside(text: str) -> npt.NDArray[np.int8]:
    """Return for each word of a text whether it is in a `QUOTATION`, in a `FORMULA` or in neither (0)."""
    marks: list[int] = []
    for i, piece in enumerate(_ASIDE.split(text)):
        kind = 0 if i % 2 == 0 else QUOTATION if piece[0] in '"“«' else FORMULA
        marks += [kind] * len(words_of(piece))
    return np.array(marks, dtype=np.int8)


def _gram_length(words: int) -> int:
    """Return the length of the n-grams by which a text of so many words is found."""
    return EXACT_GRAM if words < EXACT else TIGHT_GRAM if words < TIGHT else GRAM


def _grams(codes: Hashes) -> dict[int, Hashes]:
    """Return the hashes of all n-grams of three, five and eight words, by their length; sums wrap around."""
    base = np.uint64(BASE)
    two = codes[:-1] * base + codes[1:]
    three = two[:-1] * base + codes[2:]
    five = three[:-2] * np.uint64(pow(BASE, 2, 1 << 64)) + two[3:]
    eight = five[:-3] * np.uint64(pow(BASE, 3, 1 << 64)) + three[5:]
    # The last bits of a product depend on the last bits of its factors alone; only the first choose the slot.
    return {EXACT_GRAM: three, TIGHT_GRAM: five, GRAM: eight}


def _look_up(codes: Hashes, postings: _Postings) -> tuple[Indices, Indices, Indices]:
    """Return the n-grams of a stream that entries have: entry, place in the entry, place in the stream."""
    at = np.flatnonzero(postings.known[codes >> postings.shift])
    slot = np.searchsorted(postings.hashes, codes[at])
    slot[slot == len(postings.hashes)] = 0
    same = postings.hashes[slot] == codes[at] if len(postings.hashes) else np.zeros(len(at), dtype=bool)
    at, slot = at[same], slot[same]
    counts = postings.starts[slot + 1] - postings.starts[slot]
    # The postings of each n-gram lie one after another.
    first = np.repeat(postings.starts[slot] - np.r_[0, np.cumsum(counts)[:-1]][: len(counts)], counts)
    where = first + np.arange(len(first))
    return postings.entries[where], postings.positions[where], np.repeat(at, counts)


def _grow(words: Sequence[int], row: Sequence[int], places: Iterable[tuple[int, int]]) -> list[int]:
    """Return for each word of an entry its place in a row, or -1, by growing matches from places in both directions."""
    matched = [-1] * len(words)
    seen: set[int] = set()
    for inner, outer in places:
        # A match that has grown over this place has found it already.
        if matched[inner] == outer or (outer - inner in seen and matched[inner] >= 0):
            continue
        seen.add(outer - inner)
        for step in (1, -1):
            _grow_one_way(words, row, (inner, outer), step, matched)
    return matched


def _grow_one_way(
    words: Sequence[int], row: Sequence[int], place: tuple[int, int], step: int, matched: list[int]
) -> None:
    """Note matching words from a place on, forwards or backwards, over edits of up to three words."""
    inner, outer = place
    while True:
        while 0 <= inner < len(words) and 0 <= outer < len(row) and words[inner] == row[outer]:
            if matched[inner] < 0:
                matched[inner] = outer
            inner, outer = inner + step, outer + step
        for by_inner, by_outer in JUMPS:
            to, at = inner + step * by_inner, outer + step * by_outer
            left = len(words) - to if step > 0 else to + 1
            agree = min(AGREE, left)
            if left > 0 and _agrees(words, row, (to, at), step, agree):
                inner, outer = to, at
                break
        else:
            return


def _agrees(words: Sequence[int], row: Sequence[int], place: tuple[int, int], step: int, count: int) -> bool:
    inner, outer = place
    last = outer + step * (count - 1)
    if not (0 <= outer < len(row) and 0 <= last < len(row)):
        return False
    return all(words[inner + step * i] == row[outer + step * i] for i in range(count))


def _has_own_words(entry: _Entry, covered: npt.NDArray[np.bool_]) -> bool:
    """Return False if a row contains a quotation or a formula of the entry, and not what the entry says besides."""
    own = ~entry.aside
    if np.count_nonzero(own) < FEW or own.all():
        return True
    return bool(entry.weights[own & covered].sum() >= OWN_WORDS * entry.weights[own].sum())


def _is_other_task(entry: _Entry, row: _Row, matched: Sequence[int]) -> bool:
    """Return True if a row lacks what the entry asks, or has other numbers or symbols where the entry has its own.

    The first is a text that shares a quotation with the entry, the second another problem of the same template.
    """
    replaced: Counter[str] = Counter()
    for start, end in _gaps(matched):
        window = _window(matched, start, end, len(row.words))
        own, theirs = Counter(entry.words[start:end]), Counter(row.numbers[i] for i in window)
        kinds = dict(zip(entry.words[start:end], entry.kinds[start:end], strict=True))
        lost = _by_kind(own - theirs, kinds)
        asks = lost["word"] >= 2 or (lost["word"] > 0 and lost["question"] > 0)
        if asks and lost.total() >= LOST and entry.weights[start:end].sum() >= LOST_SHARE * entry.weights.sum():
            return True
        for kind in REPLACED:
            mine = [w for w, its in zip(entry.words[start:end], entry.kinds[start:end], strict=True) if its == kind]
            others = [row.numbers[i] for i in window if kind_of_word(row.words[i]) == kind]
            replaced[kind] += _replaced(mine, others)
    totals = Counter(entry.kinds)
    return any(replaced[kind] >= max(least, OTHER_NUMBERS * totals[kind]) for kind, least in REPLACED.items())


def _replaced(mine: Sequence[int], others: Sequence[int]) -> int:
    """Return how many numbers have others in their place, where those that are equal in both stay in order."""
    if not mine or not others:
        return 0
    blocks = SequenceMatcher(None, mine, others, autojunk=False).get_matching_blocks()
    return min(len(mine), len(others)) - sum(block.size for block in blocks)


def _gaps(matched: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of words that have no place in a row."""
    start = 0
    for has_place, run in groupby(matched, key=lambda place: place >= 0):
        end = start + len(list(run))
        if not has_place:
            yield start, end
        start = end


def _by_kind(counts: Counter[int], kinds: Mapping[int, str]) -> Counter[str]:
    by_kind: Counter[str] = Counter()
    for word, count in counts.items():
        by_kind[kinds[word]] += count
    return by_kind


def _window(matched: Sequence[int], start: int, end: int, length: int) -> range:
    """Return where a row has something else in place of an entry's words from `start` to `end`."""
    before = matched[start - 1] if start else None
    after = matched[end] if end < len(matched) else None
    size = end - start
    if before is not None and after is not None and before < after <= before + 2 * size + 2:
        return range(before + 1, after)
    if before is not None:
        return range(before + 1, min(length, before + 1 + size))
    return range(max(0, (after or 0) - size), after or 0)
