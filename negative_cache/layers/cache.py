"""`Cache`: the rows of a negative cache as variables that are updated in place."""

from collections.abc import Mapping

import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers import _cache_index
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

    Raises:
      ValueError: where the specs do not describe an embedding under `embedding_key`, `cache_size`
        is not positive, or `index` is for other embeddings.

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
        """Scalar int64, the number of rows refused so far for an embedding that is not finite."""
        return self._state.num_skipped

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
        replaced first.

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
        size = tf.size(mask) if mask.shape[0] is None else mask.shape[0]
        inserted = insertion_rows(self._oldest_rows(size), mask)
        self._write(inserted, new_items)
        self._touch(inserted)
        filled = self._state.filled
        is_more = mask & ~tf.gather(filled, inserted.rows)
        self._state.num_filled.assign_add(tf.math.count_nonzero(is_more, dtype=tf.int32))
        scatter_rows(filled, inserted.rows, inserted.values(tf.ones_like(mask), filled))
        if self.index is not None:
            changed.append((inserted.rows, mask))
            _cache_index.follow(self.index, self.embeddings, filled, changed)

    def _oldest_rows(self, count):
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

    def get_config(self):
        return {
            **super().get_config(),
            "specs": describe_specs(self.specs),
            "cache_size": self.cache_size,
            "embedding_key": self.embedding_key,
            "use_lru": self.use_lru,
            "saved": self._is_saved,
            "index": keras.utils.serialize_keras_object(self.index),
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
