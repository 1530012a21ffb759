"""Ids of queries and candidates, which decide whether pairs may share a batch."""

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from negative_cache import _features
from negative_cache._features import Features
from negative_cache._validation import to_numpy

# [N] integers or strings.
IdValues: TypeAlias = np.ndarray | tf.Tensor


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids of the queries and candidates of N pairs, as [N] int64 codes from 0 on.

    Codes are None if the ids are unknown. Unknown candidates count as different, and so do unknown
    queries.
    """

    queries: np.ndarray | None = None
    candidates: np.ndarray | None = None

    @classmethod
    def from_arrays(
        cls, num_pairs: int, query_ids: IdValues | None, candidate_ids: IdValues | None
    ) -> "Ids":
        """Makes codes of ids [N], which are integers or strings."""
        return cls(
            _codes(query_ids, num_pairs, "query_ids"),
            _codes(candidate_ids, num_pairs, "candidate_ids"),
        )

    @classmethod
    def from_features(
        cls,
        pairs: Mapping[str, Features],
        query_id_key: str | None,
        candidate_id_key: str | None,
    ) -> "Ids":
        """Makes codes of the features that are ids."""
        return cls(
            _codes_of(pairs["query"], query_id_key, "query"),
            _codes_of(pairs["candidate"], candidate_id_key, "candidate"),
        )


class OpenBatch:
    """A batch that is being filled, and knows which pairs it can take.

    Args:
      ids: the ids of all pairs.
      order: [N] int, a permutation. The methods take places in this order.
    """

    def __init__(self, ids: Ids, order: np.ndarray):
        queries, candidates = (
            (np.arange(len(order)) if codes is None else codes)[order].tolist()
            for codes in (ids.queries, ids.candidates)
        )
        positives: dict[int, set[int]] = {}
        for query, candidate in zip(queries, candidates):
            positives.setdefault(query, set()).add(candidate)
        self._candidates = candidates
        self._positives = [positives[query] for query in queries]
        self.clear()

    def clear(self) -> None:
        self._inside: set[int] = set()
        self._positives_inside: set[int] = set()

    def add(self, place: int) -> None:
        self._inside.add(self._candidates[place])
        self._positives_inside |= self._positives[place]

    def can_take(self, place: int) -> bool:
        """Whether no query gets one of its positives as a negative if this pair is added."""
        is_positive = self._candidates[place] in self._positives_inside
        return not is_positive and self._positives[place].isdisjoint(self._inside)


def _codes_of(features: Features, key: str | None, name: str) -> np.ndarray | None:
    """Returns [N] int64 codes of the feature `key`, or None if `key` is None."""
    if key is None:
        return None
    values = _features.id_feature(features, key, name)
    return _codes(values, len(values), f"{name}_id_key={key!r}")


def _codes(ids: IdValues | None, num_pairs: int, name: str) -> np.ndarray | None:
    """Checks ids [N] and returns [N] int64 codes from 0 on."""
    if ids is None:
        return None
    ids = to_numpy(ids)
    if ids.shape != (num_pairs,) or ids.dtype.kind not in "iuO":
        raise ValueError(
            f"`{name}` must be integers or strings of shape [{num_pairs}]. (A column of integers"
            f" with missing values has floats.) Received dtype {ids.dtype}, shape {ids.shape}."
        )
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


UNKNOWN_IDS = Ids()
