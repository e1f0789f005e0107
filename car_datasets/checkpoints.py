"""The folder of a training run's checkpoints: whose it is, and which of them are whole."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from car_datasets import digests
from car_datasets.settings import Settings

RUN_FILE = "run.json"


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: `Trainer` writes `trainer_state.json` last."""
    whole = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (json.JSONDecodeError, KeyError):
            continue
    return str(max(whole)[1]) if whole else None


def claim(checkpoints: Path, settings: Settings, processes: int) -> None:
    """Make the folder, or find that an equal run made it and was cut off.

    Equal means: the same settings, the same training and validation files, the same number of processes.

    Raises:
        ValueError: an unfinished run that differs has the folder (what differs is named), or it is no training run's.
    """
    mine = checkpoints / RUN_FILE
    run: dict[str, Any] = {**asdict(settings), "processes": processes}
    run |= {f"{name}_sha256": digests.file_digest(Path(run[name])) for name in ("train", "valid")}
    if mine.is_file():
        earlier = json.loads(mine.read_text(encoding="utf-8"))
        differ = [name for name, value in run.items() if earlier.get(name) != value]
        if differ:
            raise ValueError(
                f"{checkpoints} holds an unfinished run with another {', '.join(differ)} (see its {RUN_FILE}). Run it again as "
                "it was to go on, or delete the folder."
            )
    elif checkpoints.exists() and any(checkpoints.iterdir()):
        raise ValueError(f"{checkpoints} is there already and is no training run's; move it away.")
    else:
        checkpoints.mkdir(parents=True, exist_ok=True)
        partial = mine.with_suffix(".partial")
        partial.write_text(json.dumps(run, indent=2), encoding="utf-8")
        partial.replace(mine)
