"""The data sets of `worth.py`, all of one form: word ids of queries and of candidates, and pairs.

| name | query | candidate |
| --- | --- | --- |
| code | the summary of a function (`installed_code`, the demo's data) | its code |
| errors | a message that a package raises, warns of or logs | the function around it |
| interactions | a synthetic user | an item; see `_interactions` |

With transformers, candidates are 64 words and queries 32, and the two text sets are limited to
`SMALL_CORPUS` candidates, so that all of them can be ranked often. The items then have texts.
"""

import dataclasses

import numpy as np
import tensorflow as tf
from _worth_errors import load as load_errors

from negative_cache.datasets import installed_code

NAMES = ("code", "errors", "interactions")
TOWERS = ("words", "transformer")
# Words of a query and of a candidate.
LENGTHS = {"words": (24, 128), "transformer": (32, 64)}
SMALL_CORPUS = 8192
# Queries to validate with, and as many to test with.
NUM_EVALUATED = 2000
_VALIDATION, _TEST = 1, 2
_ENCODED_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Data:
    """Q queries and N candidates as word ids, and which belong together.

    Attributes:
      query_ids: [Q, words] int32, 0 for no word.
      candidate_ids: [N, words] int32.
      train: [n, 2] int32, rows of queries and of candidates.
      validation: [m, 2] int32.
      test: [m, 2] int32.
      vocabulary_size: number of word ids.
      excluded: [Q] lists of candidates that a query is not ranked among: the training pairs of a
        user. None if there are none.
    """

    query_ids: np.ndarray
    candidate_ids: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    vocabulary_size: int
    excluded: list[np.ndarray] | None = None

    @property
    def num_candidates(self) -> int:
        return len(self.candidate_ids)

    @property
    def train_candidates(self) -> np.ndarray:
        """[c] int32, the candidates of the training pairs, in the order of rows."""
        return np.unique(self.train[:, 1])

    @property
    def cache_size(self) -> int:
        """A power of two below the number of candidates and that of training pairs."""
        return 2 ** int(np.log2(min(0.8 * len(self.train), self.num_candidates, 16384)))

    def batches(self, batch_size: int, seed: int) -> tf.data.Dataset:
        """Training batches without end, each pair once in an epoch."""
        rng = np.random.default_rng(seed)
        steps = len(self.train) // batch_size
        queries, candidates = tf.constant(self.query_ids), tf.constant(self.candidate_ids)

        def rows():
            while True:
                order = rng.permutation(self.train)[: steps * batch_size]
                yield from order.reshape([steps, batch_size, 2])

        def features(pairs):
            query, candidate = pairs[:, 0], pairs[:, 1]
            return {
                "query": {"ids": tf.gather(queries, query), "row": query},
                "candidate": {"ids": tf.gather(candidates, candidate), "row": candidate},
            }

        spec = tf.TensorSpec([batch_size, 2], tf.int32)
        dataset = tf.data.Dataset.from_generator(rows, output_signature=spec)
        return dataset.map(features).prefetch(4)

    def pairs(self) -> dict[str, dict[str, np.ndarray]]:
        """The training pairs as features, in the order of `train`."""
        query, candidate = self.train[:, 0], self.train[:, 1]
        return {
            "query": {"ids": self.query_ids[query], "row": query},
            "candidate": {"ids": self.candidate_ids[candidate], "row": candidate},
        }

    def candidates(self, rows: np.ndarray | None = None) -> tf.data.Dataset:
        """Batches of candidate features, of all or of some rows."""
        return _batches(self.candidate_ids, rows)

    def queries(self, rows: np.ndarray | None = None) -> tf.data.Dataset:
        """Batches of query features, of all or of some rows."""
        return _batches(self.query_ids, rows)

    def specs(self, ids: np.ndarray) -> dict[str, tf.io.FixedLenFeature]:
        """What a cache of candidates, or of queries, holds."""
        return {
            "ids": tf.io.FixedLenFeature([ids.shape[1]], tf.int32),
            "row": tf.io.FixedLenFeature([], tf.int32),
        }

    def describe(self) -> str:
        return (
            f"{self.num_candidates:,} candidates, {len(self.train):,} training pairs,"
            f" {len(self.validation):,} queries to validate and {len(self.test):,} to test with,"
            f" a cache of {self.cache_size:,}"
        )


def make(name: str, tower: str) -> Data:
    """The data set for a kind of towers."""
    if name == "interactions":
        return _interactions(tower)
    if name == "code":
        corpus = installed_code.load()
        owners = np.arange(len(corpus))
        return _of_texts(corpus.summaries, corpus.codes, owners, corpus.split, tower)
    return _of_texts(*load_errors(), tower)


def _batches(ids, rows):
    rows = np.arange(len(ids)) if rows is None else rows
    features = {"ids": ids[rows], "row": rows.astype(np.int32)}
    return tf.data.Dataset.from_tensor_slices(features).batch(_ENCODED_AT_ONCE)


