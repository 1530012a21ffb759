"""`Cache`: the rows of a negative cache as variables that are updated in place."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers import _cache_index
from negative_cache.layers._corpus import EMBEDDING, Corpus, RowsById
from negative_cache.layers._state import (
    StateLayer,
    describe_specs,
    make_state_variable,
    on_every_replica,
    scatter_rows,
    specs_of,
)
from negative_cache.layers.tree_index import TreeIndex
from negative_cache.negative_cache import NegativeCache
from negative_cache.ops import OldestRows, insertion_rows, masked_rows, oldest_rows
from negative_cache.ops.tree_statistics import Groups

# A larger cache keeps a queue of its oldest rows. Making the queue anew takes a pass over all rows,
# once in about (queue size / batch size) updates; using it takes a pass over the queue.
_QUEUE_SIZE = 2**15


@keras.utils.register_keras_serializable("negative_cache")
class Cache(StateLayer):
    """A fixed number of rows, each with a candidate's features and its embedding.

    A cache streams: new candidates replace the rows that were touched longest ago. It differs from
    `CacheManager.update_cache` in how, not in what: an update writes the touched rows of its
    variables in place instead of returning a new cache, and rows that were never filled are known
    as such.

    The rows are non-trainable `tf.Variable`s. Under a `tf.distribute` strategy every replica holds
    rows of its own, and an update that is called outside of the replicas reaches each of them.

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

    Raises:
      ValueError: where the specs do not describe an embedding under `embedding_key`, and an id
        under a given `row_key`; where `cache_size` is not positive, or `index` is for others.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.specs = _validation.check_specs(specs)
        self.cache_size = _validation.check_count(cache_size, "cache_size")
        self._check_embedding(self.specs, embedding_key)
        self.embedding_key = embedding_key
        self.use_lru = use_lru
        if index is not None:
            _cache_index.check_index(index, self.cache_size, self.specs[embedding_key], saved)
        self.index = index
        if row_key is not None:
            _validation.check_id(row_key, self.specs, "row_key", "specs")
        self.row_key = row_key
        self._has_queue = self.cache_size > _QUEUE_SIZE
        self._hold_state(
            description={"cache_size": self.cache_size, "specs": describe_specs(self.specs)},
            saved=saved,
            data={
                key: self._make_rows(spec.shape, spec.dtype, key)
                for key, spec in self.specs.items()
            },
            last_touched=self._make_rows([], tf.int32, "last_touched"),
            filled=self._make_rows([], tf.bool, "filled"),
            num_filled=make_state_variable(lambda: tf.zeros([], tf.int32), "num_filled"),
            step=make_state_variable(lambda: tf.zeros([], tf.int32), "step"),
            num_skipped=make_state_variable(lambda: tf.zeros([], tf.int64), "num_skipped"),
            queue=self._make_queue() if self._has_queue else {},
            rows_by_id=RowsById.make_variables(self.cache_size) if row_key is not None else {},
        )
        self.built = True

    @property
    def data(self) -> dict[str, tf.Variable]:
        """Feature name -> variable [C, ...].

        Read rows of them with `tf.gather`: a slice copies the whole variable.
        """
        return dict(self._state.data)

    @property
    def embeddings(self) -> tf.Variable:
        """[C, d] variable, the cached embeddings."""
        return self._state.data[self.embedding_key]

    @property
    def age(self) -> tf.Tensor:
        """[C] int32, the number of updates since each row was touched."""
        return self._state.step - self._state.last_touched

    def age_of(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] int32, `age` of `rows` [n]."""
        return self._state.step - tf.gather(self._state.last_touched, rows)

    @property
    def saved(self) -> bool:
        """Whether files hold the rows."""
        return self._is_saved

    @property
    def step(self) -> tf.Variable:
        """Scalar int32, the number of updates so far."""
        return self._state.step

    @property
    def filled(self) -> tf.Variable:
        """[C] bool, whether each row holds a candidate."""
        return self._state.filled

    @property
    def num_filled(self) -> tf.Variable:
        """Scalar int32, the number of rows that hold a candidate."""
        return self._state.num_filled

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
        verbose: int = 1,
        **kwargs,
    ) -> "Cache":
        """A cache of a whole corpus, each candidate encoded once: row i is that of candidate i.

        Args:
          dataset: batches of candidate features, in the order of the rows; a mapping or a single
            tensor, what `candidate_network` takes. It is read twice where `cache_size` is None, to
            know the number of candidates first.
          candidate_network: the candidate tower, features -> [n, d]; called in inference mode.
          feature_specs: feature name -> spec, or a single spec; taken from the dataset where None,
            which must be a `tf.data.Dataset` then.
          candidate_id_key: the feature that identifies a candidate, the later `row_key`. Where the
            tower takes a single tensor, it is that, under the name "candidate".
          cache_size: the number of candidates.
          embedding_dtype: of the cached embeddings: float32, bfloat16 or float16.
          index: as in `Cache`.
          saved: likewise.
          verbose: 1 for a progress bar, 0 for none.
          **kwargs: of the layer.

        Raises:
          ValueError: where the features of the dataset are not those of the specs, two candidates
            have the same id, or the dataset has more candidates than `cache_size`, or none.
        """
        corpus = Corpus(dataset, candidate_network, feature_specs, candidate_id_key)
        size = corpus.count() if cache_size is None else cache_size
        embedding = tf.io.FixedLenFeature([corpus.embedding_dim()], embedding_dtype)
        cache = cls(
            {**corpus.specs, EMBEDDING: embedding},
            size,
            EMBEDDING,
            saved=saved,
            index=index,
            row_key=corpus.id_key,
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
        bar = keras.utils.Progbar(self.cache_size, unit_name="candidate", verbose=verbose)
        on_every_replica(self._forget)
        try:
            self._fill(batches, bar)
        except Exception:
            # Rows without their ids would be negatives of their own queries.
            on_every_replica(self._forget)
            raise
        if self.index is not None:
            is_filled = tf.convert_to_tensor(self.filled).numpy()
            embeddings = tf.cast(tf.convert_to_tensor(self.embeddings), tf.float32).numpy()
            # What is not filled is left out by the index as it is here.
            embeddings[~is_filled] = np.nan
            self.index.index(embeddings, verbose=verbose)

    def _fill(self, batches, bar):
        write = tf.function(self._fill_rows, reduce_retracing=True)
        ids, start = [], 0
        for items in batches:
            items = _validation.check_items(items, self.specs, what="batches", exact=True)
            ids.append(items[self.row_key].numpy())
            if start + len(ids[-1]) > self.cache_size:
                raise ValueError(
                    "There are more candidates than rows. Received at least"
                    f" {start + len(ids[-1])} candidates for a `cache_size` of {self.cache_size}."
                )
            on_every_replica(write, tf.constant(start, tf.int64), items)
            start += len(ids[-1])
            bar.update(start)
        if not start:
            raise ValueError("There are no candidates to fill the cache with.")
        if start < self.cache_size:
            bar.update(start, finalize=True)
        on_every_replica(RowsById.assign, self._state.rows_by_id, np.concatenate(ids))

    def rows_of(self, ids: tf.Tensor) -> tf.Tensor:
        """[n] int64, the rows of the candidates with `ids` [n]; -1 for an id that is not there.

        Raises:
          ValueError: for a cache without a `row_key`.
        """
        if self.row_key is None:
            raise ValueError("`rows_of` needs a cache with a `row_key`. Received: row_key=None.")
        return RowsById.find(self._state.rows_by_id, ids)

    def oldest(self, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows touched longest ago, the smallest first among equals."""
        last_touched = self._state.last_touched
        if not self._has_queue:
            return oldest_rows(self.age, count)
        rows, touched = self._state.queue["rows"], self._state.queue["last_touched"]
        queue = OldestRows(tf.convert_to_tensor(rows), touched)
        usable = queue.untouched(last_touched)

        def from_queue():
            return queue.first(usable, count)

        def from_new_queue():
            size = (
                tf.maximum(_QUEUE_SIZE, count) if tf.is_tensor(count) else max(_QUEUE_SIZE, count)
            )
            new = OldestRows.of(tf.convert_to_tensor(last_touched), size)
            # Rows touched in this very update may be needed now, but tie with rows that it is yet
            # to touch: they are not kept.
            is_old = new.last_touched < self._state.step
            rows.assign(new.rows[:_QUEUE_SIZE])
            touched.assign(tf.where(is_old, new.last_touched, -1)[:_QUEUE_SIZE])
            return new.rows[:count]

        if not tf.is_tensor(count) and count > _QUEUE_SIZE:
            # A branch that could not run could not be traced either.
            return from_new_queue()
        num_usable = tf.math.count_nonzero(usable, dtype=tf.int32)
        return tf.cond(num_usable >= count, from_queue, from_new_queue)

    def rewrite(self, rows: tf.Tensor, embeddings: tf.Tensor) -> None:
        """Writes embeddings that were computed anew, outside of the sequence of updates.

        The rows get age 0, and the others get no older.

        Args:
          rows: [n] int, different rows that are filled.
          embeddings: [n, d] float.
        """
        items = {self.embedding_key: embeddings}
        items, rows, mask = self._check_updates(items, rows, None)
        on_every_replica(self._rewrite, rows, items, mask)

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
          new_items: feature name -> [n, ...] new candidates, n <= C, with exactly the cache's
            features.
          new_items_mask: [n] bool; items with False are not inserted.
          updated_item_data: feature name -> [m, ...] new values of existing rows, for any of the
            cache's features.
          updated_item_indices: [m] int, their rows.
          updated_item_mask: [m] bool; entries with False change nothing.

        Raises:
          ValueError: where names, dtypes or shapes do not match the specs, or n exceeds the cache.
        """
        new_items = _validation.check_items(new_items, self.specs, what="new_items", exact=True)
        _validation.check_fits(new_items, self.cache_size, what="new_items")
        new_items_mask = _validation.check_mask(
            new_items_mask, new_items[self.embedding_key], what="new_items_mask"
        )
        updates = None
        if updated_item_data is not None:
            updates = self._check_updates(
                updated_item_data, updated_item_indices, updated_item_mask
            )
        on_every_replica(self._update, new_items, new_items_mask, updates)

    def _update(self, new_items, new_items_mask, updates):
        # A batch whose size was unknown until now is refused before anything changes.
        fits = tf.debugging.assert_less_equal(
            tf.size(new_items_mask),
            self.cache_size,
            "A batch must fit into the cache: it has more candidates than `cache_size`. Raise"
            " `cache_size`, or make the batches smaller.",
        )
        with tf.control_dependencies([] if fits is None else [fits]):
            self._state.step.assign_add(1)
        changed = []
        if updates is not None:
            items, indices, mask = updates
            mask = self._admit(items, mask)
            updated = masked_rows(indices, mask)
            self._write(updated, items)
            if self.embedding_key in items:
                changed.append((indices, mask))
            if self.use_lru:
                self._touch(updated)
        mask = self._admit(new_items, new_items_mask)
        inserted, mask = self._rows_for(new_items, mask)
        self._write(inserted, new_items)
        self._touch(inserted)
        self._mark_filled(inserted, mask)
        if self.index is not None:
            changed.append((inserted.rows, mask))
            _cache_index.follow(self.index, self.embeddings, self._state.filled, changed)

    def _rows_for(self, items, mask):
        """The rows that new items go to, and which of the items there is a row for."""
        if self.row_key is None:
            size = tf.size(mask) if mask.shape[0] is None else mask.shape[0]
            return insertion_rows(self.oldest(size), mask), mask
        rows = self.rows_of(items[self.row_key])
        is_known = mask & (rows >= 0)
        self._state.num_skipped.assign_add(tf.math.count_nonzero(mask & ~is_known))
        return masked_rows(rows, is_known), is_known

    def _mark_filled(self, rows, mask):
        filled = self._state.filled
        is_more = mask & ~tf.gather(filled, rows.rows)
        if self.row_key is not None:
            # A batch may bring a candidate twice.
            is_more &= Groups.of(tf.cast(rows.rows, tf.int32), mask).rank == 0
        self._state.num_filled.assign_add(tf.math.count_nonzero(is_more, dtype=tf.int32))
        scatter_rows(filled, rows.rows, rows.values(tf.ones_like(mask), filled))

    def _forget(self):
        for variable in (self._state.filled, self._state.num_filled):
            variable.assign(tf.zeros(variable.shape, variable.dtype))
        # What is not there is not to be encoded again, however long it waits.
        last_touched = self._state.last_touched
        last_touched.assign(tf.fill(last_touched.shape, last_touched.dtype.max))
        RowsById.clear(self._state.rows_by_id)

    def _fill_rows(self, start, items):
        mask = self._admit(items, tf.ones(tf.shape(items[self.row_key]), tf.bool))
        rows = masked_rows(start + tf.range(tf.size(mask, tf.int64)), mask)
        self._write(rows, items)
        self._touch(rows)
        self._mark_filled(rows, mask)

    def _rewrite(self, rows, items, mask):
        mask = self._admit(items, mask)
        written = masked_rows(rows, mask)
        self._write(written, items)
        self._touch(written)
        if self.index is not None:
            changed = [(rows, mask)]
            _cache_index.follow(self.index, self.embeddings, self._state.filled, changed)

    def get_config(self):
        return {
            **super().get_config(),
            "specs": describe_specs(self.specs),
            "cache_size": self.cache_size,
            "embedding_key": self.embedding_key,
            "use_lru": self.use_lru,
            "saved": self._is_saved,
            "index": keras.utils.serialize_keras_object(self.index),
            "row_key": self.row_key,
        }

    @classmethod
    def from_config(cls, config):
        index = keras.utils.deserialize_keras_object(config.get("index"))
        return cls(**{**config, "specs": specs_of(config["specs"]), "index": index})

    def _check_updates(self, items, indices, mask):
        items = _validation.check_items(items, self.specs, what="updated_item_data", exact=False)
        like = next(iter(items.values()))
        indices = _validation.check_indices(
            indices, like, what="updated_item_indices", needed_by="updated_item_data"
        )
        return items, indices, _validation.check_mask(mask, like, what="updated_item_mask")

    def _admit(self, items, mask):
        """Leaves out entries with a non-finite embedding, and counts them."""
        if self.embedding_key not in items:
            return mask
        finite = tf.reduce_all(tf.math.is_finite(items[self.embedding_key]), axis=1)
        skipped = tf.math.count_nonzero(mask & ~finite)
        self._state.num_skipped.assign_add(skipped)
        return mask & finite

    def _write(self, rows, items):
        for key, values in items.items():
            variable = self._state.data[key]
            scatter_rows(variable, rows.rows, rows.values(tf.stop_gradient(values), variable))

    def _touch(self, rows):
        now = tf.fill(tf.shape(rows.rows), self._state.step)
        scatter_rows(
            self._state.last_touched, rows.rows, rows.values(now, self._state.last_touched)
        )

    def _make_queue(self):
        """Variables of an `OldestRows` without a usable entry."""
        size = [_QUEUE_SIZE]
        return {
            "rows": make_state_variable(lambda: tf.zeros(size, tf.int64), "oldest_rows"),
            "last_touched": make_state_variable(lambda: tf.fill(size, -1), "oldest_last_touched"),
        }

    def _make_rows(self, shape, dtype, name):
        shape = [self.cache_size, *shape]
        dtype = tf.as_dtype(dtype)
        return make_state_variable(
            lambda: tf.fill(shape, "") if dtype == tf.string else tf.zeros(shape, dtype), name
        )

    @staticmethod
    def _check_embedding(specs, embedding_key):
        if embedding_key not in specs:
            raise ValueError(
                "`embedding_key` must be one of the features in `specs`. Received:"
                f" {embedding_key!r}, and specs for {sorted(specs)}."
            )
        spec = specs[embedding_key]
        if len(spec.shape) != 1 or not tf.as_dtype(spec.dtype).is_floating:
            raise ValueError(
                f"The embedding must be floating point of shape [dim]. Received the spec: {spec}."
            )
