"""Tests of negatives that are no negatives: explicit ones, padding, and further positives."""

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import CachedRetrieval, DualEncoder, TreeIndex
from negative_cache._compat import keras
from negative_cache.tests.layers.corpus_cases import make_corpus_task
from negative_cache.tests.layers.retrieval_cases import (
    DIM,
    Table,
    call,
    cross_entropy,
    make_queries,
    make_table,
    make_task,
)

TABLE, IDS = make_table(20), [0, 1, 2]
QUERIES = make_queries(3)
SCORES = QUERIES.astype(np.float64) @ TABLE.T


def losses_of(task, *, training=False, **kwargs):
    return call(task, QUERIES, IDS, TABLE, training=training, **kwargs).numpy()


def expected(negatives):
    """[3] losses whose negatives are the candidates `negatives[i]` of query i."""
    return [
        cross_entropy(SCORES[i, own], SCORES[i, list(others)])
        for i, (own, others) in enumerate(zip(IDS, negatives))
    ]


@pytest.mark.parametrize("training", [False, True])
def test_explicit_negatives_that_are_positives_of_their_query_are_left_out(training):
    task = make_task(TABLE, cache_size=0, remove_accidental_hits=True, reduction="none")
    ids = np.array([[0, 5], [6, 7], [2, 2]])
    given = {"negative_embeddings": TABLE[ids], "training": training}
    np.testing.assert_allclose(
        losses_of(task, negative_ids=ids, **given), expected([[5], [6, 7], []]), rtol=1e-5
    )
    # Without ids they cannot be known.
    np.testing.assert_allclose(losses_of(task, **given), expected(ids), rtol=1e-5)


def test_padding_of_explicit_negatives_counts_for_nothing_whatever_it_is():
    task = make_task(TABLE, cache_size=0, reduction="sum", candidate_id_key=None)
    ids = np.array([[4, 5], [6, 6], [7, 7]])
    mask = np.array([[True, True], [True, False], [False, False]])
    embeddings = tf.constant(np.where(mask[..., None], TABLE[ids], np.nan))
    queries = tf.constant(QUERIES)
    with tf.GradientTape() as tape:
        tape.watch([queries, embeddings])
        loss = task(
            queries,
            tf.constant(TABLE[IDS]),
            {"id": tf.constant(IDS, tf.int64)},
            negative_embeddings=embeddings,
            negative_mask=mask,
        )
    assert float(loss) == pytest.approx(sum(expected([[4, 5], [6], []])), rel=1e-5)
    for gradient in tape.gradient(loss, [queries, embeddings]):
        assert np.all(np.isfinite(gradient))


def ragged(lists):
    return tf.ragged.constant(lists, tf.int64)


def padded(lists):
    return tf.ragged.constant(lists, tf.int64).to_tensor(-1)


KNOWN = [[5, 6, 1], [], [7]]
LEFT_OUT = [{0, 5, 6, 1}, {1}, {2, 7}]


@pytest.mark.one_keras
@pytest.mark.parametrize("form", [ragged, padded])
@pytest.mark.parametrize("kind", ["sampler", "index", "corpus", "corpus, index"])
def test_further_positives_are_negatives_nowhere(kind, form):
    cached = list(range(3, 15))
    kwargs = {"reduction": "none", "num_negatives": 50}
    if "corpus" in kind:
        cached = list(range(20))
        cache = {"index": TreeIndex(20, DIM)} if "index" in kind else None
        task = make_corpus_task(TABLE, cache=cache, **kwargs)
    else:
        index = TreeIndex(12, DIM) if kind == "index" else None
        task = make_task(TABLE, cache_size=12, filled_with=cached, index=index, **kwargs)
    negatives = [[y for y in cached if y not in left_out] for left_out in LEFT_OUT]
    known = form(KNOWN)
    found = losses_of(task, known_positive_ids=known)
    np.testing.assert_allclose(found, expected(negatives), rtol=1e-4)
    drawn = drawn_rows(task, known_positive_ids=known)
    ids = task.cache.data["id"].numpy()[drawn]
    for i, left_out in enumerate(LEFT_OUT):
        assert not set(ids[i]) & left_out


def drawn_rows(task, **kwargs):
    """[B, S] rows that a training step draws."""
    drawn = []
    task.cached.write = lambda batch, encoded: drawn.append(encoded)
    call(task, QUERIES, IDS, TABLE, training=True, **kwargs)
    assert np.all(drawn[0].mask)
    return drawn[0].rows.numpy().reshape([len(QUERIES), -1])


def test_further_positives_in_the_batch_and_among_explicit_negatives():
    task = make_task(TABLE, cache_size=0, in_batch_negatives=True, reduction="none")
    explicit = np.array([[5, 9], [5, 9], [7, 9]])
    found = losses_of(
        task,
        known_positive_ids=padded(KNOWN),
        negative_embeddings=TABLE[explicit],
        negative_ids=explicit,
    )
    np.testing.assert_allclose(found, expected([[2, 9], [0, 2, 5, 9], [0, 1, 9]]), rtol=1e-5)


