"""Tests of the batches of `GlobalContrastiveBatches`, and of its arguments."""

import warnings

import numpy as np
import pytest
import tensorflow as tf

from negative_cache import GlobalContrastiveBatches, TreeIndex
from negative_cache.batching import neighbor_graph, plan
from negative_cache.tests.batching.contrastive_pairs import (
    DIM,
    NUM_PAIRS,
    PAIRS,
    assert_each_once,
    clusters,
    make_model,
    next_epoch,
    pairs_of,
    read,
)


def test_clusters_share_batches_wherever_the_cut_begins():
    towers, labels = clusters()
    batches = GlobalContrastiveBatches(
        towers, pairs_of(24), 4, num_neighbors=3, grow=True, verbose=0
    )
    for epoch in (read(batches), next_epoch(batches), next_epoch(batches)):
        assert_each_once(epoch, 24)
        # The first batch may begin inside a cluster; then the last has its rest.
        pure = [len(set(labels[batch])) == 1 for batch in epoch]
        assert sum(pure) >= 4


def test_cut_batches_are_runs_of_the_order():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, num_neighbors=3, verbose=0)
    offsets = set()
    for _ in range(6):
        epoch = next_epoch(batches)
        places = np.argsort(batches.order)
        for batch in epoch:
            np.testing.assert_array_equal(np.diff(places[batch]) % 24, 1)
        offsets.add(places[epoch[0][0]] % 4)
    # A fresh offset each epoch: of six, all the same has a probability of 4⁻⁵.
    assert len(offsets) > 1


def test_start_epoch_and_every():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, start_epoch=2, every=3, verbose=0)
    orders = []
    for _ in range(8):
        read(batches)
        orders.append(batches.order)
        batches.on_epoch_end()
    assert orders[0] is None and orders[1] is None
    resumed = GlobalContrastiveBatches(towers, pairs_of(24), 4, start_epoch=2, initial_epoch=2)
    read(resumed)
    assert resumed.order is not None
    # Ordered in the epochs 2, 5 and so on.
    assert [orders[i] is orders[i - 1] for i in range(3, 8)] == [True, True, False, True, True]


@pytest.mark.parametrize("grow", [False, True])
def test_random_fraction(grow):
    towers, labels = clusters(num_clusters=20)
    batches = GlobalContrastiveBatches(
        towers,
        pairs_of(80),
        4,
        num_neighbors=3,
        random_fraction=lambda epoch: [0.0, 0.5, 1.0][epoch],
        grow=grow,
        verbose=0,
    )
    mixed = []
    for epoch in (read(batches), next_epoch(batches), next_epoch(batches)):
        assert_each_once(epoch, 80)
        mixed.append(np.mean([len(set(labels[batch])) > 2 for batch in epoch]))
    # Four consecutive pairs are of at most two clusters; four random ones of 20 hardly ever.
    assert mixed[0] == 0.0 or grow
    assert mixed[0] < 0.2 < mixed[1] <= 0.6 < 0.8 < mixed[2]


@pytest.mark.parametrize("grow", [False, True])
def test_groups_of_similar_pairs(grow):
    towers, labels = clusters(num_clusters=40)
    batches = GlobalContrastiveBatches(
        towers, pairs_of(160), 8, num_neighbors=3, group_size=4, grow=grow, verbose=0
    )
    for epoch in (read(batches), next_epoch(batches)):
        assert_each_once(epoch, 160)
        # A batch is of two groups, of which each is of one cluster or, where cut, of two.
        num_clusters = [len(set(labels[batch])) for batch in epoch]
        assert np.mean(num_clusters) < (2.5 if grow else 4.5)
        # Groups of different places in the order come together.
        places = np.argsort(batches.order)
        spans = [np.ptp(places[batch]) for batch in epoch]
        assert np.median(spans) > 30


def test_batches_come_in_random_sequence():
    towers, _ = clusters(num_clusters=20)
    batches = GlobalContrastiveBatches(towers, pairs_of(80), 4, num_neighbors=3, verbose=0)
    epoch = read(batches)
    places = np.argsort(batches.order)
    steps = np.diff([places[batch[0]] for batch in epoch])
    assert np.mean(steps % 80 == 4) < 0.3


