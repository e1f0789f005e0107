"""columns.py: embeddings from Arrow's buffers as float32 matrices, and (rows.py) per-text numbers back as one value per row."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Array2D, Dataset, Features, LargeList, List, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from car_datasets import SelectionReport, select_car, select_car_streaming
from car_datasets.loading.schemas import as_column_names
from car_datasets.scoring.stage import Rows, invalid_rows_message, row_names
from car_datasets.utils import columns
from car_datasets.utils.columns import (
    as_arrow,
    embedding_batches,
    join_columns,
    matrix_of,
    read_embeddings,
    refuse_overwrite,
)

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4) / 2  # exact in float16 too


def dataset_of(rows: Any, kind: Any = None) -> Dataset:
    """Return a dataset with one column of vectors; a row of `None` has none."""
    rows = [None if row is None else list(row) for row in rows]
    return Dataset.from_dict({"v": rows}, features=Features({"v": kind or List(Value("float32"))}))


KINDS = {
    "list": List(Value("float32")),
    "large_list": LargeList(Value("float32")),
    "fixed_size_list": List(Value("float32"), length=4),
    "float16": List(Value("float16")),
    "float64": List(Value("float64")),
    "fixed float64": List(Value("float64"), length=4),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_list_gives_the_same_matrix(kind: Any) -> None:
    matrix, present = read_embeddings(dataset_of(ROWS, kind), "v")
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, ROWS)
    assert present.tolist() == list(range(10))


def test_whole_numbers_are_numbers() -> None:
    matrix, _ = read_embeddings(dataset_of([[1, 2], [3, 4]], List(Value("int32"))), "v")
    assert (matrix.dtype, matrix.tolist()) == (np.float32, [[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("nulls", [(), (0, 3, 4, 9)], ids=["no nulls", "nulls"])
def test_parts_of_a_dataset_give_their_own_rows(kind: Any, nulls: tuple[int, ...]) -> None:
    rows = [None if i in nulls else row for i, row in enumerate(ROWS)]
    whole = dataset_of(rows, kind)
    parts = {
        "slice": (whole.select(range(3, 8)), range(3, 8)),
        "selected": (whole.select([8, 1, 4, 1]), [8, 1, 4, 1]),
        "reversed": (whole.select(range(9, -1, -1)), range(9, -1, -1)),
        "taken from pieces": (
            concatenate_datasets([whole.select(range(n, n + 2)) for n in (0, 2, 4, 6, 8)]).select([9, 0, 4, 5, 3, 9]),
            [9, 0, 4, 5, 3, 9],
        ),
        "joined": (concatenate_datasets([whole.select(range(5, 10)), whole.select([2, 0])]), [5, 6, 7, 8, 9, 2, 0]),
        "formatted": (whole.with_format("numpy"), range(10)),
    }
    for name, (part, order) in parts.items():
        matrix, present = read_embeddings(part, "v")
        kept = [i for i in order if i not in nulls]
        np.testing.assert_array_equal(matrix, ROWS[kept], err_msg=name)
        assert [list(order)[i] for i in present] == kept, name


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.lists(st.none() | st.lists(st.floats(-9, 9, width=16), min_size=3, max_size=3), min_size=1, max_size=12),
    st.lists(st.integers(0, 12), max_size=3),
    st.sampled_from([pa.list_, pa.large_list, lambda of: pa.list_(of, 3)]),
)
def test_however_the_rows_are_cut_into_chunks(rows: list[list[float] | None], cuts: list[int], kind: Any) -> None:
    ends = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    whole = pa.array(rows, kind(pa.float32()))
    chunks = pa.chunked_array([whole.slice(a, b - a) for a, b in pairwise(ends)])
    matrix, present = matrix_of(chunks, "v")
    assert present.tolist() == [i for i, row in enumerate(rows) if row is not None]
    assert matrix.tolist() == [row for row in rows if row is not None]


def test_a_contiguous_float32_column_is_not_copied() -> None:
    dataset = dataset_of(ROWS)
    matrix, _ = read_embeddings(dataset, "v")
    buffer = dataset.data.column("v").chunk(0).values.to_numpy(zero_copy_only=True)
    assert np.shares_memory(matrix, buffer)
    part, _ = read_embeddings(dataset.select(range(3, 8)), "v")
    assert np.shares_memory(part, buffer[12:32])
    np.testing.assert_array_equal(part, ROWS[3:8])


def test_a_dataset_read_from_disk(tmp_path: Any) -> None:
    dataset_of(ROWS).save_to_disk(tmp_path / "saved", num_shards=3)
    matrix, _ = read_embeddings(load_from_disk(tmp_path / "saved"), "v")
    np.testing.assert_array_equal(matrix, ROWS)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BATCH", 3)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_vectors_are_counted_in_the_rows_that_a_filter_left(kind: Any) -> None:
    dataset = dataset_of([None, *ROWS, None, None], kind)
    assert columns.count_vectors(dataset, "v") == len(ROWS)
    assert columns.count_vectors(dataset.select([0, 3, 5, 11, 2]), "v") == 3
    assert columns.count_vectors(dataset.select([]), "v") == columns.count_vectors(dataset, "other") == 0


@pytest.mark.usefixtures("small_batches")
def test_batches_are_views_of_the_column_where_it_lies_in_one_piece() -> None:
    dataset = dataset_of(ROWS)
    buffer = dataset.data.column("v").chunk(0).values.to_numpy(zero_copy_only=True)
    batches = list(embedding_batches(dataset, "v"))
    assert [len(matrix) for matrix, _ in batches] == [3, 3, 3, 1]
    assert all(np.shares_memory(matrix, buffer) for matrix, _ in batches)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_batches_from_a_memory_mapped_file(kind: Any, tmp_path: Any) -> None:
    dataset_of([None, *ROWS, None, None, None], kind).save_to_disk(tmp_path / "saved")
    dataset = load_from_disk(tmp_path / "saved")
    whole = pa.types.is_float32(dataset.data.column("v").type.value_type)
    mapped = dataset.data.column("v").chunk(0).flatten().to_numpy(zero_copy_only=True)
    batches = list(embedding_batches(dataset, "v"))
    assert [len(matrix) for matrix, _ in batches] == [2, 3, 3, 2]  # the last batch of three has no row
    assert np.concatenate([present for _, present in batches]).tolist() == list(range(1, 11))
    np.testing.assert_array_equal(np.concatenate([matrix for matrix, _ in batches]), ROWS)
    assert np.shares_memory(batches[1][0], mapped) is whole


@pytest.mark.usefixtures("small_batches")
def test_rows_that_are_not_finite_are_counted_over_all_batches() -> None:
    rows = [[1.0, 2.0]] * 4 + [[math.nan, 2.0]] + [[3.0, math.inf]] * 4
    given = []
    with pytest.raises(ValueError, match=r"not finite in 5 rows, the first \[4, 5, 6, 7, 8\]"):
        given.extend(embedding_batches(dataset_of(rows), "v"))
    assert len(given) == 1  # nothing after the first bad row


@pytest.mark.usefixtures("small_batches")
def test_lengths_are_compared_over_batches() -> None:
    with pytest.raises(ValueError, match=r"of the lengths \[2, 3\]"):
        list(embedding_batches(dataset_of([[1, 2]] * 3 + [[1, 2, 3]] * 3), "v"))


def test_large_but_finite_values_are_not_refused() -> None:
    """Read values whose sum overflows, though they do not."""
    matrix, _ = read_embeddings(dataset_of([[3e38, 3e38], [-3e38, 3e38]]), "v")
    assert np.isfinite(matrix).all()


BAD = {
    "missing": (dataset_of(ROWS), "w", r"no column 'w'; it has \['v'\].*embedding_column="),
    "all null": (dataset_of([None, None]), "v", "'v' holds no embeddings, only nulls"),
    "no rows": (dataset_of([]), "v", "holds no embeddings"),
    "unequal": (dataset_of([[1, 2], [1, 2, 3]]), "v", r"of the lengths \[2, 3\]; all must have one length"),
    "unequal chunks": (
        concatenate_datasets([dataset_of([[1, 2]]), dataset_of([[1, 2, 3]])]),
        "v",
        r"of the lengths \[2, 3\]; all must have one length",
    ),
    "empty lists": (dataset_of([[], []]), "v", r"of the lengths \[0\]"),
    "NaN": (dataset_of([[1, 2], None, [math.nan, 2]]), "v", r"not finite in 1 rows, the first \[2\]"),
    "infinite": (dataset_of([[math.inf, 2]] * 7), "v", r"not finite in 7 rows, the first \[0, 1, 2, 3, 4\]"),
    "null in a list": (dataset_of([[1, 2], [None, 2]]), "v", r"not finite in 1 rows, the first \[1\]"),
    "numbers": (Dataset.from_dict({"v": [1.0, 2.0]}), "v", "'v' holds double, not lists of numbers"),
    "text": (Dataset.from_dict({"v": ["a", "b"]}), "v", "'v' holds string, not lists of numbers"),
    "lists of text": (Dataset.from_dict({"v": [["a"], ["b"]]}), "v", "'v' holds lists of string, not of numbers"),
    "lists of lists": (Dataset.from_dict({"v": [[[1.0]], [[2.0]]]}), "v", "'v' holds lists of list.*, not of numbers"),
    "matrices": (
        Dataset.from_dict({"v": [[[1.0, 2.0]]]}, features=Features({"v": Array2D((1, 2), "float32")})),
        "v",
        "'v' holds extension.*, not lists of numbers",
    ),
}


@pytest.mark.parametrize(("dataset", "column", "message"), BAD.values(), ids=BAD)
def test_read_embeddings_refuses(dataset: Dataset, column: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_embeddings(dataset, column)


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"not finite in 1 rows, the first \[1\]"):
        read_embeddings(dataset_of([[1.0], [1e300]], List(Value("float64"))), "v")


@pytest.mark.parametrize(
    "rows", [[[1, 2], None, [3, 4]], [np.array([1.0, 2.0]), None, (3, 4)]], ids=["lists", "arrays"]
)
def test_python_rows_become_arrow_rows(rows: Any) -> None:
    values = as_arrow(rows)
    assert values.type == pa.list_(pa.float32())
    assert values.to_pylist() == [[1.0, 2.0], None, [3.0, 4.0]]


def test_a_batch_of_nulls_has_no_rows() -> None:
    matrix, present = matrix_of(as_arrow([None, None]), "v")
    assert (len(matrix), len(present)) == (0, 0)


# rows.py --------------------------------------------------------------------------------------------------------------


def test_values_of_texts_go_back_to_their_rows() -> None:
    rows = Rows(["a", "b", "c"], [2, 0, 1], ["ok", "null", "ok"])
    assert [part.tolist() for part in rows.split(np.array([1.0, 2.0, 3.0]))] == [[1.0, 2.0], [], [3.0]]


def test_the_vector_of_a_row_is_the_mean_of_its_texts_at_their_mean_length() -> None:
    rows = Rows(["a", "b", "c", "d", "e"], [1, 0, 2, 2], ["ok", "null", "ok", "ok"])
    vectors = np.array([[3, 4], [1, 0], [0, 1], [0, 2], [0, -2]], dtype=np.float32)
    single, none, two, opposite = rows.mean_vectors(vectors)
    assert (single.tolist(), none) == ([3, 4], None)
    np.testing.assert_allclose(two, [0.5**0.5, 0.5**0.5], rtol=1e-6)  # of length 1, as both texts
    assert opposite.tolist() == [0, 0]  # no direction, and no division by 0
    assert {v.dtype for v in (single, two, opposite)} == {np.dtype("float32")}


def test_invalid_rows_are_counted_and_named() -> None:
    message = invalid_rows_message(["null", "bad", *["null"] * 6], [4, 9, 5, 6, 7, 8, 10, 11], 1000)
    assert message.startswith("8 of 1000 rows cannot be scored: 7 null (rows 4, 5, 6, 7, 8, ...); 1 bad (rows 9). ")
    assert "on_invalid='mark'" in message


def test_rows_are_named_by_source_index_where_there_is_one() -> None:
    assert row_names({"text": ["a", "b", "c"]}, [0, 2]) == [0, 2]
    assert row_names({"source_index": ["x", "y", "z"]}, [0, 2]) == ["x", "z"]


def test_taken_columns_are_named_with_the_option_that_renames() -> None:
    refuse_overwrite(["a", "b"], ["c"], "output_column=")
    with pytest.raises(ValueError, match=r"column\(s\) \['b', 'a'\].*Pass output_column= to name"):
        refuse_overwrite(["a", "b"], ["b", "c", "a"], "output_column=")


def test_columns_are_the_same_in_whatever_order_they_were_named() -> None:
    assert (
        as_column_names({"b": "2", "a": "1"}) == as_column_names([("a", "1"), ("b", "2")]) == (("a", "1"), ("b", "2"))
    )


def test_joined_columns_keep_order_format_and_an_empty_dataset() -> None:
    left = Dataset.from_dict({"a": [1, 2, 3, 4]}).select([3, 0, 2]).with_format("numpy")
    right = Dataset.from_dict({"b": ["x", "y", "z"]})
    found = join_columns(left, right)
    assert found.with_format(None).to_dict() == {"a": [4, 1, 3], "b": ["x", "y", "z"]}
    assert found.format["type"] == "numpy"
    none = join_columns(left.select([]), right.select([]))
    assert (none.column_names, len(none)) == (["a", "b"], 0)


def test_rows_in_no_cluster_have_the_labels_of_scikit_learn_and_no_others() -> None:
    pool = Dataset.from_dict({"iqs_score": [0.1, 0.2, 0.3, 0.4], "cluster": [1, -1, -2, -3]})
    assert columns.read_clusters(pool, "cluster").tolist() == [1, -1, -1, -1]
    missing = Dataset.from_dict({"cluster": [2.0, None, math.nan]})
    assert columns.read_clusters(missing, "cluster").tolist() == [2, -1, -1]
    assert select_car(pool, n1=1, n2=1)["cluster_rank"][:] == [0, 1]
    broken = Dataset.from_dict({"iqs_score": [0.1, 0.2], "cluster": [0, -4]})
    chosen = broken.select([0]).add_column("selected_by", ["score"]).add_column("source_index", [0])
    for use in (
        lambda: select_car(broken, n1=1),
        lambda: select_car_streaming(broken.to_iterable_dataset(), n1=1, n2=1),
        lambda: SelectionReport.from_selection(broken, chosen),
    ):
        with pytest.raises(ValueError, match="the cluster -4 in row 1"):
            use()
