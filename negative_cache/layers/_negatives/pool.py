"""The caches of all replicas as one pool: the rows that a step draws from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import tensorflow as tf

from negative_cache import util
from negative_cache.layers._negatives.batch import Batch, Queries
from negative_cache.layers._negatives.rows import DrawnRows, EncodedRows, RowCorrection
from negative_cache.layers._negatives.shard import Shard, ShardSample, has_negatives
from negative_cache.ops import SoftmaxSample, words
from negative_cache.ops._draws import draw_uniforms, inverse_cdf

if TYPE_CHECKING:
    from negative_cache.layers._negatives.cached import CachedNegatives
    from negative_cache.layers.cache import Cache


class PooledShard(Shard):
    """The filled rows of the caches of all R replicas, of which this one has a shard.

    Every replica must take the same steps. With G the queries of all replicas together, a step

    1. gathers the queries, so that each shard scores all of them against its own rows,
    2. gathers the shards' log partitions [R, G], from which every replica computes which shard each
       draw comes from: shard s with probability Z_s / Σ Z,
    3. sums ∇_x log Z_s with the weights Z_s / Σ Z over the replicas, if it is to be exact,
    4. brings the drawn rows to the replicas that asked for them, by a sum to which the shard that
       has a row is the only one to add something, and
    5. gathers the embeddings of now, which the shards write to their rows.

    So the law of the draws, log Z and its gradient are those of one cache that holds all rows.
    Nothing that is sent grows with the number of rows. For queries that share draws, the shards
    score those n queries a second time that draws are made for, since π is known after 2 only.

    Args:
      source: see `Shard`.
      batch: see `Shard`.
      correction: see `Shard`.
    """

    def __init__(self, source: CachedNegatives, batch: Batch, correction: RowCorrection | None):
        super().__init__(source, batch, correction)
        self._all_queries = _Gathered(self._queries)
        self._is_mine: tf.Tensor | None = None

    def log_partition(self) -> tf.Tensor:
        sample, _ = self._sample(0, self._all_queries.queries, seed=0, compute_gradient=False)
        shards = _Shards.of(sample.log_partition)
        return self._all_queries.own(shards.log_partition)

    def draw(self, seed: tf.Tensor) -> ShardSample:
        per_query, everyone = self._source.num_negatives, self._all_queries
        wanted = {"seed": seed, "compute_gradient": self._source.exact_query_gradient}
        sample, gradient = self._sample(per_query or 0, everyone.queries, **wanted)
        shards = _Shards.of(sample.log_partition)
        log_partition = everyone.own(shards.log_partition)
        if gradient is not None:
            gradient = everyone.own(
                util.cross_replica_sum(shards.share()[:, tf.newaxis] * gradient)
            )
        # No other number of this step has this seed.
        uniform_seed = seed ^ tf.constant([-1, 0], tf.int64)
        if per_query is not None:
            uniforms = draw_uniforms([self._batch.num_queries, per_query], uniform_seed)
            asked = everyone
            uniforms = util.cross_replica_concat(uniforms, axis=0)
        else:
            chosen = self._choose(log_partition, seed)
            uniforms = draw_uniforms([tf.size(chosen), 1], uniform_seed)
            asked = _Gathered(_take(self._queries, chosen))
            places = util.cross_replica_concat(everyone.start + chosen, axis=0)
            uniforms = util.cross_replica_concat(uniforms, axis=0)
            shards = shards.of_queries(places)
            other_seed = seed ^ tf.constant([0, -1], tf.int64)
            sample, _ = self._sample(1, asked.queries, seed=other_seed, compute_gradient=False)
        rows = self._fetch(sample, shards, uniforms, asked)
        is_drawn = tf.reshape(rows.mask, [-1, per_query or 1])
        draws = self._weigh(log_partition, is_drawn, rows)
        return ShardSample(log_partition, gradient, rows, draws)

    def bring_home(self, embeddings: tf.Tensor, mask: tf.Tensor) -> EncodedRows:
        embeddings, mask = gather_rows([embeddings, mask])
        return EncodedRows(self._drawn_rows, embeddings, mask & self._is_mine)

    def _fetch(
        self, sample: SoftmaxSample, shards: _Shards, uniforms: tf.Tensor, asked: _Gathered
    ) -> DrawnRows:
        """The rows that are drawn for the queries of this replica.

        Args:
          sample: [q, S] draws of this shard for each of the queries that all replicas ask for.
          shards: the log partitions of those queries.
          uniforms: [q, S] uniform random numbers.
          asked: the queries.
        """
        winners = shards.draw(uniforms)
        is_mine = tf.equal(winners, util.replica_id()) & (sample.indices >= 0)
        is_mine &= has_negatives(shards.log_partition)[:, tf.newaxis]
        self._is_mine = tf.reshape(is_mine, [-1])
        self._drawn_rows = tf.where(self._is_mine, tf.reshape(sample.indices, [-1]), 0)
        rows = self._look_up(self._drawn_rows, self._is_mine)
        rows = _sum_of_rows(rows, is_corrected=self._correction is not None)
        own = functools.partial(asked.own, num_each=sample.indices.shape[1])
        features = {key: own(values) for key, values in rows.features.items()}
        others = (None if part is None else own(part) for part in rows[1:])
        return DrawnRows(features, *others)


def gather_rows(tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Tensors [n, ...] of one n, each with the rows of all replicas, by one collective operation.

    Args:
      tensors: of known dimensions but for n, and of any dtype but strings.

    Returns:
      [G, ...] each, without gradient, in the order of the replicas.
    """
    tensors = [tf.stop_gradient(part) for part in tensors]
    gathered = util.cross_replica_concat(words.to_words(tensors), axis=0)
    return words.from_words(gathered, [words.RowSpec.of(part) for part in tensors])


