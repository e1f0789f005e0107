"""Make rows for the tests of duplicates: copies of given rows with small edits, and rows that share a template.

Words, lead-ins, sentences and templates of the two halves differ, so that rules found on one are tested on the other.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Row = dict[str, str]


class Half(NamedTuple):
    """What one half of the rows is made with."""

    synonyms: str
    fillers: str
    leads: tuple[str, ...]
    questions: tuple[str, ...]
    sentences: tuple[str, ...]


LEARN = Half(
    "describe:explain large:huge small:tiny important:crucial help:assist show:display use:employ good:great people:persons"
    " different:various give:provide improve:enhance reduce:lower main:primary often:frequently ways:methods list:name"
    " write:compose find:identify example:instance easy:simple following:below however:though need:require",
    "really quite simply actually generally usually",
    ("Sure! Here is what you asked for: ", "Certainly, ", "Of course! ", "Here you go:\n\n", "Great question! "),
    ("Please ", "Can you ", "I would like you to ", "Your task: "),
    (" I hope this helps!", " Let me know if you need more details.", " In short, it depends on the situation."),
)
TEST = Half(
    "explain:clarify big:sizeable little:slight vital:essential support:back display:present apply:utilise great:superb"
    " persons:individuals several:numerous provide:offer better:superior lower:cut chief:leading frequently:regularly"
    " method:approach name:mention compose:draft identify:spot sample:specimen hard:tough also:additionally keep:maintain"
    " make:produce create:design well:properly many:countless should:ought can:may",
    "truly clearly indeed typically mostly broadly",
    ("Absolutely, happy to help. ", "Okay, let me answer that for you.\n", "Below is my reply to your request:\n\n"),
    ("Could you please ", "Help me with this: ", "I need you to ", "Kindly "),
    (" Please ask again should anything remain unclear.", " That is the short version of a longer tale."),
)
_WORD = re.compile(r"[a-z]+")


def edited(row: Row, half: Half, rng: random.Random) -> Row:
    """Return a copy of a row with one to three words changed, a sentence added, or another lead-in."""
    prompt, answer = row["instruction"], row["output"]
    kind = rng.choice(["answer", "answer", "prompt", "prompt", "both", "sentence", "lead", "question"])
    if kind in ("answer", "both"):
        answer = _reworded(answer, half, half.fillers.split()[:3], rng)
    if kind in ("prompt", "both"):
        prompt = _reworded(prompt, half, half.fillers.split()[3:], rng)
    if kind == "sentence":
        answer = answer.rstrip() + rng.choice(half.sentences)
    if kind == "lead":
        answer = rng.choice(half.leads) + answer
    if kind == "question":
        prompt = rng.choice(half.questions) + prompt[:1].lower() + prompt[1:]
    return {**row, "instruction": prompt, "output": answer}


def _reworded(text: str, half: Half, fillers: list[str], rng: random.Random) -> str:
    """Change words, but none with a capital letter: synonyms, words that change little, and misspellings."""
    synonyms = dict(pair.split(":") for pair in half.synonyms.split())
    # A word in seven at most: in a short text, every word counts.
    for _ in range(min(rng.randint(1, 3), 1 + len(text.split()) // 7)):
        found = [
            m for m in _WORD.finditer(text) if (m.start() == 0 or text[m.start() - 1] == " ") and m.end() < len(text)
        ]
        known = [m for m in found if m[0] in synonyms]
        long = [m for m in found if len(m[0]) >= 6]
        if known and rng.random() < 0.6:
            place = rng.choice(known)
            text = text[: place.start()] + synonyms[place[0]] + text[place.end() :]
        elif long and rng.random() < 0.5:
            place = rng.choice(long)
            at = rng.randrange(place.start() + 1, place.end() - 1)
            text = text[:at] + text[at + 1 :]
        elif found:
            at = rng.choice(found).start()
            text = f"{text[:at]}{rng.choice(fillers)} {text[at:]}"
    return text


_COUNTRIES = (
    "France Paris Germany Berlin Italy Rome Spain Madrid Austria Vienna Poland Warsaw Norway Oslo Greece Athens"
)
_ANIMALS = (
    "dog chien cat chat horse cheval cow vache bird oiseau rabbit lapin sheep mouton pig cochon wolf loup bee abeille"
)
_COLOURS = ["red", "blue", "green", "yellow", "purple", "orange", "black", "white", "brown", "silver"]
_FRUITS = ["apple", "pear", "banana", "cherry", "peach", "plum", "mango", "lemon", "grape", "fig"]
_NAMES = ["Anna", "Bernard", "Clara", "David", "Emma", "Frank", "Greta", "Hugo", "Irene", "Jonas"]


def templated(test: bool) -> list[Row]:
    """Return rows of one of the two sets of templates, all of which are distinct."""
    made = _for_testing() if test else _for_learning()
    return [{"instruction": asked, "input": given, "output": said} for asked, given, said in made]


def _twos(words: str) -> list[tuple[str, str]]:
    parts = words.split()
    return list(zip(parts[::2], parts[1::2], strict=True))


def _for_learning() -> Iterator[tuple[str, str, str]]:
    for a in range(3, 11):
        for b in range(4, 9):
            yield f"What is {a} + {b}?", "", f"{a} + {b} = {a + b}."
    for country, capital in _twos(_COUNTRIES):
        yield f"What is the capital of {country}?", "", f"The capital of {country} is {capital}."
    for animal, french in _twos(_ANIMALS):
        yield f'Translate the word "{animal}" to French.', "", french
        yield (
            "Translate the sentence to French.",
            f"I have a {animal} in my garden.",
            f"J'ai un {french} dans mon jardin.",
        )
        for place in ("house", "river", "forest"):
            rule = "Read the premise and the hypothesis, decide whether the one follows from the other, and answer yes or no."
            yield rule, f"Premise: The {animal} sleeps near the {place}.\nHypothesis: An animal sleeps.", "yes"
    for colour in _COLOURS:
        for fruit in _FRUITS:
            said = f"Bring warmth to your home with our {colour} {fruit} candle. Made from natural wax, it fills every room"
            said += f" with a soft {fruit} scent and burns for forty hours. The {colour} glass makes it a lovely gift."
            yield f"Write a short product description for a {colour} {fruit} candle.", "", said
    for word in ("good", "superb", "funny", "moving", "brilliant", "charming"):
        for thing in ("film", "book", "play", "song"):
            yield "Classify the sentiment of the review.", f"The {thing} was {word}.", "Positive"


def _for_testing() -> Iterator[tuple[str, str, str]]:
    for a in range(12, 28, 2):
        for b in range(3, 9):
            yield f"Calculate {a} times {b}.", "", f"{a} times {b} is {a * b}."
    for country, capital in _twos(_COUNTRIES):
        yield f"In which country is the city of {capital}?", "", f"{capital} is a city in {country}."
        said = f"Start the day with a walk through the old town of {capital}, where you can see the market and the main"
        said += (
            f" square. Have lunch near the river, then visit the museum. End the evening with a view over {capital}."
        )
        yield f"Plan a trip of one day to {capital} for a family.", "", said
    for animal, _ in _twos(_ANIMALS):
        legs = "two" if animal == "bird" else "six" if animal == "bee" else "four"
        yield f"How many legs does a {animal} have?", "", legs
        yield f"Write one sentence about a {animal}.", "", f"The {animal} walked slowly across the wide green field."
    for colour in _COLOURS:
        yield f'Does the word "{colour}" contain the letter e?', "", "Yes" if "e" in colour else "No"
        for fruit in _FRUITS:
            said = f"Dear customer,\n\nwe are sorry that you received a {colour} shirt with a {fruit} print. We will send you"
            said += f" the right one at once, at no cost. Please keep the {colour} shirt as a gift.\n\nKind regards"
            yield f"Write to a customer who received a {colour} shirt with a {fruit} print by mistake.", "", said
    for name in _NAMES:
        yield f"Reverse the letters of the name {name}.", "", name[::-1].capitalize()
    for month in range(1, 13):
        for day in (3, 17, 25):
            yield f"Convert the date {day}.{month}.2021 to the ISO format.", "", f"2021-{month:02d}-{day:02d}"
    for sport in ["tennis", "chess", "football", "golf", "rugby", "hockey"]:
        yield f"Should a beginner play {sport} every day?", "", "No"
        yield f"Should a beginner not play {sport} every day?", "", "Yes"


def word_vectors(rows: Sequence[Row], width: int = 384) -> npt.NDArray[np.float32]:
    """Return an embedding of each row without a model: the sum of one random direction per word."""
    found = np.zeros((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        for word in re.findall(r"\w+", " ".join(row.values()).lower()):
            found[i] += np.random.default_rng(zlib.crc32(word.encode())).standard_normal(width, dtype=np.float32)
    return found
