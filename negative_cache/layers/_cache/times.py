"""The times when the rows of a cache were last touched, and which rows are filled or oldest."""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from negative_cache.layers._variables import (
    Int32Variable,
    StateVariable,
    by_replica,
    make_state_variable,
    scatter_rows,
)
from negative_cache.ops import OldestRows, _execution, cache_rows, oldest_rows
from negative_cache.ops.cache_rows import MaskedRows, times_of

# On a CPU, a cache with more rows keeps a queue of its oldest rows. The queue is made again about
# every (queue size / batch size) updates, which takes a pass over all rows. Each use takes a pass
# over the queue.
_QUEUE_SIZE = 2**15


class RowTimes:
    """The variables that say when each row was last touched, and whether it is filled.

    One number, the stamp of a row, says both; see `ops.cache_rows`. Time is the number of updates.

    Args:
      num_rows: C.

    Attributes:
      step: scalar int64 variable, the number of updates so far.
      num_filled: scalar int64 variable, the number of filled rows.
    """

    def __init__(self, num_rows: int):
        self._stamps = make_state_variable(lambda: tf.fill([num_rows], -1), "stamps")
        self.step = make_state_variable(lambda: tf.zeros([], tf.int64), "step")
        self.num_filled = make_state_variable(lambda: tf.zeros([], tf.int64), "num_filled")
        self._queue = _make_queue() if num_rows > _QUEUE_SIZE else {}

    @property
    def variables(self) -> dict:
        """The variables that files hold."""
        return {
            "stamps": self._stamps,
            "step": self.step,
            "num_filled": self.num_filled,
            "queue": self._queue,
        }

    def variables_of(self, num_rows: int) -> dict:
        """The variables that files of another number of rows hold, or what is like them."""
        queue = self._queue
        if num_rows <= _QUEUE_SIZE:
            queue = {}
        elif not queue:
            queue = {
                key: tf.TensorSpec(values.shape, values.dtype, key)
                for key, values in _unused_queue().items()
            }
        return {**self.variables, "queue": queue}

    def unused_queue(self) -> dict[str, np.ndarray]:
        """The values of a queue without usable entries, if there is a queue."""
        return _unused_queue() if self._queue else {}

    @property
    def num_rows(self) -> int:
        """C."""
        return self._stamps.shape[0]

    def limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        """Yields the valid range of each variable; see `StateLayer`."""
        num_rows = self._stamps.shape[0]
        yield "the number of steps", self.step, 0, tf.int32.max
        yield "the number of filled rows", self.num_filled, 0, num_rows
        if self._queue:
            yield "a row", self._queue["rows"], 0, num_rows - 1

    @property
    def stamps(self) -> Int32Variable:
        """[C] int32, the stamps of the rows."""
        return self._stamps

    @property
    def now(self) -> tf.Tensor:
        """Scalar int32, the current time."""
        return tf.cast(self.step, tf.int32)

    @property
    def filled(self) -> tf.Tensor:
        """[C] bool, whether each row is filled."""
        return cache_rows.is_filled(tf.convert_to_tensor(self._stamps))

    def filled_on_any_replica(self) -> np.ndarray:
        """[C] bool, whether each row is filled on a replica of this process."""
        return np.any([cache_rows.is_filled(part.value()) for part in by_replica(self._stamps)], 0)

    def is_filled(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] bool, whether each of `rows` [n] is filled."""
        return cache_rows.is_filled(tf.gather(self._stamps, rows))

    @property
    def age(self) -> tf.Tensor:
        """[C] int32, the number of updates since each row was touched."""
        return self._on_device(lambda: self._age(tf.convert_to_tensor(self._stamps)))

    def age_of(self, rows: tf.Tensor) -> tf.Tensor:
        """[n] int32, the number of updates since each of `rows` [n] was touched."""
        return self._on_device(lambda: self._age(tf.gather(self._stamps, rows)))

    def touch(self, rows: MaskedRows) -> None:
        """Sets the age of rows to 0. Empty rows stay empty."""
        self._write(rows, cache_rows.touched_at(self.now, tf.gather(self._stamps, rows.rows)))

    def fill(self, rows: MaskedRows, is_first: tf.Tensor) -> None:
        """Sets the age of rows to 0 and marks them as filled.

        Args:
          rows: the n rows.
          is_first: [n] bool; False for a masked entry, or if an earlier entry has the same row.
        """
        is_more = is_first & ~self.is_filled(rows.rows)
        self.num_filled.assign_add(tf.math.count_nonzero(is_more))
        self._write(rows, tf.fill(tf.shape(rows.rows), self.now))

    def forget(self) -> None:
        """Marks all rows as empty."""
        self.num_filled.assign(0)
        # This is the stamp of an empty row that was touched at the latest possible time. So empty
        # rows never count as the oldest, and are never refreshed.
        self._stamps.assign(tf.fill(self._stamps.shape, tf.int32.min))

    def oldest(self, count: int | tf.Tensor) -> tf.Tensor:
        """[count] int64, the rows touched longest ago; the smaller index first among equals."""
        # An accelerator sorts fast, and a queue would have to send its state to the host.
        if not self._queue or _execution.is_on_accelerator(self._stamps):
            return self._on_device(
                lambda: oldest_rows(self._age(tf.convert_to_tensor(self._stamps)), count)
            )
        rows, touched = self._queue["rows"], self._queue["last_touched"]
        queue = OldestRows(tf.convert_to_tensor(rows), tf.convert_to_tensor(touched))
        usable = queue.untouched(times_of(tf.gather(self._stamps, queue.rows)))

        def from_queue() -> tf.Tensor:
            return queue.first(usable, count)

        def from_new_queue() -> tf.Tensor:
            size = (
                tf.maximum(_QUEUE_SIZE, count) if tf.is_tensor(count) else max(_QUEUE_SIZE, count)
            )
            new = OldestRows.of(times_of(tf.convert_to_tensor(self._stamps)), size)
            # Rows touched in this update may be needed now, but tie with rows that it touches
            # later. So they must not stay in the queue.
            is_old = new.last_touched < self.now
            rows.assign(new.rows[:_QUEUE_SIZE])
            touched.assign(tf.where(is_old, new.last_touched, -1)[:_QUEUE_SIZE])
            return new.rows[:count]

        if not tf.is_tensor(count) and count > _QUEUE_SIZE:
            # `tf.cond` traces both branches, and `from_queue` would fail.
            return from_new_queue()
        num_usable = tf.math.count_nonzero(usable, dtype=tf.int32)
        return tf.cond(num_usable >= count, from_queue, from_new_queue)

    def _age(self, stamps: tf.Tensor) -> tf.Tensor:
        return self.now - times_of(stamps)

    def _on_device(self, function: Callable[[], tf.Tensor]) -> tf.Tensor:
        """Runs int32 arithmetic on the device of the stamps. TensorFlow would use the host."""
        return _execution.as_constant(function, like=self._stamps)

    def _write(self, rows: MaskedRows, stamps: tf.Tensor) -> None:
        scatter_rows(self._stamps, rows.rows, rows.values(stamps, self._stamps))


def _make_queue() -> dict[str, StateVariable]:
    """Makes the variables of an `OldestRows` without usable entries."""
    return {
        key: make_state_variable(functools.partial(tf.constant, values), f"oldest_{key}")
        for key, values in _unused_queue().items()
    }


def _unused_queue() -> dict[str, np.ndarray]:
    """The values of an `OldestRows` without usable entries."""
    return {
        "rows": np.zeros([_QUEUE_SIZE], np.int64),
        "last_touched": np.full([_QUEUE_SIZE], -1, np.int32),
    }
