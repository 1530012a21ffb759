"""`Cache`: the rows of a negative cache as variables that are updated in place."""

from collections.abc import Mapping

import tensorflow as tf

from negative_cache._compat import keras
from negative_cache._validation import check_items
from negative_cache.negative_cache import NegativeCache
from negative_cache.ops import cache_update_rows, masked_rows


class Cache(keras.layers.Layer):
    """A fixed number of rows, each with a candidate's features and its embedding.

    A cache streams: new candidates replace the rows that were touched longest ago. It differs from
    `CacheManager.update_cache` in how, not in what: an update writes the touched rows of its
    variables in place instead of returning a new cache, and rows that were never filled are known
    as such.

    The rows are non-trainable `tf.Variable`s. Under a `tf.distribute` strategy every replica holds
    rows of its own.

    Args:
      specs: feature name -> `tf.io.FixedLenFeature` (shape without the batch, dtype), the embedding
        among them.
      cache_size: C, the number of rows.
      embedding_key: which feature is the candidate's embedding. It must be floating point of rank
        1. A row with a non-finite embedding is not written; `num_skipped` counts such rows.
      use_lru: whether updating a row makes it young again, so that the row *used* longest ago is
        replaced first. Rows are replaced in order of insertion where False.

    Raises:
      ValueError: where the specs do not describe an embedding under `embedding_key`, or
        `cache_size` is not positive.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._check_arguments(specs, cache_size, embedding_key)
        self.specs = dict(specs)
        self.cache_size = int(cache_size)
        self.embedding_key = embedding_key
        self.use_lru = use_lru
        # A checkpoint object tracks the variables without making them Keras weights, which cannot
        # be strings.
        self._state = tf.train.Checkpoint(
            data={
                key: self._make_rows(spec.shape, spec.dtype, key)
                for key, spec in self.specs.items()
            },
            last_touched=self._make_rows([], tf.int32, "last_touched"),
            filled=self._make_rows([], tf.bool, "filled"),
            step=make_state_variable(lambda: tf.zeros([], tf.int32), "step"),
            num_skipped=make_state_variable(lambda: tf.zeros([], tf.int64), "num_skipped"),
        )
        self.built = True

    @property
    def data(self) -> dict[str, tf.Variable]:
        """Feature name -> variable [C, ...]. Read rows of them with `tf.gather`: a slice copies the whole."""
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
    def num_filled(self) -> tf.Tensor:
        """Scalar int32, the number of rows that hold a candidate."""
        return tf.math.count_nonzero(self._state.filled, dtype=tf.int32)

    @property
    def num_skipped(self) -> tf.Variable:
        """Scalar int64, the number of rows refused so far because their embedding was not finite."""
        return self._state.num_skipped

    def as_negative_cache(self) -> NegativeCache:
        """The cache as the published `NegativeCache`: its data are the live variables, nothing is copied."""
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
        new_items = check_items(new_items, self.specs, what="new_items", exact=True)
        num_new = new_items[self.embedding_key].shape[0]
        if num_new is not None and num_new > self.cache_size:
            raise ValueError(
                f"A batch must fit into the cache. Received `new_items` of {num_new} rows for a `cache_size` of"
                f" {self.cache_size}."
            )
        self._state.step.assign_add(1)
        if updated_item_data is not None:
            updates = check_items(
                updated_item_data, self.specs, what="updated_item_data", exact=False
            )
            if updated_item_indices is None:
                raise ValueError("`updated_item_data` needs `updated_item_indices`. Received None.")
            mask = self._admit(updates, updated_item_mask)
            updated = masked_rows(updated_item_indices, mask)
            self._write(updated, updates)
            if self.use_lru:
                self._touch(updated)
        mask = self._admit(new_items, new_items_mask)
        inserted = cache_update_rows(self.age, mask, None)
        self._write(inserted, new_items)
        self._touch(inserted)
        scatter_rows(
            self._state.filled,
            inserted.rows,
            inserted.values(tf.ones_like(mask), self._state.filled),
        )

    def get_config(self):
        specs = {
            key: (list(spec.shape), tf.as_dtype(spec.dtype).name)
            for key, spec in self.specs.items()
        }
        return {
            **super().get_config(),
            "specs": specs,
            "cache_size": self.cache_size,
            "embedding_key": self.embedding_key,
            "use_lru": self.use_lru,
        }

    @classmethod
    def from_config(cls, config):
        specs = {
            key: tf.io.FixedLenFeature(shape, tf.as_dtype(dtype))
            for key, (shape, dtype) in config["specs"].items()
        }
        return cls(**{**config, "specs": specs})

    def _admit(self, items, mask):
        """Leaves out entries with a non-finite embedding, and counts them."""
        size = tf.shape(next(iter(items.values())))[0]
        mask = tf.ones([size], tf.bool) if mask is None else tf.convert_to_tensor(mask, tf.bool)
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

    def _make_rows(self, shape, dtype, name):
        shape = [self.cache_size, *shape]
        dtype = tf.as_dtype(dtype)
        return make_state_variable(
            lambda: tf.fill(shape, "") if dtype == tf.string else tf.zeros(shape, dtype), name
        )

    @staticmethod
    def _check_arguments(specs, cache_size, embedding_key):
        if cache_size < 1:
            raise ValueError(f"`cache_size` must be at least 1. Received: {cache_size}.")
        if embedding_key not in specs:
            raise ValueError(
                f"`embedding_key` must be one of the features in `specs`. Received: {embedding_key!r}, and specs for"
                f" {sorted(specs)}."
            )
        spec = specs[embedding_key]
        if len(spec.shape) != 1 or not tf.as_dtype(spec.dtype).is_floating:
            raise ValueError(
                f"The embedding must be floating point of shape [dim]. Received the spec: {spec}."
            )


def scatter_rows(variable: tf.Variable, rows: tf.Tensor, values: tf.Tensor) -> None:
    """Writes `values` [n, ...] into `rows` [n] of `variable` [C, ...] in place.

    Unlike `Variable.scatter_nd_update` it takes every dtype, and works inside a replica context.
    """
    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=rows, updates=values)


def make_state_variable(initial_value, name: str) -> tf.Variable:
    """A non-trainable variable that under a `tf.distribute` strategy has an independent value on every replica."""
    with tf.init_scope():
        return tf.Variable(
            initial_value,
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            name=name,
        )