class _Gathered:
    """The queries of all replicas, of which those of this one are in a row.

    Args:
      own: the queries of this replica.

    Attributes:
      queries: of all replicas.
      start: scalar int32, the place of the first of this replica's.
    """

    def __init__(self, own: Queries):
        self._size = tf.shape(own.embeddings)[0]
        sent = [own.embeddings, tf.fill([self._size], util.replica_id())]
        if own.max_scores is not None:
            sent.append(own.max_scores)
        embeddings, replicas, *limits = gather_rows(sent)
        ids = own.left_out_ids
        if ids is not None:
            ids = util.cross_replica_concat(_as_wide_as_all(ids), axis=0)
        self.queries = Queries(embeddings, ids, limits[0] if limits else None)
        self.start = tf.math.count_nonzero(replicas < util.replica_id(), dtype=tf.int32)

    def own(self, values: tf.Tensor, num_each: int = 1) -> tf.Tensor:
        """Those of this replica, of values [G * num_each, ...] of all queries."""
        return values[num_each * self.start : num_each * (self.start + self._size)]


class _Shards(NamedTuple):
    """The log partitions of q queries over each of the R shards.

    Attributes:
      by_shard: [R, q] float32.
      log_partition: [q] float32, over all of them.
    """

    by_shard: tf.Tensor
    log_partition: tf.Tensor

    @classmethod
    def of(cls, log_partition: tf.Tensor) -> _Shards:
        """From the `log_partition` [q] over the shard of this replica."""
        by_shard = util.cross_replica_concat(log_partition[tf.newaxis], axis=0)
        return cls(by_shard, tf.reduce_logsumexp(by_shard, axis=0))

    def of_queries(self, places: tf.Tensor) -> _Shards:
        """Those of the queries at `places` [n]."""
        return _Shards(
            tf.gather(self.by_shard, places, axis=1), tf.gather(self.log_partition, places)
        )

    def share(self) -> tf.Tensor:
        """[q] float32, the probability that a draw comes from the shard of this replica."""
        return tf.exp(self.by_shard[util.replica_id()] - self.log_partition)

    def draw(self, uniforms: tf.Tensor) -> tf.Tensor:
        """[q, S] int32, the shards that draws come from, by `uniforms` [q, S]; same everywhere."""
        weights = tf.exp(self.by_shard - tf.reduce_max(self.by_shard, axis=0))
        return inverse_cdf(tf.transpose(weights), uniforms)


def _as_wide_as_all(ids: tf.Tensor) -> tf.Tensor:
    """[B, P'] `ids` [B, P], of which the first is repeated up to the largest P of all replicas."""
    width = tf.shape(ids)[1]
    missing = tf.reduce_max(util.cross_replica_concat(width[tf.newaxis], axis=0)) - width
    return tf.concat([ids, tf.repeat(ids[:, :1], missing, axis=1)], axis=1)


def _take(queries: Queries, places: tf.Tensor) -> Queries:
    """The queries at `places` [n]."""
    return Queries(*(None if part is None else tf.gather(part, places) for part in queries))


