"""A Hub id in the original's layout, from a Hub on this machine, to real clients."""

import json
from pathlib import Path

import pytest

from tests.hub_server import Hub

MODEL = "GyQAQ/Instruction-quality-scoring"
BASE = "someone/tiny-xlmr"

SCORE = """
import json, sys
from car_datasets import IQSModel, QualityScorer
scorer = QualityScorer(sys.argv[1], tokenizer=sys.argv[2])
rows = [json.loads(line) for line in open(sys.argv[3], encoding="utf-8")]
batch = {name: [row[name] for row in rows] for name in ("instruction", "input", "output")}
again = QualityScorer(sys.argv[1], scorer.revision, tokenizer=sys.argv[2])
model = IQSModel.from_pretrained(sys.argv[1], tokenizer=sys.argv[4])
print(json.dumps([scorer.revision, again == scorer, model.config.objective, [float(s) for s in scorer(batch)["iqs_score"]]]))
"""


def files_of(folder: Path, start: Path) -> dict[str, bytes]:
    """Return the content of a repository of a folder's files, by their path from `start` on."""
    return {p.relative_to(start).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.shared
def test_hub_id_in_the_originals_layout(hub: Hub, shared: Path) -> None:
    oracle = shared / "oracle"
    published = files_of(oracle / "instruction_score", oracle) | files_of(oracle / "instruction_comet", oracle)
    commit = hub.commit(MODEL, published, kind="models")  # what the Hub repository holds
    hub.commit(BASE, files_of(oracle / "tiny-xlmr", oracle / "tiny-xlmr"), kind="models")
    # The number of heads of so small an encoder is not known: the base model's configuration tells, from id or folder.
    done = hub.run(SCORE, MODEL, BASE, oracle / "inputs.jsonl", oracle / "tiny-xlmr", check=True)
    revision, equal, objective, scores = json.loads(done.stdout.splitlines()[-1])
    assert (revision, equal, objective) == (commit, True, "regression")
    expected = json.loads((oracle / "expected_scores.json").read_text(encoding="utf-8"))["variants"]["iqs"][
        "scores_bs1"
    ]
    assert scores == pytest.approx(expected, abs=5e-5)
