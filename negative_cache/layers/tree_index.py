"""`TreeIndex`: a dynamic tree that samples from a softmax over millions of candidates."""

import functools
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from negative_cache import _validation
from negative_cache._compat import keras
from negative_cache.layers._state import LAYOUT, StateLayer, on_every_replica
from negative_cache.layers._tree import checks
from negative_cache.layers._tree.coded import CodedResiduals
from negative_cache.layers._tree.maintenance import TreeMaintenance
from negative_cache.layers._tree.state import (
    assign_topology,
    empty_topology,
    make_tree_variables,
    tree_limits,
)
from negative_cache.layers._tree.stored import StoredEmbeddings
from negative_cache.layers._tree.tightening import tighten
from negative_cache.layers._variables import make_state_variable
from negative_cache.ops import SoftmaxSample, _execution
from negative_cache.ops._draws import seed_or_random
from negative_cache.ops.tree.build import build_topology
from negative_cache.ops.tree.cut import (
    COUNT,
    RADIUS,
    ROUNDING,
    SPREAD,
    Scoring,
    Tree,
    log_partition_bounds,
    make_cut,
)
from negative_cache.ops.tree.sampling import sample_tree, search_tree
from negative_cache.ops.tree.shape import TreeShape
from negative_cache.ops.tree.statistics import Groups

TensorFn = Callable[[tf.Tensor], tf.Tensor]

