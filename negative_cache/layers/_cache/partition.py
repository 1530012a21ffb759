"""`Partition`: which replica holds which candidate of a corpus."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from negative_cache import util


@dataclasses.dataclass(frozen=True)
class Partition:
    """Candidate i of a corpus is row i // R of the i mod R-th of R shards.

    With one shard, every replica holds all candidates.

    Args:
      num_shards: R, the number of replicas, or 1.
    """

    num_shards: int

    @classmethod
    def over_replicas(cls, is_sharded: bool) -> "Partition":
        """One shard for each replica of the present strategy, if a corpus is to have shards."""
        return cls(tf.distribute.get_strategy().num_replicas_in_sync if is_sharded else 1)

    def description(self, is_sharded: bool) -> dict[str, int]:
        """What a file and a configuration say of it."""
        return {"num_shards": self.num_shards} if is_sharded else {}

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a cache, with as many rows of a shard as it now needs.

        The corpus may have been on another number of replicas.
        """
        config = dict(config)
        num_shards = config.pop("num_shards", None)
        if num_shards is not None:
            here = cls.over_replicas(config["sharded"])
            size = here.num_rows(config["cache_size"] * num_shards)
            config["cache_size"] = size
            index = config["index"]
            if index is not None:
                config["index"] = {**index, "config": {**index["config"], "capacity": size}}
        return config

    def num_rows(self, num_candidates: int) -> int:
        """The rows that a shard needs."""
        return -(-num_candidates // self.num_shards)

    def places(self, start: tf.Tensor, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """[count] int64 rows of the candidates from `start` on, and whether this replica has each.

        Args:
          start: scalar int64, the place of the first one in the corpus.
          count: scalar int64, how many there are.
        """
        places = start + tf.range(count)
        return places // self.num_shards, tf.equal(places % self.num_shards, self._own())

    def part(self, values: np.ndarray) -> np.ndarray:
        """Of one value for each candidate [N], those of the rows of this replica, in their order.

        To be called eagerly.
        """
        return values[int(self._own()) :: self.num_shards]

    def _own(self) -> tf.Tensor:
        """Scalar int64, the number of the shard of this replica."""
        return tf.cast(util.replica_id() if self.num_shards > 1 else 0, tf.int64)
