"""The statistics of the protocol: robust means, track bootstraps, degradation levels, Holm.

Plain numpy, deterministic. A matrix of tracks is ``[tracks, levels]``: a row is one seed's chain
over the levels of magnitude pruning, NaN marks a level that was not run. Levels of one track are
correlated, so every bootstrap resamples whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Contrast",
    "binomial_tail",
    "bootstrap_interval",
    "degradation_level",
    "holm",
    "iqm",
    "mean",
    "normalised_return",
    "restricted_levels",
    "restricted_mean",
    "sign_flip",
]

_EXACT_PAIRS = 15

Array = NDArray[np.float64]
Statistic = Callable[[Array, int], Array]


def mean(x: ArrayLike, axis: int = -1) -> Array:
    """Mean along ``axis`` over the values that are there.

    Args:
        x: Any shape; NaN marks a missing value.
        axis: The axis to reduce.

    Returns:
        ``x`` without ``axis``; NaN where no value is there.
    """
    values = np.asarray(x, dtype=np.float64)
    there = ~np.isnan(values)
    return _weighted_mean(values, there.astype(np.float64), axis)


def iqm(x: ArrayLike, axis: int = -1) -> Array:
    """Interquartile mean along ``axis`` over the values that are there.

    Each of the n sorted values stands for 1/n of the sample, and a value that straddles a quartile
    counts by the part inside: weights 1/6, 2/3, 1/6 for n = 3, and no jumps as seeds are added. For
    n divisible by four this is the usual 25% trimmed mean.

    Args:
        x: Any shape; NaN marks a missing value.
        axis: The axis to reduce.

    Returns:
        ``x`` without ``axis``; NaN where no value is there.

    Source: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice" (the trimmed mean); the fractional weights are ours.
    """
    values = np.sort(np.moveaxis(np.asarray(x, dtype=np.float64), axis, -1), axis=-1)
    count = np.sum(~np.isnan(values), axis=-1, keepdims=True)  # np.sort leaves NaN at the end
    position = np.arange(values.shape[-1])
    inside = np.minimum(position + 1, 0.75 * count) - np.maximum(position, 0.25 * count)
    return _weighted_mean(values, np.maximum(inside, 0.0), -1)


def _weighted_mean(values: Array, weight: Array, axis: int) -> Array:
    total = np.sum(weight, axis=axis)
    summed = np.sum(np.where(weight > 0, values, 0.0) * weight, axis=axis)
    return np.where(total > 0, summed / np.where(total > 0, total, 1.0), np.nan)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Statistic = iqm,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile bootstrap interval of a statistic over tracks, at every level.

    Args:
        values: ``[tracks, levels]``; NaN marks a missing level.
        statistic: ``statistic(x, axis)`` reduces the track axis, such as :func:`iqm`.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Number of resamples of whole tracks.
        seed: Seed of the resampling; the same seed gives the same interval.

    Returns:
        ``low[levels], high[levels]``; NaN at levels with fewer than two tracks, where a bootstrap
        would report a width of zero.

    Raises:
        ValueError: ``values`` is not a matrix, or ``confidence`` or ``resamples`` is out of range.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"values must have shape [tracks, levels], got {values.shape}")
    low = np.full(values.shape[1], np.nan)
    high = low.copy()
    _check_resampling(confidence, resamples)
    if values.shape[0] < 2:
        return low, high

    samples = statistic(values[_resample(values.shape[0], resamples, seed)], 1)
    for level in np.flatnonzero(np.sum(~np.isnan(values), axis=0) >= 2):
        column = samples[:, level]
        low[level], high[level] = _interval(column[~np.isnan(column)], confidence)
    return low, high


def normalised_return(R: ArrayLike, random: ArrayLike, dense_median: ArrayLike) -> Array:
    """Return on the scale where the random policy is 0 and the median dense policy is 1.

    Args:
        R: Returns, any shape.
        random: Mean return of the uniformly random policy; broadcasts with ``R``.
        dense_median: Median final return of the algorithm's dense policies; broadcasts with ``R``.

    Raises:
        ValueError: A dense median does not exceed its random return: there is no scale.
    """
    random, dense = np.asarray(random, np.float64), np.asarray(dense_median, np.float64)
    if not np.all(dense > random):
        raise ValueError(
            f"dense_median must be above random, got {dense.tolist()} and {random.tolist()}"
        )
    return (np.asarray(R, dtype=np.float64) - random) / (dense - random)


def degradation_level(track: ArrayLike, threshold: float = 0.95) -> tuple[int, bool]:
    """First of two successive levels whose normalised return is below the threshold.

    Args:
        track: ``[levels]`` normalised returns from level 0 on. Only the levels before the first NaN
            count as observed.
        threshold: Share of the dense return that must be kept.

    Returns:
        ``(level, censored)``. A track that never degrades is censored at its last observed level:
        that is the first level its degradation could still have been at.

    Raises:
        ValueError: ``track`` is not a vector, or has no observed level.
    """
    values = np.asarray(track, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"track must have shape [levels], got {values.shape}")
    missing = np.flatnonzero(np.isnan(values))
    observed = values[: missing[0]] if missing.size else values
    if observed.size == 0:
        raise ValueError("track must hold a value at level 0, got none")
    below = observed < threshold
    successive = np.flatnonzero(below[:-1] & below[1:])
    if successive.size:
        return int(successive[0]), False
    return observed.size - 1, True


@dataclass(frozen=True)
class Contrast:
    """Paired difference of two restricted mean degradation levels.

    Attributes:
        first: Restricted mean of the first group, in levels.
        second: Restricted mean of the second group, in levels.
        difference: ``first - second``; positive if the first keeps its return to sparser levels.
        low: Lower end of the bootstrap interval of the difference; NaN for fewer than two pairs.
        high: Upper end.
        p_value: Of no difference, two-sided, by :func:`sign_flip`; NaN for fewer than two pairs.
        pairs: Number of seeds.
        horizon: Level at which both groups are restricted.
        censored: Number of tracks of each group that reach the horizon undegraded.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float
    pairs: int
    horizon: int
    censored: tuple[int, int]


