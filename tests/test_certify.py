"""certify.py refuses results that differ; `make certify` itself runs in CI."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from tests import certify
from tests.certify import Run


def scored(order: str, shift: float = 0.0, swap: bool = False) -> Dataset:
    numbers = np.random.default_rng(0)
    scores, vectors = numbers.normal(size=200), numbers.normal(size=(200, 8))
    places = certify.places(order, 200)
    columns = {"iqs_score": scores[places] + shift, "embedding": vectors[places], "id": places}
    found = Dataset.from_dict({name: np.asarray(values).tolist() for name, values in columns.items()})
    return found.select([1, 0, *range(2, 200)]) if swap else found


@pytest.mark.parametrize(
    ("second", "fine"),
    [
        (scored("shuffled"), True),
        (scored("shuffled", shift=1e-6), True),
        (scored("shuffled", shift=1e-4), False),
        (scored("shuffled", swap=True), False),
    ],
)
def test_it_tells_the_same_from_another(
    second: Dataset, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([scored("as given"), second])
    monkeypatch.setattr(certify, "score", lambda run, folder: next(found))
    assert certify.certify(tmp_path, (Run(1), Run(2, None, "shuffled"))) is fine
    assert capsys.readouterr().out.endswith(
        "tolerance 1e-05: certified\n" if fine else "tolerance 1e-05: NOT certified\n"
    )


@pytest.mark.parametrize(("apart", "fine"), [(0.02, True), (0.2, False)])
def test_in_half_precision_only_rows_of_nearly_equal_scores_change_places(apart: float, fine: bool) -> None:
    scores = np.array([3.0, 2.0, 1.0, 1.0 - apart])
    assert certify.same_choice([0, 1, 2], [0, 1, 3], scores, certify.HALF_TOLERANCE) is fine
    assert certify.same_choice([0, 1, 2], [1, 0, 2], scores, certify.HALF_TOLERANCE)
    assert not certify.same_choice([0, 1, 2], [0, 1], scores, certify.HALF_TOLERANCE)
    assert not certify.same_choice([0, 1, 2], [1, 0, 2], scores, certify.TOLERANCE)
