"""Compare the losses of arms: differences to a random arm with intervals, verdicts in words, and what a run could show.

Does: pair arms by seed and evaluation row; give each difference an interval that keeps its level with few seeds.
Does not: train, evaluate, read files, or write a report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from car_datasets.utils.settings import SEED

Floats = npt.NDArray[np.float64]
Losses = Mapping[str, Mapping[int, npt.ArrayLike]]  # arm to seed to one number per evaluation row

BASELINE, CONTROL = "random", "control"
LEVEL = 0.95
SAMPLES = 2_000  # bootstrap samples of evaluation rows
ALL = "all"  # the name of the figures over all domains
NATS, SHARE = "nats", "share"  # units of a difference: nats per answer token, or share of constraints that are met
NO_DIFFERENCE, CANNOT_TELL = "no difference shown", "this experiment cannot tell"


@dataclass(frozen=True)
class Difference:
    """How much better an arm is than the random arm; above 0 is better.

    Args:
        value (`float`): nats per answer token, or share of constraints.
        low, high (`float`): a 95 % interval.
        seeds, rows (`int`): what it was measured on.
    """

    value: float
    low: float
    high: float
    seeds: int
    rows: int


@dataclass(frozen=True)
class Power:
    """What a run could have shown.

    Args:
        smallest (`float`): the smallest difference that would have been shown, half the width of the median arm's
            interval.
        seeds (`int`, *optional*): how many times as many seeds would halve it; `None` if no number of seeds would.
        tokens (`int`, *optional*): how many times as many tokens per arm would halve it, if noise falls with their
            square root; `None` if none would.
        rows (`int`, *optional*): how many times as many evaluation rows would halve it; `None` if none would.
    """

    smallest: float
    seeds: int | None
    tokens: int | None
    rows: int | None


@dataclass(frozen=True)
class Comparison:
    """All arms of an experiment compared with the random arm.

    Args:
        unit (`str`): `"nats"` or `"share"`.
        means (`dict[str, float]`): nats per answer token, or share of constraints, of every arm.
        differences (`dict[str, dict[str, Difference]]`): arm to domain to difference; the domain `"all"` is first.
        verdicts (`dict[str, str]`): what is said of every arm but the random one.
        can_tell (`bool`): False if the control did not lose.
        advice (`str`): what to raise if it did not; else `""`.
        power ([`Power`]): what the run could have shown.
    """

    unit: str
    means: dict[str, float]
    differences: dict[str, dict[str, Difference]]
    verdicts: dict[str, str]
    can_tell: bool
    advice: str
    power: Power

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class _Parts(NamedTuple):
    """The estimate of a difference, and the variances of its mean over seeds and over rows."""

    value: float
    over_seeds: float
    over_rows: float
    seeds: int
    rows: int

    def half_width(self, seeds: float = 1, tokens: float = 1, rows: float = 1) -> float:
        """Return half the width of the interval, or what it would be with so many times the seeds, tokens or rows."""
        by_seeds, by_rows = self.over_seeds / (seeds * tokens), self.over_rows / rows
        at_seeds, at_rows = _quantile(self.seeds * seeds - 1), _quantile(max(1.0, self.rows * rows - 1))
        return math.sqrt(at_seeds**2 * by_seeds + at_rows**2 * by_rows)


def compare(
    losses: Losses,
    tokens: npt.ArrayLike,
    domains: Sequence[str],
    *,
    unit: str = NATS,
    samples: int = SAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare every arm with the random one.

    A difference is the sum over evaluation rows of the random arm's losses minus the arm's, divided by the sum of
    tokens, and averaged over seeds: both arms are paired by seed and row. Its interval has two parts, each as wide as
    Student's t says for its number of values: the variance of the mean over seeds, in the unbiased form, and that of
    the mean over rows, by a bootstrap over rows that keeps their seeds together. The squares of both half widths are
    added. A percentile bootstrap over three seeds would be too narrow by half, and one quantile for the sum of both
    variances (Welch and Satterthwaite) says "better" or "worse" of equal arms too often, in up to 7 of 100 runs.

    Args:
        losses (`Mapping`): arm to seed to summed nats of every evaluation row; for `unit="share"`, 1 for a constraint
            that is met and 0 for one that is not. Needs the arm `"random"`; `"control"` is the one that must lose.
        tokens (`(rows,)`): answer tokens of every evaluation row; ones for `unit="share"`.
        domains (`Sequence[str]`): the domain of every evaluation row.
        unit (`str`): `"nats"` or `"share"`.
        samples (`int`): bootstrap samples.
        seed (`int`): seed of the bootstrap.

    Returns:
        [`Comparison`]: equal for equal input on any machine, up to rounding.

    Raises:
        ValueError: there is no random arm, arms have different seeds or rows, or there are fewer than two seeds.
    """
    table = _as_arrays(losses, np.asarray(tokens, dtype=np.float64), domains, unit)
    weights = np.asarray(tokens, dtype=np.float64)
    better = {NATS: 1.0, SHARE: -1.0}[unit]  # a lower loss is better, and a higher share
    masks = {ALL: np.ones(len(weights), dtype=bool)} | {d: np.array(domains) == d for d in dict.fromkeys(domains)}
    parts: dict[str, dict[str, _Parts]] = {arm: {} for arm in table if arm != BASELINE}
    for domain, mask in masks.items():
        rows = int(mask.sum())
        # How often each row is drawn in each sample: the same for all arms, which stay paired.
        drawn = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=samples).astype(np.float64)
        for arm, found in parts.items():
            found[domain] = _parts(better * (table[BASELINE] - table[arm])[:, mask], weights[mask], drawn)
    differences = {arm: {d: _difference(part) for d, part in found.items()} for arm, found in parts.items()}
    can_tell = CONTROL not in differences or differences[CONTROL][ALL].high < 0
    power = _power([found[ALL] for arm, found in parts.items() if arm != CONTROL] or [parts[CONTROL][ALL]])
    return Comparison(
        unit=unit,
        means={arm: float(values.sum(axis=1).mean() / weights.sum()) for arm, values in table.items()},
        differences=differences,
        verdicts={arm: verdict(found[ALL], unit) if can_tell else CANNOT_TELL for arm, found in differences.items()},
        can_tell=can_tell,
        advice="" if can_tell else _advice(differences[CONTROL][ALL], unit),
        power=power,
    )


