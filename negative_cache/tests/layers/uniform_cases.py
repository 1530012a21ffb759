"""The candidates that the tests of `Uniform` draw from."""

import numpy as np

from negative_cache.tests.layers.retrieval_cases import INT_ID, make_table

SIZE = 12
TABLE = make_table(SIZE)
SPECS = {"id": INT_ID}


def corpus(size=SIZE):
    return {"id": np.arange(size, dtype=np.int64)}