def restricted_mean(
    first: ArrayLike,
    second: ArrayLike,
    threshold: float = 0.95,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Contrast:
    """Compare two groups of tracks by their restricted mean degradation level, paired by seed.

    Each track's :func:`degradation_level` is cut at a horizon, the largest level to which every
    undegraded track was observed: below it nothing is censored, so plain means estimate it. Pairs
    of tracks are resampled for the interval; the returns' normalisation is held fixed.

    Args:
        first: ``[seeds, levels]`` normalised returns, such as behavioural cloning's.
        second: ``[seeds, levels]`` of the same seeds in the same order, such as PPO's. The number
            of levels may differ.
        threshold: As in :func:`degradation_level`.
        confidence: Coverage of the interval, in (0, 1).
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: The groups are not matrices of equally many (at least one) tracks.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or len(first) == 0:
        raise ValueError(
            "first and second must be [seeds, levels] with the same number of seeds, "
            f"got {first.shape} and {second.shape}"
        )
    _check_resampling(confidence, resamples)
    (level_a, level_b), horizon, censored = restricted_levels(first, second, threshold=threshold)
    difference = level_a - level_b
    low = high = p_value = np.nan
    if difference.size >= 2:
        samples = difference[_resample(difference.size, resamples, seed)].mean(axis=1)
        low, high = _interval(samples, confidence)
        p_value = sign_flip(difference, resamples, seed)
    return Contrast(
        first=float(level_a.mean()),
        second=float(level_b.mean()),
        difference=float(difference.mean()),
        low=float(low),
        high=float(high),
        p_value=float(p_value),
        pairs=difference.size,
        horizon=horizon,
        censored=(censored[0], censored[1]),
    )


def sign_flip(difference: ArrayLike, resamples: int = 2000, seed: int = 0) -> float:
    """Two-sided p-value that paired differences are as often positive as negative, by their mean.

    Up to 15 pairs every flip of signs is tried, so that n pairs give no less than ``2 / 2**n``;
    beyond, flips are drawn at random.

    Args:
        difference: ``[pairs]``.
        resamples: Number of draws beyond 15 pairs.
        seed: Of the draws.

    Raises:
        ValueError: ``difference`` is not a vector of at least one number.
    """
    values = np.asarray(difference, dtype=np.float64)
    if values.ndim != 1 or not values.size or np.isnan(values).any():
        raise ValueError(f"difference must be a vector without NaN, got {values.tolist()}")
    pairs = values.size
    if pairs <= _EXACT_PAIRS:
        flips = 1.0 - 2.0 * (np.arange(1 << pairs)[:, None] >> np.arange(pairs) & 1)
        extra = 0
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, size=(resamples, pairs))
        flips = 1.0 - 2.0 * drawn
        extra = 1  # the differences as they are
    # Sums that differ by rounding alone are equal.
    least = abs(values.sum()) * (1 - 1e-12) - 1e-12 * np.abs(values).sum()
    extreme = int((np.abs(flips @ values) >= least).sum())
    return (extreme + extra) / (len(flips) + extra)


def binomial_tail(successes: int, trials: int, probability: float) -> float:
    """Chance of at least so many successes in independent trials (binomial, one-sided).

    Raises:
        ValueError: more successes than trials, or a probability outside [0, 1].
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, {trials}], got {successes}")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
    return math.fsum(
        math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k)
        for k in range(successes, trials + 1)
    )


def restricted_levels(
    *groups: ArrayLike, threshold: float = 0.95
) -> tuple[list[Array], int, list[int]]:
    """Degradation levels of several groups of tracks, cut at the horizon all were observed to.

    Args:
        groups: Each ``[tracks, levels]`` normalised returns.
        threshold: As in :func:`degradation_level`.

    Returns:
        ``(levels, horizon, censored)``: per group the levels ``[tracks]``, none above the horizon,
        and the number of tracks that are undegraded at the horizon.

    Raises:
        ValueError: As :func:`degradation_level`; or no group holds a track.
    """
    found = [
        [degradation_level(track, threshold) for track in np.asarray(group, np.float64)]
        for group in groups
    ]
    tracks = [track for group in found for track in group]
    if not tracks:
        raise ValueError("groups must hold at least one track, got none")
    ends = [level for level, censored in tracks if censored]
    horizon = min(ends) if ends else max(np.shape(group)[1] for group in groups) - 1
    levels = [np.array([min(level, horizon) for level, _ in group], float) for group in found]
    censored = [
        sum(level > horizon or (open_ended and level == horizon) for level, open_ended in group)
        for group in found
    ]
    return levels, horizon, censored


def holm(pvalues: Sequence[float] | ArrayLike) -> Array:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    Args:
        pvalues: ``[claims]`` in [0, 1].

    Returns:
        ``[claims]``: rejecting those at most alpha keeps the family-wise error at alpha.

    Raises:
        ValueError: A p-value is outside [0, 1] or NaN.
    """
    p: Array = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1:
        raise ValueError(f"pvalues must have shape [claims], got {p.shape}")
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"pvalues must be in [0, 1], got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _check_resampling(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


def _resample(tracks: int, resamples: int, seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(tracks, size=(resamples, tracks))


def _interval(samples: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
