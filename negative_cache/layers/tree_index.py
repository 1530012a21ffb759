"""`TreeIndex`: a dynamic tree that samples from a softmax over millions of candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._state import LAYOUT, StateLayer
from negative_cache.layers._tree import checks
from negative_cache.layers._tree.build import build_tree
from negative_cache.layers._tree.draws import (
    DrawOptions,
    ScoreOptions,
    bound,
    draw,
    transformed,
)
from negative_cache.layers._tree.make import make_tree
from negative_cache.layers._tree.state import tree_limits
from negative_cache.layers._tree.stored import RowTransform
from negative_cache.layers._tree.upkeep import TreeUpkeep
from negative_cache.layers._variables import StateVariable
from negative_cache.ops import SoftmaxSample, _execution
from negative_cache.ops._block_scorer import TensorFn
from negative_cache.ops.tree.cut import COUNT, Tree
from negative_cache.ops.tree.sampling import search_tree
from negative_cache.ops.tree.shape import TreeShape

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.utils.register_keras_serializable("negative_cache")
class TreeIndex(StateLayer):
    """A tree over candidate embeddings that samples from their softmax without scoring them all.

    A *cut* is a set of nodes and candidates that covers all candidates once. For each query it is
    refined where the query's mass Σ exp(score) is: at each level the heaviest nodes are replaced by
    their children, and in the end `beam` leaves by single candidates with exact scores. The mass of
    a remaining node is estimated, with bounds that always hold. A draw takes a part of the cut,
    descends to one candidate, and is corrected by a few Metropolis-Hastings steps. Time grows with
    the logarithm of N. `ops.tree.cut` and `ops.tree.sampling` have the equations.

    The tree is maintained and never rebuilt on a schedule, after Monath et al., arXiv 2303.15311.
    (Nodes of their SG-tree have any number of children, on levels of halving radii. Here nodes lie
    in blocks of fixed size that split when they are full, as in a B-tree.) If an updated candidate
    stays inside the ball of its leaf, and within a distance limit set when the leaf was made, only
    the means of its path change. Otherwise it is routed again, from the root to the nearest child
    at each level. If a mean moves by δ, the node's radius grows by ‖δ‖. So bounds loosen with time;
    `tighten` recomputes them from the candidates.

    With `store_embeddings=False` the index keeps no embeddings. Per candidate it takes 4 bytes for
    its slot, about 6 for the leaves' lists of members, and `residual_bytes` for a product-quantised
    residual; the means of leaves of about 900 candidates are in bfloat16. Call `index` first.
    Scores are then estimates, draws follow the softmax over them, and bounds come from nodes alone.
    The leaves' centres move only when a leaf splits: call `index` again after a large drift.

    Updates, draws and searches run in graphs without retracing, and on an accelerator with XLA. XLA
    is slower on a CPU, so Keras does not compile models with an index there. The index is a Keras
    layer, so that a model that has one saves it. It is not called.

    An update skips a row and counts it in `num_skipped` if its embedding is not finite or longer
    than 1e15, if its index is out of range or repeated, or if the tree has no room for it, which
    happens only if very many leaves hold few candidates.

    Args:
      capacity: N, the number of candidates. Their indices are 0, …, N - 1.
      embedding_dim: d.
      beam: number of leaves opened for each query, and of nodes twice as many on each level above.
        A larger beam is slower, closer to the softmax, and gives tighter bounds.
      correction_steps: K, Metropolis-Hastings steps per draw. A step costs one more cheap descent.
      leaf_size: the most candidates in a leaf. None is 64, or 1,024 without embeddings.
      branching: the most children of a node.
      embedding_dtype: dtype of the stored embeddings: float32, bfloat16 or float16.
      store_embeddings: whether embeddings are stored.
      residual_bytes: without embeddings, the bytes of a candidate's residual. It must divide d. If
        0, there are no residuals, and the candidates of a leaf are drawn uniformly.
      saved: whether files hold the tree: TensorFlow checkpoints, `.keras` and `.weights.h5`.

    Raises:
      ValueError: if an argument is out of range or contradicts another.

    Examples:
      >>> index = TreeIndex(capacity=1_000_000, embedding_dim=64)
      >>> index.index(embeddings)
      >>> sample = index.sample(query_embeddings, num_samples=4, temperature=0.05)
      >>> index.update([17, 29], fresh_embeddings)
    """

    def __init__(
        self,
        capacity: int,
        embedding_dim: int,
        *,
        beam: int = 12,
        correction_steps: int = 2,
        leaf_size: int | None = None,
        branching: int = 16,
        embedding_dtype: str | tf.DType = tf.float32,
        store_embeddings: bool = True,
        residual_bytes: int = 8,
        saved: bool = True,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        check = _validation.check_count
        self.capacity = check(capacity, "capacity")
        self.embedding_dim = check(embedding_dim, "embedding_dim")
        self.beam = check(beam, "beam")
        self.correction_steps = check(correction_steps, "correction_steps", at_least=0)
        self.branching = check(branching, "branching", at_least=4)
        self.residual_bytes = check(residual_bytes, "residual_bytes", at_least=0)
        self.store_embeddings = store_embeddings
        self.embedding_dtype = checks.check_dtype(embedding_dtype)
        if leaf_size is not None:
            leaf_size = check(leaf_size, "leaf_size", at_least=2)
        self._shape, self._candidates, fields = make_tree(
            self.capacity,
            self.embedding_dim,
            leaf_size=leaf_size,
            branching=self.branching,
            dtype=self.embedding_dtype if store_embeddings else None,
            residual_bytes=self.residual_bytes,
        )
        self.leaf_size = self._shape.leaf_size
        self._hold_state(
            description={
                **LAYOUT,
                "capacity": self.capacity,
                "embedding_dim": self.embedding_dim,
                "leaf_size": self.leaf_size,
                "branching": self.branching,
                "candidates": (
                    self.embedding_dtype.name if store_embeddings else f"{residual_bytes} bytes"
                ),
            },
            saved=saved,
            divisible=["capacity"],
            **fields,
        )
        self._upkeep = TreeUpkeep(self._shape, self._state, self._candidates)
        # Keras reads this before it compiles. On an accelerator, XLA fuses the many small
        # operations. On a CPU, they are faster without XLA, which needs fixed shapes.
        self.supports_jit = _execution.is_on_accelerator(self.state_variable)
        with tf.init_scope():
            self.reset()
        self.built = True

    @property
    def num_candidates(self) -> tf.Tensor:
        """Scalar int32, the number of candidates in the tree."""
        counts = tf.convert_to_tensor(self._state.stats["0"])[..., COUNT]
        return tf.reduce_sum(tf.cast(counts, tf.int32))

    @property
    def num_skipped(self) -> tf.Variable:
        """Scalar int64, the number of rows of updates that were left out so far."""
        return self._state.num_skipped

    @property
    def state_variable(self) -> tf.Variable:
        """A variable on the device that the index computes on."""
        return self._state.max_norm

    @property
    def num_bytes(self) -> int:
        """The size of all variables of one replica, in bytes."""
        variables = tf.nest.flatten(vars(self._state))
        return sum(variable.shape.num_elements() * variable.dtype.size for variable in variables)

    @property
    def tree_shape(self) -> TreeShape:
        """The numbers of levels, blocks and leaves."""
        return self._shape

    @property
    def tree(self) -> Tree:
        """The variables, for the functions of `ops.tree`."""
        return self._upkeep.tree

    def index(self, embeddings: np.ndarray | tf.Tensor, *, verbose: int = 1, seed: int = 0) -> None:
        """Builds a new tree over candidates 0, …, n - 1, on the host, and drops the former one.

        The candidates are clustered into leaves, the leaves' means into blocks, and so on up to the
        root block. It takes minutes for tens of millions of candidates. The embeddings are copied
        once, if they are stored, and once more if rows are left out.

        Args:
          embeddings: [n, d] float, n <= capacity; an array, a tensor or a memory-mapped file. Rows
            that are not finite, or longer than 1e15, are left out and count in `num_skipped`.
          verbose: 1 for a progress bar, 0 for none.
          seed: seed of the clustering.

        Raises:
          ValueError: if the shape does not fit, or if it is called in a `tf.function`.
        """
        if not tf.executing_eagerly():
            raise ValueError("`index` runs on the host. It cannot be called in a `tf.function`.")
        embeddings = checks.check_corpus(embeddings, self.capacity, self.embedding_dim)
        built = build_tree(
            embeddings, self._shape, self.embedding_dtype, seed=seed, verbose=verbose
        )
        self._upkeep.load(built, embeddings, seed)

    def reset(self) -> None:
        """Removes all candidates from the tree."""
        self._upkeep.clear()

    def update(
        self, indices: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor | None = None
    ) -> None:
        """Moves candidates to new embeddings, or adds them.

        Args:
          indices: [m] int, the candidates; distinct numbers in [0, capacity).
          embeddings: [m, d] float.
          mask: [m] bool; entries with False are ignored and not counted, whatever they hold.

        Raises:
          ValueError: if a shape does not fit or, outside a `tf.function`, an index is out of range
            or repeated.
        """
        embeddings = checks.check_embeddings(embeddings, self.embedding_dim, "embeddings")
        indices, mask = checks.check_indices(indices, embeddings, mask, self.capacity)
        if tf.executing_eagerly() and not self._candidates.accepts_updates:
            raise ValueError("An index without embeddings cannot start empty: call `index` first.")
        embeddings = tf.ensure_shape(tf.cast(embeddings, tf.float32), [None, self.embedding_dim])
        self._upkeep.update(indices, embeddings, mask)

    def remove(self, indices: tf.Tensor) -> None:
        """Removes candidates `indices` [m] from the tree. They need not be in it.

        Raises:
          ValueError: as in `update`.
        """
        indices = tf.convert_to_tensor(indices)
        indices, mask = checks.check_indices(indices, indices, None, self.capacity)
        self._upkeep.remove(indices, mask)

    def tighten(self) -> None:
        """Recomputes means, spreads and radii, by a pass over all candidates.

        Without stored embeddings the leaves' centres stay; only the bounds get tighter.
        """
        self._upkeep.tighten()

    def sample(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int = 1,
        *,
        correction_steps: int | None = None,
        **options: Unpack[DrawOptions],
    ) -> SoftmaxSample:
        """Draws candidates nearly in proportion to exp(score), and estimates the log partition.

        The score is s(x, y) = transform(⟨x, y⟩ / temperature).

        Args:
          query_embeddings: [B, d] float.
          num_samples: S, the number of draws per query. 0 only estimates the log partition.
          correction_steps: K; that of the index if None.
          **options: the options of `sample_with_log_probability`.

        Returns:
          A `SoftmaxSample`. Its scores are exact if embeddings are stored. `log_partition` is the
          cut's estimate. No gradient flows through it.

        Raises:
          ValueError: if a shape does not fit or an argument is out of range.
        """
        return self._draw(query_embeddings, num_samples, correction_steps, **options)[0]

    def sample_with_log_probability(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int = 1,
        *,
        correction_steps: int | None = 0,
        **options: Unpack[DrawOptions],
    ) -> tuple[SoftmaxSample, tf.Tensor]:
        """`sample`, and log q(y|x) of every draw, for importance weights exp(score) / q.

        | Option            | Meaning                                                          |
        | ----------------- | ---------------------------------------------------------------- |
        | `temperature`     | inner products are divided by it                                 |
        | `score_transform` | elementwise, nondecreasing function of the divided products      |
        | `beam`            | number of leaves to open; that of the index if None              |
        | `seed`            | as in `ops.sample_softmax`                                       |
        | `candidate_ids`   | [capacity], ids to compare with `positive_ids`; indices if None  |
        | `positive_ids`    | [B] or [B, P], candidates with these ids are excluded            |
        | `max_scores`      | [B], candidates with a higher score are excluded                 |
        | `row_transform`   | function (embeddings [n, d], candidates [n]) -> [n, d]           |
        | `choose_queries`  | as in `ops.sample_softmax_with_gradient`                         |

        In nodes that are not opened, candidates with a positive id are excluded only when they are
        drawn, so they count in the log partition. The mass above `max_scores` is estimated there as
        if a node's scores were normal. `row_transform` is applied before scoring, also to the means
        of nodes, with None for the candidates. The nodes' spreads stay the same.

        Args:
          query_embeddings: [B, d] float.
          num_samples: S, the number of draws per query.
          correction_steps: K; by default 0, because q is the law of the draws without correction.
          **options: see the table.

        Returns:
          The `SoftmaxSample`, and [B, S] float32, log q of each draw. The index of a draw is -1 if
          all K + 1 proposals are excluded.

        Raises:
          ValueError: if a shape does not fit or an argument is out of range.
        """
        return self._draw(query_embeddings, num_samples, correction_steps, **options)[:2]

    def sample_with_gradient(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int = 1,
        *,
        compute_gradient: bool = True,
        log_zero: float = -math.inf,
        correction_steps: int | None = None,
        **options: Unpack[DrawOptions],
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """`sample`, and [B, d] the gradient of its `log_partition` with respect to the queries.

        The gradient is with respect to the queries divided by the temperature. The derivatives of a
        `score_transform` in the second-order terms are treated as constants. Arguments are as in
        `sample` and in `ops.sample_softmax_with_gradient`.
        """
        sample, _, gradient = self._draw(
            query_embeddings,
            num_samples,
            correction_steps,
            compute_gradient=compute_gradient,
            log_zero=log_zero,
            **options,
        )
        return sample, gradient

    def log_partition_bounds(
        self,
        query_embeddings: tf.Tensor,
        *,
        temperature: float | None = None,
        score_transform: TensorFn | None = None,
        beam: int | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Bounds log Σ exp(score) over all candidates. The bounds are proven, rounding included.

        Args:
          query_embeddings: [B, d] float.
          temperature: inner products are divided by it.
          score_transform: elementwise and nondecreasing; bounds are looser with it.
          beam: number of leaves to open; that of the index if None.

        Returns:
          lower, upper: [B] float32 each; -inf if the tree is empty.

        Raises:
          ValueError: if a shape does not fit or an argument is out of range.
        """
        return bound(
            self.tree,
            checks.scaled_queries(query_embeddings, temperature, self.embedding_dim),
            score_transform,
            beam=self._checked_beam(beam),
            open_leaves=self.store_embeddings,
            max_norm=self._state.max_norm,
        )

    def top_k(
        self, query_embeddings: tf.Tensor, k: int, *, beam: int | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Finds candidates with large inner products: the best in the opened leaves.

        Args:
          query_embeddings: [B, d] float.
          k: number of candidates to find.
          beam: leaves to open. None is that of the index, or more for a large k.

        Returns:
          scores: [B, k] float32, inner products in descending order; -inf for missing candidates.
          indices: [B, k] int64; -1 for missing candidates.

        Raises:
          ValueError: if a shape does not fit or an argument is out of range.
        """
        k = _validation.check_count(k, "k")
        if k > self.capacity:
            raise ValueError(f"`k` must be at most {self.capacity}, the capacity. Received: {k}.")
        if beam is None:
            beam = max(self.beam, math.ceil(4 * k / self.leaf_size))
        queries = checks.scaled_queries(query_embeddings, None, self.embedding_dim)
        return search_tree(self.tree, queries, k, self._checked_beam(beam))

    def _limits(self) -> Iterator[tuple[str, StateVariable, float, float]]:
        return tree_limits(self._shape, self._state)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "capacity": self.capacity,
            "embedding_dim": self.embedding_dim,
            "beam": self.beam,
            "correction_steps": self.correction_steps,
            "leaf_size": self.leaf_size,
            "branching": self.branching,
            "embedding_dtype": self.embedding_dtype.name,
            "store_embeddings": self.store_embeddings,
            "residual_bytes": self.residual_bytes,
            "saved": self._is_saved,
        }

    def _draw(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int,
        correction_steps: int | None,
        *,
        temperature: float | tf.Tensor | None = None,
        beam: int | None = None,
        row_transform: RowTransform | None = None,
        compute_gradient: bool = False,
        log_zero: float = -math.inf,
        **options: Unpack[ScoreOptions],
    ) -> tuple[SoftmaxSample, tf.Tensor, tf.Tensor | None]:
        steps = self.correction_steps if correction_steps is None else correction_steps
        return draw(
            transformed(self.tree, self._candidates, row_transform),
            checks.scaled_queries(query_embeddings, temperature, self.embedding_dim),
            _validation.check_count(num_samples, "num_samples", at_least=0),
            beam=self._checked_beam(beam),
            correction_steps=_validation.check_count(steps, "correction_steps", at_least=0),
            like=self.state_variable,
            compute_gradient=compute_gradient,
            log_zero=log_zero,
            **options,
        )

    def _checked_beam(self, beam: int | None) -> int:
        return self.beam if beam is None else _validation.check_count(beam, "beam")
