"""Time `what_if` on 50,000 rows, compared with `select_car` for each of its lines."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from car_datasets import select_car, what_if
from tests.benchmarks.table import Line, best_of

ROWS, CLUSTERS = 50_000, 158


def measure() -> Iterator[Line]:
    """Measure other n1 and n2, and two other k, for which the rows are clustered anew."""
    rng = np.random.default_rng(0)
    plain = Dataset.from_dict(
        {
            "source_index": np.arange(ROWS),
            "iqs_score": rng.normal(size=ROWS),
            "iqs_tokens": rng.integers(5, 500, ROWS),
            "cluster": rng.integers(0, CLUSTERS, ROWS),
        }
    )
    pool = plain.add_column("embedding", list(rng.normal(size=(ROWS, 384)).astype(np.float32)))
    chosen = select_car(plain, 1000, 1)
    ours, lines = best_of(3, lambda: what_if(plain, chosen))
    theirs, _ = best_of(3, lambda: [select_car(plain, line.n1, line.n2, allow_worse=True) for line in lines])
    what = f"what_if, {ROWS:,} rows, {len(lines)} choices of n1 and n2; compared with select_car for each"
    yield Line(what, ours, theirs, target="<= 1 s", met=ours <= 1)
    ours, lines = best_of(3, lambda: what_if(pool, chosen))
    yield Line(f"the same with two other k, {len(lines)} choices in all", ours, target="<= 1 s", met=ours <= 1)
