"""Compare selections of real rows by fine-tuning: `python3 -m tests.benchmarks.prove_table`.

Two machines share the work. `--prepare FOLDER` scores and clusters the pool, draws all arms, and writes them as token
ids into one small file, `prepared.npz`; it needs the project's data folder and no GPU. `--prepared FILE --json FILE
--minutes M` trains and measures them, seed by seed, as many seeds as fit; it needs the model, and no data folder.
`--scores FILE` of the first adds arms: a JSON object of names, each with one number per row of the pool (NaN or null
for a row without one). The pool is alpaca_9k.json, then dolly_1500.json, in the order of the files.

Two arms say whether the experiment itself is right: the control must lose in every seed, and `shuffled`, CaR's rule on
shuffled scores, which are random rows, must show no difference. On two cores, some 40 minutes with nothing else running:

    python -m tests.benchmarks.prove_table --prepare FOLDER --tokens 12000 --seeds 3
    python -m tests.benchmarks.prove_table --prepared FOLDER/prepared.npz --arms random,CaR,control,shuffled \
        --trained 4 --epochs 1 --batch-tokens 1024 --updates 32 --rates 3e-4,1e-3 --minutes 90 --json FILE
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from car_datasets.proving.arms import ARMS, SELECTION, Lesson, Pool, available, draw_arms, hold_out
from car_datasets.proving.base_model import load_base_model
from car_datasets.proving.constraints import is_satisfied, read_instructions
from car_datasets.proving.experiment import Experiment, Outcome, Run, carry_out
from car_datasets.proving.probes import Probe, read_probe
from car_datasets.proving.statistics import BASELINE, SHARE, compare
from car_datasets.proving.token_rows import TokenRow, tokenise
from car_datasets.proving.trainer import Schedule
from car_datasets.proving.training import Tuner

SHARED = Path(__file__).parents[3] / "shared" / "data"
FILES = ("alpaca_9k.json", "dolly_1500.json")
LIMIT = 1_024  # tokens of a row
ROWS = 1_000  # of a selection before it is cut to the budget
EXPERTS, HUMAN = 400, 200  # evaluation rows
SOUND, WORTH = 8, 6  # of a human-written row that is evaluated on
VALIDATION = 128
LEARNING_RATES = (5e-5, 1.5e-4, 5e-4)


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def example(instruction: str, context: str, answer: str) -> dict[str, Any]:
    prompt = f"{instruction}\n{context}" if context else instruction
    return {"prompt": message("user", prompt), "completion": message("assistant", answer)}


def read_rows(data: Path) -> list[dict[str, str]]:
    """Return the rows of the pool in order, each with its source."""
    found = []
    for name in FILES:
        rows = json.loads((data / name).read_text(encoding="utf-8"))
        source = "alpaca" if name.startswith("alpaca") else "dolly"
        found += [
            {"instruction": row["instruction"], "input": row["input"] or "", "output": row["output"], "source": source}
            for row in rows
        ]
    return found


def experts(data: Path) -> Probe:
    """Return revised answers of the file that no scorer was trained on, in random order."""
    with (data / "expert_rank_valid.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))[:EXPERTS]
    examples = []
    for place in order:
        asked, _, context = rows[place]["src"].removeprefix("Instruction: ").partition(" Input: ")
        examples.append(example(asked.strip(), context.strip(), rows[place]["pos"].removeprefix("Response: ").strip()))
    examples = [each for each in examples if each["completion"][0]["content"] and each["prompt"][0]["content"]]
    return Probe("experts", Dataset.from_list(examples), ["experts"] * len(examples), "none")


def human(data: Path, rows: Sequence[dict[str, str]]) -> tuple[Probe, list[int]]:
    """Return human-written rows that were rated sound and worth learning, and their places in the pool."""
    first = sum(row["source"] == "alpaca" for row in rows)
    with (data / "ratings_train.csv").open(encoding="utf-8", newline="") as file:
        rated = [row for row in csv.DictReader(file) if row["file"] == "dolly_1500" and row["worth"]]
    good = [int(r["row"]) for r in rated if float(r["soundness"]) >= SOUND and float(r["worth"]) >= WORTH]
    chosen = sorted(np.random.default_rng(0).permutation(good)[:HUMAN].tolist())
    places = [first + row for row in chosen]
    examples = [example(rows[p]["instruction"], rows[p]["input"], rows[p]["output"]) for p in places]
    return Probe("human-written", Dataset.from_list(examples), ["human"] * len(examples), "none"), places


def prepare(folder: Path, data: Path, scores: Path | None, tokens: int, seeds: int) -> None:
    """Score the pool, draw all arms and write them as token ids."""
    rows = read_rows(data)
    scored = curated_pool(folder, data)
    base = load_base_model()
    probes = [experts(data), None, read_probe()]
    written, places = human(data, rows)
    probes[1] = written
    pool = with_arms(build_pool(rows, scored, base), rows, scores, tokens)
    pool = pool.without(np.flatnonzero(np.isin(pool.rows["place"][:], places)))
    held = hold_out(pool, concatenate_datasets([probe.rows for probe in probes]))
    print(f"held out: {held.equal} equal, {held.near} near, {held.asked} asked with another answer", file=sys.stderr)
    pool = held.pool
    free = np.setdiff1d(pool.scored, np.concatenate(list(pool.chosen.values())))
    chosen = np.sort(np.random.default_rng(0).choice(free, min(VALIDATION, len(free) // 8), replace=False))
    validation, pool = pool.rows.select(chosen), pool.without(chosen)
    limits = available(pool)
    print({name: found for name, found in limits.items()}, file=sys.stderr)
    budget = min(tokens, *(found[0] for found in limits.values()))
    write_prepared(folder / "prepared.npz", base, pool, probes, validation, (budget, seeds))


def curated_pool(folder: Path, data: Path) -> Dataset:
    """Return the pool with scores and clusters of all rows together, and the rows that CaR's rule selects marked.

    Each file is scored by `curate` into a folder of its name, which may be there from elsewhere.
    """
    from car_datasets import ClusterModel, Recipe, curate, select_car

    parts = []
    for name in FILES:
        place = folder / Path(name).stem
        if not (place / "receipt.json").is_file():
            curate(str(data / name), place, Recipe(n1=100, n2=1, keep_embeddings=True))
        scored = Dataset.from_parquet(str(place / "scored.parquet"))
        kept = ["source_index", "iqs_score", "embedding"]
        parts.append(scored.sort("source_index").select_columns(kept).remove_columns("source_index"))
    pool = concatenate_datasets(parts)
    pool = ClusterModel.fit(pool).label(pool).remove_columns("embedding")
    clusters = len(set(pool["cluster"]))
    selected = set(select_car(pool, ROWS - clusters, 1)["source_index"])
    return pool.add_column("selected", [place in selected for place in range(len(pool))])


def build_pool(rows: Sequence[dict[str, str]], scored: Dataset, base: Any) -> Pool:
    """Return the pool of `prove`, with the files as groups."""
    if len(scored) != len(rows):
        raise SystemExit(f"{len(scored)} rows are scored, the files have {len(rows)}; remove the folders of scores.")
    examples = [example(row["instruction"], row["input"], row["output"]) for row in rows]
    scores = np.array([np.nan if value is None else value for value in scored["iqs_score"]], dtype=float)
    ids = tokenise(examples, base.tokenizer, LIMIT + 1)
    answered = [bool(row["output"].strip() and row["instruction"].strip()) for row in rows]
    tokens = [r.answer_tokens if len(r.ids) <= LIMIT and good else 0 for r, good in zip(ids, answered, strict=True)]
    pool = Pool(
        rows=Dataset.from_list(examples).add_column("place", list(range(len(rows)))),
        scores=scores,
        clusters=np.array([-1 if value is None else value for value in scored["cluster"]], dtype=np.int64),
        tokens=np.array(tokens, dtype=np.int64),
        groups=np.array([row["source"] for row in rows], dtype=np.str_),
        grouped_by="source",
        scored=np.arange(len(rows)),
        chosen={SELECTION: np.flatnonzero(scored["selected"])},
        left_out={},
    )
    return pool.without(np.flatnonzero((pool.tokens < 1) | np.isnan(scores)))


def with_arms(pool: Pool, rows: Sequence[dict[str, str]], scores: Path | None, tokens: int) -> Pool:
    """Return the pool with the rivals of CaR's rule: the best scores alone, and arms of further scores.

    The latter have as many rows as `tokens` need, and a few more, because evaluation rows are taken out of the pool.
    """

    def first(order: np.ndarray) -> np.ndarray:
        return order[: int(np.searchsorted(np.cumsum(pool.tokens[order]), 1.05 * tokens)) + 1]

    chosen = dict(pool.chosen)
    best = np.argsort(-pool.scores, kind="stable")
    chosen["top-n"] = best[:ROWS]
    # As many rows as CaR's rule takes, of which each seed draws its own part: one part alone may be lucky.
    chosen["shuffled"] = by_car(pool, np.random.default_rng(0).permutation(len(pool.scores)))[:ROWS]
    if scores is not None:
        places = np.array(pool.rows["place"][:])
        for name, values in json.loads(scores.read_text(encoding="utf-8")).items():
            if len(values) != len(rows):
                raise SystemExit(f"--scores: {name} has {len(values)} numbers, the pool {len(rows)} rows.")
            column = np.array([np.nan if value is None else value for value in values], dtype=float)
            order = np.argsort(-np.nan_to_num(column[places], nan=-np.inf), kind="stable")
            chosen[f"top by {name}"] = first(order)
            chosen[f"CaR by {name}"] = first(by_car(pool, order))
    return replace(pool, chosen=chosen)


def by_car(pool: Pool, order: np.ndarray) -> np.ndarray:
    """Return rows, given from the best to the worst, as CaR's rule takes them: the best of every cluster comes first."""
    leaders: dict[int, int] = {}
    for row in order.tolist():
        leaders.setdefault(int(pool.clusters[row]), row)
    best_of = np.array([row for cluster, row in leaders.items() if cluster >= 0], dtype=np.int64)
    return np.concatenate([best_of, order[~np.isin(order, best_of)]])


