"""`Cache`: the rows of a negative cache as variables that are updated in place."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import deserialize, keras
from negative_cache.layers._cache.checks import check_index, check_on_host
from negative_cache.layers._cache.rows import CacheRows
from negative_cache.layers._cache.times import RowTimes
from negative_cache.layers._cache.writer import CacheWriter, RowUpdates
from negative_cache.layers._corpus import EMBEDDING, Corpus, RowsById, write_in_order
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

    A cache streams: new candidates replace the rows that were touched longest ago. It differs from
    `CacheManager.update_cache` in how, not in what: an update writes the touched rows of its
    variables in place instead of returning a new cache, and rows that were never filled are known
    as such.

    The rows are non-trainable `tf.Variable`s. Under a `tf.distribute` strategy every replica holds
    rows of its own, and an update that is called outside of the replicas reaches each of them.

    It is a Keras layer so that a model that has one saves it. It is not called.

    Args:
      specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype), the embedding
        among them.
      cache_size: C, the number of rows.
      embedding_key: which feature is the candidate's embedding. It must be floating point of rank
        1. A row with a non-finite embedding is not written; `num_skipped` counts such rows.
      use_lru: whether updating a row makes it young again, so that the row *used* longest ago is
        replaced first. Rows are replaced in order of insertion where False.
      saved: whether files hold the rows, TensorFlow checkpoints as well as `.keras` and
        `.weights.h5`. A file with rows of other specs or of another number is refused.
      index: an index over the embeddings of the rows, which every update of the cache keeps in
        step with them. What is changed in other ways, such as by assigning to `embeddings`, it does
        not see: call `index.index` then.
      row_key: name of the feature that identifies a candidate, scalar int or string. Given, the
        cache does not stream but covers a corpus: it is filled once, by `fill` or
        `Cache.from_dataset`, row i stays that of the i-th candidate, and new items are written to
        the rows of their ids. Of an item whose id is not in the corpus nothing is written; it
        counts in `num_skipped`.
      on_host: names of features that stay in host memory where the layer computes on an
        accelerator, the embedding among them if an `index` is there to draw from. A step copies the
        rows that it uses. Strings are always there. Not under a `tf.distribute` strategy.

    Raises:
      ValueError: where the specs do not describe an embedding under `embedding_key`, and an id
        under a given `row_key`; where `cache_size` is not positive, `index` is for others, or
        `on_host` names what cannot be there.

    Example:
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
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.specs = _validation.check_specs(specs)
        self.cache_size = _validation.check_count(cache_size, "cache_size")
        _validation.check_embedding(embedding_key, self.specs)
        self.embedding_key = embedding_key
        self.use_lru = use_lru
        if index is not None:
            check_index(
                index,
                self.cache_size,
                self.specs[embedding_key],
                saved=saved,
                is_filled_at_once=row_key is not None,
            )
        self.index = index
        if row_key is not None:
            _validation.check_id(row_key, self.specs, "row_key", "specs")
        self.row_key = row_key
        self._rows = CacheRows(self.specs, self.cache_size, on_host)
        check_on_host(on_host, embedding_key, index)
        self.on_host = tuple(on_host)
        self._times = RowTimes(self.cache_size)
        rows_by_id = {}
        if row_key is not None:
            # Ids are looked up where they are.
            rows_by_id = RowsById.make_variables(
                self.cache_size, on_host=row_key in self._rows.host_keys
            )
        self._hold_state(
            description={
                **LAYOUT,
                "cache_size": self.cache_size,
                "specs": describe_specs(self.specs),
            },
            saved=saved,
            data=self._rows.variables,
            times=self._times.variables,
            num_skipped=make_state_variable(lambda: tf.zeros([], tf.int64), "num_skipped"),
            rows_by_id=rows_by_id,
        )
        self._writer = CacheWriter(
            self._rows,
            self._times,
            self._state.num_skipped,
            embedding_key=embedding_key,
            use_lru=use_lru,
            index=index,
            row_key=row_key,
            rows_by_id=rows_by_id,
        )
        # Not all of a step is where XLA could reach it, which Keras 3 asks before it compiles.
        self.supports_jit = not self.host_keys
        self.built = True

    @property
    def host_keys(self) -> frozenset[str]:
        """The features in host memory: those asked for, and what can be nowhere else."""
        return self._rows.host_keys

    @property
    def data(self) -> dict[str, StateVariable]:
        """Feature name -> variable [C, ...].

        Read rows of them with `tf.gather`: a slice copies the whole variable. An int32 feature is
        an `Int32Variable`: `tf.gather`, `tf.convert_to_tensor`, `numpy` and `assign` take it as
        they do others.
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
        """[n] int32, `age` of `rows` [n]."""
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

    def is_filled(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] bool, whether each of `rows` [n] holds a candidate."""
        return self._times.is_filled(rows)

    @property
    def num_filled(self) -> tf.Variable:
        """Scalar int64, the number of rows that hold a candidate."""
        return self._times.num_filled

    @property
    def num_skipped(self) -> tf.Variable:
        """Scalar int64, the rows refused so far: not finite, or not of the corpus."""
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
        """A cache of a whole corpus, each candidate encoded once: row i is that of candidate i.

        Args:
          dataset: batches of candidate features, in the order of the rows; a mapping or a single
            tensor, what `candidate_network` takes. It is read twice where `cache_size` is None, to
            know the number of candidates first.
          candidate_network: the candidate tower, features -> [n, d]; called in inference mode.
          feature_specs: feature name -> spec, or a single spec; taken from the dataset where None,
            which must be a `tf.data.Dataset` then. Training batches must have the same features:
            leave out what neither the tower nor the id needs.
          candidate_id_key: the feature that identifies a candidate, the later `row_key`. Where the
            tower takes a single tensor, it is that, under the name "candidate".
          cache_size: the number of candidates.
          embedding_dtype: of the cached embeddings: float32, bfloat16 or float16.
          index: as in `Cache`.
          saved: likewise.
          on_host: likewise; the embedding's name is "embedding".
          verbose: 1 for a progress bar, 0 for none.
          **kwargs: of the layer.

        Raises:
          ValueError: where the features of the dataset are not those of the specs, two candidates
            have the same id, or the dataset has more candidates than `cache_size`, or none.
        """
        corpus = Corpus(dataset, candidate_network, feature_specs, candidate_id_key, on_host)
        size = corpus.count() if cache_size is None else cache_size
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
        """Fills a cache that has a `row_key`, in order; whatever it held is gone.

        Args:
          batches: feature name -> [n, ...], of all of the cache's features.
          verbose: 1 for a progress bar, 0 for none.

        Raises:
          ValueError: where two candidates have the same id, there are more of them than rows, or
            none; where features do not match the specs; and for a cache without a `row_key`.
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
                lambda start, items: on_every_replica(write, start, items),
                verbose=verbose,
            )
            on_every_replica(RowsById.assign, self._state.rows_by_id, ids)
        except Exception:
            # Rows without their ids would be negatives of their own queries.
            on_every_replica(self._writer.forget)
            raise
        if self.index is not None:
            self.index.index(self._embeddings_on_host(), verbose=verbose)

    def _embeddings_on_host(self) -> np.ndarray:
        """[C, d] float32, NaN where a row is not filled, which an index leaves out as well."""
        embeddings, filled = tf.convert_to_tensor(self.embeddings), self.filled.numpy()
        if embeddings.dtype != tf.float32 or not np.all(filled):
            embeddings = embeddings.numpy().astype(np.float32)
            embeddings[~filled] = np.nan
            return embeddings
        # Of a corpus that hardly fits, not another copy.
        is_on_cpu = tf.DeviceSpec.from_string(embeddings.device).device_type == "CPU"
        return np.asarray(memoryview(embeddings)) if is_on_cpu else embeddings.numpy()

    def rows_of(self, ids: tf.Tensor) -> tf.Tensor:
        """[n] int64, the rows of the candidates with `ids` [n]; -1 for an id that is not there.

        Raises:
          ValueError: for a cache without a `row_key`.
        """
        if self.row_key is None:
            raise ValueError("`rows_of` needs a cache with a `row_key`. Received: row_key=None.")
        return RowsById.find(self._state.rows_by_id, ids)

    def oldest(self, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows touched longest ago, the smallest first among equals.

        Raises:
          ValueError: where `count` is no number of rows.
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
        """Writes embeddings that were computed anew, outside of the sequence of updates.

        The rows get age 0, and the others get no older.

        Args:
          rows: [n] int, different rows that are filled.
          embeddings: [n, d] float.

        Raises:
          ValueError: where a shape or dtype does not fit, or, outside of a `tf.function`, a row
            does not exist.
        """
        rows = _validation.check_rows(rows, self.cache_size, "rows")
        items = {self.embedding_key: embeddings}
        on_every_replica(self._writer.rewrite, self._check_updates(items, rows, None))

    def as_negative_cache(self) -> NegativeCache:
        """Returns the cache as the published `NegativeCache`, whose data are the live variables."""
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
        """Updates existing rows, then lets each new item replace the oldest row left.

        Every age grows by one; touched rows get age 0. Among equal ages the smallest row is
        replaced first. With a `row_key`, new items go to the rows of their ids instead.

        Args:
          new_items: feature name -> [n, ...] new candidates, with exactly the cache's features;
            n <= C without a `row_key`. Of items of one id the first is written.
          new_items_mask: [n] bool; items with False are not inserted.
          updated_item_data: feature name -> [m, ...] new values of existing rows, for any of the
            cache's features.
          updated_item_indices: [m] int, their rows.
          updated_item_mask: [m] bool; entries with False change nothing.

        Raises:
          ValueError: where names, dtypes or shapes do not match the specs, or n exceeds a cache
            without a `row_key`.
        """
        new_items = _validation.check_items(new_items, self.specs, what="new_items", exact=True)
        if self.row_key is None:
            _validation.check_fits(new_items, self.cache_size, what="new_items")
        new_items_mask = _validation.check_mask(
            new_items_mask, new_items[self.embedding_key], what="new_items_mask"
        )
        updates = None
        if updated_item_data is not None:
            updates = self._check_updates(
                updated_item_data, updated_item_indices, updated_item_mask
            )
        on_every_replica(self._writer.update, new_items, new_items_mask, updates)

    def _limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        largest = float(tf.as_dtype(self.embeddings.dtype).max)
        yield "an embedding", self.embeddings, -largest, largest
        yield from self._times.limits()
        if self.row_key is not None:
            yield "a row", self._state.rows_by_id["rows"], -1, self.cache_size - 1

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
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Cache":
        index = deserialize(config.get("index"))
        return cls(**{**config, "specs": specs_of(config["specs"]), "index": index})

    def _check_updates(
        self, items: Mapping[str, tf.Tensor], indices: tf.Tensor | None, mask: tf.Tensor | None
    ) -> RowUpdates:
        items = _validation.check_items(items, self.specs, what="updated_item_data", exact=False)
        like = next(iter(items.values()))
        indices = _validation.check_indices(
            indices, like, what="updated_item_indices", needed_by="updated_item_data"
        )
        mask = _validation.check_mask(mask, like, what="updated_item_mask")
        return RowUpdates(items, indices, mask)
