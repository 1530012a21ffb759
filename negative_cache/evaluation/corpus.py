"""The corpus of an evaluation: its ids, and its embeddings in parts, one for each replica."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from negative_cache._compat import keras
from negative_cache._features import Features
from negative_cache._towers import Encoder
from negative_cache.evaluation import validation_set
from negative_cache.evaluation.replicas import Replicas
from negative_cache.evaluation.validation_set import Pairs, rows_of

IdsOf = Callable[[Features], np.ndarray]

# If the row of a positive is unknown, a candidate whose score is within rounding of the positive's
# score counts as the positive itself.
_RELATIVE_TIE = 1e-6


@dataclasses.dataclass(frozen=True)
class Part:
    """The candidates of one replica.

    Attributes:
      embeddings: [n, d] float32.
      places: [C] int64, for each row of the corpus the row of `embeddings`, or -1 if the candidate
        belongs to another replica. None if row i of the corpus is row i of `embeddings`.
    """

    embeddings: np.ndarray | tf.Tensor
    places: np.ndarray | None = None

    def places_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of `embeddings`, -1 if there is none, for `rows` [m] of the corpus.

        A row -1 is no candidate.
        """
        if self.places is None:
            return rows
        return np.where(rows < 0, -1, self.places[rows])


def read_ids(candidates: Iterable[Features], ids_of: IdsOf, replicas: Replicas) -> np.ndarray:
    """Returns the [C] ids of the corpus. They define which row is which candidate.

    Raises:
      ValueError: if `candidates` has no batches.
    """
    parts = []
    for replica, features in replicas.own(candidates):
        if replica is not None:
            parts.append(ids_of(features))
        elif not parts:
            # A process without a batch must know the dtype.
            parts.append(ids_of(features)[:0])
    _check_not_empty(len(parts), replicas)
    return replicas.gather(np.concatenate(parts))


def encode(
    candidates: Iterable[Features],
    encoder: Encoder,
    ids_of: IdsOf,
    expected_ids: np.ndarray | None,
    replicas: Replicas,
    *,
    dim: int,
    verbose: int = 0,
) -> list[Part]:
    """Encodes the corpus, each replica its own batches.

    Args:
      candidates: the batches.
      encoder: of the candidates.
      ids_of: features of n candidates -> [n] ids.
      expected_ids: what `read_ids` has returned, or None if rows need not be known.
      replicas: those that encode.
      dim: d, for a replica that has no batch.
      verbose: 1 shows a progress bar.

    Returns:
      The parts of this process's replicas.

    Raises:
      ValueError: if there are no candidates, or others than in `expected_ids`.
    """
    embeddings: list[list[np.ndarray]] = [[] for _ in range(replicas.num_local)]
    ids: list[list[np.ndarray]] = [[] for _ in range(replicas.num_local)]
    waiting: dict[int, Features] = {}

    def encode_waiting() -> None:
        for replica, encoded in _encode_one_each(waiting, encoder, replicas).items():
            embeddings[replica].append(encoded)
        waiting.clear()

    bar = _progress_bar(candidates, verbose)
    num_batches = 0
    with replicas.with_one_state(encoder.network):
        for num_batches, (replica, features) in enumerate(replicas.own(candidates), start=1):
            if replica is not None:
                waiting[replica] = features
                if expected_ids is not None:
                    ids[replica].append(ids_of(features))
            if len(waiting) == replicas.num_local:
                encode_waiting()
            if bar is not None:
                bar.update(num_batches)
        if waiting:
            encode_waiting()
    _check_not_empty(num_batches, replicas)
    nothing = np.zeros([0, dim], np.float32)
    whole = [np.concatenate(part) if part else nothing for part in embeddings]
    if expected_ids is None:
        return [Part(part) for part in whole]
    places = _places([validation_set.concatenate(part) for part in ids], expected_ids, replicas)
    return [Part(*part) for part in zip(whole, places)]


