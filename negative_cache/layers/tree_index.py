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

    For each query a *cut* through the tree is refined where the query's mass is: at each level the
    heaviest nodes are replaced by their children, in the end `beam` leaves by single candidates
    with exact scores. What remains are nodes, each of which stands for many candidates with an
    estimate of their partition Σ exp(score), and with bounds of it that hold at every moment. A
    draw takes a part of the cut, descends inside of it level by level to one candidate, and is
    corrected by a few Metropolis-Hastings steps. See `ops.tree.cut` and `ops.tree.sampling` for the
    equations. Time grows with the logarithm of the number of candidates.

    The tree is maintained and never rebuilt on a schedule (after Monath et al., arXiv 2303.15311,
    whose SG-tree has nodes of any number of children on levels of halving radii; here nodes lie in
    blocks of fixed size, which split in two where they are full, as in a B-tree). An updated
    candidate that stays inside the ball of its leaf, and near enough for what the leaf was when it
    was made, only moves the means of its path; another one is routed again from the root to the
    nearest child at each level. Where a mean moves by δ, the node's radius grows by ‖δ‖. So bounds
    loosen with time, and `tighten` brings them back to what the candidates themselves give.

    With `store_embeddings=False` the index keeps no embeddings: 4 bytes a candidate for its place,
    about 6 for the leaves' lists of members, `residual_bytes` of a product-quantised residual, and
    the means of leaves of about 900 candidates in bfloat16. It starts with `index`. Scores are then
    estimates, draws follow the softmax over those, and bounds come from nodes alone. Centres of
    leaves then move only when a leaf splits: after a large drift of the embeddings, call `index`
    again.

    Updates, draws and searches run in graphs, without retracing, and on an accelerator under XLA.
    On a CPU that is slower, and Keras is told not to compile what holds an index with it. It is a
    Keras layer so that a model that has one saves it, and is not called.

    A row that cannot be applied is left out and counted in `num_skipped`: an embedding that is not
    finite, or longer than 1e15; an index out of range, or for the second time in one update; a
    candidate without room, which takes very many leaves that hold only a few candidates.

    Args:
      capacity: N, the number of candidates. Their indices are 0, …, N - 1.
      embedding_dim: d.
      beam: leaves opened for each query; of inner nodes twice as many are at each level. More are
        slower, closer to the softmax and tighter in bounds.
      correction_steps: K, Metropolis-Hastings steps for each draw. Each costs one more descent for
        each draw, which is little.
      leaf_size: candidates of a leaf at the most; 64, or 1,024 without embeddings, where None.
      branching: children of a node at the most, below the root.
      embedding_dtype: of the stored embeddings: float32, bfloat16 or float16.
      store_embeddings: whether embeddings are stored.
      residual_bytes: without embeddings, bytes of a candidate's residual. It must divide d. 0 for
        none, where candidates of a leaf are drawn uniformly.
      saved: whether files hold the tree: TensorFlow checkpoints, `.keras` and `.weights.h5`.

    Raises:
      ValueError: where an argument is out of range or contradicts another.

    Example:
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
            **fields,
        )
        self._upkeep = TreeUpkeep(self._shape, self._state, self._candidates)
        # A thousand small operations are as many kernels on an accelerator, unless they are
        # compiled. On a CPU, where shapes need not be fixed, they are faster as they are, and
        # Keras, which asks this before it compiles by itself, is not to.
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
        """Scalar int64, the number of rows of updates left out so far."""
        return self._state.num_skipped

    @property
    def state_variable(self) -> tf.Variable:
        """A variable that is where the index computes."""
        return self._state.max_norm

    @property
    def num_bytes(self) -> int:
        """The size of all variables of one replica."""
        variables = tf.nest.flatten(vars(self._state))
        return sum(variable.shape.num_elements() * variable.dtype.size for variable in variables)

    @property
    def tree_shape(self) -> TreeShape:
        """The numbers of levels, blocks and leaves."""
        return self._shape

    @property
    def tree(self) -> Tree:
        """The live arrays, for the functions of `ops`."""
        return self._upkeep.tree

    def index(self, embeddings: np.ndarray | tf.Tensor, *, verbose: int = 1, seed: int = 0) -> None:
        """Builds the tree anew over candidates 0, …, n - 1, on the host; whatever it held is gone.

        The candidates are clustered into leaves, the leaves' means into blocks, and so on up to the
        root block. It takes minutes for tens of millions, and no copy of the embeddings but the
        stored one, unless rows are left out.

        Args:
          embeddings: [n, d] float, n <= capacity; an array, a tensor or a memory-mapped file. Rows
            that are not finite, or longer than 1e15, are left out and counted.
          verbose: 1 for a progress bar, 0 for none.
          seed: of the clustering.

        Raises:
          ValueError: where the shape does not fit, or in a `tf.function`.
        """
        if not tf.executing_eagerly():
            raise ValueError("`index` builds the tree on the host, outside of any `tf.function`.")
        embeddings = checks.check_corpus(embeddings, self.capacity, self.embedding_dim)
        built = build_tree(
            embeddings, self._shape, self.embedding_dtype, seed=seed, verbose=verbose
        )
        self._upkeep.load(built, embeddings, seed)

    def reset(self) -> None:
        """Takes all candidates out of the tree."""
        self._upkeep.clear()

    def update(
        self, indices: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor | None = None
    ) -> None:
        """Moves candidates to where their embeddings are now, or adds them.

        Args:
          indices: [m] int, which candidates; in [0, capacity), no two equal.
          embeddings: [m, d] float.
          mask: [m] bool; entries with False are left out without being counted, whatever they are.

        Raises:
          ValueError: where a shape does not fit; and, outside of a `tf.function`, where an index is
            out of range or repeated.
        """
        embeddings = checks.check_embeddings(embeddings, self.embedding_dim, "embeddings")
        indices, mask = checks.check_indices(indices, embeddings, mask, self.capacity)
        if tf.executing_eagerly() and not self._candidates.accepts_updates:
            raise ValueError(
                "An index without embeddings cannot grow from nothing: call `index` first."
            )
        embeddings = tf.ensure_shape(tf.cast(embeddings, tf.float32), [None, self.embedding_dim])
        self._upkeep.update(indices, embeddings, mask)

    def remove(self, indices: tf.Tensor) -> None:
        """Takes candidates `indices` [m] out of the tree; those that are not in it are no error.

        Raises:
          ValueError: as `update`.
        """
        indices = tf.convert_to_tensor(indices)
        indices, mask = checks.check_indices(indices, indices, None, self.capacity)
        self._upkeep.remove(indices, mask)

    def tighten(self) -> None:
        """Computes means, spreads and radii anew, in a pass over all candidates.

        Without stored embeddings the leaves' centres stay and only the bounds get tighter.
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
          num_samples: S, draws for each query.
          correction_steps: the index's where None.
          **options: as `sample_with_log_probability` takes them.

        Returns:
          A `SoftmaxSample`. Its scores are exact where embeddings are stored; `log_partition` is
          the cut's estimate. No gradient flows through it.

        Raises:
          ValueError: where a shape does not fit or an argument is out of range.
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

        Args:
          query_embeddings: [B, d] float.
          num_samples: S.
          correction_steps: none here, unless asked for: q is the law of draws without them.
          **options: `temperature`, `score_transform` (elementwise and nondecreasing), `beam` (the
            index's where None), `seed` as in `sample_softmax`; `candidate_ids` [capacity] with
            `positive_ids` [B] or [B, P], and `max_scores` [B], which leave out candidates as there.
            In nodes that were not opened, candidates with a positive's id are left out when they
            are drawn but count for the log partition; of those above `max_scores` the expected part
            of the mass is taken away, as if a node's scores were normal. `row_transform`, a
            function of embeddings [n, d] and candidates [n], is applied to candidates before they
            are scored, and with None for candidates to means of nodes, whose spreads stay what they
            are. `positive_ids` without `candidate_ids` are candidates themselves.

        Returns:
          The `SoftmaxSample`, and [B, S] float32: the log probability that the tree proposes each
          draw, which is the draw's own where `correction_steps` is 0. Of K + 1 proposals that all
          are left out, the index is -1.

        Raises:
          ValueError: as `sample`.
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
        """`sample`, and [B, d] the gradient of its `log_partition` by the queries.

        The queries it is taken by are those divided by the temperature, as in
        `ops.sample_softmax_with_gradient`; it is None where it is not wanted. The derivatives of
        a `score_transform` in the second-order terms count as constants. `log_zero` is as there.
        Other arguments and errors are those of `sample`.
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
        """Bounds log Σ exp(score) over all candidates, provably, rounding included.

        Args:
          query_embeddings: [B, d] float.
          temperature: inner products are divided by it.
          score_transform: elementwise and nondecreasing; bounds are looser with it.
          beam: leaves opened; the index's where None.

        Returns:
          lower: [B] float32; upper: [B] float32. -inf where the tree is empty.

        Raises:
          ValueError: where a shape does not fit or an argument is out of range.
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
        """Finds candidates with large inner products: the best of the leaves that are opened.

        Args:
          query_embeddings: [B, d] float.
          k: how many.
          beam: leaves opened; where None the index's, or more if k needs more leaves.

        Returns:
          scores: [B, k] float32 inner products, in descending order; -inf where there are fewer.
          indices: [B, k] int64; -1 likewise.

        Raises:
          ValueError: where a shape does not fit or an argument is out of range.
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
            _validation.check_count(num_samples, "num_samples"),
            beam=self._checked_beam(beam),
            correction_steps=_validation.check_count(steps, "correction_steps", at_least=0),
            like=self.state_variable,
            compute_gradient=compute_gradient,
            log_zero=log_zero,
            **options,
        )

    def _checked_beam(self, beam: int | None) -> int:
        return self.beam if beam is None else _validation.check_count(beam, "beam")
