"""Tell what a proof found: `proof.md`, a plot, a section of `report.html`, and the numbers of the receipt.

Does: put the comparisons of `proof.json` into sentences, tables and one figure; write all of it into the folder.
Does not: compare arms, or train.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from car_datasets.proving.arms import BALANCED, BOTTOM, LONGEST, MATCHED, SELECTION
from car_datasets.proving.statistics import ALL, BASELINE, CANNOT_TELL, CONTROL, NATS, NO_DIFFERENCE, SHARE, short
from car_datasets.receipt import Receipt
from car_datasets.reporting.page import PAGE_FILE, page_environment, with_proof
from car_datasets.reporting.plots import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    WIDTH,
    as_png,
    can_draw,
    styled,
)
from car_datasets.results import PLOTS_FOLDER, PROOF_FILE, PROOF_PLOT, PROOF_SUMMARY, update_receipt
from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import without_nan

FORMAT = 1  # version of `proof.json`
TOKENS, ROWS = "tokens", "rows"  # the two tables: arms of equal answer tokens, and of equal rows
DOMAINS_DRAWN = 8  # the largest domains of an evaluation set
ALT = "Difference of every arm to random rows, with 95 % intervals, over all evaluation rows and by domain."
NOT_BY_EMBEDDING = (
    "The embedder of the pool is not at hand, so rows were compared with the evaluation sets by their words alone: some of "
    "the same meaning may have been trained on."
)
# What each arm is, for readers who see its name alone.
MEANINGS = {
    SELECTION: "the selected rows",
    BASELINE: "random rows of the pool, drawn anew for each seed",
    BALANCED: "random rows, an equal share of each group",
    MATCHED: "random rows with answers as long as the selection's",
    LONGEST: "the rows with the longest answers",
    BOTTOM: "the rows with the worst scores",
    CONTROL: "the selected rows with the words of each answer shuffled, which must lose",
}


class Table(TypedDict):
    """One budget: arms of equal tokens, or of equal rows.

    Args:
        budget (`int`): answer tokens, or rows, of every arm.
        arms (`dict`): arm to `rows` and `tokens`, the means over seeds of what it was really trained on.
        probes (`dict`): evaluation set to what `Comparison.to_dict` returned for it.
        instructions (`dict`, *optional*): the same for the share of verifiable instructions that were kept.
    """

    budget: int
    arms: dict[str, dict[str, float]]
    probes: dict[str, dict[str, Any]]
    instructions: dict[str, Any] | None


class Proof(TypedDict):
    """The content of `proof.json`.

    Args:
        format (`int`): version of this record.
        model (`dict`): `name`, `revision` and `sha256` of the model, and `template`, whose chat template was used.
        training (`dict`): the schedule that all arms share, and what is trained, as plain values.
        seeds (`list[int]`): of every arm.
        pool (`dict`): `rows` and `selected` that can be trained on; `grouped_by`; `left_out`, reason to rows; and
            `held_out`, the counts of `HeldOut`; and `by_embedding`, whether embeddings told near rows as well.
        probes (`dict`): evaluation set to `rows`, `tokens` of its answers, `left_out`, `domains_by`, and `domains`,
            each with its rows.
        before (`dict[str, float]`): evaluation set to nats per answer token before any training.
        tables (`dict[str, Table]`): `"tokens"`, and `"rows"` if it was run.
        runs (`list[dict]`): for every run `table`, `arm`, `seed`, `rows`, `tokens`, `seconds`, and `order`, the sha256
            of the order of its rows.
        seconds (`dict`): `selecting`, what scoring the pool would take on this machine, None if its scorer is not at
            hand; `training` and `evaluating`.
        versions (`dict[str, str]`): of the packages that the numbers depend on.
        call (`str`): a digest of what was asked for, and of what it was asked about.
    """

    format: int
    model: dict[str, Any]
    training: dict[str, Any]
    seeds: list[int]
    pool: dict[str, Any]
    probes: dict[str, dict[str, Any]]
    before: dict[str, float]
    tables: dict[str, Table]
    runs: list[dict[str, Any]]
    seconds: dict[str, float | None]
    versions: dict[str, str]
    call: str


class Lines(NamedTuple):
    """A table as text: a title, and lines of cells of which the first has the names of the columns."""

    title: str
    lines: list[list[str]]


def kept_proof(folder: Path, call: str) -> Proof | None:
    """Return the proof that a folder holds, if the same call has written it and its files are as it wrote them.

    Args:
        folder (`Path`): of a result.
        call (`str`): the digest of the call.
    """
    receipt = Receipt.read(folder)
    names = (PROOF_FILE, PROOF_SUMMARY, f"{PLOTS_FOLDER}/{PROOF_PLOT}")
    for name in names if can_draw() else names[:2]:
        if not (folder / name).is_file() or receipt.files.get(name) != file_digest(folder / name):
            return None
    found: Proof = json.loads((folder / PROOF_FILE).read_bytes())
    return found if receipt.proof and found.get("call") == call else None


def write_proof(folder: Path, proof: Proof) -> None:
    """Write a proof into the folder of a result: JSON, Markdown, plot, a section of the page, and the receipt.

    Args:
        folder (`Path`): a folder that `car-datasets curate` wrote.
        proof ([`Proof`]): what was found.

    Raises:
        ValueError: the folder has no valid receipt.
    """
    plot = draw_proof(proof) if can_draw() else None
    files = {
        PROOF_FILE: (json.dumps(without_nan(proof), indent=2, ensure_ascii=False) + "\n").encode(),
        PROOF_SUMMARY: to_markdown(proof, plot is not None).encode(),
    }
    if plot is not None:
        files[f"{PLOTS_FOLDER}/{PROOF_PLOT}"] = plot
    page = folder / PAGE_FILE
    if page.is_file():  # it may have been deleted
        files[PAGE_FILE] = with_proof(page.read_text(encoding="utf-8"), to_html(proof, plot)).encode()
    update_receipt(folder, summary_of(proof), files)


def summary_of(proof: Proof) -> dict[str, Any]:
    """Return the numbers of a proof for the receipt: what was trained on what, and every difference over all rows."""
    return {
        "model": proof["model"].get("name"),
        "seeds": len(proof["seeds"]),
        "sentences": sentences(proof),
        "tables": {
            name: {
                "budget": table["budget"],
                **{
                    probe: {
                        arm: {**each[ALL], "verdict": found["verdicts"][arm]}
                        for arm, each in found["differences"].items()
                    }
                    for probe, found in _comparisons(table).items()
                },
            }
            for name, table in proof["tables"].items()
        },
    }


def _comparisons(table: Table) -> dict[str, dict[str, Any]]:
    """Return the comparisons of a table by what was measured."""
    kept = table.get("instructions")
    return {**table["probes"], **({"instructions kept": kept} if kept else {})}


# sentences -------------------------------------------------------------------------------------------------------------


def sentences(proof: Proof) -> list[str]:
    """Return what a proof says, in sentences: verdicts, what the run could have shown, the control and the costs."""
    told = []
    for name, table in proof["tables"].items():
        budget = f"{table['budget']:,} {'answer tokens' if name == TOKENS else 'rows'} per arm"
        for probe, found in _comparisons(table).items():
            told.append(_verdict(probe, found, budget))
    for probe, found in proof["tables"][next(iter(proof["tables"]))]["probes"].items():
        told.append(_power(probe, found["power"], found["unit"]))
    told.append(_costs(proof))
    held = proof["pool"].get("held_out", {})
    if out := sum(held.get(name, 0) for name in ("equal", "near", "asked")):
        told.append(
            f"{out:,} rows of the pool, {held.get('selected', 0):,} of them selected, were not trained on, because an "
            f"evaluation set has them ({held['equal']:,} equal, {held['near']:,} nearly, {held['asked']:,} with another "
            "answer)."
        )
    if not proof["pool"].get("by_embedding", True):
        told.append(NOT_BY_EMBEDDING)
    return told


def _verdict(probe: str, found: Mapping[str, Any], budget: str) -> str:
    where = f"On {probe}, at {budget}"
    if not found["can_tell"]:
        return f"{where}, {CANNOT_TELL}. {found['advice']}"
    verdicts = found["verdicts"]
    selection = verdicts.get(SELECTION, NO_DIFFERENCE)
    if selection == NO_DIFFERENCE:
        said = [f"{where}, no difference between the selection and random rows was shown."]
    else:
        said = [f"{where}, the selection is {selection}."]
    said += [f"{arm}: {text}." for arm, text in verdicts.items() if arm not in MEANINGS]
    if CONTROL in verdicts:
        said.append(f"The control is {verdicts[CONTROL]}, as it must be.")
    return " ".join(said)


def _power(probe: str, power: Mapping[str, Any], unit: str) -> str:
    smallest = f"{100 * power['smallest']:.1f} points" if unit == SHARE else f"{short(power['smallest'])} nats"
    ways = [f"{power[name]} times the {words}" for name, words in _WAYS if power.get(name)]
    more = f"; {' or '.join(ways)} would halve it" if ways else ""
    return f"The smallest difference that this run could have shown on {probe} is {smallest}{more}."


_WAYS = (("seeds", "seeds"), ("tokens", "tokens per arm"), ("rows", "evaluation rows"))


def _costs(proof: Proof) -> str:
    seconds = proof["seconds"]
    training, evaluating = seconds.get("training") or 0.0, seconds.get("evaluating") or 0.0
    selecting = seconds.get("selecting")
    cost = (
        "What selecting cost is not known, as the scorer is not at hand"
        if selecting is None
        else f"Scoring the pool, which is most of the cost of selecting, takes about {_duration(selecting)} on this machine"
    )
    return (
        f"{cost}; training all {len(proof['runs'])} runs of {proof['model'].get('name')} took "
        f"{_duration(training)}, evaluating them {_duration(evaluating)}."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# tables ----------------------------------------------------------------------------------------------------------------


def tables_of(proof: Proof) -> list[Lines]:
    """Return all tables of a proof: per budget and evaluation set, one over all rows and one by domain."""
    found = []
    for name, table in proof["tables"].items():
        budget = f"equal {'answer tokens' if name == TOKENS else 'rows'} ({table['budget']:,})"
        for probe, compared in _comparisons(table).items():
            found.append(Lines(f"{probe}, {budget}", _overall(compared, table)))
            domains = list(next(iter(compared["differences"].values())))
            if len(domains) > 2:
                found.append(Lines(f"{probe}, {budget}, difference to random by domain", _by_domain(compared, domains)))
    return found


def _overall(compared: Mapping[str, Any], table: Table) -> list[list[str]]:
    measure = "nats per answer token" if compared["unit"] == NATS else "share kept"
    lines = [["arm", "rows", "tokens", measure, "better than random by", "verdict"]]
    for arm, mean in compared["means"].items():
        trained = table["arms"].get(arm, {})
        difference = compared["differences"].get(arm, {}).get(ALL)
        lines.append(
            [
                arm,
                f"{trained.get('rows', 0):,.0f}",
                f"{trained.get('tokens', 0):,.0f}",
                f"{mean:.3f}",
                "" if difference is None else _cell(difference, compared["unit"]),
                compared["verdicts"].get(arm, ""),
            ]
        )
    return lines


def _by_domain(compared: Mapping[str, Any], domains: Sequence[str]) -> list[list[str]]:
    arms = list(compared["differences"])
    lines = [["domain", "rows", *arms]]
    for domain in domains:
        each = [compared["differences"][arm][domain] for arm in arms]
        lines.append([domain, f"{each[0]['rows']:,}", *(_cell(found, compared["unit"]) for found in each)])
    return lines


def _cell(difference: Mapping[str, Any], unit: str) -> str:
    def text(value: float) -> str:
        if not np.isfinite(value):
            return "?"
        return f"{100 * value:.1f}" if unit == SHARE else short(value)

    sign = "+" if difference["value"] >= 0 else ""
    return f"{sign}{text(difference['value'])} ({text(difference['low'])} to {text(difference['high'])})"


# files -----------------------------------------------------------------------------------------------------------------


def to_markdown(proof: Proof, has_plot: bool = True) -> str:
    """Return a proof as Markdown.

    Args:
        proof ([`Proof`]): what was found.
        has_plot (`bool`): show the plot, which is in the folder of plots.
    """
    parts = ["# Does the selection train a better model than chance?", _listed(sentences(proof))]
    if has_plot:
        parts.append(f"![{ALT}]({PLOTS_FOLDER}/{PROOF_PLOT})")
    for title, lines in tables_of(proof):
        rows = [f"| {' | '.join(map(_escaped, line))} |" for line in lines]
        parts += [f"## {_escaped(title)}", "\n".join([rows[0], "|---" * len(lines[0]) + "|", *rows[1:]])]
    arms = {arm for table in proof["tables"].values() for arm in table["arms"]}
    parts += ["## Arms", _listed(f"{arm}: {MEANINGS[arm]}." for arm in MEANINGS if arm in arms)]
    parts += ["## How it was measured", _method(proof, arms)]
    return "\n\n".join(parts) + "\n"


def _listed(lines: Any) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Return text that a name of a user's arm, file or domain cannot turn into other Markdown."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _method(proof: Proof, arms: Collection[str]) -> str:
    training, pool = proof["training"], proof["pool"]
    parts = {"all": "All weights", "lora": "Low-rank adapters (LoRA)"}.get(str(training.get("trained")))
    parts = parts or f"The last {training.get('trained')} layers"
    tried = ", ".join(f"{rate} ({loss:.3f})" for rate, loss in training.get("learning_rates_tried", {}).items())
    chosen = f"the best of those tried, by their loss on {pool.get('validation', 0)} rows of no arm: {tried}"
    probes = "; ".join(
        f"{name} ({each['rows']:,} rows, {each['tokens']:,} answer tokens)" for name, each in proof["probes"].items()
    )
    before = "; ".join(f"{name} {value:.3f}" for name, value in proof["before"].items())
    left_out = "; ".join(f"{reason}: {count:,}" for reason, count in pool.get("left_out", {}).items() if count)
    told = [
        f"{parts} of {proof['model'].get('name')} were trained for each arm and each of {len(proof['seeds'])} seeds, from "
        "the same start and by the same schedule.",
        f"The learning rate is {training.get('learning_rate', 0):g}{', ' + chosen if tried else ''}.",
        f"Arms were drawn from {pool['rows']:,} rows, of which {pool['selected']:,} are selected. A chat of several answers "
        "is trained on its last one.",
        f"Rows that could not be trained on: {left_out}." if left_out else "",
        f"The balanced arm has an equal share of each {pool.get('grouped_by')}." if BALANCED in arms else "",
        f"The evaluation sets are {probes}. Before any training, the model has these nats per answer token: {before}.",
        "A nat is the unit of the loss: .1 nats less make each token of the answer 10 % more likely. Differences are paired "
        "by seed and evaluation row, and their intervals hold 95 % and allow for both.",
        "proof.json has all settings, and every run with its rows, tokens, seconds and the order of its rows.",
    ]
    return _listed(line for line in told if line)


def to_html(proof: Proof, plot: bytes | None) -> str:
    """Return the section of `report.html`.

    Args:
        proof ([`Proof`]): what was found.
        plot (`bytes`, *optional*): the PNG file.
    """
    template = page_environment().get_template("proof.html.jinja")
    picture = None if plot is None else base64.b64encode(plot).decode()
    return template.render(sentences=sentences(proof), tables=tables_of(proof), plot=picture, alt=ALT)


def draw_proof(proof: Proof) -> bytes:
    """Draw the difference of every arm to random, over all rows and by domain, one panel per evaluation set.

    The first table of the proof is drawn. The control is far below the others, and is left to the text.

    Args:
        proof ([`Proof`]): what was found.

    Returns:
        `bytes`: a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with styled():
        from matplotlib.figure import Figure

        table = proof["tables"][next(iter(proof["tables"]))]
        panels = {probe: _drawn_lines(found) for probe, found in table["probes"].items()}
        heights = [len(lines) for lines in panels.values()]
        figure = Figure(figsize=(WIDTH, 1.1 * len(panels) + 0.17 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for place, (probe, lines) in zip(axes, panels.items(), strict=True):
            _draw_panel(place, lines)
            place.set_title(f"Better than random rows by, on {probe}")
        axes[-1].set_xlabel("nats per answer token, with 95 % intervals; right of the line is better than random")
        return as_png(figure)


class _Line(NamedTuple):
    """An interval of the plot, or with a difference of `None` the space between two arms."""

    arm: str
    domain: str
    difference: Mapping[str, Any] | None


def _drawn_lines(found: Mapping[str, Any]) -> list[_Line]:
    lines: list[_Line] = []
    for arm, each in found["differences"].items():
        if arm == CONTROL and len(found["differences"]) > 1:
            continue
        domains = [domain for domain in each if domain != ALL and np.isfinite(each[domain]["high"])]
        largest = sorted(domains, key=lambda domain: -each[domain]["rows"])[:DOMAINS_DRAWN]
        shown = [d for d in domains if d in largest] if len(domains) > 1 else []
        lines += [_Line(arm, domain, each[domain]) for domain in (ALL, *shown)] + [_Line("", "", None)]
    return lines[:-1]


def _draw_panel(axes: Any, lines: Sequence[_Line]) -> None:
    colours = dict(zip(dict.fromkeys(line.domain for line in lines if line.domain), _COLOURS * 9, strict=False))
    for place, line in enumerate(lines):
        if line.difference is None:
            continue
        value, low, high = (line.difference[name] for name in ("value", "low", "high"))
        entire = line.domain == ALL
        axes.plot([low, high], [place, place], color=colours[line.domain], linewidth=2.6 if entire else 1.2)
        axes.plot([value], [place], "s" if entire else "o", color=colours[line.domain], markersize=7 if entire else 4)
    axes.axvline(0, color=GREY, linewidth=1, zorder=0)
    # The arm's name stands for the line over all rows.
    axes.set_yticks(range(len(lines)), [line.arm if line.domain == ALL else line.domain for line in lines], fontsize=8)
    for label, line in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if line.domain == ALL else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.4, -0.6)


_COLOURS = (DARK, BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