# A product with this many means takes about as long as opening a few dozen blocks.
_MAX_ROOT_WIDTH = 10_000
# Where embeddings are stored, leaves have room for candidates that come. Where memory is all that
# matters they are larger, and filled.
_STORED = {"leaf_size": 64, "fill": 0.66, "spare": 2.0}
_CODED = {"leaf_size": 1024, "fill": 0.9, "spare": 1.15}


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
    On a CPU that is slower, and Keras is told not to compile what holds an index with it.

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
        **kwargs,
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
        plan = _STORED if store_embeddings else _CODED
        leaf_size = plan["leaf_size"] if leaf_size is None else leaf_size
        self.leaf_size = check(leaf_size, "leaf_size", at_least=2)
        checks.check_storage(self)
        self._shape = TreeShape.of(
            self.capacity,
            self.embedding_dim,
            leaf_size=self.leaf_size,
            branching=self.branching,
            max_root_width=_MAX_ROOT_WIDTH,
            leaf_fill=plan["fill"],
            spare=plan["spare"],
        )
        fields = make_tree_variables(
            self._shape, tf.float32 if store_embeddings else CodedResiduals.leaf_mean_dtype
        )
        if store_embeddings:
            self._candidates = StoredEmbeddings(
                self.capacity, self.embedding_dim, self.embedding_dtype
            )
        else:
            last = str(self._shape.num_levels - 1)
            self._candidates = CodedResiduals(
                self._shape, self.residual_bytes, fields["mean"][last], fields["stats"][last]
            )
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
            candidates=self._candidates.variables,
            max_norm=make_state_variable(lambda: tf.zeros([]), "max_norm"),
            num_skipped=make_state_variable(lambda: tf.zeros([], tf.int64), "num_skipped"),
            **fields,
        )
        self._strategy = tf.distribute.get_strategy()
        self._maintenance = TreeMaintenance(self._shape, self._state, self._candidates)
        # A thousand small operations are as many kernels on an accelerator, unless they are
        # compiled. On a CPU, where shapes need not be fixed, they are faster as they are, and
        # Keras, which asks this before it compiles by itself, is not to.
        self.supports_jit = _execution.is_on_accelerator(self.state_variable)
        # Nothing here is for AutoGraph to convert, which would take longer than to trace it.
        compiled = functools.partial(
            tf.function,
            autograph=False,
            reduce_retracing=True,
            jit_compile=_execution.is_to_be_compiled(self.state_variable) or None,
        )
        self._compiled_update = compiled(self._update)
        self._compiled_remove = compiled(self._remove)
        self._compiled_tighten = compiled(self._tighten)
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
        return self._maintenance.tree

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
        if not isinstance(embeddings, np.ndarray):
            embeddings = tf.convert_to_tensor(embeddings).numpy()
        checks.check_embeddings(self, embeddings, "embeddings")
        if len(embeddings) > self.capacity:
            raise ValueError(
                "`embeddings` must have no more rows than `capacity`. Received:"
                f" {len(embeddings)} rows for a capacity of {self.capacity}."
            )
        ids, max_norm = checks.usable_rows(self, embeddings)
        points = embeddings if len(ids) == len(embeddings) else embeddings[ids]
        progress = keras.utils.Progbar(len(ids), unit_name="candidate", verbose=verbose)
        rng = np.random.default_rng(seed)
        topology = build_topology(
            points, self._shape, rng=rng, on_progress=progress.add if verbose else None
        )
        members = topology.members
        if points is not embeddings:
            members = np.where(members >= 0, ids[members], -1).astype(np.int32)
        children, owners = topology.children, topology.owners
        if not len(ids):
            children, owners, members = empty_topology(self._shape)

        def load():
            assign_topology(self._state, children, owners, members)
            self._candidates.clear()
            self._candidates.load(embeddings, members, owners[-1], np.random.default_rng(seed))
            self._state.max_norm.assign(max_norm)
            self._state.num_skipped.assign_add(len(embeddings) - len(ids))
            self._compiled_tighten()
            last_stats = tf.convert_to_tensor(self.tree.levels[-1].stats)
            self._state.first_spread.assign(last_stats[..., SPREAD])

        self._on_every_replica(load)

    def reset(self) -> None:
        """Takes all candidates out of the tree."""

        def empty():
            assign_topology(self._state, *empty_topology(self._shape))
            self._candidates.clear()
            self._state.max_norm.assign(0.0)

        self._on_every_replica(empty)

    def update(self, indices: tf.Tensor, embeddings: tf.Tensor, mask: tf.Tensor | None = None):
        """Moves candidates to where their embeddings are now, or adds them.

        Args:
          indices: [m] int, which candidates; in [0, capacity), no two equal.
          embeddings: [m, d] float.
          mask: [m] bool; entries with False are left out without being counted, whatever they are.

        Raises:
          ValueError: where a shape does not fit; and, outside of a `tf.function`, where an index is
            out of range or repeated.
        """
        embeddings = checks.check_embeddings(self, embeddings, "embeddings")
        indices, mask = checks.check_indices(self, indices, embeddings, mask)
        if tf.executing_eagerly() and not self._candidates.accepts_updates:
            raise ValueError(
                "An index without embeddings cannot grow from nothing: call `index` first."
            )
        embeddings = tf.ensure_shape(tf.cast(embeddings, tf.float32), [None, self.embedding_dim])
        self._on_every_replica(self._compiled_update, indices, embeddings, mask)

    def remove(self, indices: tf.Tensor) -> None:
        """Takes candidates `indices` [m] out of the tree; those that are not in it are no error.

        Raises:
          ValueError: as `update`.
        """
        indices = tf.convert_to_tensor(indices)
        indices, mask = checks.check_indices(self, indices, indices, None)
        self._on_every_replica(self._compiled_remove, indices, mask)

    def tighten(self) -> None:
        """Computes means, spreads and radii anew, in a pass over all candidates.

        Without stored embeddings the leaves' centres stay and only the bounds get tighter.
        """
        self._on_every_replica(self._compiled_tighten)

    def sample(self, query_embeddings: tf.Tensor, num_samples: int = 1, **options) -> SoftmaxSample:
        """Draws candidates nearly in proportion to exp(score), and estimates the log partition.

        The score is s(x, y) = transform(⟨x, y⟩ / temperature).

        Args:
          query_embeddings: [B, d] float.
          num_samples: S, draws for each query.
          **options: as `sample_with_log_probability` takes them; `correction_steps` are the
            index's where None.

        Returns:
          A `SoftmaxSample`. Its scores are exact where embeddings are stored; `log_partition` is
          the cut's estimate. No gradient flows through it.

        Raises:
          ValueError: where a shape does not fit or an argument is out of range.
        """
        return self._sample(query_embeddings, num_samples, **options)[0]

    def sample_with_log_probability(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int = 1,
        *,
        correction_steps: int = 0,
        **options,
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
        sample, log_probability, _ = self._sample(
            query_embeddings, num_samples, correction_steps=correction_steps, **options
        )
        return sample, log_probability

    def sample_with_gradient(
        self,
        query_embeddings: tf.Tensor,
        num_samples: int = 1,
        *,
        compute_gradient: bool = True,
        log_zero: float = -math.inf,
        **options,
    ) -> tuple[SoftmaxSample, tf.Tensor | None]:
        """`sample`, and [B, d] the gradient of its `log_partition` by the queries.

        The queries it is taken by are those divided by the temperature, as in
        `ops.sample_softmax_with_gradient`; it is None where it is not wanted. The derivatives of
        a `score_transform` in the second-order terms count as constants. `log_zero` is as there.
        Other arguments and errors are those of `sample`.
        """
        sample, _, gradient = self._sample(
            query_embeddings,
            num_samples,
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
        queries = self._scaled(query_embeddings, temperature)
        scoring = Scoring(queries, score_transform)
        beam = self._checked_beam(beam)
        cut = make_cut(self.tree, scoring, beam, open_leaves=self.store_embeddings)
        # The worst case of a sum of d products.
        norms = tf.norm(queries, axis=1) * self._state.max_norm
        rounding = ROUNDING * (2 * self.embedding_dim + 8)
        if _execution.rounds_factors(self.state_variable):
            rounding += 2.0 * _execution.FACTOR_ROUNDING
        return log_partition_bounds(cut, scoring, rounding * norms)

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
        queries = self._scaled(query_embeddings, None)
        return search_tree(self.tree, queries, k, self._checked_beam(beam))

    def _limits(self):
        return tree_limits(self._shape, self._state)

    def get_config(self):
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

    def _sample(
        self,
        query_embeddings,
        num_samples,
        *,
        temperature=None,
        score_transform=None,
        beam=None,
        correction_steps=None,
        candidate_ids=None,
        positive_ids=None,
        max_scores=None,
        row_transform=None,
        seed=None,
        compute_gradient=False,
        log_zero=-math.inf,
    ):
        if candidate_ids is not None and positive_ids is None:
            raise ValueError("`candidate_ids` are used together with `positive_ids`.")
        steps = self.correction_steps if correction_steps is None else correction_steps
        scoring = Scoring(
            self._scaled(query_embeddings, temperature),
            score_transform,
            candidate_ids=candidate_ids,
            positive_ids=positive_ids,
            max_scores=max_scores,
        )
        draw = functools.partial(
            sample_tree,
            self._transformed(row_transform),
            scoring,
            num_samples=_validation.check_count(num_samples, "num_samples"),
            beam=self._checked_beam(beam),
            correction_steps=_validation.check_count(steps, "correction_steps", at_least=0),
            seed=seed_or_random(seed),
            compute_gradient=compute_gradient,
            log_zero=log_zero,
        )
        return _execution.as_constant(draw, like=self.state_variable)

    def _transformed(self, row_transform) -> Tree:
        """The tree as draws see it whose candidates, and means of them, are corrected."""
        if row_transform is None:
            return self.tree
        if not self.store_embeddings:
            raise ValueError("`row_transform` needs an index with store_embeddings=True.")
        return self.tree._replace(
            mean_transform=lambda means: row_transform(means, None),
            candidates=self._candidates.transformed(row_transform),
        )

    def _update(self, indices, embeddings, mask):
        usable = self._usable(indices, mask) & self._candidates.accepts_updates
        embeddings = self._candidates.rounded(embeddings)
        usable &= checks.is_usable(embeddings)
        embeddings = tf.where(usable[:, tf.newaxis], embeddings, 0.0)
        longest = tf.reduce_max(tf.concat([tf.norm(embeddings, axis=1), [0.0]], axis=0))
        self._state.max_norm.assign(tf.maximum(self._state.max_norm, longest))
        refused = self._maintenance.update(tf.where(usable, indices, 0), embeddings, usable)
        skipped = tf.math.count_nonzero(mask & ~usable) + tf.cast(refused, tf.int64)
        self._state.num_skipped.assign_add(skipped)

    def _remove(self, indices, mask):
        usable = self._usable(indices, mask)
        self._maintenance.remove(tf.where(usable, indices, 0), usable)
        self._state.num_skipped.assign_add(tf.math.count_nonzero(mask & ~usable))

    def _usable(self, indices, mask):
        """[m] bool, in range and for the first time."""
        mask = mask & (indices >= 0) & (indices < self.capacity)
        return mask & (Groups.of(indices, mask).rank == 0)

    def _tighten(self):
        tighten(self._shape, self._state, self._candidates)
        # No embedding is longer than the farthest point of a node of the root can be.
        root = self.tree.levels[0]
        norms = tf.norm(tf.cast(root.mean, tf.float32), axis=2)
        longest = tf.reduce_max(norms + root.stats[..., RADIUS]) * (1.0 + 1e-5)
        self._state.max_norm.assign(tf.minimum(self._state.max_norm, longest))

    def _on_every_replica(self, function, *args):
        # Outside of its scope a strategy is not known, and one replica alone would be changed.
        if self._strategy.num_replicas_in_sync > 1 and not tf.distribute.has_strategy():
            with self._strategy.scope():
                on_every_replica(function, *args)
        else:
            on_every_replica(function, *args)

    def _scaled(self, queries, temperature):
        queries = checks.check_embeddings(self, queries, "query_embeddings")
        queries = tf.ensure_shape(tf.cast(queries, tf.float32), [None, self.embedding_dim])
        queries = tf.stop_gradient(queries)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"`temperature` must be positive. Received: {temperature}.")
        return queries if temperature is None else queries / temperature

    def _checked_beam(self, beam):
        return self.beam if beam is None else _validation.check_count(beam, "beam")