def write_prepared(
    path: Path, base: Any, pool: Pool, probes: Sequence[Probe], validation: Dataset, sizes: tuple[int, int]
) -> None:
    """Write arms and evaluation rows as token ids; the file holds no text."""
    budget, seeds = sizes
    places: dict[Lesson, int] = {}
    runs = []
    for seed in range(seeds):
        for arm in draw_arms(pool, seed, tokens=budget, names=ARMS).values():
            rows = [places.setdefault(lesson, len(places)) for lesson in arm.lessons]
            runs.append(
                {"arm": "CaR" if arm.name == SELECTION else arm.name, "seed": seed, "rows": rows, "tokens": arm.tokens}
            )
    rows = tokenise(pool.examples(list(places)), base.tokenizer, LIMIT)
    measured = {}
    for probe in probes:
        found = tokenise(probe.rows.to_list(), base.tokenizer, LIMIT)
        usable = [place for place, row in enumerate(found) if row.answer_tokens]
        measured[probe.name] = {
            "first": len(rows),
            "count": len(usable),
            "domains": [probe.domains[place] for place in usable],
        }
        rows += [found[place] for place in usable]
    found = tokenise(validation.to_list(), base.tokenizer, LIMIT)
    record = {
        "runs": runs,
        "probes": measured,
        "validation": {"first": len(rows), "count": len(found)},
        "budget": budget,
        "model": base.revision,
    }
    rows += found
    np.savez_compressed(
        path,
        ids=np.concatenate([row.ids for row in rows]).astype(np.int32),
        lengths=np.array([len(row.ids) for row in rows], np.int32),
        prompts=np.array([row.prompt for row in rows], np.int32),
        record=np.array(json.dumps(record)),
    )
    print(f"{path}: {len(rows):,} rows, {len(runs):,} runs of {budget:,} answer tokens, {path.stat().st_size:,} bytes")


