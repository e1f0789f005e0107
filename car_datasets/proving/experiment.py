"""All runs of a proof: every arm and seed trained and measured, each kept in a file once it is done.

Does: choose the learning rate once, on the validation rows of a random arm; train, measure and answer; write each
finished run whole, by a digest of all that its numbers depend on, so that a killed experiment resumes.
Does not: draw arms, compare them, or report.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from car_datasets.proving.base_model import BaseModel
from car_datasets.proving.token_rows import TokenRow
from car_datasets.proving.trainer import Schedule
from car_datasets.proving.training import Tuner
from car_datasets.scoring.stage import Progress, say
from car_datasets.utils.files import write_content

RUN_FILE = "run-{}.json"
# Of what the arms are and of how they are trained and measured. Raise it when any of these changes, so that older runs
# and proofs are not taken for new ones; a test says when the draws change.
EDITION = 2
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")  # whose versions change numbers
Messages = Sequence[Mapping[str, str]]


class Run(NamedTuple):
    """One arm to be trained with one seed.

    Args:
        table (`str`): the budget that its arms share.
        arm (`str`): the name of the arm.
        seed (`int`): of its draw and its orders.
        rows (`Sequence[int]`): places in `Experiment.rows`, in training order.
    """

    table: str
    arm: str
    seed: int
    rows: Sequence[int]


@dataclass(frozen=True)
class Experiment:
    """What is trained and measured.

    Args:
        rows (`list[TokenRow]`): all rows that are trained on or measured.
        runs (`list[Run]`): in the order in which they are done.
        probes (`dict[str, Sequence[int]]`): evaluation set to places in `rows`.
        validation (`Sequence[int]`): places of the rows that choose the learning rate; none of them is trained on.
        prompts (`Sequence`): chats that are answered after each run; empty for none.
        most_tokens (`int`): of an answer.
        rates (`tuple[float, ...]`): learning rates to choose from, at least one.
    """

    rows: list[TokenRow]
    runs: list[Run]
    probes: dict[str, Sequence[int]]
    validation: Sequence[int] = ()
    prompts: Sequence[Messages] = ()
    most_tokens: int = 128
    rates: tuple[float, ...] = ()


class Finished(NamedTuple):
    """A run that was trained and measured.

    Args:
        run ([`Run`]): which.
        nats (`dict[str, list[float]]`): evaluation set to the summed nats of the answer of every row.
        answers (`list[str]`): to the prompts, in order.
        trained (`dict`): steps, tokens, seconds, loss and order of the training.
        seconds (`float`): of measuring and answering.
    """

    run: Run
    nats: dict[str, list[float]]
    answers: list[str]
    trained: dict[str, Any]
    seconds: float


class Outcome(NamedTuple):
    """All finished runs.

    Args:
        runs (`list[Finished]`): in the order of the experiment.
        before (`dict[str, list[float]]`): nats of every evaluation row before any training.
        answers_before (`list[str]`): answers before any training.
        rate (`float`): the chosen learning rate.
        validation (`dict[str, float]`): learning rate to nats per answer token of the validation rows.
        settings (`dict`): of the training, as plain values.
    """

    runs: list[Finished]
    before: dict[str, list[float]]
    answers_before: list[str]
    rate: float
    validation: dict[str, float]
    settings: dict[str, Any]


def carry_out(
    experiment: Experiment,
    base: BaseModel,
    schedule: Schedule,
    device: torch.device,
    folder: Path,
    seconds: float | None = None,
) -> Outcome:
    """Do all runs of an experiment that are not in a folder yet.

    Args:
        experiment ([`Experiment`]): what to train and measure.
        base ([`BaseModel`]): the model.
        schedule ([`Schedule`]): how it is trained.
        device (`torch.device`): where.
        folder (`Path`): keeps finished runs; made if it does not exist.
        seconds (`float`, *optional*): stop before a seed that would probably end later, so that each seed has all arms.
    """
    work = _Work(experiment, base, schedule, device, folder)
    begun = time.monotonic()
    before = work.measured()
    rate, validation = work.chosen_rate()
    done: list[Finished] = []
    seeds = list(dict.fromkeys(run.seed for run in experiment.runs))
    total = sum(len(run.rows) for run in experiment.runs)
    with Progress("Fine-tuning", total) as progress:
        for place, seed in enumerate(seeds):
            spent = time.monotonic() - begun
            # The first seed also pays for loading and warming up, so that the estimate is on the safe side.
            if seconds is not None and place and spent * (place + 1) / place > seconds:
                say(f"{place} of {len(seeds)} seeds were done in {spent:.0f} s; another one would take too long.")
                break
            for run in (run for run in experiment.runs if run.seed == seed):
                done.append(work.finished(run, rate))
                progress.passed(sum(len(each.run.rows) for each in done))
    # The base model is the caller's: a further experiment with it must not start from the weights of the last run.
    work.restore()
    settings = {**before["settings"], "learning_rate": rate}
    return Outcome(done, before["nats"], before["answers"], rate, validation, settings)


class _Work:
    """The runs of an experiment: read from files, or done by a model that is set up when it is first needed."""

    def __init__(
        self, experiment: Experiment, base: BaseModel, schedule: Schedule, device: torch.device, folder: Path
    ) -> None:
        self.experiment, self.base, self.schedule, self.device, self.folder = experiment, base, schedule, device, folder
        self._tuner: Tuner | None = None
        folder.mkdir(parents=True, exist_ok=True)
        measured = [*experiment.probes.items(), ("validation", experiment.validation)]
        self.common = {
            "edition": EDITION,
            "model": base.revision,
            "template": base.tokenizer.chat_template,
            "schedule": asdict(schedule),
            "device": device.type,
            "versions": {name: version(name) for name in PACKAGES},
            "measured": {name: _digest([experiment.rows[row] for row in rows]) for name, rows in measured},
            "prompts": [experiment.prompts, experiment.most_tokens],
        }

    @property
    def tuner(self) -> Tuner:
        if self._tuner is None:
            self._tuner = Tuner(self.base, self.experiment.rows, self.schedule, self.device)
        return self._tuner

    def restore(self) -> None:
        """Put the weights of the base model back to where every run starts, if a run has changed them."""
        if self._tuner is not None:
            self._tuner.restore()

    def kept(self, key: Mapping[str, Any], compute: Any) -> dict[str, Any]:
        """Return what a file holds for a key, or compute and write it."""
        content = json.dumps({**self.common, **key}, sort_keys=True)
        path = self.folder / RUN_FILE.format(hashlib.sha256(content.encode()).hexdigest()[:24])
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except (OSError, ValueError):  # not done yet
            found = compute()
        write_content(path, json.dumps(found) + "\n")
        return found

    def measured(self) -> dict[str, Any]:
        """Return losses and answers of the model before any training, and the settings of the training."""

        def compute() -> dict[str, Any]:
            self.tuner.restore()
            return {**self._measure(), "settings": self.tuner.describe()}

        return self.kept({"run": "before"}, compute)

    def _measure(self) -> dict[str, Any]:
        nats = {name: self.tuner.nats(rows).tolist() for name, rows in self.experiment.probes.items()}
        prompts = self.experiment.prompts
        return {"nats": nats, "answers": self.tuner.answers(prompts, self.experiment.most_tokens) if prompts else []}

    def chosen_rate(self) -> tuple[float, dict[str, float]]:
        """Return the learning rate with the least loss on the validation rows, and the losses of all."""
        experiment, rates = self.experiment, self.experiment.rates
        if len(rates) == 1 or not len(experiment.validation):
            return rates[len(rates) // 2], {}
        # The random arm: a rate that suits the selection best would favour it.
        run = next((run for run in experiment.runs if run.arm == "random"), experiment.runs[0])
        tokens = sum(experiment.rows[row].answer_tokens for row in experiment.validation)

        def compute(rate: float) -> dict[str, float]:
            self.tuner.train(run.rows, rate, run.seed)
            return {"nats": float(self.tuner.nats(experiment.validation).sum() / tokens)}

        losses = {
            rate: self.kept(self._key(run, rate, "validation"), lambda r=rate: compute(r))["nats"] for rate in rates
        }
        return min(losses, key=lambda rate: losses[rate]), {f"{rate:g}": loss for rate, loss in losses.items()}

    def _key(self, run: Run, rate: float, kind: str) -> dict[str, Any]:
        trained = _digest([self.experiment.rows[row] for row in run.rows])
        return {"run": kind, "rows": trained, "rate": rate, "seed": run.seed}

    def finished(self, run: Run, rate: float) -> Finished:
        """Return a run, which is trained and measured if its file is not there."""

        def compute() -> dict[str, Any]:
            trained = self.tuner.train(run.rows, rate, run.seed)
            begun = time.perf_counter()
            measured = self._measure()
            return {**measured, "trained": trained._asdict(), "seconds": time.perf_counter() - begun}

        return Finished(run, **self.kept(self._key(run, rate, "run"), compute))


def _digest(rows: Sequence[TokenRow]) -> str:
    content = hashlib.sha256()
    for row in rows:
        content.update(len(row.ids).to_bytes(4, "little") + row.prompt.to_bytes(4, "little"))
        content.update(np.ascontiguousarray(row.ids).tobytes())
    return content.hexdigest()
