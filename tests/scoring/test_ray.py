"""`OnRay`: as `.map` on a table, and through a real local Ray, one of whose workers is killed."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from car_datasets import QualityScorer, TextEmbedder
from car_datasets.scoring.engines import OnRay
from car_datasets.scoring.stage import add_columns
from tests.conftest import ROOT

BATCH, FILES = 8, 6


@pytest.fixture
def rows() -> Dataset:
    """Return 96 rows with an id that is no row number."""
    answers = ["Red, green and blue.", "The sea is wide.", "6", "a, b, c", "Bad."]
    return Dataset.from_dict(
        {
            "source_index": [1000 + 7 * i for i in range(96)],
            "instruction": [f"Write a list of {i} colours." for i in range(96)],
            "output": [answers[i % 5] * (1 + i % 3) for i in range(96)],
        }
    )


def test_a_table_gets_what_map_gives(tiny_iqs: str, tiny_embedder: str, rows: Dataset) -> None:
    table = rows.with_format("arrow")[:]
    for stage in (QualityScorer(tiny_iqs, diagnostics=True), TextEmbedder(tiny_embedder)):
        found, wanted = OnRay(stage)(table), add_columns(rows, stage, "")
        assert found.column_names == wanted.column_names
        assert found.schema.types == wanted.features.arrow_schema.types
        assert found.select(rows.column_names).equals(table)
        for name in stage.output_features():
            assert found.column(name).to_pylist() == wanted[name][:]


def test_rows_without_a_score_stay_null(tiny_iqs: str, rows: Dataset) -> None:
    table = rows.with_format("arrow")[:2].set_column(2, "output", pa.nulls(2, pa.string()))
    found = OnRay(QualityScorer(tiny_iqs, on_invalid="mark"))(table)
    assert found.schema.field("iqs_score").type == pa.float32()
    assert found.column("iqs_score").null_count == 2


def test_mistakes_name_the_call_that_mends_them(tiny_iqs: str, rows: Dataset) -> None:
    stage = OnRay(QualityScorer(tiny_iqs))
    with pytest.raises(ValueError, match=r"batch is a dict.*batch_format='pyarrow'"):
        stage(rows[:2])  # type: ignore[arg-type]
    table = rows.with_format("arrow")[:2]
    with pytest.raises(ValueError, match=r"iqs_score.*output_column="):
        stage(stage(table))


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Start a local Ray, which does not report its use."""
    folder = tempfile.mkdtemp(prefix="ray-")  # not tmp_path: its sockets' names must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        found = pytest.importorskip("ray", reason="needs the extra `ray`")
        found.init(
            num_cpus=4,  # as Ray counts: two for the actors, the others to read and to write
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
        )
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        yield ray
        found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_through_ray_with_a_killed_worker(ray: Any, tiny_iqs: str, rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(FILES):
        rows.shard(FILES, i).to_parquet(tmp_path / "in" / f"{i}.parquet")
    log = tmp_path / "log"
    log.touch()

    class Slow(OnRay):  # local, so that Ray sends it by value
        def __call__(self, table: pa.Table) -> pa.Table:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.5)
            return super().__call__(table)

    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            workers = log.read_text().split()
            if len(workers) >= 3:
                os.kill(int(workers[-1]), signal.SIGKILL)  # it has this batch at hand
                killed.append(int(workers[-1]))
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    scorer = QualityScorer(tiny_iqs, diagnostics=True)
    rows_in = ray.data.read_parquet(str(tmp_path / "in")).repartition(FILES)  # or so few rows would be one block
    rows_in.map_batches(
        Slow,
        fn_constructor_args=(scorer,),
        batch_format="pyarrow",
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=2),
    ).write_parquet(str(tmp_path / "out"))
    killer.join()
    workers = log.read_text().split()
    assert len(killed) == 1
    assert len(workers) > 96 // BATCH  # the batch of the killed one was done again
    assert len(set(workers)) >= 3  # two, and the one that took the place of the killed one
    found = pq.read_table(tmp_path / "out").sort_by("source_index")
    wanted = add_columns(rows, scorer, "").with_format("arrow")[:]
    assert found.column_names == wanted.column_names
    others = [name for name in wanted.column_names if name != "iqs_score"]
    assert found.select(others).to_pylist() == wanted.select(others).to_pylist()  # every row once, with its id
    assert np.allclose(found["iqs_score"], wanted["iqs_score"], atol=1e-5)