def read_prepared(path: Path) -> tuple[list[TokenRow], dict[str, Any]]:
    """Return the rows and the record of a prepared file."""
    with np.load(path) as found:
        parts = np.split(found["ids"], np.cumsum(found["lengths"])[:-1])
        rows = [TokenRow(ids, int(prompt)) for ids, prompt in zip(parts, found["prompts"], strict=True)]
        return rows, json.loads(str(found["record"]))


def run(options: argparse.Namespace) -> None:
    """Train and measure prepared arms within a time, and write and print what was found."""
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, record = read_prepared(options.prepared)
    base = load_base_model()
    if base.revision != record["model"]:
        raise SystemExit(f"The arms were prepared for the model {record['model']}; this is {base.revision}.")
    runs = [Run("tokens", each["arm"], each["seed"], each["rows"]) for each in record["runs"]]
    if options.arms:
        runs = [each for each in runs if each.arm in options.arms.split(",")]
    if options.rows:
        runs = [each._replace(rows=each.rows[: options.rows]) for each in runs]
    probes = {name: range(each["first"], each["first"] + each["count"]) for name, each in record["probes"].items()}
    if options.eval_rows:
        probes = {name: places[: options.eval_rows] for name, places in probes.items()}
    domains = {name: each["domains"][: len(probes[name])] for name, each in record["probes"].items()}
    kept = record["validation"]
    instructions = read_instructions() if options.answers else []
    experiment = Experiment(
        rows=rows,
        runs=runs,
        probes=probes,
        validation=range(kept["first"], kept["first"] + kept["count"]),
        prompts=[message("user", each.prompt) for each in instructions],
        most_tokens=options.most_tokens,
        rates=tuple(map(float, options.rates.split(","))),
    )
    trained = int(options.trained) if options.trained.isdecimal() else options.trained
    schedule = Schedule(
        trained=trained, epochs=options.epochs, batch_tokens=options.batch_tokens, updates=options.updates
    )
    left = options.minutes * 60 - (time.monotonic() - begun)
    with tempfile.TemporaryDirectory() as folder:
        outcome = carry_out(experiment, base, schedule, device, Path(options.work or folder), left)
    report = summarise(experiment, outcome, domains, instructions)
    report["budget"] = record["budget"]
    report["card"] = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    report["seconds"] = time.monotonic() - begun
    options.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    show(report)


