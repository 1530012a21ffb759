"""From a CSV of interactions to a retriever that answers queries.

    python examples/from_csv.py interactions.csv --output retriever
    python examples/from_csv.py --generate interactions.csv    # writes one to try it with

The CSV has the columns user, item and timestamp, a number. The last interaction of each user is to
test with and the one before to validate with. The others are to train with. Training stops when the
validation MRR stops rising. Items that a user has had before are passed over in every evaluation.

Start without a cache, as this does. With many more items than a batch holds, also try
`--cache-size 16384`.
"""

import argparse
import csv

import numpy as np
import tensorflow as tf

import negative_cache as nc


def generate(path, num_users=1000, num_items=2000, num_tastes=20, count=40_000):
    """Users like the items of their taste, and the popular ones more."""
    rng = np.random.default_rng(0)
    popularity = 1.0 / np.arange(1, num_items // num_tastes + 1)
    popularity /= popularity.sum()
    users = rng.integers(num_users, size=count)
    items = rng.choice(len(popularity), count, p=popularity) * num_tastes + users % num_tastes
    items = np.where(rng.random(count) < 0.1, rng.integers(num_items, size=count), items)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "timestamp"])
        writer.writerows(
            (f"user {u}", f"item {i}", t) for t, (u, i) in enumerate(zip(users, items))
        )


def read(path):
    """The users and items [n] of each user's first interaction with an item, by time."""
    with open(path, newline="") as file:
        try:
            rows = sorted(csv.DictReader(file), key=lambda row: float(row["timestamp"]))
            pairs = list(dict.fromkeys((row["user"], row["item"]) for row in rows))
        except (KeyError, ValueError) as error:
            raise SystemExit(
                f"{path} must have the columns user, item and timestamp, a number: {error!r}"
            ) from error
    return np.array([user for user, _ in pairs]), np.array([item for _, item in pairs])


def split(users):
    """The rows to train, validate and test with: all but the last two of each user, those two."""
    num_later = np.zeros(len(users), int)
    seen = dict.fromkeys(users, 0)
    for row in reversed(range(len(users))):
        num_later[row] = seen[users[row]]
        seen[users[row]] += 1
    return (np.flatnonzero(num_later >= 2), *(np.flatnonzero(num_later == n) for n in (1, 0)))


def items_before(users, items, rows):
    """For each of `rows`, which ascend, the items that its user has had before."""
    had, wanted, lists = {user: [] for user in users}, set(rows.tolist()), []
    for row, (user, item) in enumerate(zip(users, items)):
        if row in wanted:
            lists.append(had[user].copy())
        had[user].append(item)
    return lists


def make_tower(values, dim=64):
    names = np.unique(values).tolist()
    lookup = tf.keras.layers.StringLookup(vocabulary=names)
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(len(names) + 1, dim)])


def make_model(users, items, cache_size):
    item_tower = make_tower(items)
    task = nc.CachedRetrieval(
        item_tower,
        feature_specs=tf.io.FixedLenFeature([], tf.string),
        cache_size=cache_size,
        in_batch_negatives=True,
        candidate_id_key="candidate",
        remove_accidental_hits=True,
        frequency_correction=True,
        use_lru=False,  # The correction takes the cache for a sample of the stream.
    )
    model = nc.DualEncoder(make_tower(users), item_tower, task)
    model.compile(optimizer=tf.keras.optimizers.Adam(0.003))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("csv")
    parser.add_argument("--generate", action="store_true", help="write the CSV, and end")
    parser.add_argument("--output", default="retriever", help="folder of the SavedModel")
    parser.add_argument("--cache-size", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=50, help="at most")
    args = parser.parse_args()
    if args.generate:
        generate(args.csv)
        return
    users, items = read(args.csv)
    train, validation, test = split(users)
    if not len(train):
        raise SystemExit("No user has three interactions, to train, validate and test with.")
    ids = np.unique(items)
    print(f"{len(users):,} interactions of {len(np.unique(users)):,} users, {len(ids):,} items")

    def pairs(rows):
        return {"query": users[rows], "candidate": items[rows]}

    def to_rank(rows):
        """Batches to evaluate, with the items that the users have had before."""
        excluded = tf.ragged.constant(items_before(users, items, rows), tf.string, 1)
        return tf.data.Dataset.from_tensor_slices({**pairs(rows), "excluded": excluded}).batch(1024)

    corpus = tf.data.Dataset.from_tensor_slices(ids).batch(1024)
    model = make_model(users, items, args.cache_size)
    data = tf.data.Dataset.from_tensor_slices(pairs(train)).shuffle(1_000_000)
    model.fit(
        data.batch(args.batch_size, drop_remainder=len(train) >= args.batch_size),
        epochs=args.epochs,
        verbose=2,
        callbacks=[
            nc.CorpusMetrics(corpus, to_rank(validation)),
            tf.keras.callbacks.EarlyStopping(
                "val_mrr", mode="max", patience=3, restore_best_weights=True
            ),
        ],
    )
    measured = nc.evaluation.evaluate(model, corpus, to_rank(test), k=(1, 10, 100))
    print("test:", ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))

    model.export(args.output)
    served = tf.saved_model.load(args.output)
    scores = tf.linalg.matvec(served.embed_candidate(ids), served.embed_query(users[:1])[0])
    best = ids[tf.math.top_k(scores, 5).indices]
    print(f"{users[0]} -> {', '.join(best)}")


if __name__ == "__main__":
    main()