@pytest.mark.one_keras
@pytest.mark.parametrize("count", [1, 8, 9, 30, None])
def test_any_number_of_further_positives(count):
    task = make_task(TABLE, cache_size=12, filled_with=range(3, 15), reduction="none")
    lists = np.full([3, 30 if count is None else count], -1)
    lists[:, -1] = [5, 6, 7]

    @tf.function(input_signature=[tf.TensorSpec([3, count], tf.int64)])
    def losses(known):
        return call(task, QUERIES, IDS, TABLE, known_positive_ids=known, training=False)

    negatives = [[y for y in range(3, 15) if y != known] for known in (5, 6, 7)]
    found = losses(tf.constant(lists, tf.int64))
    np.testing.assert_allclose(found, expected(negatives), rtol=1e-5)


@pytest.mark.parametrize(
    ["kwargs", "message"],
    [
        ({"known_positive_ids": [[1], [2]]}, "`known_positive_ids` must be .* for 3 queries"),
        ({"known_positive_ids": [[1.0]] * 3}, "`known_positive_ids` must be integers or strings"),
        ({"negative_mask": [[1, 0]] * 3}, "`negative_mask` must be boolean"),
        ({"negative_mask": [[True]] * 3}, "`negative_mask` must be .* here \\(3, 2\\)"),
        ({"negative_ids": [[1]] * 3}, "`negative_ids` must have shape"),
        ({"negative_ids": [["1", "2"]] * 3}, "`negative_ids` must be of the kind .* 'id', int64"),
        ({"known_positive_ids": [["1"]] * 3}, "`known_positive_ids` must be of the kind"),
    ],
)
def test_refuses(kwargs, message):
    task = make_task(TABLE, cache_size=0, remove_accidental_hits=True)
    with pytest.raises(ValueError, match=message):
        losses_of(task, negative_embeddings=TABLE[[[4, 5]] * 3], **kwargs)


def test_further_positives_need_ids():
    task = make_task(TABLE, cache_size=0, in_batch_negatives=True, candidate_id_key=None)
    with pytest.raises(ValueError, match="`known_positive_ids` needs a `candidate_id_key`"):
        losses_of(task, known_positive_ids=padded(KNOWN))


@pytest.mark.parametrize("as_ragged", [True, False])
def test_a_model_trains_with_lists_of_different_length(as_ragged):
    lists = tf.ragged.constant([[5, 0], [6], [], [7, 8, 9]], tf.int64)
    known = tf.ragged.constant([[1], [], [0, 3], [2]], tf.int64)
    ids = np.arange(4)
    data = {"query": ids, "candidate": {"id": ids}, "negative": {"id": lists}}
    data["known_positive_ids"] = known
    if not as_ragged:
        data["negative"] = {"id": lists.to_tensor(0)}
        data["negative_mask"] = tf.sequence_mask(lists.row_lengths())
        data["known_positive_ids"] = known.to_tensor(-1)
    tower = Table(TABLE)
    task = CachedRetrieval(
        tower,
        {"id": tf.io.FixedLenFeature([], tf.int64)},
        cache_size=0,
        in_batch_negatives=True,
        candidate_id_key="id",
        remove_accidental_hits=True,
    )
    queries = make_queries(4)
    model = DualEncoder(lambda rows: tf.gather(queries, rows), tower, task)
    model.compile(keras.optimizers.SGD(0.0))
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(2)
    logged = model.fit(dataset, epochs=1, verbose=0).history["loss"][0]
    # In-batch pairs are (0, 1) and (2, 3): 1 is right for 0, and 3 for 2, 2 for 3.
    negatives = [[5], [0, 6], [], [7, 8, 9]]
    scores = queries.astype(np.float64) @ TABLE.T
    losses = [cross_entropy(scores[i, i], scores[i, negatives[i]]) for i in range(4)]
    assert logged == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"negatives": tf.constant([[1], [2]])},
        {"positives": tf.constant([[1], [2]])},
        {"negative_mask": tf.constant([[True], [False]])},
    ],
)
def test_a_batch_with_parts_that_there_are_not_is_refused(more):
    model = DualEncoder(Table(TABLE), Table(TABLE), make_task(TABLE, cache_size=0))
    ids = {"id": tf.constant([0, 1], tf.int64)}
    with pytest.raises(ValueError, match='A batch has "query" and "candidate", and may have'):
        model({"query": ids, "candidate": ids, **more})


def test_ragged_negatives_must_be_of_one_length_and_have_no_mask():
    tower = Table(TABLE)
    model = DualEncoder(tower, tower, make_task(TABLE, cache_size=0))
    ids = {"id": tf.constant([0, 1], tf.int64)}
    lists = tf.ragged.constant([[1], [2, 3]], tf.int64)
    batch = {"query": ids, "candidate": ids, "negative": {"id": lists}}
    other = {"id": lists, "b": tf.ragged.constant([[1, 1], [2]], tf.int64)}
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be of one length"):
        model({**batch, "negative": other})
    masked = {**batch, "negative_mask": tf.ones([2, 2], tf.bool)}
    with pytest.raises(ValueError, match='need no "negative_mask"'):
        model.compute_loss(masked, None, model(masked))