def summarise(
    experiment: Experiment, outcome: Outcome, domains: dict[str, list[str]], instructions: Sequence[Any]
) -> dict[str, Any]:
    """Return comparisons, losses of every run and speeds."""
    found: dict[str, Any] = {}
    for name, places in experiment.probes.items():
        weights = [experiment.rows[place].answer_tokens for place in places]
        losses: dict[str, dict[int, list[float]]] = {}
        for each in outcome.runs:
            losses.setdefault(each.run.arm, {})[each.run.seed] = each.nats[name]
        several = len({each.run.seed for each in outcome.runs}) > 1 and "random" in losses
        found[name] = {
            "before": sum(outcome.before[name]) / sum(weights),
            "by_seed": {a: {s: sum(v) / sum(weights) for s, v in runs.items()} for a, runs in losses.items()},
            "compared": compare(losses, weights, domains[name]).to_dict() if several else None,
        }
    kept: dict[str, dict[int, list[float]]] = {}
    names = [one["name"] for each in instructions for one in each.constraints]
    for each in outcome.runs if instructions else ():
        pairs = zip(instructions, each.answers, strict=True)
        values = [float(is_satisfied(text, one)) for asked, text in pairs for one in asked.constraints]
        kept.setdefault(each.run.arm, {})[each.run.seed] = values
    if kept and len({each.run.seed for each in outcome.runs}) > 1:
        found["instructions kept"] = {"compared": compare(kept, [1.0] * len(names), names, unit=SHARE).to_dict()}
    training = sum(each.trained["seconds"] for each in outcome.runs)
    return {
        "probes": found,
        "settings": outcome.settings,
        "rates": outcome.validation,
        "tokens_per_second": sum(each.trained["tokens"] for each in outcome.runs) / training,
        "training_seconds": training,
        "measuring_seconds": sum(each.seconds for each in outcome.runs),
        "runs": [
            {"arm": each.run.arm, "seed": each.run.seed, "rows": len(each.run.rows), **each.trained}
            for each in outcome.runs
        ],
        "nats": {
            name: {f"{each.run.arm}/{each.run.seed}": each.nats[name] for each in outcome.runs}
            for name in experiment.probes
        },
    }


