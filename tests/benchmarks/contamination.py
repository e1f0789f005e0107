"""Measure the search for evaluation items: rows per second, items found, and hard negatives that are flagged.

The texts are made here: questions over invented facts, and families of rows that resemble an item without copying it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import numpy as np

from car_datasets.selection.marks.contamination import Decontaminator
from tests.benchmarks.table import Line

ROWS, ITEMS, WORDS, RUNS = 10_000, 20_000, 150, 3
FASTEST, RECALL, FALSE, FAMILY = 10_000, 0.95, 1, 40  # rows per second; shares; flags, and rows of a family

PLACES = "harbour valley library quarry orchard mill lighthouse monastery canal market bridge observatory"
PEOPLE = "Ottilie Bram Sunniva Casimir Leocadia Anselm Philippa Tancred Marguerite Ignatius Rosalind Evander"
THINGS = "barrels lanterns ledgers kettles tapestries sextants violins saddles bricks almanacs anchors candles"
CAUSES = "a flood, a late frost, a strike, an auction, a royal visit, a landslide, a drought, an eclipse"
WHY = (
    "Describe how {p} of the {a} dealt with {c} after most of the {t} had been promised to the {b}, and explain which "
    "of the two places gained more from the bargain.",
    "According to the chronicle of the {a}, {p} refused to sell the {t} because of {c}. What does this refusal tell us "
    "about the relations between the {a} and the {b} at that time?",
    "After {c} the keeper of the {a}, a certain {p}, moved all {t} to the {b} by night. Who would have objected to the "
    "move, and on what grounds?",
    "List three reasons why {p} might have preferred the {b} to the {a} as a store for {t} in the year of {c}.",
)
SUMS = (
    "{p} stacks {t} in {x} rows of {y} each in the {a}, and then carries {z} of them across to the {b}. How many "
    "{t} stay behind?",
    "The {a} opens for {x} hours a day and admits {y} visitors in each hour, of whom {z} in every hundred pay nothing. "
    "How many paying visitors does the {a} see in a day?",
    "A tank in the {a} holds {x} litres, loses {y} litres a day and is topped up with {z} litres at the end of each "
    "week. After how many days is it empty for the first time?",
    "Find the largest number below {x} that leaves the remainder {y} when it is divided by {z}.",
    "What is the probability of drawing two {t} in a row from a crate of {x} {t} and {y} kettles without putting any "
    "back?",
)
LINES = (
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: rough winds do shake the darling "
    "buds of May",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I thought I "
    "would sail about a little",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife",
    "Two roads diverged in a yellow wood, and sorry I could not travel both and be one traveler, long I stood",
    "The quality of mercy is not strained; it droppeth as the gentle rain from heaven upon the place beneath",
)
ABOUT_LINES = (
    'Name the author and the work: "{q}"',
    "{q}. In which form of verse or prose is this written, and how can one tell?",
    'A critic calls the opening "{q}" an invitation to distrust its speaker. Do you agree?',
    "Which of these was published first: the text beginning {q}, or Gulliver's Travels?",
)
WITH_LINES = (
    'Our reading group met on Tuesday. Somebody had written "{q}" on the blackboard, and nobody would wipe it off.',
    "{q}. Count the vowels in this sentence.",
    'Turn the famous words "{q}" into a limerick about a cat.',
)
SERIES = (
    r"\ln(1+x) = x - \frac{x^2}{2} + \frac{x^3}{3} - \frac{x^4}{4} + \cdots",
    r"\cos x = \sum_{k=0}^{\infty} \frac{(-1)^k x^{2k}}{(2k)!}",
    r"1^2 + 2^2 + 3^2 + \cdots + n^2 = \frac{n(n+1)(2n+1)}{6}",
    "1 + r + r^2 + r^3 + ... + r^n = (1 - r^(n+1)) / (1 - r)",
    r"\tan(A + B) = \frac{\tan A + \tan B}{1 - \tan A \tan B}",
)
ABOUT_SERIES = (
    "For which values does ${q}$ hold, and what happens at the ends of the interval?",
    "Use {q} to bound the error of the first three terms.",
    "Starting from ${q}$, find a closed form for the derivative at the origin.",
)
WITH_SERIES = (
    "The lecture proved ${q}$ on its first page and never used it again.",
    "Typeset {q} as a displayed equation.",
    "Write a short program which prints both sides of {q} for random arguments.",
)


def filled(templates: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Return so many texts, from the templates in turn."""
    texts = []
    for i in range(count):
        a, b = rng.sample(PLACES.split(), 2)
        x, y, z = (rng.randint(3, 400) for _ in range(3))
        names = {
            "a": a,
            "b": b,
            "p": rng.choice(PEOPLE.split()),
            "t": rng.choice(THINGS.split()),
            "c": rng.choice(CAUSES.split(", ")),
        }
        texts.append(templates[i % len(templates)].format(**names, x=x, y=y, z=z))
    return texts


