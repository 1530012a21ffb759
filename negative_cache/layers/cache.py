"""`Cache`: the rows of a negative cache as variables that are updated in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import deserialize, keras
from negative_cache.layers._cache.checks import (
    check_index,
    check_on_host,
    check_sharded,
    check_updates,
)
from negative_cache.layers._cache.dividing import divide_corpus, divide_stream
from negative_cache.layers._cache.partition import Partition
from negative_cache.layers._cache.rows import CacheRows
from negative_cache.layers._cache.times import RowTimes
from negative_cache.layers._cache.writer import CacheWriter
from negative_cache.layers._corpus import EMBEDDING, Corpus, RowsById, write_in_order
from negative_cache.layers._dividing import State, copies
from negative_cache.layers._state import (
    LAYOUT,
    StateLayer,
    describe_specs,
    on_every_replica,
    specs_of,
)
from negative_cache.layers._variables import StateVariable, make_state_variable
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.negative_cache import NegativeCache


@keras.utils.register_keras_serializable("negative_cache")
class Cache(StateLayer):
    """A fixed number of rows, each with a candidate's features and its embedding.

    A cache streams: new candidates replace the rows that were touched longest ago. The result is
    that of `CacheManager.update_cache`, with two differences. An update writes the touched rows in
    place instead of returning a new cache. And the cache knows which rows have never been filled.

    The rows are non-trainable `tf.Variable`s. Under a `tf.distribute` strategy every replica holds
    its own rows. An update that is called outside the replicas applies to all of them.

    It is a Keras layer, so that a model that has one saves it. It is not called.

    Args:
      specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype), including the
        embedding.
      cache_size: C, the number of rows.
      embedding_key: name of the feature that is the candidate's embedding, floating point of rank
        1. A row with a non-finite embedding is not written; `num_skipped` counts such rows.
      use_lru: whether updating a row resets its age, so that the row *used* longest ago is replaced
        first. If False, rows are replaced in order of insertion.
      saved: whether TensorFlow checkpoints, `.keras` and `.weights.h5` files hold the rows. A file
        with other specs is refused, and with another number of rows if it has as many replicas.
      index: an index over the embeddings of the rows. Every update of the cache updates it too. It
        does not notice other changes, such as an assignment to `embeddings`: call `index.index`
        after them.
      row_key: name of the feature that identifies a candidate, scalar int or string. With it, the
        cache covers a corpus instead of streaming: `fill` or `Cache.from_dataset` fills it once,
        row i always belongs to the i-th candidate, and new items are written to the rows of their
        ids. An item whose id is not in the corpus is not written and counts in `num_skipped`.
      on_host: names of features that stay in host memory if the layer computes on an accelerator. A
        step copies the rows that it uses. The embedding can be one of them if there is an `index`
        to draw from. Strings are always on the host. Not possible under a `tf.distribute` strategy.
      sharded: whether each of the R replicas of a `tf.distribute` strategy holds its part of a
        corpus: row i of replica r is candidate R i + r. See `docs/distributed.md`.

    Raises:
      ValueError: if `specs` lacks an embedding `embedding_key` or an id `row_key`, if `cache_size`
        is not positive, or if `index`, `on_host` or `sharded` do not fit the rows.

    Examples:
      >>> cache = Cache(
      ...     {
      ...         "id": tf.io.FixedLenFeature([], tf.int64),
      ...         "embedding": tf.io.FixedLenFeature([2], tf.float32),
      ...     },
      ...     cache_size=4,
      ... )
      >>> cache.update(new_items={"id": [7, 8], "embedding": [[1.0, 0.0], [0.0, 1.0]]})
      >>> cache.filled.numpy().tolist()
      [True, True, False, False]
    """

    def __init__(
        self,
        specs: Mapping[str, tf.io.FixedLenFeature],
        cache_size: int,
        embedding_key: str = "embedding",
        use_lru: bool = True,
        saved: bool = True,
        index: TreeIndex | None = None,
        row_key: str | None = None,
        on_host: Sequence[str] = (),
        sharded: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.specs = _validation.check_specs(specs)
        self.cache_size = _validation.check_count(cache_size, "cache_size")
        _validation.check_embedding(embedding_key, self.specs)
        self.embedding_key = embedding_key
        self.use_lru = use_lru
        check_sharded(sharded, row_key)
        if index is not None:
            check_index(
                index,
                self.cache_size,
                self.specs[embedding_key],
                saved=saved,
                is_filled_at_once=row_key is not None,
            )
            index.row_law = "remade" if row_key is None or sharded else "copied"
        self.index = index
        if row_key is not None:
            _validation.check_id(row_key, self.specs, "row_key", "specs")
        self.row_key = row_key
        self.sharded = sharded
        self._partition = partition = Partition.over_replicas(sharded)
        self._rows = CacheRows(self.specs, self.cache_size, on_host)
        check_on_host(on_host, embedding_key, index)
        self.on_host = tuple(on_host)
        self._times = RowTimes(self.cache_size)
        # Ids are looked up on the device that holds them.
        are_on_host, size = row_key in self._rows.host_keys, self.cache_size
        ids = {} if row_key is None else RowsById.make_variables(size, on_host=are_on_host)
        self._hold_state(
            description={
                **LAYOUT,
                "cache_size": self.cache_size,
                "specs": describe_specs(self.specs),
                **partition.description(sharded),
            },
            saved=saved,
            # Not of a corpus that every replica has as a whole.
            divisible=["cache_size", "num_shards"] if row_key is None or sharded else [],
            data=self._rows.variables,
            times=self._times.variables,
            num_skipped=make_state_variable(lambda: tf.zeros([], tf.int64), "num_skipped"),
            rows_by_id=ids,
        )
        self._writer = CacheWriter(
            self._rows,
            self._times,
            self._state.num_skipped,
            embedding_key=embedding_key,
            use_lru=use_lru,
            index=index,
            row_key=row_key,
            rows_by_id=ids,
            partition=partition,
        )
        # Read by Keras 3 before it compiles. XLA cannot access variables in host memory.
        self.supports_jit = not self.host_keys
        self.built = True

    @property
    def host_keys(self) -> frozenset[str]:
        """The features in host memory: those in `on_host`, and strings."""
        return self._rows.host_keys

    @property
    def data(self) -> dict[str, StateVariable]:
        """Feature name -> variable [C, ...].

        Read rows with `tf.gather`: a slice copies the whole variable. An int32 feature is an
        `Int32Variable`, which supports `tf.gather`, `tf.convert_to_tensor`, `numpy` and `assign`
        like a `tf.Variable`.
        """
        return dict(self._state.data)

    @property
    def embeddings(self) -> tf.Variable:
        """[C, d] variable, the cached embeddings."""
        return self._state.data[self.embedding_key]

    @property
    def age(self) -> tf.Tensor:
        """[C] int32, the number of updates since each row was touched."""
        return self._times.age

    def age_of(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] int32, the number of updates since each of `rows` [n] was touched."""
        return self._times.age_of(_validation.check_rows(rows, self.cache_size, "rows"))

    @property
    def saved(self) -> bool:
        """Whether files hold the rows."""
        return self._is_saved

    @property
    def step(self) -> tf.Variable:
        """Scalar int64, the number of updates so far."""
        return self._times.step

    @property
    def filled(self) -> tf.Tensor:
        """[C] bool, whether each row holds a candidate."""
        return self._times.filled

    def filled_on_any_replica(self) -> np.ndarray:
        """[C] bool, `filled` of all replicas of this process together."""
        return self._times.filled_on_any_replica()

    def is_filled(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] bool, whether each of `rows` [n] holds a candidate."""
        return self._times.is_filled(rows)

    @property
    def num_filled(self) -> tf.Variable:
        """Scalar int64, the number of rows that hold a candidate."""
        return self._times.num_filled

    @property
    def num_skipped(self) -> tf.Variable:
        """Scalar int64, rows not written so far: not finite, or of an id not in the corpus."""
        return self._state.num_skipped

    @classmethod
    def from_dataset(
        cls,
        dataset: Iterable,
        candidate_network: Callable[..., tf.Tensor],
        feature_specs: Mapping[str, tf.io.FixedLenFeature] | tf.io.FixedLenFeature | None = None,
        *,
        candidate_id_key: str | None = None,
        cache_size: int | None = None,
        embedding_dtype: str | tf.DType = tf.float32,
        index: TreeIndex | None = None,
        saved: bool = True,
        on_host: Sequence[str] = (),
        verbose: int = 1,
        **kwargs: Any,
    ) -> "Cache":
        """Makes a cache of a whole corpus. Every candidate is encoded; row i holds candidate i.

        Args:
          dataset: batches of candidate features, in the order of the rows. A batch is a mapping or
            a single tensor, the input of `candidate_network`. If `cache_size` is None, the dataset
            is read twice, the first time to count the candidates.
          candidate_network: the candidate tower, features -> [n, d]; called in inference mode.
          feature_specs: feature name -> spec, or a single spec. If None, it is taken from the
            dataset, which must be a `tf.data.Dataset` then. Training batches must have the same
            features, so leave out those that neither the tower nor the id needs.
          candidate_id_key: name of the feature that identifies a candidate; it becomes `row_key`.
            If the tower takes a single tensor, that tensor is the id, with the name "candidate".
          cache_size: the number of candidates, or if it is `sharded` of those of a replica; counted
            if None.
          embedding_dtype: dtype of the cached embeddings: float32, bfloat16 or float16.
          index: as in `Cache`.
          saved: as in `Cache`.
          on_host: as in `Cache`; the name of the embedding is "embedding".
          verbose: 1 for a progress bar, 0 for none.
          **kwargs: passed to `Cache`.

        Returns:
          The filled `Cache`.

        Raises:
          ValueError: if the dataset does not match the specs, is empty, has more candidates than
            `cache_size` or two with the same id.
        """
        corpus = Corpus(dataset, candidate_network, feature_specs, candidate_id_key, on_host)
        size = cache_size
        if size is None:
            size = Partition.over_replicas(kwargs.get("sharded", False)).num_rows(corpus.count())
        embedding = tf.io.FixedLenFeature([corpus.embedding_dim()], embedding_dtype)
        cache = cls(
            {**corpus.specs, EMBEDDING: embedding},
            size,
            EMBEDDING,
            saved=saved,
            index=index,
            row_key=corpus.id_key,
            on_host=on_host,
            **kwargs,
        )
        cache.fill(corpus.items(), verbose=verbose)
        return cache

    def fill(self, batches: Iterable[Mapping[str, tf.Tensor]], *, verbose: int = 1) -> None:
        """Fills the rows of a cache with a `row_key` in order, and drops the former contents.

        Args:
          batches: batches of candidates, feature name -> [n, ...], with all features of the cache.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: if two candidates have the same id, if there are more candidates than rows or
            none, if the features do not match the specs, or if the cache has no `row_key`.
        """
        if self.row_key is None:
            raise ValueError("`fill` is for a cache with a `row_key`. Received: row_key=None.")
        write = tf.function(self._writer.fill, reduce_retracing=True)
        on_every_replica(self._writer.forget)
        try:
            ids = write_in_order(
                batches,
                self.specs,
                self.row_key,
                self.cache_size,
                self._partition.num_shards,
                lambda start, items: on_every_replica(write, start, items),
                verbose=verbose,
            )
            RowsById.check_distinct(ids)
            on_every_replica(self._writer.know_ids, ids)
        except Exception:
            # Without ids, a row could not be excluded as the positive of its own query.
            on_every_replica(self._writer.forget)
            raise
        self._writer.index_corpus(verbose=verbose)

    def count_skipped(self, is_skipped: tf.Tensor) -> None:
        """Adds the entries with True in `is_skipped` [n] to `num_skipped`."""
        on_every_replica(self._writer.count_skipped, is_skipped)

    def rows_of(self, ids: tf.Tensor) -> tf.Tensor:
        """[n] int64, the rows of the candidates with `ids` [n]; -1 for an unknown id.

        Raises:
          ValueError: if the cache has no `row_key`.
        """
        if self.row_key is None:
            raise ValueError("`rows_of` needs a cache with a `row_key`. Received: row_key=None.")
        return RowsById.find(self._state.rows_by_id, ids)

    def oldest(self, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows touched longest ago; the smaller index first among equals.

        Raises:
          ValueError: if `count` is negative or larger than the number of rows.
        """
        if not tf.is_tensor(count):
            _validation.check_count(count, "count", at_least=0)
            if count > self.cache_size:
                raise ValueError(
                    f"`count` must be at most {self.cache_size}, the number of rows. Received:"
                    f" {count}."
                )
        return self._times.oldest(count)

    def rewrite(self, rows: tf.Tensor, embeddings: tf.Tensor) -> None:
        """Writes recomputed embeddings to existing rows. This does not count as an update.

        The rows get age 0, the others keep theirs.

        Args:
          rows: [n] int, distinct filled rows.
          embeddings: [n, d] float.

        Raises:
          ValueError: if a shape or dtype does not fit or, outside a `tf.function`, a row does not
            exist.
        """
        rows = _validation.check_rows(rows, self.cache_size, "rows")
        items = {self.embedding_key: embeddings}
        on_every_replica(self._writer.rewrite, check_updates(items, rows, None, self.specs))

    def as_negative_cache(self) -> NegativeCache:
        """Returns the cache as the published `NegativeCache`, whose data are the variables."""
        return NegativeCache(data=self.data, age=self.age)

    def update(
        self,
        *,
        new_items: Mapping[str, tf.Tensor],
        new_items_mask: tf.Tensor | None = None,
        updated_item_data: Mapping[str, tf.Tensor] | None = None,
        updated_item_indices: tf.Tensor | None = None,
        updated_item_mask: tf.Tensor | None = None,
    ) -> None:
        """Updates existing rows, then replaces the oldest remaining rows by new items.

        Every age grows by one. Touched rows get age 0. Among equal ages, the row with the smallest
        index is replaced first. With a `row_key`, new items are written to the rows of their ids
        instead.

        Args:
          new_items: feature name -> [n, ...] new candidates, with exactly the cache's features. n
            can be at most C unless there is a `row_key`. If several items have the same id in a
            cache with a `row_key`, the first is written.
          new_items_mask: [n] bool; items with False are not inserted.
          updated_item_data: feature name -> [m, ...] new values of existing rows, for any of the
            cache's features.
          updated_item_indices: [m] int, the rows to update.
          updated_item_mask: [m] bool; entries with False change nothing.

        Raises:
          ValueError: if names, dtypes or shapes do not match the specs, or n > C without a
            `row_key`.
        """
        new_items = _validation.check_items(new_items, self.specs, what="new_items", exact=True)
        if self.row_key is None:
            _validation.check_fits(new_items, self.cache_size, what="new_items")
        new_items_mask = _validation.check_mask(
            new_items_mask, new_items[self.embedding_key], what="new_items_mask"
        )
        updates = check_updates(
            updated_item_data, updated_item_indices, updated_item_mask, self.specs
        )
        on_every_replica(self._writer.update, new_items, new_items_mask, updates)

    def _limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        largest = float(tf.as_dtype(self.embeddings.dtype).max)
        yield "an embedding", self.embeddings, -largest, largest
        yield from self._times.limits()
        if self.row_key is not None:
            yield "a row", self._state.rows_by_id["rows"], -1, self.cache_size - 1

    def _fields_in_file(self, description: Mapping) -> Mapping:
        times = self._times.variables_of(description["cache_size"])
        return {**vars(self._state), "times": times}

    def _divided(self, states: list[State], num_replicas: int) -> list[State]:
        if self.row_key is not None and not self.sharded:
            return copies(states, num_replicas)
        divide = divide_stream if self.row_key is None else divide_corpus
        return divide(states, num_replicas, self._times, self.name)

    def _is_divided(self) -> None:
        if self.index is not None and self.index.row_law == "remade":
            self._writer.remake_index()

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "specs": describe_specs(self.specs),
            "cache_size": self.cache_size,
            "embedding_key": self.embedding_key,
            "use_lru": self.use_lru,
            "saved": self._is_saved,
            "index": keras.utils.serialize_keras_object(self.index),
            "row_key": self.row_key,
            "on_host": list(self.on_host),
            "sharded": self.sharded,
            **self._partition.description(self.sharded),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Cache":
        config = Partition.of_config(config)
        index = deserialize(config.get("index"))
        return cls(**{**config, "specs": specs_of(config["specs"]), "index": index})