def show(report: dict[str, Any]) -> None:
    """Print the verdicts of every evaluation set."""
    print(f"{report['card']}, {report['seconds']:.0f} s, {report['tokens_per_second']:,.0f} tokens/s trained;", end=" ")
    print(f"measuring {report['measuring_seconds']:.0f} s; rates {report['rates']}")
    for name, found in report["probes"].items():
        print(f"\n{name}: before {found.get('before', 0):.4f}")
        compared = found["compared"]
        if compared is None:
            print(found.get("by_seed"))
            continue
        for arm, mean in compared["means"].items():
            difference = compared["differences"].get(arm, {}).get("all")
            shown = "" if difference is None else "{value:+.4f} ({low:+.4f} to {high:+.4f})".format(**difference)
            print(f"  {arm:24} {mean:.4f} {shown:32} {compared['verdicts'].get(arm, '')}{lost(found, arm)}")


def lost(found: dict[str, Any], arm: str) -> str:
    """Return in how many seeds an arm was worse than random rows."""
    losses = found.get("by_seed")
    if losses is None or arm == BASELINE:
        return ""
    worse = sum(losses[arm][seed] > losses[BASELINE][seed] for seed in losses[arm])
    return f"; worse in {worse} of {len(losses[arm])} seeds"


def check_packing(prepared: Path) -> None:
    """Print by how much packed rows differ from rows alone on this device, and how many tokens a second are trained."""
    rows, record = read_prepared(prepared)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base_model()
    tuner = Tuner(base, rows, Schedule(), device)
    chosen = list(range(64))
    packed, alone = tuner.nats(chosen), np.concatenate([tuner.nats([row]) for row in chosen])
    weights = np.array([rows[row].answer_tokens for row in chosen])
    print(
        f"{tuner.attention}: packed beside alone, largest {np.abs((packed - alone) / weights).max():.2e} nats a token"
    )
    for tokens in (8_192, 16_384, 32_768):
        tuner = Tuner(base, rows, Schedule(batch_tokens=tokens), device)
        found = [tuner.train(record["runs"][0]["rows"], 1e-5, 0) for _ in range(2)][-1]
        print(f"{tokens:,} tokens a batch: {found.tokens / found.seconds:,.0f} tokens/s, {found.steps} steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="write prepared.npz into this folder")
    parser.add_argument("--data", type=Path, default=SHARED, help="the project's data folder")
    parser.add_argument("--scores", type=Path, help="a JSON object of further scores")
    parser.add_argument("--tokens", type=int, default=100_000, help="answer tokens of an arm")
    parser.add_argument("--seeds", type=int, default=10, help="seeds that are prepared")
    parser.add_argument("--prepared", type=Path, help="train and measure the arms of this file")
    parser.add_argument("--json", type=Path, default=Path("prove_table.json"), help="write what was found")
    parser.add_argument("--minutes", type=float, default=4.0, help="stop before a seed that would end later")
    parser.add_argument("--trained", default="all", help="all, lora, or a number of last layers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=8_192)
    parser.add_argument("--updates", type=int, default=16, help="the fewest updates of the weights")
    parser.add_argument("--rates", default=",".join(map(str, LEARNING_RATES)), help="learning rates to choose from")
    parser.add_argument("--answers", action="store_true", help="also answer the verifiable instructions")
    parser.add_argument("--most-tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--arms", help="only these, with commas")
    parser.add_argument("--rows", type=int, help="only so many rows of each arm, for a trial")
    parser.add_argument("--eval-rows", type=int, help="only so many rows of each evaluation set, for a trial")
    parser.add_argument("--work", type=Path, help="keep finished runs in this folder")
    parser.add_argument("--check", action="store_true", help="check packing and speed of --prepared, and end")
    options = parser.parse_args()
    if options.prepare:
        options.prepare.mkdir(parents=True, exist_ok=True)
        prepare(options.prepare, options.data, options.scores, options.tokens, options.seeds)
    elif options.check:
        check_packing(options.prepared)
    elif options.prepared:
        run(options)
    else:
        parser.error("pass --prepare FOLDER or --prepared FILE")


if __name__ == "__main__":
    main()
