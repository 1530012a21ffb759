"""Counting of equal values."""

import numpy as np


def occurrence_numbers(codes: np.ndarray) -> np.ndarray:
    """[n] int64: how many equal codes come before each.

    Args:
      codes: [n] int, at least 0.
    """
    counts = np.bincount(codes)
    by_code = np.argsort(codes, kind="stable")
    numbers = np.empty(len(codes), np.int64)
    numbers[by_code] = np.arange(len(codes)) - (np.cumsum(counts) - counts)[codes[by_code]]
    return numbers
