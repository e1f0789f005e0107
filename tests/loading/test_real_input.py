"""The real thing: 9,229 rows of Alpaca from the command line, on the embedded default."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest


@pytest.mark.slow
@pytest.mark.shared
def test_curate_alpaca(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "alpaca_9k.json"
    command = [sys.executable, "-m", "car_datasets", "curate", str(source), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(source.read_text(encoding="utf-8"))
    chosen = json.loads((tmp_path / "out" / "selected.json").read_text(encoding="utf-8"))
    assert len(chosen) >= 1000
    assert all({k: c[k] for k in rows[0]} == rows[c["source_index"]] for c in chosen)  # every row traced to its source
    scored = pq.read_table(tmp_path / "out" / "scored.parquet", columns=["iqs_score", "source_index"])
    assert scored.num_rows == len(rows)
    assert scored["source_index"].to_pylist() == list(range(len(rows)))
    assert scored["iqs_score"].null_count == 0
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2
    assert peak < 24, f"{peak:.1f} GB"
