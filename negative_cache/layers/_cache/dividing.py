"""The rows of a cache for another number of replicas than they were saved on.

A state has the fields of `Cache`: "data", feature name -> [C, ...]; "times", those of `RowTimes`;
"num_skipped"; "rows_by_id", those of `RowsById`, if the cache covers a corpus.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from negative_cache.layers._cache.times import RowTimes
from negative_cache.layers._corpus import RowsById
from negative_cache.layers._dividing import State, check_lengths, deal, divided_rows, shares

# The stamps of empty rows: of a cache that streams, as if touched before the first update, so that
# they are filled first; of a corpus, see `RowTimes.forget`.
_FIRST, _NEVER = -1, tf.int32.min


def divide_stream(
    states: Sequence[State], num_replicas: int, now: RowTimes, name: str
) -> list[State]:
    """Divides all filled rows evenly. If there are too many, the oldest are dropped.

    Args:
      states: of the replicas that the rows were saved on.
      num_replicas: on how many they are to be.
      now: the times of the layer.
      name: of the layer, for a warning.
    """
    num_rows = now.num_rows
    times = _Times(states, now.unused_queue())
    dealt = deal(times.ages, num_replicas, num_rows, name)
    data = divided_rows([state["data"] for state in states], times.rows, dealt, num_rows)
    counts = shares([state["num_skipped"] for state in states], num_replicas)
    return [
        {
            "data": own_data,
            "times": times.of(own, np.arange(len(own)), num_rows, empty=_FIRST),
            "num_skipped": count,
            "rows_by_id": {},
        }
        for own_data, own, count in zip(data, dealt, counts)
    ]


def divide_corpus(
    states: Sequence[State], num_replicas: int, now: RowTimes, name: str
) -> list[State]:
    """Gives every candidate to its owner: candidate i is row i // R of shard i mod R.

    Args:
      states: as in `divide_stream`, of shards.
      num_replicas: R.
      now: the times of the layer, which has C rows of each shard.
      name: of the layer.

    Raises:
      ValueError: if the corpus has more than R C candidates.
    """
    num_rows = now.num_rows
    times = _Times(states, now.unused_queue())
    places = _places(times.rows)
    known = [state["rows_by_id"]["rows"] >= 0 for state in states]
    id_places = _places(
        [state["rows_by_id"]["rows"][mask].astype(np.int64) for state, mask in zip(states, known)]
    )
    fingerprints = np.concatenate(
        [state["rows_by_id"]["fingerprints"][mask] for state, mask in zip(states, known)]
    )
    # A candidate whose embedding is not finite has an id and an empty row.
    num_candidates = 1 + int(np.max(np.concatenate([places, id_places, [-1]])))
    if num_candidates > num_rows * num_replicas:
        raise ValueError(
            f"The corpus of the layer {name!r} must fit. Received a file of {num_candidates}"
            f" candidates, for a `cache_size` of {num_rows} on each of {num_replicas} replica(s)."
            f" Wanted: a `cache_size` of at least {-(-num_candidates // num_replicas)}."
        )
    dealt, rows = _owned(places, num_replicas)
    data = divided_rows([state["data"] for state in states], times.rows, dealt, num_rows, rows)
    counts = shares([state["num_skipped"] for state in states], num_replicas)
    ids, rows_of_ids = _owned(id_places, num_replicas)
    return [
        {
            "data": data[shard],
            "times": times.of(dealt[shard], rows[shard], num_rows, empty=_NEVER),
            "num_skipped": counts[shard],
            "rows_by_id": RowsById.values(fingerprints[ids[shard]], rows_of_ids[shard], num_rows),
        }
        for shard in range(num_replicas)
    ]


class _Times:
    """The times of all filled rows of several replicas.

    Attributes:
      rows: for each replica, its filled rows.
      ages: the ages of all of them, one replica after the other.
    """

    def __init__(self, states: Sequence[State], queue: State):
        for state in states:
            by_row = [state["data"], state["rows_by_id"], state["times"]["stamps"]]
            check_lengths(tf.nest.flatten(by_row))
        self._queue = queue
        times = [state["times"] for state in states]
        self.rows = [np.flatnonzero(part["stamps"] >= 0) for part in times]
        # All replicas take the same steps, so that these are equal but for misuse.
        self.ages = np.concatenate(
            [int(part["step"]) - part["stamps"][own] for part, own in zip(times, self.rows)]
        )
        self._now = max(int(part["step"]) for part in times)

    def of(self, own: np.ndarray, rows: np.ndarray, num_rows: int, *, empty: int) -> State:
        """The times of a replica that has the `own` ones of all rows in its `rows`."""
        stamps = np.full([num_rows], empty, np.int32)
        stamps[rows] = np.clip(self._now - self.ages[own], 0, tf.int32.max)
        return {
            "stamps": stamps,
            "step": np.int64(self._now),
            "num_filled": np.int64(len(own)),
            "queue": self._queue,
        }


def _places(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The places in a corpus of the `rows` of each of its R shards."""
    return np.concatenate([own * len(rows) + shard for shard, own in enumerate(rows)])


def _owned(places: np.ndarray, num_shards: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each shard, which of the `places` in a corpus are its own, and the rows of these."""
    own = [np.flatnonzero(places % num_shards == shard) for shard in range(num_shards)]
    return own, [places[part] // num_shards for part in own]
