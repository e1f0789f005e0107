"""One score from several columns: `combine_scores`, a weighted sum of ranks or of standardised scores.

Does: bring scores of any scale to one, in all rows or within groups of them, and add them with weights.
Does not: run a model, choose weights, or give a score to a row that lacks one of them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from datasets import Dataset

from car_datasets.utils.columns import check_columns, read_numbers, refuse_other_datasets, refuse_overwrite

Floats = npt.NDArray[np.float64]


def _ranks(scores: Floats, groups: pd.Series[Any]) -> Floats:
    """Return the share of its group that each row outranks, from 0 to 1; rows of equal score share their places."""
    by_group = pd.Series(scores).groupby(groups)
    ranks = (by_group.rank(method="average") - 0.5) / by_group.transform("size")
    return np.asarray(ranks.to_numpy(), dtype=np.float64)


def _standardised(scores: Floats, groups: pd.Series[Any]) -> Floats:
    """Return the distance of each score from the mean of its group in standard deviations; 0 if all are equal."""
    by_group = pd.Series(scores).groupby(groups)
    centred = scores - by_group.transform("mean").to_numpy()
    spread = by_group.transform("std", ddof=0).to_numpy()
    # Of equal scores, rounding may leave a spread that is not quite zero.
    equal = by_group.transform("max").to_numpy() == by_group.transform("min").to_numpy()
    return np.asarray(np.where(equal, 0.0, centred / np.where(equal, 1.0, spread)), dtype=np.float64)


# How a column of scores is brought to a scale that all columns share; a new one can be named by `how`.
SCALES: dict[str, Callable[[Floats, pd.Series[Any]], Floats]] = {"rank": _ranks, "zscore": _standardised}


def combine_scores(
    dataset: Dataset,
    weights: Mapping[str, float],
    how: str = "rank",
    within: str | None = None,
    output_column: str = "combined_score",
) -> Dataset:
    """Add a column that combines several columns of scores: `combine_scores(rows, {"iqs_score": 1, "ifd": -0.5})`.

    Every column is brought to one scale, multiplied with its weight, and added; the sum is divided by the sum of the
    absolute weights. The scale is computed over the rows that have all of the scores, so that it is the same for each
    column. Select by the new column with `score_column="combined_score"` (`--score-column combined_score`).

    Args:
        dataset (`Dataset`): with the columns of scores; higher is better where the weight is positive.
        weights (`Mapping[str, float]`): of the columns, by name; a negative one for a column of which less is better.
        how (`str`): `"rank"`, by the share of rows that a row outranks, from 0 to 1, which no outlier moves; or
            `"zscore"`, by the distance from the mean in standard deviations, which keeps how far apart scores are.
        within (`str`, *optional*): a column of groups, such as languages or sources: ranks and means are then those of
            the group, so that a scorer's liking for some groups does not count. Null is a group too.
        output_column (`str`): the new column, float64; null for a row that lacks one of the scores.

    Returns:
        `Dataset`: the rows in their order, with the new column.

    Raises:
        ValueError: a column is missing, holds no numbers or infinite ones, or no row has all of them; a weight is no
            number or zero; `how` is unknown; or the new column exists.
    """
    refuse_other_datasets(dataset, "combine_scores", "combine_scores(Dataset.from_list(list(stream)), weights)")
    _check_weights(weights)
    if how not in SCALES:
        raise ValueError(f"how={how!r} is not known; choose one of {sorted(SCALES)}.")
    check_columns(dataset.column_names, (*weights, *([] if within is None else [within])), ())
    refuse_overwrite(dataset.column_names, [output_column], "output_column=...")
    columns = {name: read_numbers(dataset, name, math.nan).astype(np.float64) for name in weights}
    for name, scores in columns.items():
        if infinite := np.flatnonzero(np.isinf(scores)).tolist():
            raise ValueError(
                f"The column {name!r} holds infinite scores in {len(infinite)} rows, the first {infinite[:5]}. Score "
                "these rows again, or make their scores null, which leaves them out."
            )
    complete = np.flatnonzero(~np.isnan(np.stack(list(columns.values()))).any(axis=0))
    if not len(complete):
        raise ValueError(
            f"No row has a score in all of the columns {list(weights)}, so there is nothing to combine. "
            + ", ".join(f"{name!r} has {np.count_nonzero(~np.isnan(scores)):,}" for name, scores in columns.items())
            + f" of {len(dataset):,}."
        )
    groups = _groups(dataset, within)[complete]
    total = sum(weight * SCALES[how](columns[name][complete], pd.Series(groups)) for name, weight in weights.items())
    combined = np.full(len(dataset), np.nan)
    combined[complete] = total / sum(abs(weight) for weight in weights.values())
    return dataset.add_column(output_column, pa.array(combined, from_pandas=True))


def _check_weights(weights: Any) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(
            f"weights={weights!r} must map columns of scores to weights, such as {{'iqs_score': 1, 'ifd': -0.5}}."
        )
    for name, weight in weights.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not math.isfinite(weight) or weight == 0:
            raise ValueError(
                f"weights has {name!r}: {weight!r}; a weight is a number other than 0, negative where less is better. "
                "Leave out a column that should not count."
            )


def _groups(dataset: Dataset, within: str | None) -> npt.NDArray[np.int64]:
    """Return the number of each row's group; all rows are in one without a column of groups."""
    if within is None:
        return np.zeros(len(dataset), dtype=np.int64)
    values = dataset.select_columns([within]).with_format("arrow")[:][within].combine_chunks()
    try:
        codes = values.dictionary_encode(null_encoding="encode").indices
    except (pa.ArrowNotImplementedError, AttributeError) as error:
        raise ValueError(
            f"within={within!r} holds {values.type}, and must hold one text or number per row, by which rows are grouped."
        ) from error
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int64)