def thresholds_of_pairs(
    queries: np.ndarray,
    positives: Pairs,
    embeddings: np.ndarray,
    parts: Sequence[Part],
    replicas: Replicas,
) -> np.ndarray:
    """Returns [M] thresholds. The first positives have `embeddings`, the other ones have rows."""
    found = [thresholds(queries[: len(embeddings)], embeddings)] if len(embeddings) else []
    for start in range(len(embeddings), len(positives.queries), 2**16):
        chunk = slice(start, start + 2**16)
        own_queries, rows = queries[positives.queries[chunk]], positives.rows[chunk]
        values = np.zeros(len(rows), np.float32)
        for part in parts:
            places = part.places_of(rows)
            here = np.flatnonzero(places >= 0)
            values[here] = thresholds(own_queries[here], part.embeddings[places[here]])
        # Each is there in one process only.
        found.append(replicas.total(values))
    return np.concatenate(found)


def thresholds(queries: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Returns [n] thresholds that higher candidates exceed: a positive's score plus rounding.

    A copy of the positive under another id is scored in another product, so its score may differ by
    rounding.
    """
    scores = tf.reduce_sum(queries * positives, axis=1).numpy()
    lengths = np.linalg.norm(queries, axis=1) * np.linalg.norm(positives, axis=1)
    return scores + _RELATIVE_TIE * lengths


def _encode_one_each(
    batches: Mapping[int, Features], encoder: Encoder, replicas: Replicas
) -> dict[int, np.ndarray]:
    """Returns the embeddings of the batch that each replica has, if it has one."""
    any_batch = next(iter(batches.values()))
    if not replicas.is_one:
        encoder.build(any_batch)
    # A replica without a batch repeats another one's, because not every tower bears an empty one.
    given = [batches.get(replica, any_batch) for replica in range(replicas.num_local)]
    encoded = replicas.embed(encoder, replicas.place(given))
    return {replica: encoded[replica].numpy() for replica in batches}


def _check_not_empty(num_batches: int, replicas: Replicas) -> None:
    """Raises a `ValueError` in every process if one of them has read no batch."""
    counts = replicas.gather(np.array([num_batches]))
    if not np.all(counts):
        where = "" if len(counts) == 1 else f" Received batches by worker: {counts.tolist()}."
        raise ValueError(f"The dataset to embed is empty: `candidates` has no batches.{where}")


def _places(
    ids: Sequence[np.ndarray], expected_ids: np.ndarray, replicas: Replicas
) -> list[np.ndarray | None]:
    """Returns the `places` of the parts whose candidates have `ids`, [n] each.

    A dataset that shuffles has another order in each pass.
    """
    if replicas.is_one and np.array_equal(ids[0], expected_ids):
        return [None]
    own_ids = np.concatenate([part for part in ids if len(part)] or [expected_ids[:0]])
    rows = rows_of(own_ids, expected_ids)
    (size,) = replicas.total(np.array([len(rows)]))
    times = replicas.total(np.bincount(rows[rows >= 0], minlength=len(expected_ids)))
    if size != len(expected_ids) or np.any(times != 1):
        raise ValueError(
            "`candidates` must yield the same candidates in every pass, and to every worker in the"
            f" same order. Received {len(expected_ids)} and then {size}, in which"
            f" {np.sum(times == 0)} of the former are missing and {np.sum(times > 1)} repeat."
        )
    places: list[np.ndarray | None] = []
    for own_rows in np.split(rows, np.cumsum([len(part) for part in ids])[:-1]):
        place = np.full(len(expected_ids), -1, np.int64)
        place[own_rows] = np.arange(len(own_rows))
        places.append(place)
    return places


def _progress_bar(batches: Iterable[Features], verbose: int) -> keras.utils.Progbar | None:
    if not verbose:
        return None
    size = getattr(batches, "cardinality", None)
    size = int(size()) if size is not None else -1
    return keras.utils.Progbar(size if size > 0 else None, unit_name="batch")
