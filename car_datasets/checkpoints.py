"""Find the last complete checkpoint of a training run, and refuse to resume a run that differs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from car_datasets import digests
from car_datasets.results import write_folder
from car_datasets.settings import Settings

RUN_FILE = "run.json"


def last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, or None; `Trainer` writes `trainer_state.json` last."""
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            complete.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):  # interrupted while the file was being written
            continue
    return str(max(complete)[1]) if complete else None


def claim(checkpoints: Path, settings: Settings, processes: int) -> None:
    """Create the folder of a run's checkpoints, or check that an interrupted run with equal settings created it.

    Equal runs have the same settings, the same content of training and validation file, and the same number of
    processes: with any other number, batches and weights would differ.

    Args:
        checkpoints (`Path`): the folder.
        settings ([`Settings`]): settings of the run, with `train` and `valid`.
        processes (`int`): number of processes.

    Raises:
        ValueError: the folder belongs to an unfinished run that differs (the message names what differs), or was not
            created by a training run.
    """
    record = checkpoints / RUN_FILE
    run: dict[str, Any] = {**asdict(settings), "processes": processes}
    run |= {f"{name}_sha256": digests.file_digest(Path(run[name])) for name in ("train", "valid")}
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        differ = [name for name, value in run.items() if earlier.get(name) != value]
        if differ:
            raise ValueError(
                f"{checkpoints} holds an unfinished run with another {', '.join(differ)} (see its {RUN_FILE}). To "
                "resume, restore these; to start anew, delete the folder."
            )
    elif checkpoints.exists() and any(checkpoints.iterdir()):
        raise ValueError(f"{checkpoints} already exists and was not created by a training run; move it away.")
    else:
        with write_folder(checkpoints) as partial:
            (partial / RUN_FILE).write_text(json.dumps(run, indent=2), encoding="utf-8")
