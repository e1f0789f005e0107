"""engines.py: `estimate_scoring` and `map_across_gpus`; `OnRay` is in test_ray.py, which starts a real Ray."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import multiprocess
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import ClusterModel, QualityScorer, cluster_filter, map_across_gpus, select_car
from car_datasets.cli import app
from car_datasets.scoring import engines, inference
from car_datasets.scoring.engines import Estimate, estimate_scoring
from car_datasets.utils.processes import device_for
from tests.conftest import ROOT

# --- estimate_scoring: timed on rows drawn at random


def test_an_estimate_counts_what_the_scorer_reads(tiny_iqs: str, pairs: Dataset) -> None:
    scorer = QualityScorer(tiny_iqs, diagnostics=True)
    found = estimate_scoring(pairs, scorer)
    assert (found.rows, found.sample, found.device) == (6, 6, str(device_for()))
    assert found.tokens == sum(scorer(pairs[:])["iqs_tokens"])  # no row is longer than the model reads
    assert 0 < found.seconds < 60
    assert 0 < found.waste < 1
    assert estimate_scoring(pairs, QualityScorer(tiny_iqs, diagnostics=True, batch_tokens=1)).waste == 0
    assert estimate_scoring(pairs, scorer, 2).sample == 2


def test_a_chat_counts_every_exchange_up_to_the_models_limit(tiny_iqs: str) -> None:
    turns = [{"role": role, "content": "sea " * 60} for role in ("user", "assistant")] * 3
    chats = Dataset.from_dict({"messages": [turns] * 4})
    assert estimate_scoring(chats, QualityScorer(tiny_iqs)).tokens == 4 * 3 * 48


def test_minutes_are_those_of_the_whole_dataset() -> None:
    found = Estimate(rows=60_000, sample=200, seconds=2.0, tokens=20_000, waste=0.05, device="cpu")
    assert found.rows_per_second == 100
    assert found.minutes == 10
    assert str(found) == (
        "100.0 rows/s (10,000 tokens/s, 5% padding) on cpu, timed on 200 rows: about 10.0 minutes to score 60,000 rows "
        "in one process."
    )
    assert "10.0 hours" in str(found._replace(rows=3_600_000))


def test_what_it_cannot_time_is_refused(tiny_iqs: str, pairs: Dataset) -> None:
    with pytest.raises(ValueError, match="sample=0"):
        estimate_scoring(pairs, QualityScorer(tiny_iqs, diagnostics=True), 0)
    with pytest.raises(ValueError, match="has no rows"):
        estimate_scoring(pairs.select([]), QualityScorer(tiny_iqs))
    empty = Dataset.from_list([{**row, "output": None} for row in pairs])
    with pytest.raises(ValueError, match="None of 6 rows"):
        estimate_scoring(empty, QualityScorer(tiny_iqs, diagnostics=True, on_invalid="mark"))


def test_the_command_prints_one_line(tiny_iqs: str, pairs: Dataset, tmp_path: Any) -> None:
    pairs.to_json(str(tmp_path / "rows.jsonl"))
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "rows.jsonl"), "--scorer", tiny_iqs, "--rows", "4"])
    assert done.exit_code == 0, done.output
    assert "timed on 4 rows" in done.output
    assert "to score 6 rows" in done.output


def test_the_command_times_the_engine_that_it_is_given(
    tiny_iqs: str, tiny_engine: str, pairs: Dataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []
    estimate = engines.Estimate(rows=6, sample=6, seconds=1.0, tokens=None, waste=None, device="cpu")
    monkeypatch.setattr(
        engines, "estimate_scoring", lambda dataset, scorer, rows: timed.append(scorer.engine) or estimate
    )
    pairs.to_json(str(tmp_path / "rows.jsonl"))
    options = ["--scorer", tiny_iqs, "--engine", tiny_engine, "--no-embeddings"]
    done = CliRunner().invoke(app, ["estimate", str(tmp_path / "rows.jsonl"), *options])
    assert done.exit_code == 0, done.output
    assert timed == [tiny_engine]


# --- map_across_gpus: `.map` over spawned workers, and what cannot be spawned, on a machine without a GPU


def score_and_tell(batch: Any, rank: int, scorer: QualityScorer) -> dict[str, Any]:
    found = scorer(batch, rank)
    loads, count = inference.load_scorer.cache_info().misses, len(batch["output"])
    return {**found, "loads": [loads] * count, "rank": [rank] * count, "process": [os.getpid()] * count}


@pytest.mark.slow
def test_each_spawned_worker_loads_once_and_the_order_stays(
    tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = Dataset.from_dict({name: values * 4 for name, values in pairs.to_dict().items()})
    one = rows.map(QualityScorer(tiny_iqs), batched=True)  # torch has run here: forked workers would hang
    before = multiprocess.get_start_method(allow_none=True)
    tell = functools.partial(score_and_tell, scorer=QualityScorer(tiny_iqs))
    found = map_across_gpus(rows, tell, num_proc=2, batch_size=4)
    assert multiprocess.get_start_method(allow_none=True) == before
    assert found["iqs_score"][:] == pytest.approx(one["iqs_score"][:], abs=1e-5)
    assert found["output"][:] == rows["output"][:]
    assert set(found["loads"][:]) == {1}
    assert found["rank"][:] == [0] * 12 + [1] * 12
    assert len({*found["process"][:], os.getpid()}) == 3


def test_a_forked_worker_says_so_instead_of_hanging(tiny_iqs: str, pairs: Dataset) -> None:
    if multiprocess.get_start_method() != "fork":
        pytest.skip("this Python does not fork")
    device_for()
    with pytest.raises(ValueError, match="forked from a process that had run a model"):
        pairs.map(QualityScorer(tiny_iqs), batched=True, with_rank=True, num_proc=2)


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (cluster_filter, {}, r"fn=cluster_filter needs all rows at once.*cluster_filter\(dataset, \.\.\.\)"),
        (functools.partial(select_car, n1=2), {}, "needs all rows at once"),
        (ClusterModel.fit, {}, r"fn=ClusterModel\.fit needs all rows at once"),
        (device_for, {"batch_size": None}, "needs all rows at once"),
        (device_for, {"num_proc": 0}, "num_proc=0"),
        (device_for, {"num_proc": True}, "num_proc=True"),
        (device_for, {"num_proc": 2.0}, r"num_proc=2\.0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(pairs: Dataset, fn: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_across_gpus(pairs, fn, **{"num_proc": 2, **options})


def test_streams_and_launched_processes_are_refused(
    tiny_iqs: str, pairs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="IterableDataset, which has no num_proc"):
        map_across_gpus(pairs.to_iterable_dataset(), QualityScorer(tiny_iqs), num_proc=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"a launcher started 2 processes already.*score_in_shards"):
        map_across_gpus(pairs, QualityScorer(tiny_iqs), num_proc=2)


SCRIPT = """
import sys
from datasets import Dataset
from car_datasets import map_across_gpus

