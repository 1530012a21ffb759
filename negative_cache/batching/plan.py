"""The plan of an epoch, and the maker of batches that follows it.

`BatchPlan` holds the user's arguments and checks them. `BatchMaker` embeds pairs, orders them and
cuts the order into batches. Epochs of Keras and datasets are the subject of `batches` and `shards`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from negative_cache import _features, _validation
from negative_cache._features import Features
from negative_cache._towers import TowerPair, Towers
from negative_cache.batching import keep_apart
from negative_cache.batching.grow import grow_batches
from negative_cache.batching.ids import UNKNOWN_IDS, Ids
from negative_cache.batching.order import (
    check_embeddings,
    check_index,
    check_quantile,
    neighbor_graph,
    order_of,
)
from negative_cache.layers.tree_index import TreeIndex


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The checked arguments of `GlobalContrastiveBatches` that say how to make batches.

    `group_size` is B if all pairs of a batch are similar.

    Raises:
      ValueError: if an argument is out of range.
    """

    batch_size: int
    num_neighbors: int
    quantile: float | None
    start_epoch: int
    random_fraction: float | Callable[[int], float]
    group_size: int
    grow: bool
    drop_remainder: bool
    index: TreeIndex | None
    embedding_batch_size: int
    seed: int
    verbose: int

    def __post_init__(self) -> None:
        for name, smallest in (
            ("batch_size", 1),
            ("embedding_batch_size", 1),
            ("num_neighbors", 1),
            ("start_epoch", 0),
            ("seed", 0),
        ):
            self._set(name, _validation.check_count(getattr(self, name), name, at_least=smallest))
        check_quantile(self.quantile)
        check_index(self.index)
        if not callable(self.random_fraction):
            self._set("random_fraction", _check_fraction(self.random_fraction, "random_fraction"))
        self._set("group_size", _validation.check_count(self.group_size, "group_size"))
        if self.batch_size % self.group_size:
            raise ValueError(
                "`group_size` must divide `batch_size`. Received:"
                f" {self.group_size} and {self.batch_size}."
            )

    def num_batches(self, num_pairs: int) -> int:
        """Returns the number of batches of `num_pairs` pairs."""
        if self.drop_remainder:
            return num_pairs // self.batch_size
        return math.ceil(num_pairs / self.batch_size)

    def check_not_empty(self, num_pairs: int) -> None:
        """Checks that `num_pairs` pairs make at least one batch."""
        if not self.num_batches(num_pairs):
            raise ValueError(
                "There is no batch: `drop_remainder` leaves out all pairs if there are fewer pairs"
                f" than in a batch. Received: {num_pairs} pairs and"
                f" `batch_size={self.batch_size}`."
            )

    def random_fraction_of(self, epoch: int) -> float:
        """Returns the share of random batches in an epoch, which is 1 before `start_epoch`."""
        if epoch < self.start_epoch:
            return 1.0
        if not callable(self.random_fraction):
            return self.random_fraction
        return _check_fraction(self.random_fraction(epoch), "random_fraction(epoch)")

    def rng(self, stream: Sequence[int]) -> np.random.Generator:
        """Makes a generator from the seed and a stream of integers, such as the epoch."""
        return np.random.default_rng([self.seed, *stream])

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class Order:
    """The rows [N] int64 of pairs in order, and the graph of their neighbors to grow batches on.

    The graph is None if batches are cut from the order.
    """

    rows: np.ndarray
    graph: scipy.sparse.csr_matrix | None = None


class BatchMaker:
    """Orders pairs by the embeddings of two towers and cuts them into the batches of an epoch.

    Args:
      model: see `Towers`.
      plan: the arguments. All random numbers are drawn from its seed and a `stream` of integers,
        such as the epoch and the number of the shard.
    """

    def __init__(self, model: TowerPair, plan: BatchPlan):
        self.plan = plan
        self.towers = Towers(model, plan.embedding_batch_size)

    def embed(self, pairs: Mapping[str, Features]) -> tuple[np.ndarray, np.ndarray]:
        """Returns [N, d] embeddings of the queries, and of the candidates."""
        return self.towers.embed(pairs, _features.num_rows(pairs), self.plan.verbose)

    def order(
        self,
        pairs: Mapping[str, Features],
        ids: Ids,
        stream: Sequence[int],
        numbers: np.ndarray | None = None,
    ) -> Order:
        """Orders pairs by their current embeddings. Errors name pairs by their `numbers` [N]."""
        embeddings = [
            check_embeddings(values, f"{name} embeddings", numbers)
            for values, name in zip(self.embed(pairs), ("query", "candidate"))
        ]
        seed = int(self.plan.rng(stream).integers(2**31))
        graph = neighbor_graph(
            *embeddings,
            num_neighbors=self.plan.num_neighbors,
            quantile=self.plan.quantile,
            candidate_ids=ids.candidates,
            query_ids=ids.queries,
            index=self.plan.index,
            seed=seed,
            verbose=self.plan.verbose,
        )
        return Order(order_of(graph, seed), graph if self.plan.grow else None)

    def batches(
        self, order: Order, ids: Ids, epoch: int, stream: Sequence[int]
    ) -> list[np.ndarray]:
        """Returns the rows of each batch. The last batch may be smaller."""
        plan = self.plan
        rng, fraction = plan.rng([*stream, 1]), plan.random_fraction_of(epoch)
        if fraction == 1.0:
            rows = rng.permutation(order.rows)
        else:
            # The order begins at a random place, so that the batches of two epochs differ.
            rows = np.roll(order.rows, -rng.integers(max(len(order.rows), 1)))
            if order.graph is not None:
                rows = grow_batches(order.graph, rows, plan.group_size, ids)
        return cut_batches(
            rows,
            plan.batch_size,
            group_size=plan.group_size,
            random_fraction=fraction,
            ids=ids,
            rng=rng,
        )


def cut_batches(
    order: np.ndarray,
    batch_size: int,
    *,
    group_size: int | None = None,
    random_fraction: float = 0.0,
    ids: Ids = UNKNOWN_IDS,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """Cuts an order into batches, and puts the batches in random sequence.

    Args:
      order: [N] int, a permutation.
      batch_size: B.
      group_size: the number of consecutive pairs that stay together, a divisor of B. If None, it is
        B. A batch is made of random groups.
      random_fraction: the share of full batches whose pairs are shuffled among these batches. If it
        is not 0, at least two batches are shuffled.
      ids: the ids of the pairs. Pairs that would be false negatives of each other are kept apart.
      rng: the generator of all random numbers.

    Returns:
      The rows of each batch. The last batch is shorter if B does not divide N.
    """
    order = np.array(order)
    num_full = len(order) // batch_size
    if group_size not in (None, batch_size):
        groups = order[: len(order) // group_size * group_size].reshape([-1, group_size])
        groups[:] = rng.permutation(groups)
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    num_mixed = round(random_fraction * num_full)
    if random_fraction:
        num_mixed = min(max(num_mixed, 2), num_full)
    mixed = rng.choice(num_full, num_mixed, replace=False)
    full[mixed] = rng.permutation(full[mixed].reshape([-1])).reshape([-1, batch_size])
    order = keep_apart.separate(order, ids, batch_size)
    full = order[: num_full * batch_size].reshape([num_full, batch_size])
    rest = order[num_full * batch_size :]
    return [*full[rng.permutation(num_full)], *([rest] if len(rest) else [])]


def _check_fraction(fraction: Any, name: str) -> float:
    """Checks that an argument is a share, from 0 to 1."""
    try:
        value = float(fraction)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"`{name}` must lie between 0 and 1. Received: {fraction!r}.")
    return value