def _as_arrays(losses: Losses, tokens: Floats, domains: Sequence[str], unit: str) -> dict[str, Floats]:
    """Return arm to `(seeds, rows)`, seeds in the order of the random arm's; raise ValueError if arms do not pair."""
    if unit not in (NATS, SHARE):
        raise ValueError(f"unit={unit!r} is not known; choose {NATS!r} or {SHARE!r}.")
    if BASELINE not in losses or len(losses) < 2:
        raise ValueError(f"losses has the arms {list(losses)}; {BASELINE!r} and one more are needed.")
    if tokens.ndim != 1 or len(tokens) != len(domains) or len(tokens) < 2 or not (tokens > 0).all():
        raise ValueError(
            f"tokens has the shape {tokens.shape} and domains {len(domains)} entries; pass one number above 0 and one "
            "domain for each of at least two evaluation rows."
        )
    seeds = list(losses[BASELINE])
    if len(seeds) < 2:
        raise ValueError(f"losses has the seeds {seeds}; two are the least, and three are better: seeds=3 (--seeds 3).")
    table = {}
    for arm, runs in losses.items():
        if set(runs) != set(seeds):
            raise ValueError(f"The arm {arm!r} has the seeds {sorted(runs)}, and {BASELINE!r} has {sorted(seeds)}.")
        values = np.array([np.asarray(runs[s], dtype=np.float64) for s in seeds])
        if values.shape != (len(seeds), len(tokens)) or not np.isfinite(values).all():
            raise ValueError(
                f"The arm {arm!r} has losses of shape {values.shape}, or some that are not finite; "
                f"{(len(seeds), len(tokens))} finite ones are needed."
            )
        table[arm] = values
    return table


def _parts(paired: Floats, weights: Floats, drawn: Floats) -> _Parts:
    """Return the estimate and its two variances from paired differences `(seeds, rows)` and samples of rows."""
    seeds, rows = paired.shape
    by_seed = paired.sum(axis=1) / weights.sum()
    over_rows = math.inf  # of one row nothing is known
    if rows > 1:
        over_rows = float(np.var((drawn @ paired.mean(axis=0)) / (drawn @ weights), ddof=1)) * rows / (rows - 1)
    return _Parts(float(by_seed.mean()), float(by_seed.var(ddof=1) / seeds), over_rows, seeds, rows)


def _quantile(freedom: float) -> float:
    """Return the quantile of Student's t that a two-sided interval has at its upper end."""
    from scipy.special import stdtrit  # `t.ppf` without its checks, which take a hundred times as long

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _difference(part: _Parts) -> Difference:
    half = part.half_width()
    return Difference(part.value, part.value - half, part.value + half, part.seeds, part.rows)


def _power(parts: Sequence[_Parts]) -> Power:
    """Return what the median arm of a run could have shown."""
    part = sorted(parts, key=lambda each: each.half_width())[len(parts) // 2]
    half = part.half_width()

    def factor(name: str) -> int | None:
        times = np.arange(2, 65)
        found = [int(n) for n in times if part.half_width(**{name: float(n)}) <= half / 2]
        return found[0] if found else None

    return Power(half, factor("seeds"), factor("tokens"), factor("rows"))


def verdict(difference: Difference, unit: str = NATS) -> str:
    """Return in words what an interval says, such as `better than random by .021 nats (.012 to .030)`."""
    if difference.low <= 0 <= difference.high:
        return NO_DIFFERENCE
    better = difference.value > 0
    low, high = sorted((abs(difference.low), abs(difference.high)))
    value = abs(difference.value)
    if unit == SHARE:
        figures = f"{100 * value:.1f} points ({100 * low:.1f} to {100 * high:.1f})"
    else:
        figures = f"{short(value)} nats ({short(low)} to {short(high)})"
    return f"{'better' if better else 'worse'} than {BASELINE} by {figures}"


def short(value: float) -> str:
    """Return a number with three digits after the point, and without the zero before it, such as `.021` or `-.004`."""
    text = f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and not text.endswith("1.000") else text


def _advice(control: Difference, unit: str) -> str:
    """Return what to raise if the control did not lose."""
    shown = verdict(control, unit)
    return (
        f"The control was trained on answers with shuffled words and must lose, but the result for it is: {shown}. Raise the "
        "tokens of each arm (tokens=, --tokens), the number of seeds (seeds=, --seeds), or take a larger model "
        "(model=, --model)."
    )