def test_arguments_of_the_order_come_through():
    towers, _ = clusters(num_clusters=20)
    embeddings = [np.asarray(towers[0](np.arange(80)))] * 2
    ids, users = np.arange(80) % 60, np.arange(80) // 3
    options = {"num_neighbors": 5, "quantile": 0.97}
    batches = GlobalContrastiveBatches(
        towers,
        {"query": np.arange(80), "candidate": np.arange(80)},
        4,
        candidate_ids=ids,
        query_ids=users,
        grow=True,
        verbose=0,
        **options,
    )
    read(batches)
    seed = int(np.random.default_rng([0, 0]).integers(2**31))
    for given in ({}, {"candidate_ids": ids}, {"query_ids": users}, {"quantile": None}):
        every = {"candidate_ids": ids, "query_ids": users, **options}
        if "quantile" in given:
            every.update(given)
        else:
            every = {key: value for key, value in every.items() if key not in given}
        other = neighbor_graph(*embeddings, seed=seed, **every)
        is_same = (other != batches._last_order.order.graph).nnz == 0
        assert is_same == (not given)


def test_grown_batches_know_the_ids():
    # Pairs of one cluster are of one query: none can share a batch.
    towers, labels = clusters(num_clusters=30, size=4)
    batches = GlobalContrastiveBatches(
        towers, pairs_of(120), 4, num_neighbors=3, grow=True, query_ids=labels, verbose=0
    )
    maker, seen = batches._maker, []
    grow = plan.grow_batches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "grow_batches", lambda *given: seen.append(given) or grow(*given))
        epoch = read(batches)
    assert seen[0][3] is batches._ids and seen[0][2] == maker.plan.batch_size
    assert sum(len(set(labels[batch])) < 4 for batch in epoch) <= 2


def test_an_epoch_that_fails_to_begin_is_begun_again():
    towers, _ = clusters()
    fails, epochs = [True], []

    def fraction(epoch):
        epochs.append(epoch)
        if fails:
            raise RuntimeError("not yet")
        return 0.5

    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, random_fraction=fraction, verbose=0)
    with pytest.raises(RuntimeError):
        batches[0]
    fails.clear()
    read(batches)
    assert set(epochs) == {0} and batches._epoch == 1


def test_restart_keeps_what_is_left_of_a_pass():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, batches_per_epoch=4, verbose=0)
    first = read(batches)
    batches.on_epoch_end()
    batches[0]
    batches.restart()
    second = read(batches)
    # The second epoch begins with the two batches that the first pass has left.
    seen = np.concatenate([*first, *second])
    assert np.all(np.bincount(seen, minlength=24) >= 1)


def test_an_index_is_filled_at_every_ordering():
    model = make_model(learning_rate=1.0)
    index = TreeIndex(NUM_PAIRS, DIM)
    batches = GlobalContrastiveBatches(model, PAIRS, 5, index=index, verbose=0)
    model.fit(batches, epochs=2, verbose=0)
    first = np.sort(index.top_k(np.eye(DIM, dtype=np.float32), 3)[0])
    model.fit(batches, epochs=1, verbose=0)
    again = np.sort(index.top_k(np.eye(DIM, dtype=np.float32), 3)[0])
    assert np.any(first != again)


@pytest.mark.parametrize("options", [{}, {"grow": True}, {"random_fraction": 0.5}])
def test_pairs_of_one_candidate_share_no_batch(options):
    ids = np.repeat(np.arange(8), 3)
    embeddings = tf.one_hot(ids, 8)
    tower = lambda features: tf.gather(  # noqa: E731
        embeddings, features["row"] if isinstance(features, dict) else features
    )
    pairs = {"query": np.arange(24), "candidate": {"row": np.arange(24), "id": ids}}
    for given in ({"candidate_id_key": "id"}, {"candidate_ids": ids}):
        batches = GlobalContrastiveBatches((tower, tower), pairs, 5, verbose=0, **given, **options)
        for _ in range(3):
            for i in range(len(batches)):
                batch_ids = batches[i]["candidate"]["id"].numpy()
                assert len(set(batch_ids)) == len(batch_ids)
            batches.on_epoch_end()


@pytest.mark.parametrize("batch_size", [22, 30])
def test_fewer_pairs_than_a_batch(batch_size):
    model = make_model()
    batches = GlobalContrastiveBatches(model, PAIRS, batch_size, verbose=0)
    assert len(batches) == 1
    assert_each_once(read(batches))
    model.fit(batches, epochs=2, verbose=0)


