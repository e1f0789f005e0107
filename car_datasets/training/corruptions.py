"""Make copies of answers that are certainly worse (corruptions), and copies of equal quality (changes of style).

Does: eight corruptions, which a good scorer ranks below the row, and three changes of style, which it ignores; finer
ones of both kinds, for training alone.
Does not: score or train.

Training and evaluation use different phrases, so that evaluation does not measure the memory of a phrase.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence

from car_datasets.loading.templates import Exchange

Change = Callable[[Exchange, random.Random, str], str]  # row, generator, "train" or "evaluate" -> new response

# The seeds of the shipped head draw from these tuples: any edit, even of the order, changes its weights. A phrase
# that is listed twice is drawn more often.
REFUSALS = {
    "train": (
        "I'm sorry, but I cannot help with that.",
        "Sorry, I can't assist with this request.",
        "As an AI language model, I am unable to do this.",
        "I cannot answer this question.",
        "I do not have enough information to answer.",
        "Unfortunately, I am not able to fulfil your request.",
    ),
    "evaluate": (
        "I'm afraid I can't do that.",
        "I apologize, but I am not able to provide an answer to this question.",
        "As an AI, I don't have the ability to complete this task.",
        "I'm sorry, I don't know.",
    ),
}
OPENINGS = {
    "train": tuple(
        f"{greeting}{start} {what}{whose}{end}"
        for greeting, (start, what), whose, end in itertools.product(
            ("", "", "Sure! ", "Sure, ", "Certainly! ", "Of course. ", "Okay, "),
            (
                *itertools.product(
                    ("Here is", "Here's", "Below is", "The following is", "This is"),
                    (
                        "the answer",
                        "a response",
                        "one example",
                        "the result",
                        "my solution",
                        "a list",
                        "some text",
                        "a draft",
                    ),
                ),
                *itertools.product(
                    ("Here are", "Below are", "The following are", "These are"),
                    ("some ideas", "the answers", "a few examples", "several suggestions", "the steps", "the results"),
                ),
            ),
            ("", "", " to your question", " you requested", " for you", " based on your input", " that may help"),
            (":", ":", "."),
        )
    ),
    "evaluate": (
        "Here is a possible answer:",
        "Here is the response you asked for:",
        "Here's one way to put it:",
        "Sure! Here is my answer:",
    ),
}
FILLERS = {
    "train": tuple(
        itertools.product(
            (
                "",
                "",
                "Thank you for your question.",
                "That is a great question!",
                "I would be happy to help with that.",
                "What an interesting topic!",
                "Of course, I can help you.",
                "Hello, and thanks for writing.",
            ),
            (
                "I hope this helps!",
                "Please let me know if you need anything else.",
                "Feel free to ask if you have any further questions.",
                "I hope you find this useful, and have a great day!",
                "Thanks for asking, and good luck.",
                "If you would like more details, just say so.",
                "It was a pleasure to help you.",
            ),
        )
    ),
    "evaluate": (
        ("Thanks for reaching out!", "Don't hesitate to ask if anything is unclear."),
        ("I'd be glad to assist you with this.", "I hope this answer was helpful to you."),
        ("Great question, thank you for asking!", "Let me know if there is anything else I can do for you."),
    ),
}
BULLETS = ("-", "*", "•")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


def sentences(text: str) -> list[str]:
    """Return the sentences and lines of a text, in order, without the white space between them."""
    return [part for part in _SENTENCE.split(text.strip()) if part]


def _truncated(row: Exchange, rng: random.Random, phrases: str) -> str:
    words = row.response.split()
    share = 0.5 if phrases == "evaluate" else rng.uniform(0.35, 0.65)
    return " ".join(words[: int(len(words) * share)])


def _repeated(row: Exchange, rng: random.Random, phrases: str) -> str:
    words = row.response.split()
    parts = 4 if phrases == "evaluate" else rng.choice((2, 3, 4, 4, 4))
    return " ".join(words[: len(words) // parts] * parts)


def _shuffled_words(row: Exchange, rng: random.Random, phrases: str) -> str:
    return " ".join(_reordered(row.response.split(), rng))


def _shuffled_sentences(row: Exchange, rng: random.Random, phrases: str) -> str:
    return " ".join(_reordered(sentences(row.response), rng))


def _reordered(parts: list[str], rng: random.Random) -> list[str]:
    """Return the parts in another order, if one exists."""
    # Half of all shuffles of two sentences leave them as they are, so one shuffle is not enough.
    copy = list(parts)
    while copy == parts and len(set(parts)) > 1:
        rng.shuffle(copy)
    return copy


def _empty(row: Exchange, rng: random.Random, phrases: str) -> str:
    return ""


def _refusal(row: Exchange, rng: random.Random, phrases: str) -> str:
    return rng.choice(REFUSALS[phrases])


def _echo(row: Exchange, rng: random.Random, phrases: str) -> str:
    return f"{row.instruction} {row.input}".strip()


def _opening(row: Exchange, rng: random.Random, phrases: str) -> str:
    return f"{rng.choice(OPENINGS[phrases])} {row.response}"


def _bullets(row: Exchange, rng: random.Random, phrases: str) -> str:
    mark = rng.choice(BULLETS)
    return "\n".join(f"{mark} {part}" for part in sentences(row.response))


def _filler(row: Exchange, rng: random.Random, phrases: str) -> str:
    before, after = rng.choice(FILLERS[phrases])
    return f"{before} {row.response} {after}".strip()


_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?!\w)(?![.)]\s)")  # not the mark of a numbered item
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}\b")  # not at the start of a sentence
_LEAD_IN = re.compile(
    r"^(?:(?:Sure|Certainly|Of course|Okay|Absolutely|Great)[^.:!]{0,40}[.!,:]\s*)?"
    r"(?:Here(?:'s| is| are)|Below (?:is|are)|The following (?:is|are)|These are|This is)[^.:!?]{0,90}[:.]\s+"
)
_CLOSING = re.compile(
    r"(?<=[.!?])\s+(?:I hope|Let me know|Please let me|Feel free|Thank|Good luck|Enjoy)[^.!?]{0,100}[.!?]$"
)
_MARK = re.compile(r"(?:(?<=\s)|^)(?:[-*•]|\d{1,2}[.)])\s+(?=\S)")


def _changed_number(row: Exchange, rng: random.Random, phrases: str) -> str:
    found = list(_NUMBER.finditer(row.response))
    if not found:
        return row.response
    number = rng.choice(found)
    digits = [at for at in range(number.start(), number.end()) if row.response[at].isdigit()]
    at = rng.choice(digits[:2])  # the leading ones, so that the value is clearly another
    digit = rng.choice([digit for digit in "123456789" if digit != row.response[at]])
    return row.response[:at] + digit + row.response[at + 1 :]


def _exchanged_names(row: Exchange, rng: random.Random, phrases: str) -> str:
    names = sorted(set(_NAME.findall(row.response)))
    if len(names) < 2:
        return row.response
    one, other = rng.sample(names, 2)
    swap = {one: other, other: one}
    return re.sub(rf"\b(?:{one}|{other})\b", lambda found: swap[found.group()], row.response)


def _dropped_sentence(row: Exchange, rng: random.Random, phrases: str) -> str:
    parts = sentences(row.response)
    if len(parts) < 3:
        return row.response
    at = rng.randrange(1, len(parts))
    return " ".join(parts[:at] + parts[at + 1 :])


def _plain(row: Exchange, rng: random.Random, phrases: str) -> str:
    text = _CLOSING.sub("", _LEAD_IN.sub("", row.response))
    text = _MARK.sub("", text).replace("**", "")
    # What is left of an answer that is little more than its lead-in is no answer.
    return text if 2.5 * len(text.split()) >= len(row.response.split()) else row.response


def _bold(row: Exchange, rng: random.Random, phrases: str) -> str:
    words = row.response.split()
    for _ in range(min(len(words), 1 + len(words) // 25)):
        first = rng.randrange(len(words))
        last = min(len(words) - 1, first + rng.randrange(3))
        words[first], words[last] = f"**{words[first]}", f"{words[last]}**" if last > first else f"**{words[first]}**"
    return " ".join(words)


def _numbered(row: Exchange, rng: random.Random, phrases: str) -> str:
    form = rng.choice(("{}. {}", "{}) {}"))
    return " ".join(form.format(i, part) for i, part in enumerate(sentences(row.response), 1))


# The eighth corruption, `mismatched`, needs all rows and so is a function of its own.
CORRUPTIONS: dict[str, Change] = {
    "truncated": _truncated,
    "repeated": _repeated,
    "shuffled_words": _shuffled_words,
    "shuffled_sentences": _shuffled_sentences,
    "empty": _empty,
    "refusal": _refusal,
    "echo": _echo,
}
STYLES: dict[str, Change] = {"opening": _opening, "bullets": _bullets, "filler": _filler}
# A wrong number, the names of two exchanged, a step left out: worse if the row was right, and hard to see. Not evaluated.
FINE_CORRUPTIONS: dict[str, Change] = {
    "changed_number": _changed_number,
    "exchanged_names": _exchanged_names,
    "dropped_sentence": _dropped_sentence,
}
FINE_STYLES: dict[str, Change] = {"plain": _plain, "bold": _bold, "numbered": _numbered}


def corrupt(
    kind: str, rows: Sequence[Exchange], seed: int = 0, phrases: str = "evaluate", paired: bool = False
) -> list[Exchange | None]:
    """Return a copy of every row with one kind of change; `None` if a row cannot have it (one word has no other order).

    Args:
        kind (`str`): a name in `CORRUPTIONS`, `STYLES`, `FINE_CORRUPTIONS` or `FINE_STYLES`, or `"mismatched"`.
        rows (`Sequence[Exchange]`): the rows; they are not modified.
        seed (`int`): equal seeds give equal copies.
        phrases (`str`): `"train"` or `"evaluate"`: which set of phrases to draw from. With `"train"`, the point at
            which an answer is cut varies, too.
        paired (`bool`): rows 2i and 2i + 1 are a pair; `"mismatched"` then never gives a row the answer of its partner.

    Raises:
        ValueError: `kind` or `phrases` is unknown.
    """
    changes = {**CORRUPTIONS, **STYLES, **FINE_CORRUPTIONS, **FINE_STYLES}
    if kind != "mismatched" and kind not in changes:
        raise ValueError(f"kind={kind!r} is not known; choose one of {['mismatched', *changes]}.")
    if phrases not in REFUSALS:
        raise ValueError(f"phrases={phrases!r} is not known; choose one of {list(REFUSALS)}.")
    # A text seed is hashed by sha512, and so is equal in every process, unlike `hash()`.
    rng = random.Random(f"{kind}-{seed}")
    if kind == "mismatched":
        return mismatched(rows, rng, paired=paired)
    # All rows draw from one generator, also those whose copy is discarded.
    copies = [row._replace(response=changes[kind](row, rng, phrases)) for row in rows]
    return [copy if _is_changed(kind, copy, row) else None for copy, row in zip(copies, rows, strict=True)]


def _is_changed(kind: str, copy: Exchange, row: Exchange) -> bool:
    """Return True if a copy has other words than its row, and is empty only if `kind` is `"empty"`."""
    # Truncating a single word leaves nothing, and an empty answer is a corruption of its own.
    words = copy.response.split()
    return words != row.response.split() and (kind == "empty" or bool(words))


def mismatched(
    rows: Sequence[Exchange], rng: random.Random, candidates: int = 8, paired: bool = False
) -> list[Exchange | None]:
    """Return every row with the answer of another row of similar length and a different instruction, or `None`.

    Similar length, so that the length does not reveal the mismatch.

    Args:
        rows (`Sequence[Exchange]`): the rows; they are not modified.
        rng (`random.Random`): chooses among the candidates.
        candidates (`int`): number of rows, nearest in length, to choose from.
        paired (`bool`): rows 2i and 2i + 1 are a pair, and never get each other's answer, though their instructions may
            differ.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].response))
    copies: list[Exchange | None] = [None] * len(rows)
    for place, i in enumerate(order):
        # A window around the row, moved inwards at both ends of the order.
        low = max(0, min(place - candidates // 2, len(order) - candidates - 1))
        near = [j for j in order[low : low + candidates + 1] if rows[j].instruction != rows[i].instruction]
        near = [j for j in near if not (paired and j // 2 == i // 2)]
        # An empty answer is a corruption of its own, and an equal one is not a mismatch.
        others = [j for j in near if rows[j].response.split() not in ([], rows[i].response.split())]
        if others:
            copies[i] = rows[i]._replace(response=rows[rng.choice(others)].response)
    return copies


def draw_corruptions(rows: Sequence[Exchange], seed: int, weights: Mapping[str, float]) -> list[Exchange]:
    """Return one corrupted copy of each row, of a kind drawn by weight from those that the row can have.

    The phrases are those of training. With `"empty"` and `"refusal"` in `weights` every row has at least one copy.

    Args:
        rows (`Sequence[Exchange]`): the rows; they are not modified.
        seed (`int`): equal seeds give equal copies.
        weights (`Mapping[str, float]`): relative frequency of each kind of corruption.
    """
    rng = random.Random(f"draw-{seed}")
    copies = {kind: corrupt(kind, rows, seed, "train") for kind in weights}
    drawn = []
    for i in range(len(rows)):
        # Weights are those of the kinds that this row can have.
        possible = {kind: copy for kind in weights if (copy := copies[kind][i]) is not None}
        [kind] = rng.choices(list(possible), [weights[kind] for kind in possible])
        drawn.append(possible[kind])
    return drawn