def upper(batch):
    return {"b": [text.upper() for text in batch["a"]]}

def main():
    print(map_across_gpus(Dataset.from_dict({"a": ["x", "y"]}), upper, num_proc=2)["b"][:])
"""
GUARD = 'if __name__ == "__main__":\n    main()\n'


def run(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_guarded_script_runs_and_an_unguarded_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(SCRIPT + GUARD)
    done = run(str(tmp_path / "good.py"))
    assert done.stdout == "['X', 'Y']\n", done.stderr
    (tmp_path / "bad.py").write_text(SCRIPT + "main()\n")
    done = run(str(tmp_path / "bad.py"))
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith('would start workers again. Put the call under `if __name__ == "__main__":`.')
    assert 'bad.py", line 11' in done.stderr


@pytest.mark.parametrize("command", [["-"], ["-c", SCRIPT + "main()\n"]])
def test_a_callable_of_a_notebook_is_told_to_move(command: list[str]) -> None:
    done = run(*command, text=SCRIPT + "main()\n")  # a pipe and a prompt have no file, as a notebook has none
    assert done.returncode == 1
    assert "fn=upper is defined in a notebook, a prompt or a pipe" in done.stderr
    assert "%%writefile" in done.stderr


FORKS_AFTER_CLUSTERING = """
import numpy as np
from datasets import Dataset
from car_datasets import ClusterModel, QualityScorer
vectors = list(np.random.default_rng(0).normal(size=(300, 16)))
ClusterModel.fit(Dataset.from_dict({"embedding": vectors}), k=5, kmeans=ENGINE)
rows = Dataset.from_dict({"instruction": ["a"] * 8, "output": ["b"] * 8})
rows.map(QualityScorer(MODEL), batched=True, num_proc=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torch", "sklearn"])
def test_a_worker_forked_after_clustering_says_so_instead_of_hanging(tiny_iqs: str, engine: str) -> None:
    if multiprocess.get_start_method() != "fork":
        pytest.skip("this Python does not fork")
    code = FORKS_AFTER_CLUSTERING.replace("MODEL", repr(tiny_iqs)).replace("ENGINE", repr(engine))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "forked from a process that had run a model" in done.stderr
