"""Reads the validation set of `evaluate` in one pass, and looks up its ids in the corpus.

Scores and ranks are in `ranks`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _features
from negative_cache._features import Features, Values
from negative_cache._validation import to_numpy


def rows_of(ids: np.ndarray, corpus_ids: np.ndarray) -> np.ndarray:
    """Finds the rows of `ids` [n] in `corpus_ids` [C].

    Returns:
      [n] int64 rows, with -1 for ids that are not in the corpus.

    Raises:
      ValueError: if an id is in the corpus twice.
    """
    order = np.argsort(corpus_ids, kind="stable")
    ordered = corpus_ids[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if repeated.size:
        raise ValueError(
            f"Candidate ids must be unique in the corpus. Received twice: {ordered[repeated[0]]!r}."
        )
    positions = np.minimum(np.searchsorted(ordered, ids), len(ordered) - 1)
    return np.where(ordered[positions] == ids, order[positions], -1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of a query and a row of the corpus.

    Attributes:
      queries: [n] int64.
      rows: [n] int64, with -1 if the row is unknown or the candidate is not in the corpus.
    """

    queries: np.ndarray
    rows: np.ndarray

    @classmethod
    def of_unknown_rows(cls, queries: np.ndarray) -> "Pairs":
        return cls(queries, np.full(len(queries), -1))

    @property
    def keys(self) -> np.ndarray:
        return (self.queries << 32) + self.rows

    def unique(self) -> "Pairs":
        """Returns each pair with a row once, in the order of queries."""
        keys = np.unique(self.keys[self.rows >= 0])
        return Pairs(keys >> 32, keys & 0xFFFFFFFF)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Pairs":
        return Pairs(function(self.queries), function(self.rows))

    def without(self, excluded: "Pairs") -> "Pairs":
        kept = ~np.isin(self.keys, excluded.keys)
        return Pairs(self.queries[kept], self.rows[kept])


