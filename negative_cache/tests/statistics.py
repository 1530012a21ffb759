"""Statistical assertions with a stated false-alarm rate. Seeds are fixed: a pass stays one."""

import numpy as np
from scipy import stats

FALSE_ALARM_RATE = 1e-6


def assert_draws_follow(draws: np.ndarray, probabilities: np.ndarray) -> None:
    """Asserts by a chi-square test that the integers `draws` [n] have the law `probabilities` [C].

    Rare outcomes are pooled until five of them are expected; an impossible outcome fails at once. A
    correct sampler fails with probability `FALSE_ALARM_RATE`.
    """
    probabilities = np.asarray(probabilities, np.float64)
    draws = np.asarray(draws).reshape(-1)
    counts = np.bincount(draws, minlength=len(probabilities))
    assert len(counts) == len(probabilities), (
        f"drew {draws.max()} of {len(probabilities)} candidates"
    )
    impossible = np.flatnonzero((counts > 0) & (probabilities == 0))
    assert not impossible.size, f"drew candidates of probability zero: {impossible}"
    order = np.argsort(-probabilities)
    expected, observed = probabilities[order] * len(draws), counts[order]
    frequent = max(int(np.sum(expected >= 5)), 1)
    expected = np.append(expected[:frequent], expected[frequent:].sum())
    observed = np.append(observed[:frequent], observed[frequent:].sum())
    keep = expected > 0
    statistic = np.sum((observed[keep] - expected[keep]) ** 2 / expected[keep])
    p_value = stats.chi2.sf(statistic, max(int(keep.sum()) - 1, 1))
    assert p_value > FALSE_ALARM_RATE, (
        f"chi-square {statistic:.1f} over {keep.sum()} cells, p = {p_value:.2g}"
    )


def assert_mean_is(samples: np.ndarray, expected: np.ndarray) -> None:
    """Asserts by z-tests, one an entry, that `samples` [n, ...] have the mean `expected` [...].

    The tests' false-alarm rates add up to at most `FALSE_ALARM_RATE` (Bonferroni).
    """
    samples, expected = np.asarray(samples, np.float64), np.asarray(expected, np.float64)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    limit = stats.norm.isf(FALSE_ALARM_RATE / 2 / expected.size)
    deviation = np.abs(samples.mean(axis=0) - expected)
    worst = np.max(
        deviation / np.maximum(error, 1e-12) * (deviation > 1e-6 * (1 + np.abs(expected)))
    )
    assert worst < limit, f"the mean is {worst:.1f} standard errors off, more than {limit:.1f}"
