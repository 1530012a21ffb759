"""The retrieval quickstart of TF-Recommenders on MovieLens 100K, with another task in its place.

    python examples/movielens_tfrs.py --data ml-100k

trains the same two towers three times: with `tfrs.tasks.Retrieval`, with `CachedRetrieval` without
a cache, which is that task with the correction for popularity, and with the cache.

The correction makes the whole difference here, and is the first thing to try for a recommender. The
cache adds nothing and makes a step some five times as long: MovieLens 100K has 1,682 movies, and a
cache is for corpora of many times the batch.
"""

import argparse
import os
import time

# TensorFlow reads this when it is imported.
if os.environ.setdefault("TF_USE_LEGACY_KERAS", "1") not in ("1", "true", "True"):
    raise SystemExit("TF-Recommenders needs Keras 2: unset TF_USE_LEGACY_KERAS, or set it to 1.")

import numpy as np
import tensorflow as tf

try:
    import tensorflow_recommenders as tfrs
except ModuleNotFoundError as error:
    raise SystemExit("This needs TF-Recommenders: pip install '.[tfrs]'") from error

import negative_cache as nc

EMBEDDING_DIM = 32
KS = (1, 5, 10, 50, 100)


def make_tower(vocabulary):
    return tf.keras.Sequential(
        [
            tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None),
            tf.keras.layers.Embedding(len(vocabulary) + 1, EMBEDDING_DIM),
        ]
    )


class MovieModel(tfrs.Model):
    def __init__(self, user_ids, movie_titles):
        super().__init__()
        self.user_model = make_tower(user_ids)
        self.movie_model = make_tower(movie_titles)
        self.task = tfrs.tasks.Retrieval()
        movies = tf.data.Dataset.from_tensor_slices(movie_titles).batch(1024)
        self.top_k = tfrs.metrics.FactorizedTopK(
            movies.map(lambda titles: (titles, self.movie_model(titles))), ks=KS
        )

    def compute_task_loss(self, users, movies, titles, training):
        return self.task(users, movies)

    def compute_loss(self, features, training=False):
        titles = features["movie_title"]
        users = self.user_model(features["user_id"])
        movies = self.movie_model(titles)
        if not training:
            # By id. Compared by score, a movie can lose to itself by a rounding error.
            self.top_k.update_state(users, movies, true_candidate_ids=titles)
        return self.compute_task_loss(users, movies, titles, training)


class CachedMovieModel(MovieModel):
    """All that changes."""

    def __init__(self, user_ids, movie_titles, cache_size):
        super().__init__(user_ids, movie_titles)
        self.task = nc.CachedRetrieval(
            self.movie_model,
            tf.io.FixedLenFeature([], tf.string),
            cache_size=cache_size,
            in_batch_negatives=True,
            candidate_id_key="candidate",  # The name of a feature that comes alone.
            remove_accidental_hits=True,
            frequency_correction=True,  # Popular movies are not to be punished for it.
            use_lru=False,  # So that the cache is a sample of the stream.
            reduction="sum",  # As TF-Recommenders does; learning rates are tuned to it.
        )

    def compute_task_loss(self, users, movies, titles, training):
        return self.task(users, movies, titles, training=training)


class StepTimer(tf.keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def train_and_evaluate(make_model, train, test, args):
    """Accuracies at `KS` on the test set, and the median time of a training step."""
    tf.keras.utils.set_random_seed(args.seed)
    model, timer = make_model(), StepTimer()
    model.compile(optimizer=tf.keras.optimizers.Adagrad(args.learning_rate))
    batches = train.shuffle(100_000).batch(args.batch_size)
    model.fit(batches, epochs=args.epochs, callbacks=[timer], verbose=0)
    logs = model.evaluate(test.batch(4096), return_dict=True, verbose=0)
    accuracies = [logs[f"factorized_top_k/top_{k}_categorical_accuracy"] for k in KS]
    return accuracies, np.median(timer.seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder with u.data and u.item")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--cache-size", type=int, default=4096, help="no less than --batch-size")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.batch_size <= args.cache_size:
        parser.error(f"--batch-size must be 1 to --cache-size, received {args.batch_size}")
    if args.epochs < 1:
        parser.error(f"--epochs must be 1 or more, received {args.epochs}")
    try:
        data = nc.datasets.movielens.load(args.data)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    train, test = data.split(args.seed)
    user_ids, titles = np.unique(data.user_ids), data.unique_titles
    print(f"{len(data):,} ratings, {len(user_ids):,} users, {len(titles):,} movies")

    models = {
        "tfrs.tasks.Retrieval": lambda: MovieModel(user_ids, titles),
        "CachedRetrieval, no cache": lambda: CachedMovieModel(user_ids, titles, 0),
        f"CachedRetrieval, {args.cache_size:,} rows": lambda: CachedMovieModel(
            user_ids, titles, args.cache_size
        ),
    }
    print(f"{'accuracy of the top':30}" + "".join(f"{k:8}" for k in KS) + "  ms a step")
    for name, make_model in models.items():
        accuracies, seconds = train_and_evaluate(make_model, train, test, args)
        cells = "".join(f"{accuracy:8.4f}" for accuracy in accuracies)
        print(f"{name:30}{cells}{1000 * seconds:11.1f}", flush=True)


if __name__ == "__main__":
    main()