@dataclasses.dataclass(frozen=True)
class ValidationSet:
    """The contents of the validation batches.

    Attributes:
      queries: [Q, d] float32 embeddings.
      positives: [n, d] float32 embeddings of "candidate". Either all queries have one (n = Q), or
        none has (n = 0).
      candidate_ids: [n] ids of "candidate", or None if ids are not needed.
      listed: "positives" or "excluded" -> the query [m] and the id [m] of each entry of the lists.
      padded: the keys of `listed` whose lists were padded tensors.
    """

    queries: np.ndarray
    positives: np.ndarray
    candidate_ids: np.ndarray | None
    listed: Mapping[str, tuple[np.ndarray, np.ndarray]]
    padded: frozenset[str]

    @property
    def lists_positives(self) -> bool:
        return "positives" in self.listed

    def look_up(self, corpus_ids: np.ndarray | None) -> tuple[Pairs, Pairs | None]:
        """Looks up positives and excluded candidates in the corpus.

        Args:
          corpus_ids: [C] ids of the corpus, or None if ids are not needed.

        Returns:
          The positives, first those of "candidate", and the excluded pairs or None.

        Raises:
          ValueError: if corpus ids are not unique, ids have another kind than corpus ids, an id of
            "positives" is not in the corpus, or there are no positives.
        """
        queries = np.arange(len(self.positives))
        if corpus_ids is None or self.candidate_ids is None:
            return Pairs.of_unknown_rows(queries), None
        found = self._rows_by_name(self.candidate_ids, corpus_ids)
        positives, excluded = Pairs(queries, found["candidate"]), None
        if "positives" in found:
            queries, ids = self.listed["positives"]
            _check_found(ids, found["positives"], "positives")
            listed = Pairs(queries, found["positives"]).unique().without(positives)
            positives = Pairs(
                np.concatenate([positives.queries, listed.queries]),
                np.concatenate([positives.rows, listed.rows]),
            )
        if "excluded" in found:
            queries, _ = self.listed["excluded"]
            excluded = Pairs(queries, found["excluded"]).unique().without(positives)
        if not len(positives.queries):
            raise ValueError("No query of the validation dataset has a positive.")
        return positives, excluded

    def _rows_by_name(
        self, candidate_ids: np.ndarray, corpus_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Returns the rows of the ids of "candidate" and of all lists, with -1 for no row."""
        ids = {name: values for name, (_, values) in self.listed.items()}
        ids["candidate"] = candidate_ids
        for name, values in ids.items():
            if len(values) and (values.dtype == object) != (corpus_ids.dtype == object):
                raise ValueError(
                    f"Ids of {name!r} and of the corpus must be of one kind. Received dtypes:"
                    f" {values.dtype} and {corpus_ids.dtype}."
                )
            if name in self.padded and np.any(corpus_ids == _padding_of(values)):
                raise ValueError(
                    f"{name!r} is padded with {_padding_of(values)!r}, but a candidate of the"
                    " corpus has that id. Use a `tf.RaggedTensor`, which needs no padding."
                )
        # All ids are looked up at once, because each look-up sorts the ids of the corpus.
        filled = [values for values in ids.values() if len(values)]
        rows = rows_of(np.concatenate([*filled, corpus_ids[:0]]), corpus_ids)
        ends = np.cumsum([len(values) for values in ids.values()])
        return dict(zip(ids, np.split(rows, ends[:-1])))


def read(
    batches: Iterable,
    *,
    embed_query: Callable[..., np.ndarray],
    embed_candidate: Callable[..., np.ndarray],
    ids_of: Callable[..., np.ndarray],
    uses_ids: bool,
) -> ValidationSet:
    """Reads validation batches, which `evaluate` describes, in one pass.

    Args:
      batches: the validation batches.
      embed_query: features of n queries -> [n, d] float32.
      embed_candidate: features of n candidates -> [n, d] float32.
      ids_of: features of n candidates -> [n] ids.
      uses_ids: whether to read ids of candidates even if batches have no lists of ids.

    Raises:
      ValueError: if there are no batches, or the parts of a batch do not match.
    """
    queries, positives, candidate_ids = [], [], []
    listed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    names, padded, num_queries = None, set(), 0
    for batch in batches:
        names = _check_names(batch, names)
        queries.append(embed_query(batch["query"]))
        size = len(queries[-1])
        uses_ids = uses_ids or not names.isdisjoint(("positives", "excluded"))
        if "candidate" in names:
            if uses_ids:
                candidate_ids.append(ids_of(batch["candidate"]))
            positives.append(embed_candidate(batch["candidate"]))
            if len(positives[-1]) != size:
                raise ValueError(
                    '"query" and "candidate" of a validation batch must have equally many rows.'
                    f" Received: {size} and {len(positives[-1])}."
                )
        for name in names & {"positives", "excluded"}:
            rows, ids = flatten(batch[name], name, size)
            if not isinstance(batch[name], (tf.RaggedTensor, tf.SparseTensor)):
                padded.add(name)
                kept = ids != _padding_of(ids)
                rows, ids = rows[kept], ids[kept]
            listed.setdefault(name, []).append((num_queries + rows, ids))
        num_queries += size
    if not num_queries:
        raise ValueError("The validation dataset to embed is empty.")
    return ValidationSet(
        queries=np.concatenate(queries),
        positives=concatenate(positives),
        candidate_ids=concatenate(candidate_ids) if uses_ids else None,
        listed={
            name: (concatenate(rows for rows, _ in pairs), concatenate(ids for _, ids in pairs))
            for name, pairs in listed.items()
        },
        padded=frozenset(padded),
    )


def _check_names(batch: object, names: set[str] | None) -> set[str]:
    """Returns the parts of a validation batch, which must be the same in all batches."""
    if (
        not isinstance(batch, Mapping)
        or "query" not in batch
        or batch.keys().isdisjoint(("candidate", "positives"))
    ):
        received = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            'A validation batch must be a dictionary with "query" and "candidate" or "positives".'
            f" Received: {received}."
        )
    parts = set(batch) & {"query", "candidate", "positives", "excluded"}
    if names is not None and parts != names:
        raise ValueError(
            f"All validation batches must have the same parts. Received {sorted(parts)} after"
            f" {sorted(names)}."
        )
    return parts


def flatten(values: Values, name: str, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Flattens lists, one for each row, that are ragged, sparse or padded.

    Returns:
      The row [m] int64 of each entry, and the entries [m].
    """
    if isinstance(values, tf.SparseTensor):
        shape, rows = values.shape, values.indices[:, 0].numpy()
        entries = values.values.numpy()
    elif isinstance(values, tf.RaggedTensor):
        shape, rows = values.shape, values.value_rowids().numpy()
        entries = values.flat_values.numpy()
    else:
        entries = to_numpy(values)
        shape = tf.TensorShape(entries.shape)
        rows = np.repeat(np.arange(len(entries)), entries.shape[1]) if entries.ndim == 2 else None
        entries = entries.reshape([-1])
    if shape.rank != 2 or shape[0] not in (None, num_rows):
        raise ValueError(
            f"`{name}` must have shape [{num_rows}, None], one list per query, ragged or padded."
            f" Received shape: {shape}."
        )
    return rows.astype(np.int64), entries


def ids_of(features: Features, key: str | None) -> np.ndarray:
    """Returns the [n] ids of a batch of candidate features."""
    ids = to_numpy(_features.id_feature(features, key))
    if ids.ndim != 1:
        raise ValueError(f"Candidate ids must have shape [n]. Received shape: {ids.shape}.")
    return ids


def _padding_of(ids: np.ndarray) -> int | bytes:
    return b"" if ids.dtype == object else -1


def concatenate(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenates arrays. The result is empty if there are none."""
    arrays = list(arrays)
    return np.concatenate(arrays) if arrays else np.zeros([0], np.int64)


def _check_found(ids: np.ndarray, rows: np.ndarray, name: str) -> None:
    """Checks that all ids have a row."""
    unknown = ids[rows < 0]
    if unknown.size:
        raise ValueError(
            f"The ids of {name!r} must be ids of candidates in the corpus. Not in it:"
            f" {unknown[:5].tolist()} ({unknown.size} of {ids.size} ids)."
        )