def _of_texts(queries, candidates, owners, split, tower) -> Data:
    """Texts as word ids; the words are the most frequent ones of the training pairs."""
    rng = np.random.default_rng(0)
    if tower == "transformer" and len(candidates) > SMALL_CORPUS:
        kept = np.sort(rng.permutation(len(candidates))[:SMALL_CORPUS])
        place = np.full(len(candidates), -1)
        place[kept] = np.arange(len(kept))
        is_kept = place[owners] >= 0
        queries, split, owners = queries[is_kept], split[is_kept], place[owners[is_kept]]
        candidates = candidates[kept]
    pairs = np.stack([np.arange(len(queries)), owners], axis=1).astype(np.int32)
    train = pairs[split == 0]
    texts = np.concatenate([candidates[np.unique(train[:, 1])], queries[train[:, 0]]])
    query_length, candidate_length = LENGTHS[tower]
    words = installed_code.text_to_ids(texts, sequence_length=candidate_length)
    query_words = installed_code.text_to_ids(
        vocabulary=words.get_vocabulary(), sequence_length=query_length
    )
    validation, test = (
        rng.permutation(pairs[split == part])[:NUM_EVALUATED] for part in (_VALIDATION, _TEST)
    )
    return Data(
        query_ids=_vectorize(query_words, queries),
        candidate_ids=_vectorize(words, candidates),
        train=train,
        validation=validation,
        test=test,
        vocabulary_size=words.vocabulary_size(),
    )


def _vectorize(layer, texts):
    starts = range(0, len(texts), _ENCODED_AT_ONCE)
    parts = [layer(tf.constant(texts[i : i + _ENCODED_AT_ONCE])).numpy() for i in starts]
    return np.concatenate(parts).astype(np.int32)


NUM_USERS, NUM_ITEMS, NUM_FACTORS, PER_USER = 6000, 5000, 12, 16
ZIPF, PREFERENCE, NUM_TEXT_WORDS = 0.9, 2.5, 4000


def _interactions(tower: str) -> Data:
    """Users who choose items in proportion to popularity times preference.

    P(item | user) ∝ rank(item)^-0.9 exp(2.5 ⟨u, v⟩ / √12), with standard normal u, v of 12
    factors. Each of 6,000 users has 16 of the 5,000 items, one of them to validate and one to test
    with, and is not ranked among the 14 others. Ranks are of what users *choose*, so that a model
    must know popularity.

    For the demo's towers, a user and an item are one word each: a factorization of the matrix of
    interactions. For transformers, a query is the user and 14 items in random order without the
    positive, and an item has a text of 63 words beside its own, drawn in proportion to
    exp(⟨v, w⟩) for words w.
    """
    rng = np.random.default_rng(0)
    users = rng.standard_normal([NUM_USERS, NUM_FACTORS])
    items = rng.standard_normal([NUM_ITEMS, NUM_FACTORS])
    log_popularity = -ZIPF * np.log1p(rng.permutation(NUM_ITEMS))
    scores = PREFERENCE / np.sqrt(NUM_FACTORS) * users @ items.T + log_popularity
    # Without replacement: the largest of scores plus Gumbel noise.
    chosen = np.argsort(-(scores + rng.gumbel(size=scores.shape)), axis=1)[:, :PER_USER]
    chosen = rng.permuted(chosen, axis=1)
    train, validation, test = (
        np.stack([np.repeat(np.arange(NUM_USERS), part.shape[1]), part.ravel()], axis=1)
        for part in (chosen[:, 2:], chosen[:, :1], chosen[:, 1:2])
    )
    known = list(chosen[:, 2:])
    evaluated = rng.permutation(NUM_USERS)[:NUM_EVALUATED]
    item_words = 1 + np.arange(NUM_ITEMS)[:, np.newaxis]
    user_words = 1 + NUM_ITEMS + np.arange(NUM_USERS)[:, np.newaxis]
    vocabulary_size = 1 + NUM_ITEMS + NUM_USERS
    query_ids, candidate_ids = user_words, item_words
    if tower == "transformer":
        words = rng.standard_normal([NUM_TEXT_WORDS, NUM_FACTORS]) / np.sqrt(NUM_FACTORS)
        logits = 2.0 * items @ words.T
        noise = rng.gumbel(size=logits.shape)
        texts = vocabulary_size + np.argsort(-(logits + noise), axis=1)[:, : LENGTHS[tower][1] - 1]
        candidate_ids = np.concatenate([item_words, texts], axis=1)
        vocabulary_size += NUM_TEXT_WORDS
        # One query for each training pair, and one for each user to evaluate.
        histories = [item_words[known[user], 0] for user in range(NUM_USERS)]
        query_ids = np.zeros([len(train) + NUM_USERS, LENGTHS[tower][0]], np.int64)
        for row, (user, item) in enumerate(train):
            history = np.where(histories[user] == item + 1, 0, histories[user])
            query_ids[row, : 1 + len(history)] = [user_words[user, 0], *history]
        for user, history in enumerate(histories):
            query_ids[len(train) + user, : 1 + len(history)] = [user_words[user, 0], *history]
        train[:, 0] = np.arange(len(train))
        validation[:, 0] += len(train)
        test[:, 0] += len(train)
        known = [np.zeros(0, np.int64)] * len(train) + known
    return Data(
        query_ids=query_ids.astype(np.int32),
        candidate_ids=candidate_ids.astype(np.int32),
        train=train.astype(np.int32),
        validation=validation[evaluated].astype(np.int32),
        test=test[evaluated].astype(np.int32),
        vocabulary_size=vocabulary_size,
        excluded=known,
    )
