"""Measure how well `mark_duplicates` finds copies with small edits, on rows, words and templates that no rule was made with.

The rows are those of `FILE`, in Alpaca's form; name another file by the variable of the environment `EDITED_ROWS`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset

from car_datasets import TextEmbedder, mark_duplicates
from tests.benchmarks.table import Line

FILE = "../shared/data/dolly_1500.json"
SEED, ROWS, COPIES = 20, 800, 400
Row = dict[str, str]

SYNONYMS = (
    "begin:start usually:normally quickly:fast buy:purchase ask:inquire big:large kids:children often:regularly"
    " choose:pick famous:well-known near:close start:begin answer:reply gave:handed allows:lets various:several"
    " area:region main:principal popular:well-liked known:recognised called:termed located:situated including:among"
    " created:made built:constructed people:folks around:about several:some works:functions needs:requires"
)
SPELLINGS = (
    "color:colour center:centre favorite:favourite organize:organise theater:theatre gray:grey traveling:travelling"
)
SHORTER = ("it is:it's", "that is:that's", "they are:they're", "you are:you're", "there is:there's", "we are:we're")
ADVERBS = ["basically", "also", "perhaps", "certainly", "largely", "simply"]
LIGHT = {"the", "a", "an", "very", "just", "quite", "also", "really", "so", "then"}
BEFORE = ("Good question. ", "Here's an answer: ", "As far as I know, ", "Thanks for asking!\n\n", "Well, ")
AFTER = (" Hope that is useful.", " Feel free to ask for more.", " That sums it up.", "\n\nIs there anything else?")
ASKED = ("Quick question: ", "Hi there, ", "Answer this for me: ", "I was wondering: ", "Tell me, ")


def measure() -> Iterator[Line]:
    """Measure the F1 of planted pairs, and the rows of templates that are lost."""
    rows = json.loads(Path(os.environ.get("EDITED_ROWS", FILE)).read_text(encoding="utf-8"))
    rows = [{name: row.get(name) or "" for name in ("instruction", "input", "output")} for row in rows]
    rng = random.Random(SEED)
    rows = rng.sample(rows, min(ROWS, len(rows)))
    templated = list(templates())
    copied = sorted(rng.sample(range(len(rows)), min(COPIES, len(rows))))
    kinds = [rng.choice(list(EDITS)) for _ in copied]
    copies = [edited(rows[row], kind, rng) for row, kind in zip(copied, kinds, strict=True)]
    changed = [i for i, row in enumerate(copied) if copies[i] != rows[row]]
    copied, kinds, copies = ([values[i] for i in changed] for values in (copied, kinds, copies))

    dataset = Dataset.from_list([*rows, *copies, *templated]).map(TextEmbedder(), batched=True, with_rank=True)
    found = mark_duplicates(dataset)["duplicate_of"][:]
    # Rows that have a copy among the rows of the file themselves are not ours to judge.
    own = mark_duplicates(dataset.select(range(len(rows))))["duplicate_of"][:]
    known = {i for i, of in enumerate(own) if of is not None} | {of for of in own if of is not None}
    right = {(len(rows) + i, row) for i, row in enumerate(copied) if row not in known}
    seen = {(i, of) for i, of in enumerate(found[: len(rows) + len(copies)]) if of is not None and i >= len(rows)}
    seen |= {(i, of) for i, of in enumerate(found[: len(rows)]) if of is not None and i not in known}
    seen = {(max(pair), min(pair)) for pair in seen if not known & set(pair)}
    hits = len(right & seen)
    f1 = 2 * hits / (len(right) + len(seen))
    what = f"F1 of {len(right)} planted copies in {len(rows):,} rows"
    yield Line(what, f1, unit="", target=">= .95", met=f1 >= 0.95)
    yield Line("precision", hits / max(1, len(seen)), unit="")
    yield Line("recall", hits / len(right), unit="")
    missed = Counter(kinds[i - len(rows)] for i, _ in right - seen)
    for kind in EDITS:
        total = sum(kind == kinds[i - len(rows)] for i, _ in right)
        yield Line(f"recall, {kind}", 1 - missed[kind] / max(1, total), unit=f"of {total}")
    lost = 100 * sum(of is not None for of in found[-len(templated) :]) / len(templated)
    yield Line(f"of {len(templated)} rows of templates lost", lost, unit="%", target="<= 1 %", met=lost <= 1)


def edited(row: Row, kind: str, rng: random.Random) -> Row:
    """Return a copy of a row with one kind of edit."""
    return {**row, **EDITS[kind](row, rng)}


def _side(change: Callable[[str, random.Random], str]) -> Callable[[Row, random.Random], Row]:
    """Return an edit of the prompt, of the answer or of both by one to three changes, fewer in a short text."""

    def edit(row: Row, rng: random.Random) -> Row:
        found = dict(row)
        for side in rng.choice([("instruction",), ("output",), ("instruction", "output")]):
            for _ in range(min(rng.randint(1, 3), 1 + len(found[side].split()) // 12)):
                found[side] = change(found[side], rng)
        return found

    return edit


def _replaced(pairs: str) -> Callable[[str, random.Random], str]:
    known = dict(pair.split(":") for pair in pairs.split())

    def change(text: str, rng: random.Random) -> str:
        places = [m for m in re.finditer(r"\b[a-z]+\b", text) if m[0] in known]
        if not places:
            return text
        place = rng.choice(places)
        return text[: place.start()] + known[place[0]] + text[place.end() :]

    return change


def _shortened(text: str, rng: random.Random) -> str:
    for pair in rng.sample(SHORTER, len(SHORTER)):
        long, short = pair.split(":")
        if re.search(rf"\b{long}\b", text):
            return re.sub(rf"\b{long}\b", short, text, count=1)
    return text


def _added(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    place = rng.randrange(1, max(2, len(words)))
    return " ".join([*words[:place], rng.choice(ADVERBS), *words[place:]])


def _left_out(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if word in LIGHT and i]
    if not places:
        return text
    del words[rng.choice(places)]
    return " ".join(words)


def _mistyped(text: str, rng: random.Random) -> str:
    places = [m for m in re.finditer(r"(?<= )[a-z]{7,}\b", text)]
    if not places:
        return text
    at = rng.randrange((place := rng.choice(places)).start() + 1, place.end() - 2)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


EDITS: dict[str, Callable[[Row, random.Random], Row]] = {
    "other words": _side(_replaced(SYNONYMS)),
    "other spelling": _side(_replaced(SPELLINGS)),
    "contractions": _side(_shortened),
    "a word more": _side(_added),
    "a word less": _side(_left_out),
    "mistyped": _side(_mistyped),
    "a sentence before": lambda row, rng: {"output": rng.choice(BEFORE) + row["output"]},
    "a sentence after": lambda row, rng: {"output": row["output"].rstrip() + rng.choice(AFTER)},
    "another question": lambda row, rng: {"instruction": rng.choice(ASKED) + row["instruction"]},
    "case and marks": lambda row, _: {
        "instruction": row["instruction"].rstrip("?.") + " ?",
        "output": row["output"] + " ",
    },
}

_INSTRUMENTS = ["violin", "trumpet", "drum", "cello", "organ", "banjo", "guitar", "bassoon", "zither", "oboe"]
_METALS = {"iron": "Fe", "gold": "Au", "silver": "Ag", "tin": "Sn", "lead": "Pb", "zinc": "Zn", "copper": "Cu"}
_METALS |= {"nickel": "Ni", "titanium": "Ti", "mercury": "Hg"}
_JOBS = ["baker", "tailor", "nurse", "pilot", "farmer", "plumber", "teacher", "painter", "lawyer", "cook"]
_VERBS = {"sing": "sang", "write": "wrote", "go": "went", "eat": "ate", "take": "took", "drive": "drove"}
_VERBS |= {"swim": "swam", "bring": "brought", "fly": "flew", "hold": "held"}


def templates() -> Iterator[Row]:
    """Yield rows of one of seven templates, all of which are distinct."""
    for instrument in _INSTRUMENTS:
        yield _row(f"Is the {instrument} a string instrument or a percussion instrument?", f"It depends: {instrument}.")
        for job in _JOBS:
            letter = (
                f"Dear neighbour, I am a {job} and practise the {instrument} in the evening. Please tell me if it is"
            )
            letter += (
                f" too loud, and I will play the {instrument} at another time. Best wishes from the {job} upstairs."
            )
            yield _row(f"Write a note from a {job} who plays the {instrument} to a neighbour.", letter)
    for name, sign in _METALS.items():
        yield _row(f"What is the chemical symbol of {name}?", f"The chemical symbol of {name} is {sign}.")
    for base, past in _VERBS.items():
        yield _row(f"Give the simple past of the verb to {base}.", f"The simple past of to {base} is {past}.")
    for hours in range(2, 14):
        for speed in (30, 45, 80):
            yield _row(
                f"A train runs {hours} hours at {speed} km per hour. How far does it go?",
                f"It goes {hours * speed} km.",
            )
    for number in range(11, 61, 2):
        yield _row(f"Write the number {number} in binary.", f"{number} in binary is {number:b}.")
    for job in _JOBS:
        yield _row(f"Name one tool that a {job} uses.", f"One of the tools of a {job} is a good pair of hands.")


def _row(asked: str, said: str) -> Row:
    return {"instruction": asked, "input": "", "output": said}
