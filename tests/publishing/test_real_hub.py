"""Push, load, verify: to a Hub on this machine always, to the public one when asked for by `pytest --real-hub`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.conftest import GUARD, REAL_TOKEN, ROOT
from tests.hub_server import Hub

LOOP = """
import json, sys
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import HfApi
from car_datasets import IQSModel, QualityScorer, curate, load_instructions, push_selection, score_in_shards

model, sample, out, suffix = sys.argv[1:]
api = HfApi()
me = api.whoami()["name"]
names = {kind: f"{me}/car-datasets-test-{kind}-{suffix}" for kind in ("model", "rows", "work", "selection")}
try:
    IQSModel.from_pretrained(model).push_to_hub(names["model"], private=True)
    api.upload_folder(repo_id=names["model"], folder_path=model, allow_patterns=["tokenizer*", "special*", "vocab*"])
    api.create_repo(names["rows"], repo_type="dataset", private=True)
    api.upload_file(path_or_fileobj=sample, path_in_repo="rows.json", repo_id=names["rows"], repo_type="dataset")
    scorer = QualityScorer(names["model"])
    assert scorer.revision == api.model_info(names["model"]).sha
    rows = load_instructions(names["rows"]).select(range(64))
    place = f"hf://datasets/{names['work']}/run"
    kept = score_in_shards(rows, scorer, place, shard_rows=32)
    assert score_in_shards(rows, scorer, place, shard_rows=32)["iqs_score"][:] == kept["iqs_score"][:]
    assert api.dataset_info(names["work"]).private
    selected, _, _ = curate(names["rows"], out, n1=10)
    pushed = push_selection(out, names["selection"], check=True)
    again = load_dataset(names["selection"], revision=pushed.sha, split="selected")
    assert again["source_index"][:] == selected["source_index"][:]
    assert api.dataset_info(names["selection"]).private
    print(json.dumps([len(selected), sorted(names)]))
finally:
    for kind, name in names.items():
        api.delete_repo(name, repo_type="model" if kind == "model" else "dataset", missing_ok=True)
"""


@pytest.mark.slow
def test_the_loop_on_a_hub_on_this_machine(hub: Hub, tiny_iqs: str, sample_file: Path, tmp_path: Path) -> None:
    done = hub.run(LOOP, tiny_iqs, sample_file, tmp_path / "out", "local", check=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1])[0] >= 10
    assert hub.repo("me/car-datasets-test-selection-local") is None  # it clears up


def test_the_loop_on_the_public_hub(
    request: pytest.FixtureRequest, tiny_iqs: str, sample_file: Path, tmp_path: Path
) -> None:
    if not request.config.getoption("--real-hub"):
        pytest.skip(
            "pushes to the public Hub; before a release: "
            "HF_TOKEN=... python -m pytest --real-hub tests/publishing/test_real_hub.py"
        )
    token = REAL_TOKEN
    if not token:
        pytest.fail("--real-hub needs HF_TOKEN, with a token that may write")
    path = [part for part in os.environ["PYTHONPATH"].split(os.pathsep) if part != str(GUARD)]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"},
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_TOKEN": token,
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
    }
    command = [sys.executable, "-c", LOOP, tiny_iqs, str(sample_file), str(tmp_path / "out"), uuid.uuid4().hex[:8]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert token not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-4000:]
