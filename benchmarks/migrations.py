"""Three models of TensorFlow Recommenders, and the same with the task of this package.

    python benchmarks/migrations.py                     # generated ratings
    python benchmarks/migrations.py --data ml-100k      # those of MovieLens, downloaded before

The models do what those of its tutorials on basic retrieval, multi-task and sequential
recommendation do. A migrated model is the class itself with the replacements of `MIGRATIONS` in
its source, so that the number of changed lines is that of the replacements. A third is the
tutorials' own task, told how popular each movie is. All are trained for equally many steps with
the optimizer of the tutorials, on several seeds, and the positives of test ratings are ranked among
all movies.

The temperature and the loss's reduction are the tutorials' in both.
"""

import argparse
import inspect
import os
import pathlib
import textwrap

os.environ["TF_USE_LEGACY_KERAS"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import _measure
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs

import negative_cache as nc
from negative_cache.datasets.movielens import MovieLens

NUM_USERS, NUM_MOVIES, NUM_RATINGS = 943, 1682, 100_000
RESULTS = pathlib.Path("benchmarks/results/migrations.json")
HISTORY, DIM, BATCH_SIZE, EPOCHS, SEEDS = 10, 32, 256, 3, 3


def make_tower(vocabulary):
    lookup = tf.keras.layers.StringLookup(vocabulary=vocabulary, mask_token=None)
    return tf.keras.Sequential([lookup, tf.keras.layers.Embedding(len(vocabulary) + 1, DIM)])


class Basic(tfrs.Model):
    def __init__(self, user_ids, titles):
        super().__init__()
        self.user_model, self.movie_model = make_tower(user_ids), make_tower(titles)
        self.task = tfrs.tasks.Retrieval()

    def embed_query(self, features):
        return self.user_model(features["user_id"])

    def compute_loss(self, features, training=False):
        movies = self.movie_model(features["movie_title"])
        return self.task(self.embed_query(features), movies)


class MultiTask(tfrs.Model):
    def __init__(self, user_ids, titles):
        super().__init__()
        self.user_model, self.movie_model = make_tower(user_ids), make_tower(titles)
        self.rating_model = tf.keras.Sequential(
            [tf.keras.layers.Dense(64, activation="relu"), tf.keras.layers.Dense(1)]
        )
        self.rating_task = tfrs.tasks.Ranking(loss=tf.keras.losses.MeanSquaredError())
        self.task = tfrs.tasks.Retrieval()

    def embed_query(self, features):
        return self.user_model(features["user_id"])

    def compute_loss(self, features, training=False):
        users, movies = self.embed_query(features), self.movie_model(features["movie_title"])
        ratings = self.rating_model(tf.concat([users, movies], axis=1))
        rating_loss = self.rating_task(labels=features["user_rating"], predictions=ratings)
        return rating_loss + self.task(users, movies)


class Sequential(tfrs.Model):
    def __init__(self, user_ids, titles):
        super().__init__()
        self.movie_model, self.history_model = make_tower(titles), make_tower(titles)
        self.gru = tf.keras.layers.GRU(DIM)
        self.task = tfrs.tasks.Retrieval()

    def embed_query(self, features):
        return self.gru(self.history_model(features["history"]))

    def compute_loss(self, features, training=False):
        movies = self.movie_model(features["movie_title"])
        return self.task(self.embed_query(features), movies)


TASK = """\
self.task = nc.Retrieval(
    self.movie_model,
    [nc.InBatch()],
    candidate_id_key="candidate",
    remove_accidental_hits=True,
    frequency_correction=True,
    reduction="sum",
)"""
CALL = 'features["movie_title"], training=training)'
# For each model: a part of a line, and what stands in its place.
MIGRATIONS = {
    model: {
        "self.task = tfrs.tasks.Retrieval()": TASK,
        f"self.task({users}, movies)": f"self.task({users}, movies, {CALL}",
    }
    for model, users in (
        (Basic, "self.embed_query(features)"),
        (MultiTask, "users"),
        (Sequential, "self.embed_query(features)"),
    )
}


# The tutorials' own task, told how popular each movie is.
GIVEN = 'candidate_sampling_probability=probability_of(features["movie_title"]))'
CORRECTIONS = {
    model: {old: old[:-1] + ", " + GIVEN for old in replacements if old.endswith("movies)")}
    for model, replacements in MIGRATIONS.items()
}


def probabilities(titles):
    """A function of titles that returns the share that each has of `titles`, of the training."""
    unique, counts = np.unique(titles, return_counts=True)
    shares = tf.constant(counts / len(titles), tf.float32)
    table = tf.lookup.KeyValueTensorInitializer(tf.constant(unique.tolist()), shares)
    return tf.lookup.StaticHashTable(table, 1.0 / len(titles)).lookup


def changed(model, replacements, **names):
    """The class with replacements in its source, and the number of its lines that are new.

    Args:
      model: the class.
      replacements: a part of a line, and what stands in its place.
      **names: that what stands there uses.
    """
    source, num_lines = inspect.getsource(model), 0
    for old, new in replacements.items():
        (line,) = [line for line in source.splitlines() if old in line]
        indent = line[: len(line) - len(line.lstrip())]
        lines = textwrap.indent(line.strip().replace(old, new), indent)
        source = source.replace(line, lines)
        num_lines += len(lines.splitlines())
    names = {**globals(), **names}
    exec(source, names)
    return names[model.__name__], num_lines


def generate():
    """Users walk from movie to movie: to those of their taste, the popular and the similar ones."""
    random = np.random.default_rng(0)
    popularity = -1.1 * np.log(np.arange(NUM_MOVIES) + 15.0)
    tastes, places = random.normal(size=[NUM_USERS, 6]), random.normal(size=[NUM_MOVIES, 6])
    logits = popularity + 0.7 * tastes @ places.T
    counts = random.lognormal(sigma=0.8, size=NUM_USERS)
    counts = np.clip(NUM_RATINGS * counts / counts.sum(), 5, NUM_MOVIES // 4).astype(int)
    last = random.integers(NUM_MOVIES, size=NUM_USERS)
    users, movies, times = [], [], []
    for step in range(counts.max()):
        active = np.flatnonzero(counts > step)
        noise = random.gumbel(size=[len(active), NUM_MOVIES])
        scores = logits[active] + 0.7 * places[last[active]] @ places.T + noise
        last[active] = np.argmax(scores, axis=1)
        logits[active, last[active]] = -np.inf  # Nobody rates a movie twice.
        users.append(active)
        movies.append(last[active].copy())
        times.append(np.full(len(active), step))
    users, movies = np.concatenate(users), np.concatenate(movies)
    liking = np.einsum("nd,nd->n", tastes[users], places[movies])
    titles = np.array([f"Film {movie}" for movie in range(NUM_MOVIES)], object)
    return MovieLens(
        user_ids=np.array([f"user {user}" for user in users], object),
        movie_titles=titles[movies],
        ratings=np.clip(np.round(3.5 + 0.5 * liking), 1, 5).astype(np.float32),
        timestamps=np.concatenate(times),
        unique_titles=titles,
    )


def rows_of(data):
    """All ratings as features, with the movies that the user rated before, by time."""
    order = np.lexsort([data.timestamps, data.user_ids])
    users, titles = data.user_ids[order], data.movie_titles[order]
    starts = np.r_[True, users[1:] != users[:-1]]
    place = np.arange(len(users)) - np.maximum.accumulate(
        np.where(starts, np.arange(len(users)), 0)
    )
    history = np.full([len(users), HISTORY], "", object)
    for back in range(1, HISTORY + 1):
        has = place >= back
        history[has, HISTORY - back] = titles[np.flatnonzero(has) - back]
    is_last = np.r_[starts[1:], True]
    features = {
        "user_id": users,
        "movie_title": titles,
        "user_rating": data.ratings[order],
        "history": history,
    }
    return features, place, is_last


def split(model, features, place, is_last, seed):
    """Training and test rows: of a sequence the last one is to test with, else a random fifth."""
    if model is Sequential:
        train, test = np.flatnonzero((place > 0) & ~is_last), np.flatnonzero((place > 0) & is_last)
    else:
        order = np.random.default_rng(seed).permutation(len(place))
        train, test = np.split(order, [len(order) * 4 // 5])
    return tuple({key: values[rows] for key, values in features.items()} for rows in (train, test))


def accuracies(make, train, test, user_ids, titles, seed):
    """Recall@10 and @100 of the test rows among all movies, after `EPOCHS` epochs."""
    tf.keras.utils.set_random_seed(seed)
    model = make(user_ids, titles)
    model.compile(optimizer=tf.keras.optimizers.Adagrad(0.1))
    batches = tf.data.Dataset.from_tensor_slices(train).shuffle(200_000, seed=seed)
    model.fit(batches.batch(BATCH_SIZE), epochs=EPOCHS, verbose=0)
    pairs = {"query": test, "candidate": test["movie_title"]}
    measured = nc.evaluation.evaluate(
        (model.embed_query, model.movie_model),
        tf.data.Dataset.from_tensor_slices(titles).batch(1024),
        tf.data.Dataset.from_tensor_slices(pairs).batch(1024),
        k=(10, 100),
        candidate_id_key="candidate",
    )
    return measured["recall_at_10"], measured["recall_at_100"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of MovieLens 100K; generated ratings if not given")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    data = nc.datasets.movielens.load(args.data) if args.data else generate()
    features, place, is_last = rows_of(data)
    user_ids, titles = np.unique(data.user_ids), data.unique_titles
    print(f"{len(data):,} ratings, {len(user_ids):,} users, {len(titles):,} movies")
    results = []
    for model in MIGRATIONS:
        for name, replacements in (
            ("tfrs", {}),
            ("tfrs, given popularity", CORRECTIONS[model]),
            ("negative_cache", MIGRATIONS[model]),
        ):
            runs = []
            for seed in range(args.seeds):
                train, test = split(model, features, place, is_last, seed)
                popularity = probabilities(train["movie_title"])
                make, lines = changed(model, replacements, probability_of=popularity)
                runs.append(accuracies(make, train, test, user_ids, titles, seed))
            at_10, at_100 = np.mean(runs, axis=0)
            results.append(
                {"model": model.__name__, "task": name, "changed_lines": lines, "runs": runs}
            )
            print(
                f"{model.__name__:12}{name:24}{lines:3} lines  recall@10 {at_10:.3f}"
                f"  recall@100 {at_100:.3f}  {[f'{run[1]:.3f}' for run in runs]}",
                flush=True,
            )
    _measure.save(args.output, {"data": args.data or "generated", "results": results})


if __name__ == "__main__":
    main()