def families(rng: random.Random) -> dict[str, tuple[list[str], list[str]]]:
    """Return items, and rows that resemble them without copying one, by family."""
    return {
        "other numbers": (filled(SUMS, FAMILY, rng), filled(SUMS, FAMILY, rng)),
        "quotations": (
            [each.replace("{q}", q) for each in ABOUT_LINES for q in LINES],
            [WITH_LINES[i % 3].replace("{q}", LINES[i % 5]) for i in range(FAMILY)],
        ),
        "formulas": (
            [each.replace("{q}", q) for each in ABOUT_SERIES for q in SERIES],
            [WITH_SERIES[i % 3].replace("{q}", SERIES[i % 5]) for i in range(FAMILY)],
        ),
    }


def prose(words: int, rng: random.Random) -> str:
    """Return filler that has the words of the items, in no order that they have."""
    pool = " ".join([*WHY, *SUMS]).replace("{", "").replace("}", "").split()
    return " ".join(rng.choices(pool, k=words))


def edited(text: str, rng: random.Random) -> str:
    """Return a text with one word replaced, deleted or inserted."""
    words = text.split()
    at, other = rng.randrange(len(words)), rng.choice(["copper", "slowly", "which", "under", "brave"])
    kind = rng.randrange(3)
    words[at : at + (kind != 2)] = [] if kind == 1 else [other]
    return " ".join(words)


def buried(text: str, rng: random.Random) -> str:
    """Return a text in ten times its length of filler."""
    words = 10 * len(text.split())
    before = rng.randrange(words + 1)
    return f"{prose(before, rng)} {text} {prose(words - before, rng)}"


COPIES: dict[str, Callable[[str, random.Random], str]] = {
    "verbatim": lambda text, rng: text,
    "with one word edited": edited,
    "in ten times their length of filler": buried,
    "edited, in filler": lambda text, rng: buried(edited(text, rng), rng),
}


def batch_of(texts: list[str]) -> dict[str, list[str]]:
    """Return rows that have the texts in the prompt and in the answer by turns."""
    return {
        "instruction": [text if i % 2 else "Reply to this message." for i, text in enumerate(texts)],
        "output": ["I am not sure." if i % 2 else text for i, text in enumerate(texts)],
    }


def measure() -> Iterator[Line]:
    """Measure recall, false flags and speed."""
    rng = random.Random(2_026)
    items = filled((*WHY, *SUMS), 400, rng)
    stage = Decontaminator([items])
    for kind, copy in COPIES.items():
        found = stage(batch_of([copy(item, rng) for item in items]))["contaminated_by"]
        share = np.mean([by is not None for by in found])
        yield Line(
            f"items found {kind}, of {len(items)}", float(share), unit="", target=f">= {RECALL}", met=share >= RECALL
        )
    for name, (known, rows) in families(rng).items():
        flags = sum(by is not None for by in Decontaminator([known])(batch_of(rows))["contaminated_by"])
        yield Line(f"{name}: rows flagged, of {len(rows)}", flags, unit="", target=f"<= {FALSE}", met=flags <= FALSE)
    generator = np.random.default_rng(0)
    vocabulary = np.array(
        ["".join("bdfgklmnprstvz"[int(c)] + "aeiou"[int(c) % 5] for c in str(i)) for i in range(50_000)]
    )
    frequency = 1 / np.arange(10, len(vocabulary) + 10)
    draws = generator.choice(len(vocabulary), (ROWS + ITEMS) * WORDS, p=frequency / frequency.sum())
    texts = [" ".join(vocabulary[part]) for part in draws.reshape(-1, WORDS)]
    start = time.process_time()
    held = Decontaminator([[" ".join(text.split()[: rng.randint(12, 100)]) for text in texts[ROWS:]]])
    yield Line(f"{ITEMS:,} items read and indexed", time.process_time() - start)
    scored = {"instruction": [text[:200] for text in texts[:ROWS]], "output": [text[200:] for text in texts[:ROWS]]}
    seconds = []
    for _ in range(RUNS):
        start = time.process_time()
        held(scored)
        seconds.append(time.process_time() - start)
    speed = ROWS / min(seconds)
    what = f"rows of {WORDS} words against {ITEMS:,} items, one core"
    yield Line(what, speed, unit="rows/s", target=f">= {FASTEST:,}", met=speed >= FASTEST)
