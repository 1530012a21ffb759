"""`python -m negative_cache.tests.layers.four_replicas` tests pools over four replicas.

It is a program because a process can have one strategy that sends something (`replicas`).
"""

import dataclasses

import numpy as np

# Its import makes four logical devices, as it must be before any tensor is made.
from negative_cache.tests import conftest  # noqa: F401
from negative_cache.tests.layers.pool_cases import PooledSampler, make_pooled, rows_of_all
from negative_cache.tests.layers.shared_draw_cases import CASES
from negative_cache.tests.statistics import assert_mean_is

# The name of a case, and the draws.
TESTED = [
    ("default", {"num_negatives": 2}),
    ("margin, sampled", {"num_draws": 2}),
    ("corpus", {"num_draws": 2}),
]


def main():
    for name, draws in TESTED:
        case = dataclasses.replace(CASES[name], known=rows_of_all)
        sampler = PooledSampler(case, make_pooled(case, name, num_replicas=4, **draws))
        for expected, samples in zip(sampler.expected(), sampler.many(500)):
            assert np.any(expected != 0.0)
            assert_mean_is(samples, expected)
        print(f"{name}: the gradient of all rows")


if __name__ == "__main__":
    main()
