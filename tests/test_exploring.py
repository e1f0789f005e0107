"""exploring.py: embedding-atlas gets the rows, columns and points of a result, and its real server answers."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from car_datasets import ColumnNames, curate, select_car, verify
from car_datasets.cli import app
from car_datasets.exploring import NEAREST, atlas_table, explore, names_of, write_atlas
from tests.reporting.test_plots import make_pool
from tests.test_recipe import short_rows

needs_atlas = pytest.mark.skipif(
    importlib.util.find_spec("embedding_atlas") is None, reason="needs pip install 'car-datasets[explore]'"
)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    pool = make_pool(200)
    pool.to_parquet(folder / "scored.parquet")
    select_car(pool.remove_columns("embedding"), 30, 1).to_parquet(folder / "selected.parquet")
    return folder


def test_the_file_has_our_columns_places_and_neighbours(curated: Path, tmp_path: Path) -> None:
    options = write_atlas(curated, tmp_path / "pool.parquet")
    assert options[0] == str(tmp_path / "pool.parquet")
    assert "--disable-projection" in options
    found, pool = Dataset.from_parquet(options[0]), make_pool(200)
    assert set(options[2:-1:2]) <= set(found.column_names)
    assert "embedding" not in found.column_names
    assert found["iqs_score"][:] == pool["iqs_score"][:]
    assert found["map_text"][:] == pool["text"][:]
    kept = Dataset.from_parquet(str(curated / "selected.parquet"))
    by = dict(zip(kept["source_index"][:], kept["selected_by"][:], strict=True))
    assert found["selected_by"][:] == [by.get(i, "not kept") for i in range(200)]
    vectors = np.array(pool["embedding"][:])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similar = units @ units.T
    for i, near in enumerate(found["map_neighbours"][:]):
        assert near["ids"][0] == i
        assert near["ids"] == np.argsort(-similar[i], kind="stable")[: NEAREST + 1].tolist()
        assert near["distances"] == pytest.approx((1 - similar[i][near["ids"]]).tolist(), abs=1e-5)


def test_the_table_for_a_notebook_is_the_file_and_says_what_its_columns_are(curated: Path, tmp_path: Path) -> None:
    table, columns = atlas_table(str(curated))
    assert columns == {
        "row_id": "map_row",
        "text": "map_text",
        "x": "map_x",
        "y": "map_y",
        "neighbors": "map_neighbours",
    }
    rows = table["map_row"].to_pylist()
    assert rows == list(range(200))
    assert {i for near in table["map_neighbours"].to_pylist() for i in near["ids"]} <= set(rows)
    written = Dataset.from_parquet(write_atlas(curated, tmp_path / "pool.parquet")[0])
    assert written.to_dict() == table.drop_columns("map_row").to_pydict()


def test_a_result_is_shown_and_verified_by_the_columns_of_its_receipt(
    tiny_iqs: str, tiny_embedder: str, tmp_path: Path
) -> None:
    source, folder = tmp_path / "rows.jsonl", tmp_path / "out"
    short_rows().to_json(source)
    names = {"score_column": "quality", "embedding_column": "vector", "cluster_column": "topic"}
    curate(source, folder, scorer=tiny_iqs, embedder=tiny_embedder, n1=5, k=3, **names)
    table = atlas_table(folder).table
    assert {"quality", "topic"} <= set(table.column_names)
    assert "vector" not in table.column_names
    assert names_of(folder, {"score_column": "other"}) == ColumnNames("other", "topic", "source_index", "vector")
    assert verify(folder, source=source).matches


def test_columns_of_the_users_keep_their_names(curated: Path, tmp_path: Path) -> None:
    for name in ("scored", "selected"):
        part = Dataset.from_parquet(str(curated / f"{name}.parquet"))
        part.add_column("map_x", ["mine"] * len(part)).to_parquet(tmp_path / f"{name}.parquet")
    table, columns = atlas_table(tmp_path)
    assert columns["x"] == "map_x_" and columns["y"] == "map_y"
    assert table["map_x"].to_pylist() == ["mine"] * 200
    assert table["map_x_"].to_pylist() == atlas_table(curated).table["map_x"].to_pylist()


@needs_atlas
def test_the_widget_takes_the_table(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedding_atlas.widget import EmbeddingAtlasWidget

    table, columns = atlas_table(curated)
    widget = EmbeddingAtlasWidget(table, **columns)
    data = widget._props["data"]
    assert data["id"] == "map_row" and data["neighbors"] == "map_neighbours"
    assert data["projection"] == {"x": "map_x", "y": "map_y"}
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(widget, "send", sent.append)
    asked = {"uuid": "1", "type": "json", "sql": f"SELECT * FROM {widget._table_name}"}
    widget._handle_custom_msg(asked, [])  # as a browser asks
    assert [row["map_row"] for row in sent[0]["result"]] == list(range(200))


def test_folders_that_cannot_be_explored_are_named(curated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no scored\.parquet"):
        write_atlas(tmp_path, tmp_path / "pool.parquet")
    for name in ("scored", "selected"):
        part = Dataset.from_parquet(str(curated / f"{name}.parquet"))
        part.remove_columns([c for c in part.column_names if c == "embedding"]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"no column 'embedding'.*--no-embeddings"):
        write_atlas(tmp_path, tmp_path / "pool.parquet")


def test_without_embedding_atlas_the_extra_is_named(curated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "embedding_atlas", None)  # as where it is not installed
    done = CliRunner().invoke(app, ["explore", str(curated)])
    assert done.exit_code == 2
    assert "pip install 'car-datasets[explore]'" in done.stderr


def test_the_server_gets_no_token(curated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "embedding_atlas"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "cli.py").write_text(
        "import json, os, pathlib\nfrom huggingface_hub import get_token\n"
        f"pathlib.Path({str(tmp_path / 'seen.json')!r}).write_text(json.dumps([get_token(), dict(os.environ)]))"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_of_a_login")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PGPASSWORD")
    kept = {"PYTHONPATH": paths, "HF_HOME": str(tmp_path / "home"), "MONKEY": "kept"}
    for name, value in (kept | dict.fromkeys(secrets, "hf_secret")).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "embedding_atlas", raising=False)
    explore(curated)
    token, seen = json.loads((tmp_path / "seen.json").read_text())
    assert token is None
    assert kept.items() <= seen.items() and "PATH" in seen
    assert not {name for name, value in seen.items() if "hf_" in value}
    assert os.environ["HF_TOKEN"] == "hf_secret"


@pytest.mark.slow
@needs_atlas
def test_a_real_server_answers(curated: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "car_datasets",
        "explore",
        str(curated),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None
            assert time.monotonic() < deadline
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                    assert b"<html" in answer.read().lower()
                    break
            except OSError:
                time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/metadata.json", timeout=5) as answer:
            assert b"map_neighbours" in answer.read()
        query = json.dumps({"type": "arrow", "sql": "SELECT count(*) AS n FROM dataset"}).encode()  # as the page asks
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/query", query, timeout=5) as answer:
            assert pa.ipc.open_stream(answer.read()).read_all()["n"].to_pylist() == [200]
    finally:
        os.killpg(server.pid, signal.SIGINT)
        server.wait(30)