def _sum_of_rows(rows: DrawnRows, is_corrected: bool) -> DrawnRows:
    """Rows that each are there on one replica at most, as all replicas are to know them.

    Should shards disagree, by a rounding, on whose a row is, then it is nobody's.

    Args:
      rows: as this replica has them.
      is_corrected: whether `known` is something else than `stale`.
    """
    features = {key: values for key, values in rows.features.items() if not _is_string(values)}
    strings = {key: values for key, values in rows.features.items() if _is_string(values)}
    lengths = [_flat(tf.strings.length(values)) for values in strings.values()]
    others = [rows.known if is_corrected else None, rows.age, rows.ids, rows.log_weights]
    sent = [tf.cast(rows.mask, tf.int32), rows.stale, *features.values(), *lengths]
    sent += [part for part in others if part is not None]
    sums = util.cross_replica_sum(_masked(words.to_words(sent), rows.mask))
    count, stale, *found = words.from_words(sums, [words.RowSpec.of(part) for part in sent])
    mask, rest = tf.equal(count, 1), iter(found)
    features = {key: next(rest) for key in features}
    for key, values in strings.items():
        features[key] = _sum_of_strings(values, rows.mask, next(rest))
    known, age, ids, log_weights = (None if part is None else next(rest) for part in others)
    return DrawnRows(
        features={key: features[key] for key in rows.features},
        mask=mask,
        stale=stale,
        known=known if is_corrected else stale,
        age=age,
        ids=ids,
        log_weights=log_weights,
    )


def _sum_of_strings(strings: tf.Tensor, mask: tf.Tensor, lengths: tf.Tensor) -> tf.Tensor:
    """The strings [m, ...] of all replicas, each there on one; `lengths` are the sums of theirs."""
    # At least one: there may be nothing drawn, or only empty strings.
    num_words = tf.maximum((tf.reduce_max(lengths) + 3) // 4, 1)
    rows = tf.where(mask[:, tf.newaxis], _flat(strings), "")
    sums = util.cross_replica_sum(words.to_bytes(tf.reshape(rows, [-1]), num_words))
    joined = words.from_bytes(sums, tf.reshape(lengths, [-1]))
    return tf.reshape(joined, [tf.shape(lengths)[0], *strings.shape[1:]])


def _is_string(values: tf.Tensor) -> bool:
    return values.dtype == tf.string


def _flat(values: tf.Tensor) -> tf.Tensor:
    """[n, k], `values` [n, ...] with known dimensions."""
    return tf.reshape(values, [tf.shape(values)[0], values.shape[1:].num_elements()])


def _masked(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    return tf.where(mask[:, tf.newaxis], values, tf.zeros_like(values))


def emptiest_first(num_filled: tf.Tensor, count: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """[count] int32, the shards that candidates go to, one after the other to the emptiest.

    Args:
      num_filled: [R] int32, the rows that each shard has.
      count: scalar int32, how many candidates there are.
      turn: scalar int32, another at every call, for which of equal shards comes first.
    """
    num_shards = tf.size(num_filled)
    shards = tf.range(num_shards)
    # The j-th more candidate of a shard comes before all that would make another one fuller.
    levels = num_filled[tf.newaxis] + tf.range(count)[:, tf.newaxis]
    order = levels * num_shards + (shards - turn) % num_shards
    first = tf.math.top_k(-tf.reshape(order, [-1]), k=count).indices
    return first % num_shards


def check_pool(pool: str | None) -> str | None:
    """Returns `pool`.

    Raises:
      ValueError: if it is neither "replicas" nor None.
    """
    if pool not in (None, "replicas"):
        raise ValueError(f'`pool` must be "replicas" or None. Received: {pool!r}.')
    return pool


def check_pool_of_corpus(pool: str | None, cache: Cache) -> None:
    """Checks that a corpus that is to be one pool has a part of it on every replica.

    Raises:
      ValueError: if the cache is not sharded, and there are several replicas.
    """
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if pool is not None and not cache.sharded and num_replicas > 1:
        raise ValueError(
            "On every replica there is the whole corpus, so that a pool would hold each candidate"
            " several times: make the cache with `sharded=True`. Received:"
            f" pool={pool!r}, sharded=False."
        )


def check_replicas(source: CachedNegatives) -> None:
    """Checks that the replicas that take a step are those that the source's state was made for.

    Raises:
      ValueError: if the source, its cache, its index or its corrector was made outside of the scope
        of the strategy, or a pool is used outside of its replicas.
    """
    cache, num_replicas = source.get_cache(), util.num_replicas()
    for layer in (source, cache, cache.index, source.corrector):
        if layer is not None and num_replicas > 1 and layer.num_replicas != num_replicas:
            raise ValueError(
                f"What replicas use must be made in the scope of their strategy. {layer.name!r} was"
                f" made for {layer.num_replicas} replica(s). Wanted: {num_replicas}."
            )
    if source.pool is not None and cache.num_replicas != num_replicas:
        raise ValueError(
            "A pool is that of the replicas of a strategy, and all of them use it at once: call the"
            f" task in `strategy.run`. {source.name!r} was called outside of the replicas."
        )