def test_drop_remainder_leaves_out_others_each_epoch():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 5, drop_remainder=True, verbose=0)
    assert len(batches) == 4
    left_out = set()
    for _ in range(6):
        epoch = next_epoch(batches)
        assert [len(batch) for batch in epoch] == [5, 5, 5, 5]
        left_out.add(frozenset(range(24)) - frozenset(np.concatenate(epoch).tolist()))
    assert len(left_out) > 1


def test_other_entries_come_along():
    towers, _ = clusters()
    pairs = {**pairs_of(24), "negative": np.arange(48).reshape([24, 2])}
    batch = GlobalContrastiveBatches(towers, pairs, 4, verbose=0)[0]
    np.testing.assert_array_equal(batch["negative"][:, 0], 2 * batch["query"])


def test_an_index_searches():
    towers, _ = clusters(num_clusters=20)
    index = TreeIndex(100, 20)
    batches = GlobalContrastiveBatches(towers, pairs_of(80), 4, index=index, verbose=0)
    assert_each_once(read(batches), 80)
    assert int(index.num_candidates) == 80


def test_progress_bars(capsys):
    towers, _ = clusters()
    read(GlobalContrastiveBatches(towers, pairs_of(24), 4, embedding_batch_size=8))
    shown = capsys.readouterr().out
    # Two towers of three batches, then 24 rows.
    assert "6/6" in shown and "24/24" in shown


def test_out_of_range():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, verbose=0)
    with pytest.raises(IndexError):
        batches[6]
    assert len(list(batches)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "`query_network` and `candidate_network`"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1. Received: 0"),
        ({"num_neighbors": 0}, "`num_neighbors` must be an integer >= 1. Received: 0"),
        ({"quantile": 1.5}, r"`quantile` must lie in \[0, 1\). Received: 1.5"),
        ({"start_epoch": -1}, "`start_epoch` must be an integer >= 0. Received: -1"),
        ({"initial_epoch": -1}, "`initial_epoch` must be an integer >= 0. Received: -1"),
        ({"every": 0}, "`every` must be an integer >= 1. Received: 0"),
        ({"random_fraction": 1.5}, "`random_fraction` must lie between 0 and 1. Received: 1.5"),
        ({"batches_per_epoch": 0}, "`batches_per_epoch` must be an integer >= 1"),
        ({"embedding_batch_size": 0}, "`embedding_batch_size` must be an integer >= 1"),
        (
            {"candidate_id_key": "id", "candidate_ids": np.arange(24)},
            "Of `candidate_id_key` and `candidate_ids` only one",
        ),
        ({"group_size": 3}, "`group_size` must divide `batch_size`. Received: 3 and 4"),
        ({"group_size": 0}, "`group_size` must be an integer >= 1. Received: 0"),
        ({"index": 5}, "`index` must be a `TreeIndex`. Received: 5"),
        ({"random_fraction": "much"}, "`random_fraction` must lie .* Received: 'much'"),
        ({"batch_size": 25, "drop_remainder": True}, "24 pairs and `batch_size=25`"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"model": clusters()[0], "pairs": pairs_of(24), "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        GlobalContrastiveBatches(**{**arguments, **change})


def test_a_bad_schedule_and_embeddings_that_are_not_finite():
    towers, _ = clusters()
    batches = GlobalContrastiveBatches(towers, pairs_of(24), 4, random_fraction=lambda epoch: 2)
    with pytest.raises(ValueError, match=r"`random_fraction\(epoch\)` must lie .* Received: 2"):
        batches[0]
    broken = [lambda ids: towers[0](ids) / tf.cast(ids[:, tf.newaxis] != 9, tf.float32)] * 2
    batches = GlobalContrastiveBatches(broken, pairs_of(24), 4, verbose=0)
    with pytest.raises(ValueError, match="must be finite.* Received 1 rows .* row 9"):
        batches[0]


def test_a_candidate_too_frequent_is_warned_of_once():
    towers, _ = clusters()
    with pytest.warns(UserWarning, match="18 of 24 pairs will share a batch"):
        batches = GlobalContrastiveBatches(
            towers, pairs_of(24), 4, candidate_ids=np.zeros(24, int), verbose=0
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_each_once(read(batches), 24)
